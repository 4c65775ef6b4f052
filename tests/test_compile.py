"""The DETR criteria under torch.compile: no graph break, few compiles, the same numbers.

The graphs are run by `aot_eager`: what is tested is tracing, forward and backward, not Inductor.
"""

from __future__ import annotations

import pytest
import torch
from test_detr import EXTRAS, Inputs, criterion_of

from detloss_triton import sum_losses, use_backend


@pytest.mark.parametrize("name", ["detr", "dfine"])
def test_no_graph_break_and_the_same_numbers(name: str) -> None:
    torch._dynamo.reset()
    inputs = Inputs([2, 0, 3], torch.device("cpu"), torch.float32)
    outputs, criterion = getattr(inputs, name)(*EXTRAS), criterion_of(name)
    targets, outputs["dn_meta"] = criterion.prepare(inputs.targets, outputs["dn_meta"])
    logits = outputs["pred_logits"]
    with use_backend("torch"):
        eager = criterion(outputs, targets)
        (expected,) = torch.autograd.grad(sum_losses(eager), logits, retain_graph=True)
        compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
        losses = compiled(outputs, targets)
        (gradient,) = torch.autograd.grad(sum_losses(losses), logits)
    for key, loss in eager.items():
        torch.testing.assert_close(losses[key], loss, rtol=1e-5, atol=1e-6, msg=key)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_few_compiles_over_random_box_counts() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    criterion = criterion_of("detr")
    compiled = torch.compile(criterion, fullgraph=True, backend=counter)
    generator = torch.Generator().manual_seed(0)
    first = 0
    with use_backend("torch"):
        for step in range(40):
            counts = torch.randint(0, 61, (4,), generator=generator).tolist()
            inputs = Inputs(counts, torch.device("cpu"), torch.float32)
            targets, _ = criterion.prepare(inputs.targets)
            sum_losses(compiled(inputs.detr("aux"), targets)).backward()
            first = counter.frame_count if step == 0 else first
    assert counter.frame_count - first <= 3
