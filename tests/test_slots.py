"""What a user puts into a slot of ATSS, RTMDet, SSD or YOLOX, or overrides, is called as OTX calls
it, or refused by name. What OTX calls them with was seen by putting spies into its criteria.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trees import leaves, mixed

import detloss_triton as dt
from detloss_triton.bench.batches import DENSE as BUILDERS
from detloss_triton.bench.batches import Batch, coder
from detloss_triton.criteria.levels import is_ours, takes

Log = list[Any]
CPU = torch.device("cpu")
ANCHORS = 150


def shapes(x: Any) -> Any:
    if isinstance(x, Tensor):
        return tuple(x.shape)
    if isinstance(x, dict):
        return {key: shapes(value) for key, value in x.items()}
    return tuple(map(shapes, x)) if isinstance(x, tuple) else x


def of_function(module: nn.Module, log: Log) -> Any:
    def loss(*args: Any, **kwargs: Any) -> Tensor:
        log.append((shapes(args), shapes(kwargs)))
        return module(*args, **kwargs)

    loss.use_sigmoid = True  # type: ignore[attr-defined]
    return loss


def of_partial(module: nn.Module, log: Log) -> Any:
    return functools.partial(of_function(module, log))


def of_object(module: nn.Module, log: Log) -> Any:
    class Called:
        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            return of_function(module, log)(*args, **kwargs)

    return Called()


def of_module(module: nn.Module, log: Log) -> Any:
    class Own(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return of_function(module, log)(*args, **kwargs)

    return Own()


def subclassed(method: str) -> Callable[[nn.Module, Log], Any]:
    def of_subclass(module: nn.Module, log: Log) -> Any:
        kind = type(module)

        def own(self: Any, *args: Any, **kwargs: Any) -> Tensor:
            log.append((shapes(args), shapes(kwargs)))
            return getattr(kind, method)(self, *args, **kwargs)

        module.__class__ = type("Own", (kind,), {method: own})
        return module

    return of_subclass


def of_instance(module: nn.Module, log: Log) -> Any:
    module.forward = of_function(type(module).forward.__get__(module), log)  # type: ignore[method-assign]
    return module


def hooked_before(module: nn.Module, log: Log) -> Any:
    module.register_forward_pre_hook(
        lambda _, args, kwargs: log.append((shapes(args), shapes(kwargs))), with_kwargs=True
    )
    return module


def hooked_after(module: nn.Module, log: Log) -> Any:
    module.register_forward_hook(
        lambda _, args, kwargs, out: log.append((shapes(args), shapes(kwargs))), with_kwargs=True
    )
    return module


KINDS: dict[str, Callable[[nn.Module, Log], Any]] = {
    "function": of_function,
    "partial": of_partial,
    "object": of_object,
    "module": of_module,
    "own forward": subclassed("forward"),
    "own __call__": subclassed("__call__"),
    "forward of an instance": of_instance,
    "forward pre-hook": hooked_before,
    "forward hook": hooked_after,
}
# Derived from our focal loss, which takes a mask, so that the class says so.
DERIVED = ("own forward", "own __call__", "forward of an instance")
HOOKED = ("forward pre-hook", "forward hook")


def bce(reduction: str = "mean") -> nn.Module:
    return dt.CrossEntropyLoss(use_sigmoid=True, reduction=reduction)


SLOTS: dict[tuple[str, str], Callable[[], nn.Module]] = {
    ("atss", "loss_cls"): dt.CrossSigmoidFocalLoss,
    ("atss", "qfl_cfg"): dt.QualityFocalLoss,
    ("atss", "loss_bbox"): lambda: dt.GIoULoss(loss_weight=2.0),
    ("atss", "loss_centerness"): bce,
    ("rtmdet", "loss_cls"): dt.QualityFocalLoss,
    ("rtmdet", "loss_bbox"): lambda: dt.GIoULoss(loss_weight=2.0),
    ("yolox", "loss_cls"): lambda: bce("sum"),
    ("yolox", "loss_bbox"): lambda: dt.IoULoss(mode="square", reduction="sum"),
    ("yolox", "loss_obj"): lambda: bce("sum"),
    ("yolox", "loss_l1"): lambda: dt.L1Loss(reduction="sum"),
}


def calls(slot: str, batch: Batch, masked: bool) -> Log:
    """What OTX calls a slot with: shapes of its arguments, level by level."""
    inputs = batch.inputs
    if "pos_masks" in inputs:
        p = len(inputs["bbox_targets"])
        rows = {"loss_cls": (p, 5), "loss_obj": (2 * ANCHORS, 1)}.get(slot, (p, 4))
        return [((rows, rows), {})]
    levels = [(x.numel(), int((x < 5).sum())) for x in inputs["labels"]]
    avg_factor = {"avg_factor": inputs.get("avg_factor", 1.0)}
    if slot == "loss_bbox":
        return [(((p, 4), (p, 4)), {"weight": (p,), "avg_factor": 1.0}) for _, p in levels if p]
    if slot == "loss_centerness":
        return [(((p,), (p,)), avg_factor) for _, p in levels if p]
    pairs = slot == "qfl_cfg" or "assign_metrics" in inputs
    return [
        (
            ((n, 5), ((n,), (n,)) if pairs else (n,), (n,)),
            {**avg_factor, "valid_label_mask": (n, 5)} if masked else avg_factor,
        )
        for n, _ in levels
    ]


def batch_of(name: str) -> Batch:
    """One whose last level has no positives; its masks leave nothing out."""
    batch = BUILDERS[name](positives=0.3).on(CPU)
    if "assign_metrics" in batch.inputs or "anchors" in batch.inputs:
        batch.inputs["labels"][-1].fill_(5)
    for mask in batch.inputs.get("valid_label_mask", []):
        mask.fill_(1)
    return batch


def step(batch: Batch, **slots: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    losses = batch.make(**slots)(**batch.inputs)
    mixed(losses).backward()
    return dict(leaves(losses)), {path: x.grad for path, x in batch.leaves().items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "slot"), SLOTS)
def test_a_slot_is_called_as_otx_calls_it(name: str, slot: str, kind: str) -> None:
    """Once for a call of OTX's, with its arguments; losses and gradients are those of ours."""
    log: Log = []
    settings = {"use_qfl": True} if slot == "qfl_cfg" else {}
    plain, spied = batch_of(name), batch_of(name)
    losses, gradients = step(plain, **settings, **{slot: SLOTS[name, slot]()})
    theirs, their_gradients = step(
        spied, **settings, **{slot: KINDS[kind](SLOTS[name, slot](), log)}
    )
    focal = (name, slot) == ("atss", "loss_cls")
    assert log == calls(slot, spied, masked=focal and kind in DERIVED + HOOKED)
    torch.testing.assert_close(theirs, losses)
    torch.testing.assert_close(their_gradients, gradients)


@pytest.mark.parametrize(("name", "slot"), SLOTS)
def test_backward_hooks_fire(name: str, slot: str) -> None:
    """Once for a call of OTX's, too."""
    module, fired = SLOTS[name, slot](), []
    module.register_full_backward_hook(lambda *_: fired.append(1))
    batch = batch_of(name)
    step(batch, **({"use_qfl": True} if slot == "qfl_cfg" else {}), **{slot: module})
    assert len(fired) == len(calls(slot, batch, masked=False))


@pytest.mark.parametrize(("name", "slot"), [key for key in SLOTS if key != ("yolox", "loss_obj")])
def test_losses_that_are_not_reduced_have_the_shape_of_otx_s(name: str, slot: str) -> None:
    """A row of each positive, or anchor, of a level; 0 where there is no positive."""
    module = SLOTS[name, slot]()
    module.reduction = "none"
    assert not is_ours(module)
    settings = {"use_qfl": True} if slot == "qfl_cfg" else {}
    batch = batch_of(name)
    losses = batch.make(**settings, **{slot: module})(**batch.inputs)
    key = "loss_cls" if slot == "qfl_cfg" else slot
    found = [tuple(x.shape) for _, x in leaves({key: losses[key]})]
    rows = [call[0] for call, _ in calls(slot, batch, masked=False)]
    if slot != "qfl_cfg" and key != "loss_cls":
        found = [shape for shape in found if shape]
        rows = [shape[:1] if slot == "loss_bbox" else shape for shape in rows]
    elif isinstance(module, dt.QualityFocalLoss):
        rows = [shape[:1] for shape in rows]
    assert found == rows


def naming(
    pred: Tensor,
    target: Any,
    weight: Tensor,
    avg_factor: float,
    valid_label_mask: Tensor | None = None,
) -> Tensor:
    """The number of entries that the mask leaves in: of all, where there is none."""
    kept = torch.ones_like(pred) if valid_label_mask is None else valid_label_mask
    return kept.sum() + 0 * pred.sum()


def collecting(*args: Any, **kwargs: Any) -> Tensor:
    return naming(*args, **kwargs)


class Naming(nn.Module):
    def forward(
        self, pred: Tensor, target: Any, weight: Tensor, valid_label_mask: Any = None, **kwargs: Any
    ) -> Tensor:
        return naming(pred, target, weight, valid_label_mask=valid_label_mask, **kwargs)


class Derived(Naming):
    """As of OTX's focal loss: what its class takes, it takes, whatever its own signature says."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)


class Collecting(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return naming(*args, **kwargs)


@pytest.mark.parametrize("slot", ["loss_cls", "qfl_cfg"])
@pytest.mark.parametrize(
    ("module", "masked"),
    [
        (Naming(), True),
        (Derived(), True),
        (naming, True),
        (functools.partial(naming), True),
        (Collecting(), False),
        (collecting, False),
    ],
)
def test_atss_hands_its_mask_to_what_names_it(slot: str, module: Any, masked: bool) -> None:
    batch = BUILDERS["atss"]()
    criterion = batch.make(use_qfl=slot == "qfl_cfg", **{slot: module})
    kept = [mask.sum() if masked else mask.numel() for mask in batch.inputs["valid_label_mask"]]
    assert [loss.item() for loss in criterion(**batch.inputs)["loss_cls"]] == kept


def test_a_function_of_no_signature_takes_no_mask() -> None:
    assert not takes(min, "valid_label_mask")


def test_a_stranger_that_takes_the_mask_is_part_of_the_graph() -> None:
    batch = BUILDERS["atss"]()
    for module in (Derived(), Collecting(), naming):
        criterion = batch.make(loss_cls=module)
        compiled = torch.compile(criterion, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**batch.inputs), criterion(**batch.inputs))
    torch._dynamo.reset()


class OwnDecode(dt.DeltaXYWHBBoxCoder):
    """Of ours, with the signature of OTX's call."""

    def decode(self, bboxes: Tensor, pred_bboxes: Tensor) -> Tensor:  # type: ignore[override]
        return super().decode(bboxes, pred_bboxes)


class NoCoder:
    """Not of ours, and without a dictionary of its own."""

    __slots__ = ()

    def decode(self, bboxes: Tensor, pred_bboxes: Tensor) -> Tensor:
        return coder().decode(bboxes, pred_bboxes)


class CoderModule(nn.Module):
    def decode(self, bboxes: Tensor, pred_bboxes: Tensor) -> Tensor:
        return coder().decode(bboxes, pred_bboxes)


def decoding_of_an_instance() -> Any:
    ours = coder()
    ours.decode = NoCoder().decode
    return ours


CODERS: dict[str, Callable[[], Any]] = {
    "own decode": lambda: coder(SimpleNamespace(DeltaXYWHBBoxCoder=OwnDecode)),
    "stranger": NoCoder,
    "module": CoderModule,
    "decode of an instance": decoding_of_an_instance,
}


@pytest.mark.parametrize("kind", CODERS)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("atss", {}),
        ("atss", {"use_qfl": True}),
        ("ssd", {"reg_decoded_bbox": True}),
    ],
)
def test_coders_are_called_as_otx_calls_them(
    name: str, settings: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ATSS: for the positives of each level that has any; SSD: for all anchors of each image."""
    plain, spied = batch_of(name), batch_of(name)
    losses, gradients = step(plain, **settings)
    theirs = CODERS[kind]()
    log: Log = []
    decode = theirs.decode

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        log.append((shapes(args), kwargs))
        return decode(*args, **kwargs)

    if kind == "stranger":
        monkeypatch.setattr(NoCoder, "decode", staticmethod(spy))
    else:
        theirs.decode = spy
    their_losses, their_gradients = step(spied, bbox_coder=theirs, **settings)
    if name == "ssd":
        assert log == [(((ANCHORS, 4), (ANCHORS, 4)), {})] * 2
    else:
        positives = [int((x < 5).sum()) for x in spied.inputs["labels"]]
        assert log == [(((p, 4), (p, 4)), {}) for p in positives if p]
    torch.testing.assert_close(their_losses, losses)
    torch.testing.assert_close(their_gradients, gradients)


@pytest.mark.parametrize("name", ["atss", "ssd"])
def test_a_coder_of_ours_with_its_own_decode_needs_no_weight(name: str) -> None:
    """Nor is it called where nothing is decoded."""
    settings: dict[str, Any] = {"reg_decoded_bbox": True} if name == "ssd" else {}
    for positives in (0.3, 0.0):
        plain, own = (BUILDERS[name](positives=positives).on(CPU) for _ in range(2))
        theirs = step(own, bbox_coder=CODERS["own decode"](), **settings)
        torch.testing.assert_close(theirs, step(plain, **settings))


@pytest.mark.parametrize("of_class", [True, False])
def test_an_own_centerness_target_is_called_for_positives(of_class: bool) -> None:
    log: Log = []

    def halved(self: Any, anchors: Tensor, gts: Tensor) -> Tensor:
        log.append((shapes(anchors), shapes(gts)))
        return 0.5 * dt.ATSSCriterion.centerness_target(self, anchors, gts)

    batch = batch_of("atss")
    ours, own = batch.make(), batch.make(loss_bbox=dt.GIoULoss(loss_weight=2.0))
    if of_class:
        own.__class__ = type("Own", (dt.ATSSCriterion,), {"centerness_target": halved})
    else:
        own.centerness_target = functools.partial(halved, own)
    losses, theirs = ours(**batch.inputs), own(**batch.inputs)
    positives = [int((x < 5).sum()) for x in batch.inputs["labels"]]
    assert log == [((p, 4), (p, 4)) for p in positives if p]
    # Boxes are weighted by their share of the sum, which halves as well.
    for key in ("loss_cls", "loss_bbox"):
        torch.testing.assert_close(theirs[key], losses[key])
    logits, last = batch.inputs["centerness"], len(positives) - 1
    for level, n in enumerate(positives):
        # BCE is linear in its target: half of it less is half of sum(target * logit) more.
        is_object = batch.inputs["labels"][level].flatten() < 5
        boxes = [batch.inputs[key][level].flatten(0, 1) for key in ("anchors", "bbox_targets")]
        target = torch.where(is_object, ours.centerness_target(*boxes), 0)
        more = (0.5 * target * logits[level].flatten()).sum() / batch.inputs["avg_factor"]
        found = theirs["loss_centerness"][level] - losses["loss_centerness"][level]
        torch.testing.assert_close(found, more, rtol=1e-4, atol=1e-5)
        assert n or level == last


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("atss", "_forward"),
        ("atss", "_get_pos_inds"),
        ("atss", "_get_loss_cls"),
        ("atss", "_get_loss_bbox"),
        ("atss", "_get_loss_centerness"),
        ("rtmdet", "_forward"),
        ("ssd", "_forward"),
    ],
)
@pytest.mark.parametrize("of_class", [True, False])
def test_methods_that_would_not_be_called_are_refused(
    name: str, method: str, of_class: bool
) -> None:
    """What OTX's criteria call level by level, or image by image."""
    batch = BUILDERS[name]()
    criterion = batch.make()

    def own(*args: Any) -> None:
        raise AssertionError

    if of_class:
        criterion.__class__ = type("Own", (type(criterion),), {method: own})
    else:
        setattr(criterion, method, own)
    with pytest.raises(TypeError, match=rf"^{type(criterion).__name__} overrides {method}, which"):
        criterion(**batch.inputs)


def test_quality_focal_loss_may_be_any_callable() -> None:
    """`qfl_cfg` that is no mapping is what classifies."""
    batch = BUILDERS["atss"]()
    assert batch.make(use_qfl=True, qfl_cfg=naming).loss_cls is naming
    assert batch.make(use_qfl=True, qfl_cfg={"beta": 1.5}).loss_cls.beta == 1.5


class Falsy(nn.ModuleList):
    """A module of which len() is 0."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return args[0].sum()


def test_no_module_is_taken_for_none() -> None:
    falsy = Falsy()
    assert BUILDERS["atss"]().make(loss_centerness=falsy).loss_centerness is falsy
    for slot in ("loss_cls", "loss_bbox", "loss_obj", "loss_l1"):
        assert getattr(BUILDERS["yolox"]().make(**{slot: falsy}), slot) is falsy
