"""Run by test_distributed.py under torchrun: gradients of a sharded batch against the whole one.

Each argument holds the box counts of a batch's images, one batch after another. The criteria are
those whose normalisers are means over ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from test_detr import Inputs, criterion_of
from torch import Tensor, nn
from trees import mapped
from whole_cases import batch

from detloss_triton import sum_losses
from detloss_triton.bench.batches import DENSE as BUILDERS
from detloss_triton.demo import ranks
from detloss_triton.demo.detectors import RECIPES
from detloss_triton.demo.shape_images import CLASS_NAMES, ShapeImages
from detloss_triton.demo.train import Settings, fit
from detloss_triton.targets import unpack

Arguments = dict[str, Any]
# The criterion, the inputs of a slice of the batch, and what of them a head predicts.
Problem = tuple[nn.Module, Callable[[slice], Arguments], tuple[str, ...]]


class Head(nn.Module):
    """Predictions, scaled by a parameter whose gradient DDP averages."""

    def __init__(self, predicted: tuple[str, ...]) -> None:
        super().__init__()
        self.predicted = predicted
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, inputs: Arguments) -> Arguments:
        def scaled(path: str, x: Tensor) -> Tensor:
            return x * self.scale if any(name in path for name in self.predicted) else x

        return mapped(scaled, inputs)


def detr(counts: list[int]) -> Problem:
    batch = Inputs(counts, torch.device("cpu"), torch.float32)
    outputs = mapped(lambda _, x: x.detach(), batch.detr("aux"))

    def part(images: slice) -> Arguments:
        return {
            "outputs": mapped(lambda _, x: x[images], outputs),
            "targets": batch.targets[images],
        }

    return criterion_of("detr"), part, ("pred_",)


def dfine(counts: list[int]) -> Problem:
    """But for the distillation, which balances the images of each process."""
    batch = Inputs(counts, torch.device("cpu"), torch.float32)
    outputs = mapped(lambda _, x: x.detach(), batch.dfine("aux", "enc"))
    criterion = criterion_of("dfine")
    criterion.weight_dict = {k: v for k, v in criterion.weight_dict.items() if k != "loss_ddf"}

    def part(images: slice) -> Arguments:
        return {
            "outputs": mapped(lambda _, x: x[images] if x.dim() > 1 else x, outputs),
            "targets": batch.targets[images],
        }

    return criterion, part, ("pred_",)


def check_own_unions(counts: list[int]) -> None:
    """OTX's way: each process divides by its own pairs, as many as the mean on average."""
    criterion, part, _ = dfine(counts)
    rank, world, n = dist.get_rank(), dist.get_world_size(), len(counts)
    inputs = part(slice(rank * n // world, (rank + 1) * n // world))
    shared = criterion(**inputs)
    criterion.union_over_ranks = False
    own = criterion(**inputs)
    for key in ("loss_bbox", "loss_giou_enc_0", "loss_fgl_aux_0"):
        share = (shared[key].detach() / own[key].detach()).nan_to_num(0)
        assert (share - 1).abs() > 0.05, (key, share)
        dist.all_reduce(share)
        torch.testing.assert_close(share / world, torch.ones(()))
    torch.testing.assert_close(shared["loss_vfl"], own["loss_vfl"])


def dense(name: str, counts: list[int]) -> Problem:
    """Images that are to have no boxes have none; the others a share of positives."""
    batch = BUILDERS[name](images=len(counts), positives=0.3)
    for labels in batch.inputs["labels"]:
        labels[torch.tensor(counts) == 0] = 5
    for metrics, labels in zip(
        batch.inputs.get("assign_metrics", ()), batch.inputs["labels"], strict=False
    ):
        metrics *= labels < 5

    def part(images: slice) -> Arguments:
        inputs = {k: v for k, v in batch.inputs.items() if k not in ("stride", "avg_factor")}
        inputs = mapped(lambda _, x: x[images], inputs)
        if "stride" in batch.inputs:
            inputs["stride"] = batch.inputs["stride"]
        if "avg_factor" in batch.inputs:
            # A head gives the mean over ranks of its positives: each has as many images.
            share = len(range(*images.indices(len(counts)))) / len(counts)
            inputs["avg_factor"] = batch.inputs["avg_factor"] * share
        return inputs

    return batch.make(), part, batch.differentiable


def whole(name: str, counts: list[int]) -> Problem:
    """Each image has a box at least, where a loss counts an image without as one of one."""
    case = batch(name, tuple(max(count, 1) for count in counts))
    maps = {key: x for key, x in case.inputs.items() if key != "targets"}
    targets = unpack(case.inputs["targets"])

    def part(images: slice) -> Arguments:
        cut = mapped(lambda _, x: x.detach()[images], maps)
        return {**cut, "targets": targets[images]}

    return case.criterion, part, tuple(maps)


def check(
    criterion: nn.Module, part: Callable[[slice], Arguments], predicted: Any, n: int, sent: int = 1
) -> None:
    alone = Head(predicted)
    sum_losses(criterion(**alone(part(slice(None))))).backward()

    rank, world = dist.get_rank(), dist.get_world_size()
    head = nn.parallel.DistributedDataParallel(Head(predicted))
    inputs = head(part(slice(rank * n // world, (rank + 1) * n // world)))
    collectives = []
    reduce = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (collectives.append(1), reduce(*args, **kwargs))[1]
    losses = criterion(**inputs)
    dist.all_reduce = reduce
    assert len(collectives) == sent, f"{len(collectives)} collectives in a step"
    sum_losses(losses).backward()
    ours, expected = head.module.scale.grad, alone.scale.grad
    assert expected.any()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def check_training() -> None:
    """Processes that train on different images have the same parameters after it."""
    cpu = torch.device("cpu")
    settings = Settings("yolov9", 2, 2 * dist.get_world_size(), 64, 0, "torch", cpu, 1, Path())
    model = RECIPES["yolov9"].build(len(CLASS_NAMES), 64, cpu)
    before = [p.detach().clone() for p in model.parameters()]
    history = fit(model, ShapeImages(64, 0), 1e-3, settings)
    after = [p.detach() for p in model.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    for values in (*after, torch.tensor(history["total_loss"])):
        of_first = values.clone()
        dist.broadcast(of_first, 0)
        assert torch.equal(of_first, values)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for argument in sys.argv[1:]:
        counts = [int(n) for n in argument.split(",")]
        dense_problems = dense("atss", counts), dense("rtmdet", counts)
        for problem in (detr(counts), dfine(counts), *dense_problems):
            check(*problem, len(counts))
        check_own_unions(counts)
        for name, sent in (("atss", 2), ("rtmdet", 1), ("yolox", 1)):
            check(*whole(name, counts), len(counts), sent)
    check_training()
    # DDP holds the group too; were it the last to let go, it would join gloo's threads while it
    # keeps them from the interpreter's lock, and never return: `check` has dropped it by now.
    print(f"rank {dist.get_rank()} agrees", flush=True)
    dist.destroy_process_group()
    ranks.leave()


main()
