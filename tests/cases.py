"""All seven criteria behind one interface: a criterion, and the arguments of one call."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from test_detr import EXTRAS, Inputs, criterion_of
from torch import Tensor, nn
from trees import leaves, mapped, mixed, shared

from detloss_triton.bench.batches import DENSE as BUILDERS

CPU = torch.device("cpu")
NAMES = (*BUILDERS, "detr", "dfine")


@dataclass(frozen=True)
class Case:
    """A criterion and the arguments of its forward, of which some tensors are leaves."""

    criterion: nn.Module
    inputs: dict[str, Any]

    def on(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Case:
        """A copy on the device, its leaves in `dtype`; what is no leaf stays in its own."""

        def placed(_: str, x: Tensor) -> Tensor:
            if not x.requires_grad:
                return x.to(device, copy=True)
            return x.detach().to(device, dtype, copy=True).requires_grad_()

        criterion = copy.deepcopy(self.criterion).to(device)
        if hasattr(criterion, "vec2box"):
            criterion.vec2box.update((64, 64), device)
        return Case(criterion, mapped(shared(placed), self.inputs))

    def leaves(self) -> dict[str, Tensor]:
        """Dotted path -> leaf."""
        return {path: x for path, x in leaves(self.inputs) if x.requires_grad}

    def step(self, criterion: Any = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """({path: loss}, {path: gradient}) of a forward and backward pass."""
        criterion = self.criterion if criterion is None else criterion
        losses = dict(leaves(criterion(**self.inputs)))
        wanted = self.leaves()
        gradients = torch.autograd.grad(mixed(losses), list(wanted.values()))
        return losses, dict(zip(wanted, gradients, strict=True))


def case(name: str, counts: tuple[int, ...] = (2, 0, 3), seed: int = 0) -> Case:
    """A batch of the criterion, on the CPU; targets packed where there is something to pack.

    Args:
        counts: boxes in each image; of the criteria that are given positives, these go up with it.
    """
    if name in BUILDERS:
        more: dict[str, Any] = {"positives": min(0.02 * sum(counts), 0.6)}
        if name == "yolov9":
            more = {"targets": max(1, *counts), "positives": 0.5 * any(counts)}
        batch = BUILDERS[name](seed, **more).on(CPU)
        return Case(batch.make(), batch.inputs)
    inputs, criterion = Inputs([*counts], CPU, torch.float32), criterion_of(name)
    outputs = getattr(inputs, name)(*EXTRAS if max(counts) else ("aux", "pre", "enc"))
    targets, dn_meta = criterion.prepare(inputs.targets, outputs.get("dn_meta"))
    if dn_meta is not None:
        outputs["dn_meta"] = dn_meta
    return Case(criterion, {"outputs": outputs, "targets": targets})


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Within `tolerance` of each tensor's largest value; with 0, bit by bit."""
    assert ours.keys() == theirs.keys()
    for path, expected in theirs.items():
        largest = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(
            ours[path].double(),
            expected.double(),
            rtol=0,
            atol=tolerance * largest,
            equal_nan=True,
            msg=lambda m, path=path: f"{path}: {m}",
        )
