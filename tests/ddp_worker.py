"""Run by test_distributed.py under torchrun: gradients of a sharded batch against the whole one."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from test_detr import Inputs, criterion_of
from torch import nn

from detloss_triton import sum_losses


class Head(nn.Module):
    """Outputs of a criterion, scaled by a parameter whose gradient DDP averages."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            "pred_logits": outputs["pred_logits"] * self.scale,
            **{"pred_boxes": outputs["pred_boxes"] * self.scale},
        }


def main() -> None:
    torch.set_num_threads(1)
    counts = [int(n) for n in sys.argv[1].split(",")]
    inputs = Inputs(counts, torch.device("cpu"), torch.float32)
    whole = {key: value.detach() for key, value in inputs.detr().items()}
    criterion, alone = criterion_of("detr"), Head()
    sum_losses(criterion(alone(whole), inputs.targets)).backward()

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    share = slice(rank * len(counts) // world, (rank + 1) * len(counts) // world)
    head = nn.parallel.DistributedDataParallel(Head())
    collectives = []
    reduce = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (collectives.append(1), reduce(*args, **kwargs))[1]
    losses = criterion(head({k: v[share] for k, v in whole.items()}), inputs.targets[share])
    assert len(collectives) == 1, f"{len(collectives)} collectives in a step"
    sum_losses(losses).backward()
    ours, expected = head.module.scale.grad, alone.scale.grad
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    # DDP holds the group too; were it the last to let go, it would join gloo's threads while it
    # keeps them from the interpreter's lock, and never return.
    del head, losses
    dist.destroy_process_group()
    print(f"rank {rank} agrees")


main()
