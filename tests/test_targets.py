"""Targets as the criteria take them, from torchvision's, and denoising queries made of them."""

from __future__ import annotations

import pytest
import torch
from cases import case
from torch import Tensor

from detloss_triton import Targets, denoising_queries, normalised_targets, pad_targets
from detloss_triton.boxes import cxcywh_to_xyxy
from detloss_triton.targets import pack

SIZE = (64, 64)


def target(*rows: tuple[float, float, float, float, int]) -> dict[str, Tensor]:
    """Boxes `(x1, y1, x2, y2, label)`."""
    table = torch.tensor(rows).reshape(-1, 5)
    return {"boxes": table[:, :4], "labels": table[:, 4].long()}


def test_rows_are_padded_with_class_minus_one() -> None:
    images = [target((1, 2, 3, 4, 0), (5, 6, 7, 8, 3)), target()]
    for given in (images, pack(images)):
        rows = pad_targets(given)
        assert rows[0, :2].tolist() == [[0, 1, 2, 3, 4], [3, 5, 6, 7, 8]]
        assert (rows[0, 2:, 0] == -1).all() and (rows[1, :, 0] == -1).all()
    labels, boxes, counts = pack(images)
    labels[0, 1:] = 9
    assert (pad_targets(Targets(labels, boxes, counts - 1))[:, 1:, 0] == -1).all()
    assert pad_targets([target()]).shape[1] > 0


def test_normalised_targets_are_centres_and_sizes() -> None:
    rows = (0, 16, 32, 64, 2), (8, 8, 24, 24, 0)
    two, none = normalised_targets([target(*rows), target()], SIZE)
    assert two["labels"].tolist() == [2, 0]
    assert two["boxes"].tolist() == [[0.25, 0.625, 0.5, 0.75], [0.25, 0.25, 0.25, 0.25]]
    assert none["labels"].shape == (0,) and none["boxes"].shape == (0, 4)
    (wide,) = normalised_targets([target(*rows)], (64, 128))
    assert wide["boxes"][0].tolist() == [0.125, 0.625, 0.25, 0.75]
    with pytest.raises(ValueError, match=r"normalised_targets: targets\[0\] must have a tensor"):
        normalised_targets([{"boxes": torch.zeros(1, 4)}], SIZE)


def test_positives_stay_near_and_negatives_leave() -> None:
    torch.manual_seed(0)
    # Away from the edges, where corners are cut off.
    rows = [[(20, 24, 32, 40, 1), (30, 20, 44, 36, 2)], [], [(24, 20, 40, 44, 0)]]
    targets = normalised_targets([target(*image) for image in rows], SIZE)
    for noise in (1.0, 0.4):
        queries = denoising_queries(targets, 3, positives=25, wrong_labels=0.5, box_noise=noise)
        assert queries is not None
        assert queries.groups == 12
        assert queries.labels.shape == (3, 48)
        assert queries.boxes.shape == (3, 48, 4)
        first, none, last = queries.positives
        assert first.tolist() == [4 * k + i for k in range(12) for i in (0, 1)]
        assert none.tolist() == []
        assert last.tolist() == [4 * k for k in range(12)]
        assert (queries.labels[1] == 3).all() and (queries.boxes[1] == 0).all()
        for image in (0, 2):
            index, truth = queries.positives[image], targets[image]["boxes"].repeat(12, 1)
            moves = []
            for of in (index, index + 2):
                moved = cxcywh_to_xyxy(queries.boxes[image, of]) - cxcywh_to_xyxy(truth)
                moves.append((moved / truth[:, 2:].repeat(1, 2)).abs() / noise)
            assert 0.1 < moves[0].max() < 0.5 and (moves[1].amax(1) >= 0.5 - 1e-5).any()
            kept = queries.labels[image, index].view(12, -1) == targets[image]["labels"]
            assert 0.4 < kept.float().mean() < 1


def test_no_boxes_make_no_queries() -> None:
    assert denoising_queries(normalised_targets([target(), target()], SIZE), 3) is None
    one = normalised_targets([target((8, 8, 40, 40, 0))], SIZE)
    for wrong in ({"num_classes": 0}, {"num_classes": 2, "positives": 0}):
        with pytest.raises(ValueError, match=r"denoising_queries: .* must be at least 1"):
            denoising_queries(one, **wrong)


def test_groups_are_hidden_from_other_queries() -> None:
    queries = denoising_queries(normalised_targets([target((8, 8, 40, 40, 0))], SIZE), 1, 24)
    assert queries is not None
    blocked = queries.blocked(n_queries=3)
    n = queries.labels.shape[1]
    assert blocked.shape == (n + 3, n + 3)
    # Any query may look at the three others, and only a denoising query at its group.
    assert not blocked[:, n:].any() and blocked[n:, :n].all()
    own_group = torch.eye(n // 2, dtype=torch.bool).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(~blocked[:n, :n], own_group)


@pytest.mark.parametrize("name", ["detr", "dfine"])
def test_packed_targets_may_have_no_room(name: str, backend: str, device: torch.device) -> None:
    """As many boxes as an image has at most: none."""
    batch = case(name, (0, 0)).on(device)
    targets = batch.inputs["targets"]
    nothing = Targets(targets.labels[:, :0], targets.boxes[:, :0], targets.counts)
    losses, _ = batch.step()
    found = batch.criterion(batch.inputs["outputs"], nothing)
    for key, loss in losses.items():
        torch.testing.assert_close(found[key], loss)
