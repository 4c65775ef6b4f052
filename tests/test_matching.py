"""Packing and matching of the DETR family: what hostile numbers do, and where layers are read."""

from __future__ import annotations

import pytest
import torch
from machine import CPU
from torch import Tensor

from detloss_triton import HungarianMatcher, Targets, backend
from detloss_triton.ops.matching import match_cost
from detloss_triton.ops.packing import denoising_map, pad

COSTS = {"cost_class": 2.0, "cost_bbox": 5.0, "cost_giou": 2.0}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_counts_beyond_the_rows_read_nothing(
    generator: torch.Generator, backend: str, device: torch.device
) -> None:
    """As of packed targets that are not the batch's: no error can be raised without a wait."""
    labels = torch.randint(0, 9, (5,), generator=generator).to(device)
    boxes = torch.rand(5, 4, generator=generator).to(device)
    counts = torch.tensor([2**40, -7, 3], device=device)
    found, padded = pad(counts, (labels,), (boxes,), n_targets=4)
    queries = torch.arange(5, device=device)
    sizes = {"n_images": 3, "n_groups": 1, "n_targets": 4, "n_queries": 6}
    targets = denoising_map((queries,), counts, **sizes)
    assert found[0].equal(labels[:4]) and padded[0].equal(boxes[:4])
    assert found[1].eq(-1).all() and padded[1].eq(0).all()
    assert found[2].tolist() == [labels[4].item(), -1, -1, -1]
    assert padded[2, 0].equal(boxes[4]) and padded[2, 1:].eq(0).all()
    none = [-1] * 6
    assert targets[0].tolist() == [[0, 1, 2, 3, -1, -1], none, [-1, -1, -1, -1, 0, -1]]


@pytest.mark.parametrize("n_images", [1, 5, 300])
def test_images_are_packed_as_they_are_one_by_one(
    n_images: int, generator: torch.Generator, backend: str, device: torch.device
) -> None:
    """More of them than a program counts at a time, and more targets than it fills places."""
    counts = torch.randint(0, 4, (n_images,), generator=generator).tolist()
    counts[-1] = 140
    labels = [torch.randint(0, 9, (n,), generator=generator).to(device) for n in counts]
    boxes = [torch.rand(n, 4, generator=generator).to(device) for n in counts]
    queries = [torch.randperm(280, generator=generator)[: 2 * n].to(device) for n in counts]
    on_device = torch.tensor(counts, device=device)
    found, padded = pad(on_device, tuple(labels), tuple(boxes), n_targets=141)
    sizes = {"n_images": n_images, "n_groups": 2, "n_targets": 141, "n_queries": 280}
    targets = denoising_map(tuple(queries), on_device, **sizes)
    for i, n in enumerate(counts):
        assert found[i, :n].equal(labels[i]) and found[i, n:].eq(-1).all()
        assert padded[i, :n].equal(boxes[i]) and padded[i, n:].eq(0).all()
        expected = torch.full((280,), -1, device=device)
        expected[queries[i]] = torch.arange(n, device=device).repeat(2)
        assert targets[0, i].equal(expected)


def test_the_last_of_a_repeated_query_counts(backend: str, device: torch.device) -> None:
    queries = torch.full((80,), 9, device=device)
    queries[[0, 2, 45, 79]], queries[[1, 43]] = 4, 1
    counts = torch.tensor([40], device=device)
    sizes = {"n_images": 1, "n_groups": 2, "n_targets": 48, "n_queries": 6}
    found = denoising_map((queries,), counts, **sizes)
    assert found.tolist() == [[[-1, 3, -1, -1, 39, -1]]]


def layers_behind(
    n_denoising: int, generator: torch.Generator, device: torch.device
) -> tuple[list[Tensor], list[Tensor], Targets]:
    """Layers of a decoder whose queries lie behind so many denoising ones, as OTX cuts them."""
    logits = torch.randn(3, 2, n_denoising + 20, 16, generator=generator).to(device)
    boxes = (0.1 + 0.5 * torch.rand(3, 2, n_denoising + 20, 4, generator=generator)).to(device)
    labels = torch.randint(0, 16, (2, 8), generator=generator).to(device)
    targets = (0.1 + 0.5 * torch.rand(2, 8, 4, generator=generator)).to(device)
    counts = torch.tensor([5, 8], device=device)
    last, places = logits[:, :, n_denoising:], boxes[:, :, n_denoising:]
    return list(last), list(places), Targets(labels, targets, counts)


@pytest.mark.parametrize("n_denoising", [0, 4, 5])
def test_layers_that_lie_apart_are_matched_as_a_stack(
    n_denoising: int, generator: torch.Generator, backend: str, device: torch.device
) -> None:
    logits, boxes, targets = layers_behind(n_denoising, generator, device)
    matcher = HungarianMatcher(COSTS)
    found = matcher.match_layers(logits, boxes, targets)
    assert found.equal(matcher.match(torch.stack(logits), torch.stack(boxes), targets))
    assert (found >= 0).sum(2).tolist() == [[5, 8]] * 3
    params = {**COSTS, "alpha": 0.25, "gamma": 2.0, "softmax": False, "iou_power": -1.0}
    cost = match_cost(tuple(logits), tuple(boxes), *targets[:2], **params)
    each = [
        match_cost.reference((x,), (y,), *targets[:2], **params)
        for x, y in zip(logits, boxes, strict=True)
    ]
    torch.testing.assert_close(cost, torch.cat(each), rtol=1e-5, atol=1e-5)


def test_only_layers_that_would_compile_anew_are_copied(generator: torch.Generator) -> None:
    """How many denoising queries there are changes with every batch."""
    signatures = set()
    for n_denoising in range(12):
        logits, boxes, targets = layers_behind(n_denoising, generator, CPU)
        with backend.record_launches() as launches:
            HungarianMatcher(COSTS).match_layers(logits, boxes, targets)
        for name, given in (("logits", logits), ("boxes", boxes)):
            layers = launches[0].arguments[name]
            in_place = {
                x.data_ptr() == y.data_ptr() for (x, *_), y in zip(layers, given, strict=True)
            }
            # 16 logits and 4 coordinates a query: each fourth number leaves boxes aligned.
            assert in_place == {name == "logits" or n_denoising % 4 == 0}
            strides = tuple(n % 16 == 0 for x in layers for n in x[1:])
            aligned = tuple(x[0].data_ptr() % 16 == 0 for x in layers)
            signatures.add((name, strides, aligned))
    assert len(signatures) == 2


def test_a_match_of_ones_own_gets_stacks() -> None:
    seen = []

    class Own(HungarianMatcher):
        def match(self, logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
            seen.append((logits.shape, boxes.shape))
            return super().match(logits, boxes, targets)

    logits, boxes, targets = layers_behind(2, torch.Generator().manual_seed(0), CPU)
    plain = HungarianMatcher(COSTS)
    expected = plain.match_layers(logits, boxes, targets)
    assert Own(COSTS).match_layers(logits, boxes, targets).equal(expected)
    assert seen == [((3, 2, 20, 16), (3, 2, 20, 4))]
    match = plain.match
    plain.match = lambda *given: match(*given) - 1  # type: ignore[method-assign]
    assert plain.match_layers(logits, boxes, targets).equal(expected - 1)
