"""Shapes that do not fit are refused before anything is computed, with the argument's name."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trees import leaves, mapped

import detloss_triton as dt
from detloss_triton.bench.batches import DENSE as BUILDERS
from detloss_triton.bench.batches import STRIDES
from detloss_triton.criteria.levels import check_maps
from detloss_triton.once import once
from detloss_triton.shapes import check_shapes

# What says how many images, anchors and positives there are: if it is wrong, others do not fit it.
REFERENCES = {
    "atss": {"labels"},
    "rtmdet": {"labels"},
    "ssd": {"cls_score"},
    "yolox": {"flatten_objectness", "bbox_targets"},
    "yolov9": {"targets"},
}
SCALARS = {"num_total_samples", "num_pos"}

CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "one dimension more": lambda x: x.unsqueeze(0),
    "one dimension fewer": lambda x: x[..., 0],
    "the last shorter": lambda x: x[..., :-1],
    "the last longer": lambda x: torch.cat([x, x[..., :1]], -1),
    "the first shorter": lambda x: x[:-1],
    "the first longer": lambda x: torch.cat([x, x[:1]]),
    "the second shorter": lambda x: x[:, :-1] if x.dim() > 2 else x[:-1],
    "no tensor": lambda x: x.tolist(),
}


def wrong_arguments() -> Iterator[Any]:
    for name, builder in BUILDERS.items():
        seen = set()
        for path, _ in leaves(builder().inputs):
            # One part of one level of a list stands for the others.
            argument, _, rest = path.partition(".")
            part = rest.partition(".")[2]
            if argument in SCALARS or (argument, part) in seen:
                continue
            seen.add((argument, part))
            for change in CHANGES:
                # Any number of targets per image is right.
                if (argument, change) != ("targets", "the second shorter"):
                    yield pytest.param(name, path, change, id=f"{name}-{path}-{change}")


@pytest.mark.parametrize(("name", "path", "change"), list(wrong_arguments()))
def test_wrong_shapes_are_refused(name: str, path: str, change: str) -> None:
    batch = BUILDERS[name]()
    argument = path.partition(".")[0]
    inputs = mapped(lambda here, x: CHANGES[change](x) if here == path else x, batch.inputs)
    with pytest.raises((ValueError, TypeError)) as error:
        batch.make()(**inputs)
    message = str(error.value)
    assert message.startswith(type(batch.make()).__name__), message
    at_fault = inputs.keys() if argument in REFERENCES[name] else {argument}
    assert any(word in message for word in at_fault), message


def refused(name: str, match: str, make: dict[str, Any] | None = None, **changed: Any) -> None:
    batch = BUILDERS[name]()
    with pytest.raises((ValueError, TypeError), match=match):
        batch.make(**(make or {}))(**{**batch.inputs, **changed})


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        (name, argument)
        for name in ("atss", "rtmdet")
        for argument in BUILDERS[name]().inputs
        if argument not in ("avg_factor", "stride")
    ],
)
def test_levels_in_another_order_are_refused(name: str, argument: str) -> None:
    refused(name, r"level 0: \w+ must", **{argument: BUILDERS[name]().inputs[argument][::-1]})


def test_channels_that_do_not_fit() -> None:
    """Of a head for another number of classes, or bins."""
    ssd = BUILDERS["ssd"]().inputs
    refused(
        "ssd",
        r"SSDCriterion: cls_score must have shape \(N, A, 6\), got \(2, 150, 5\)",
        cls_score=ssd["cls_score"][..., :5],
    )
    yolov9 = BUILDERS["yolov9"]().inputs["main_preds"]
    refused(
        "yolov9",
        r"main_preds, level 0: distributions must have shape .*\(2, 16, 4, 8, 8\), got \(2, 15,",
        main_preds=[(c, d[:, :15], b) for c, d, b in yolov9],
    )
    refused(
        "yolov9",
        r"aux_preds, level 0: classes must have shape \(2, 5, h, w\), got \(2, 4, 8, 8\)",
        aux_preds=[(c[:, :4], d, b) for c, d, b in yolov9],
    )
    refused("yolov9", "main_preds, level 0 must be", main_preds=[level[:2] for level in yolov9])
    refused("yolov9", "main_preds must have an entry per level, got none", main_preds=[])
    atss = BUILDERS["atss"]().inputs
    refused(
        "atss",
        r"level 0: cls_score must have shape \(N, k \* 5, H, W\) with N = 2 .*got \(2, 6, 8, 8\)",
        cls_score=[torch.cat([x, x[:, :1]], 1) for x in atss["cls_score"]],
    )
    refused(
        "atss",
        "expected one entry per level, got none",
        **{key: [] for key in atss if key != "avg_factor"},
    )


@pytest.mark.parametrize("name", ["atss", "rtmdet"])
def test_labels_that_are_no_tensors(name: str) -> None:
    """Of the first level, which the others are held against."""
    labels = BUILDERS[name]().inputs["labels"]
    for wrong in (None, torch.tensor(1)):
        refused(name, "Criterion, level 0: labels must", labels=[wrong, *labels[1:]])


def test_strides_that_are_tensors_are_looked_at_each_time() -> None:
    eight, sixteen = torch.tensor(8), torch.tensor(16)
    batch = BUILDERS["rtmdet"]().on(torch.device("cpu"))
    criterion, levels = batch.criterion(torch.device("cpu")), len(batch.inputs["labels"])
    criterion(**{**batch.inputs, "stride": [(eight, eight)] * levels})
    with pytest.raises(ValueError, match="stride must be the same in x and y"):
        criterion(**{**batch.inputs, "stride": [(eight, sixteen)] * levels})


@pytest.mark.parametrize("stride", [[8, 16, 32], [(8,), (16,), (32,)], [(8, 8, 8)] * 3])
def test_strides_are_pairs(stride: Any) -> None:
    refused("rtmdet", r"RTMDetCriterion, level 0: stride must be a pair", stride=stride)


@pytest.mark.parametrize("change", [1, -1])
def test_a_cpu_counts_positives(change: int) -> None:
    batch = BUILDERS["yolox"]()
    mask = batch.inputs["pos_masks"].clone()
    n = int(mask.sum())
    mask[int((mask.int() if change < 0 else 1 - mask.int()).argmax())] ^= True
    refused("yolox", rf"pos_masks must have as .* rows, {n}, got {n + change}", pos_masks=mask)


def test_what_is_not_read_is_not_checked() -> None:
    batch = BUILDERS["yolox"]()
    batch.make(use_l1=False)(**{**batch.inputs, "l1_targets": None})
    inputs = BUILDERS["yolov9"]()
    vec2box = dt.Vec2Box(None, (64, 64), list(STRIDES))

    class SumOfFour(nn.Module):
        def forward(self, pred: Tensor, *rest: Any) -> Tensor:
            assert pred.shape[-1] == 4
            return pred.sum()

    for head in ("main_preds", "aux_preds"):
        inputs.inputs[head] = [(c, d[:, :4], b) for c, d, b in inputs.inputs[head]]
    dt.YOLOv9Criterion(5, vec2box, loss_dfl=SumOfFour())(**inputs.inputs)


@pytest.mark.parametrize("name", ["atss", "rtmdet"])
def test_maps_and_rows_are_both_taken(name: str) -> None:
    """(N, n, features) tensors, as heads that decode hold them, give what maps do."""
    batch = BUILDERS[name]()
    rows = {
        key: [x.flatten(2).transpose(1, 2) if x.dim() == 4 else x for x in batch.inputs[key]]
        for key in ("cls_score", "bbox_pred", "centerness")
        if key in batch.inputs
    }
    ours, theirs = (batch.make()(**inputs) for inputs in (batch.inputs, {**batch.inputs, **rows}))
    torch.testing.assert_close(ours, theirs)


def test_masks_of_one_column_and_of_softmax_scores() -> None:
    """A mask may hold one factor per anchor; with softmax also the background's, which OTX asks."""
    batch = BUILDERS["atss"]()
    ones = [torch.ones(2, x.shape[1], 1) for x in batch.inputs["labels"]]
    all_ones = [x.expand(-1, -1, 5) for x in ones]
    narrow, wide = (
        batch.make()(**{**batch.inputs, "valid_label_mask": mask}) for mask in (ones, all_ones)
    )
    torch.testing.assert_close(narrow, wide)
    scores = [torch.cat([x, x[:, :1]], 1) for x in batch.inputs["cls_score"]]
    for mask in (ones, all_ones, [x.expand(-1, -1, 6) for x in ones]):
        inputs = {**batch.inputs, "cls_score": scores, "valid_label_mask": mask}
        batch.make(loss_cls=dt.CrossEntropyLoss())(**inputs)


def test_several_anchors_per_cell() -> None:
    rows = torch.zeros(2, 3 * 4 * 6)
    maps = {"a": (torch.zeros(2, 3 * 5, 4, 6), 5), "b": (torch.zeros(2, 72, 5), 5)}
    check_maps("here", rows, **maps)
    for wrong in (torch.zeros(2, 2 * 5, 4, 6), torch.zeros(2, 16, 4, 6), torch.zeros(3, 15, 4, 6)):
        with pytest.raises(ValueError, match=r"here: a must have shape \(N, k \* 5, H, W\)"):
            check_maps("here", rows, a=(wrong, 5))


def test_names_stand_for_one_size() -> None:
    x = torch.zeros(2, 3)
    check_shapes("here", a=(x, ("N", 3)), b=(x.T, (3, "N")))
    with pytest.raises(ValueError, match=r"^here: b must have shape \(N\) = \(2\), got \(3,\)$"):
        check_shapes("here", a=(x, ("N", 3)), b=(x[0], ("N",)))
    with pytest.raises(TypeError, match=r"^here: a must be a tensor, got list$"):
        check_shapes("here", a=([2, 3], ("N", 3)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_checks_work_without_values_and_in_a_graph_of_any_size(device: str) -> None:
    graphs = []

    def counted(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=counted, fullgraph=True, dynamic=True)
    def checked(labels: Tensor, scores: Tensor) -> Tensor:
        check_shapes("here", labels=(labels, ("N", "n")), scores=(scores, ("N", 5, "h", "w")))
        check_maps("here", labels, scores=(scores, 5))
        return scores + 1

    torch.compiler.reset()
    for n, h, w in ((2, 4, 6), (3, 5, 7), (4, 8, 9)):
        checked(torch.zeros(n, h * w, device=device), torch.zeros(n, 5, h, w, device=device))
    assert len(graphs) == 1


class Checking:
    """Counts how often it has looked at its arguments, and refuses an empty tensor."""

    def __init__(self) -> None:
        self.n_classes, self.looked = 3, 0

    @once("n_classes")
    def check(self, *args: Any) -> None:
        self.looked += 1
        if isinstance(args[0], Tensor) and args[0].numel() == 0:
            raise ValueError("nothing")

    def looks_at(self, *args: Any) -> bool:
        before = self.looked
        self.check(*args)
        return self.looked > before


def test_what_fits_is_checked_once_for_a_signature() -> None:
    x, checking = torch.zeros(2, 3), Checking()
    assert checking.looks_at(x, [x], 1) and not checking.looks_at(x + 1, [x], 1)
    others: list[tuple[Any, ...]] = [
        (x.T, [x], 1),
        (x.double(), [x], 1),
        (x.to("meta"), [x], 1),
        (x, [x, x], 1),
        (x, [x.T], 1),
        (x, [x], True),
        (x, [x], 1.0),
        (x, [x], None),
        (x, [x], "1"),
        (x.tolist(), [x], 1),
    ]
    for args in others:
        assert checking.looks_at(*args), args
        assert not checking.looks_at(*args), args
    checking.n_classes = 4
    assert checking.looks_at(x, [x], 1)
    # Another object of the class knows what this one does, one of a class derived from it nothing.
    other = Checking()
    assert not other.looks_at(x, [x], 1)
    assert type("Derived", (Checking,), {})().looks_at(x, [x], 1)


def test_what_is_refused_or_may_change_is_looked_at_again() -> None:
    checking, nothing = Checking(), torch.zeros(0)
    for _ in range(2):
        with pytest.raises(ValueError, match="nothing"):
            checking.check(nothing)
    pair = np.array([8, 8])
    assert checking.looks_at(1, pair) and checking.looks_at(1, pair)


def test_signatures_are_few_and_keep_no_tensor_alive() -> None:
    checking = Checking()
    for n in range(1, 1000):
        checking.check(torch.empty(n, device="meta"))
    passed = next(
        cell.cell_contents
        for cell in Checking.check.__closure__  # type: ignore[attr-defined]
        if isinstance(cell.cell_contents, dict)
    )
    assert 0 < len(passed) <= 256
    x = torch.zeros(5, 7)
    gone = weakref.ref(x)
    checking.check(x, [x], (x,))
    del x
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", ["atss", "rtmdet", "yolov9"])
def test_a_criterion_that_is_changed_is_checked_anew(name: str) -> None:
    batch = BUILDERS[name]().on(torch.device("cpu"))
    criterion = batch.criterion(torch.device("cpu"))
    criterion(**batch.inputs)
    for attribute in ("num_classes", "cls_out_channels"):
        if hasattr(criterion, attribute):
            setattr(criterion, attribute, getattr(criterion, attribute) + 1)
    for part in (getattr(criterion, "matcher", None),):
        if part is not None:
            part.class_num += 1
    with pytest.raises(ValueError, match="must have shape"):
        criterion(**batch.inputs)
