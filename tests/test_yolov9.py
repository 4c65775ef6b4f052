"""YOLOv9: what a user puts in is called, anchors fit each level, errors name the argument.

Its numbers: test_golden.py; what its modules are called with, one by one: test_criteria.py.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from synchronisation import NoHostReads
from test_criteria import assert_same, shapes, step
from torch import Tensor, nn

import detloss_triton as dt
from detloss_triton import validation
from detloss_triton.bench.batches import STRIDES, Draw, yolov9

SIZE, CLASSES = (64, 64), 5
Calls = list[tuple[str, Any]]


def anchors_of(size: tuple[int, int] = SIZE, **kwargs: Any) -> dt.Vec2Box:
    return dt.Vec2Box(None, size, list(STRIDES), **kwargs)


def head_of(sizes: Sequence[tuple[int, int]], images: int = 2) -> list[tuple[Tensor, ...]]:
    draw = Draw(1)
    return [
        (
            draw.normal(images, CLASSES, h, w) - 2,
            draw.normal(images, 16, 4, h, w),
            0.5 + 3 * draw.uniform(images, 4, h, w),
        )
        for h, w in sizes
    ]


def spied(calls: Calls, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which notes that it was called, and with which shapes."""

    @functools.wraps(function, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = args if args and isinstance(args[0], (Tensor, list)) else args[1:]
        calls.append((name, shapes(tensors)))
        return function(*args, **kwargs)

    return call


def subclass(kind: type, name: str, calls: Calls) -> Any:
    return type("Mine", (kind,), {name: spied(calls, name, getattr(kind, name))})


class MatcherModule(nn.Module):
    def __init__(self, matcher: dt.BoxMatcher) -> None:
        super().__init__()
        self.matcher = matcher

    def forward(self, target: Tensor, predict: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.matcher(target, predict)


KINDS: dict[str, Any] = {
    "criterion": dt.YOLOv9Criterion,
    "matcher": dt.BoxMatcher,
    "vec2box": dt.Vec2Box,
    "loss_cls": dt.BCELoss,
    "loss_dfl": dt.DFLoss,
    "loss_iou": dt.BoxLoss,
}
SLOTS = ("loss_cls", "loss_dfl", "loss_iou")


def criterion_of(device: torch.device, **kinds: Any) -> Any:
    """With the default parts, but for some of another class."""
    kinds = {**KINDS, **kinds}
    vec2box = kinds["vec2box"](None, SIZE, STRIDES, device)
    slots = kinds["loss_cls"](), kinds["loss_dfl"](vec2box), kinds["loss_iou"]()
    criterion = kinds["criterion"](CLASSES, vec2box, *slots)
    criterion.matcher = kinds["matcher"](CLASSES, vec2box.anchor_grid)
    return criterion


OVERRIDES = [
    ("matcher", "replaced", "by a function"),
    ("matcher", "replaced", "by a module with a hook"),
    *(("matcher", "subclass", name) for name in ("__call__", "match", "over_anchors")),
    *(("matcher", "object", name) for name in ("match", "over_anchors")),
    *(("vec2box", "subclass", name) for name in ("__call__", "decode")),
    ("vec2box", "object", "decode"),
    ("criterion", "subclass", "separate_anchor"),
    ("criterion", "object", "separate_anchor"),
    *((slot, "subclass", "__call__") for slot in SLOTS),
    *((slot, "object", "forward") for slot in SLOTS),
    *(
        (slot, "hook", f"register_{when}hook")
        for slot in SLOTS
        for when in ("forward_", "forward_pre_", "full_backward_", "full_backward_pre_")
    ),
]


@pytest.mark.parametrize(("part", "how", "name"), OVERRIDES, ids="-".join)
def test_overrides_are_called(part: str, how: str, name: str, device: torch.device) -> None:
    """Once per head at least; those that only note it leave the numbers as they are."""
    calls: Calls = []

    def note(*_: Any) -> None:
        calls.append((name, ()))

    kinds = {part: subclass(KINDS[part], name, calls)} if how == "subclass" else {}
    criterion = criterion_of(device, **kinds)
    owner = criterion if part == "criterion" else getattr(criterion, part)
    if how == "object":
        setattr(owner, name, spied(calls, name, getattr(owner, name)))
    elif how == "hook":
        getattr(owner, name)(note)
    elif name == "by a function":
        criterion.matcher = spied(calls, name, owner)
    elif how == "replaced":
        criterion.matcher = MatcherModule(owner)
        criterion.matcher.register_forward_hook(note)
    ours, theirs = (yolov9().on(device) for _ in range(2))
    expected_losses, expected_gradients = step(ours, device)
    losses, gradients = step(dataclasses.replace(theirs, make=lambda **_: criterion), device)
    assert len(calls) >= 2
    assert_same(losses, expected_losses, 1e-5)
    assert_same(gradients, expected_gradients, 1e-5)


def test_parts_are_called_in_otx_order(device: torch.device) -> None:
    """Head by head, each part with all anchors of a head."""
    calls: Calls = []
    criterion = criterion_of(
        device,
        vec2box=subclass(dt.Vec2Box, "__call__", calls),
        criterion=subclass(dt.YOLOv9Criterion, "separate_anchor", calls),
    )
    criterion.matcher = spied(calls, "matcher", criterion.matcher)
    for slot in SLOTS:
        loss = getattr(criterion, slot)
        loss.forward = spied(calls, slot, loss.forward)
    criterion(**yolov9().on(device).inputs)
    assert len(calls) == 12
    for head in calls[:6], calls[6:]:
        n_found = head[4][1][3]
        assert [name for name, _ in head[:1]] == ["__call__"]
        assert head[1:] == [
            ("matcher", ((2, 4, 5), ((2, 84, 5), (2, 84, 4)))),
            ("separate_anchor", ((2, 84, 9),)),
            ("loss_cls", ((2, 84, 5), (2, 84, 5), ())),
            ("loss_iou", ((2, 84, 4), (2, 84, 4), (2, 84), n_found, ())),
            ("loss_dfl", ((2, 84, 4, 16), (2, 84, 4), (2, 84), n_found, ())),
        ]


def test_what_is_overridden_changes_the_losses(device: torch.device) -> None:
    class Mine(dt.YOLOv9Criterion):
        def separate_anchor(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
            scores, boxes = super().separate_anchor(anchors)
            return scores / 2, boxes

    class FirstTarget(dt.BoxMatcher):
        def __call__(self, target: Tensor, predict: Any) -> tuple[Tensor, Tensor]:
            return super().__call__(target[:, :1], predict)

    batch = yolov9().on(device)
    vec2box = anchors_of(device=device)
    expected = dt.YOLOv9Criterion(CLASSES, vec2box)(**batch.inputs)
    halved = Mine(CLASSES, vec2box)(**batch.inputs)
    for loss in ("loss_df", "loss_iou"):
        torch.testing.assert_close(halved[loss], expected[loss])
    assert halved["loss_cls"] > 1.5 * expected["loss_cls"]
    first = dt.YOLOv9Criterion(CLASSES, vec2box)
    first.matcher = FirstTarget(CLASSES, vec2box.anchor_grid)
    inputs = {**batch.inputs, "targets": batch.inputs["targets"][:, :1]}
    torch.testing.assert_close(
        first(**batch.inputs), dt.YOLOv9Criterion(CLASSES, vec2box)(**inputs)
    )


def test_anchors_of_a_part_are_its_own(device: torch.device) -> None:
    """Those of a matcher or of a DFLoss count; what had the criterion's follow its updates."""
    batch = yolov9().on(device)
    vec2box, moved = anchors_of(device=device), anchors_of(device=device)
    moved.anchor_grid = moved.anchor_grid + 3
    plain = dt.YOLOv9Criterion(CLASSES, vec2box)
    expected = plain(**batch.inputs)
    matching = dt.YOLOv9Criterion(CLASSES, vec2box)
    matching.matcher = dt.BoxMatcher(CLASSES, moved.anchor_grid)
    one_by_one = copy.deepcopy(matching)
    one_by_one.matcher = functools.partial(one_by_one.matcher)
    losses = matching(**batch.inputs)
    torch.testing.assert_close(losses, one_by_one(**batch.inputs))
    assert abs(losses["loss_cls"] - expected["loss_cls"]) > 0.1
    of_slot = dt.YOLOv9Criterion(CLASSES, vec2box, loss_dfl=dt.DFLoss(moved))(**batch.inputs)
    torch.testing.assert_close(of_slot["loss_cls"], expected["loss_cls"])
    assert abs(of_slot["loss_df"] - expected["loss_df"]) > 0.1

    wide = {"main_preds": head_of([(4, 8), (2, 4), (1, 2)]), "targets": batch.inputs["targets"]}
    wide = {key: yolov9_on(value, device) for key, value in wide.items()}
    plain.vec2box.update((32, 64), device)
    torch.testing.assert_close(
        plain(**wide),
        dt.YOLOv9Criterion(CLASSES, anchors_of((32, 64), device=device))(**wide),
    )
    with pytest.raises(ValueError, match=r"matcher.anchors must have shape \(A, 2\) = \(42, 2\)"):
        matching(**wide)


def yolov9_on(x: Any, device: torch.device) -> Any:
    if isinstance(x, (list, tuple)):
        return type(x)(yolov9_on(y, device) for y in x)
    return x.to(device)


def test_subclasses_that_override_nothing_run_fused(device: torch.device) -> None:
    def named(kind: type) -> Any:
        return type("Named", (kind,), {"more": lambda self: 1})

    batch = yolov9().on(device)
    criterion = criterion_of(device, **{part: named(kind) for part, kind in KINDS.items()})
    with NoHostReads(device):
        criterion(**batch.inputs)


@pytest.mark.parametrize(
    "step_of_otx",
    ["get_valid_matrix", "get_iou_matrix", "get_cls_matrix", "filter_topk", "filter_duplicates"],
)
@pytest.mark.parametrize("in_criterion", [True, False])
def test_steps_that_are_not_taken_are_refused(step_of_otx: str, in_criterion: bool) -> None:
    """OTX's matcher has them: overridden, they would be ignored, unless all of it is overridden."""
    batch, vec2box = yolov9(), anchors_of()
    criterion = dt.YOLOv9Criterion(CLASSES, vec2box)
    methods: dict[str, Any] = {step_of_otx: lambda *_: None}
    mine = type("Mine", (dt.BoxMatcher,), methods)(CLASSES, vec2box.anchor_grid)
    for matcher in (mine, dt.BoxMatcher(CLASSES, vec2box.anchor_grid)):
        setattr(matcher, step_of_otx, methods[step_of_otx])
        criterion.matcher = matcher
        with pytest.raises(TypeError, match=f"{step_of_otx}, which is not called: override match"):
            if in_criterion:
                criterion(**batch.inputs)
            else:
                matcher(batch.inputs["targets"], vec2box(batch.inputs["main_preds"])[::2])
    theirs = dt.BoxMatcher(CLASSES, vec2box.anchor_grid)
    methods["__call__"] = lambda self, *args: theirs(*args)
    criterion.matcher = type("Mine", (dt.BoxMatcher,), methods)(CLASSES, vec2box.anchor_grid)
    criterion(**batch.inputs)


def test_parts_that_do_not_fit_are_refused() -> None:
    class Mine(dt.YOLOv9Criterion):
        def _forward(self, *args: Any) -> Any:
            raise AssertionError

    class Whole(Mine):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    batch, vec2box = yolov9(), anchors_of()
    with pytest.raises(TypeError, match="Mine has a _forward, which forward does not call: overr"):
        Mine(CLASSES, vec2box)(**batch.inputs)
    Whole(CLASSES, vec2box)(**batch.inputs)
    criterion = dt.YOLOv9Criterion(CLASSES, vec2box)
    criterion.matcher = dt.BoxMatcher(3, vec2box.anchor_grid)
    with pytest.raises(ValueError, match=r"matcher\.class_num must be num_classes = 5, got 3"):
        criterion(**batch.inputs)
    stale = dt.YOLOv9Criterion(CLASSES, vec2box, loss_dfl=dt.DFLoss(anchors_of((32, 64))))
    with pytest.raises(ValueError, match=r"DFLoss: targets_bbox must have .* = \(B, 42, 4\), got"):
        stale(**batch.inputs)
    criterion.matcher = lambda target, predict: (predict[1], predict[1][..., 0] > 0)
    with pytest.raises((ValueError, RuntimeError)):
        criterion(**batch.inputs)
    theirs = dt.BoxMatcher(CLASSES, vec2box.anchor_grid)
    criterion.matcher = lambda *args: (theirs(*args)[0], theirs(*args)[1][:, 1:])
    with pytest.raises(ValueError, match=r"Criterion: mask of matcher must have .* \(2, 84\)"):
        criterion(**batch.inputs)


MAPS = [(8, 12), (4, 6), (2, 3)]
MISFITS: dict[str, tuple[tuple[int, int], list[int], list[tuple[int, int]], str]] = {
    "order": ((64, 96), [8, 16, 32], MAPS[::-1], r"\(8, 12\) at stride 8, got \(2, 3\): .*order"),
    "order of two": (
        (64, 96),
        [8, 16, 32],
        [MAPS[0], *MAPS[:0:-1]],
        r"level 1 must have \(h, w\) = \(4, 6\) at stride 16, got \(2, 3\): .* order",
    ),
    "strides": (
        (64, 96),
        [32, 16, 8],
        MAPS,
        r"\(2, 3\) at stride 32, got \(8, 12\): .*order than vec2box's strides \[32, 16, 8\]",
    ),
    "width first": (
        (96, 64),
        [8, 16, 32],
        MAPS,
        r"\(12, 8\) at stride 8, got \(8, 12\): .*image_size .*is \(height, width\)",
    ),
    "size": (
        (64, 64),
        [8, 16, 32],
        MAPS,
        r"\(8, 8\) at stride 8, got \(8, 12\): .*call vec2box.update\(\(height, width\), device\)",
    ),
    "as many anchors": (
        (32, 192),
        [8, 16, 32],
        MAPS,
        r"\(4, 24\) at stride 8, got \(8, 12\): .*call vec2box.update",
    ),
    "levels": ((64, 96), [8, 16, 32], MAPS[:2], r"an entry per level, got 2 for strides \[8, 16"),
    "no levels": ((64, 96), [8, 16, 32], [], "an entry per level, got none for strides"),
    "rounded up": (
        (60, 90),
        [8, 16, 32],
        MAPS,
        r"\(7, 11\) at stride 8, got \(8, 12\): .*\(60, 90\).*multiple of 32.*as \(64, 96\)",
    ),
}


class TheirVec2Box:
    """A stranger's, with the attributes of OTX's and nothing else."""

    def __init__(self, ours: dt.Vec2Box) -> None:
        self.anchor_grid, self.scaler, self.strides = ours.anchor_grid, ours.scaler, ours.strides
        self.calls = 0

    def __call__(self, predicts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, ...]:
        self.calls += 1
        classes, distributions, sides = (
            torch.cat([x[part].flatten(-2) for x in predicts], -1).movedim(-1, 1)
            for part in range(3)
        )
        sides = sides * self.scaler[:, None]
        corners = torch.cat(
            [self.anchor_grid - sides[..., :2], self.anchor_grid + sides[..., 2:]], -1
        )
        return classes, distributions.transpose(2, 3), corners


def attributes(ours: dt.Vec2Box) -> SimpleNamespace:
    return SimpleNamespace(
        anchor_grid=ours.anchor_grid, scaler=ours.scaler, strides=tuple(ours.strides)
    )


@pytest.mark.parametrize("kind", ["ours", "theirs", "attributes"])
@pytest.mark.parametrize("argument", ["main_preds", "aux_preds"])
@pytest.mark.parametrize("misfit", list(MISFITS))
def test_each_level_fits_its_anchors(misfit: str, argument: str, kind: str) -> None:
    size, strides, sizes, message = MISFITS[misfit]
    vec2box: Any = dt.Vec2Box(None, size, strides)
    if kind != "ours":
        vec2box = (TheirVec2Box if kind == "theirs" else attributes)(vec2box)
        # An object of another's knows nothing of its image.
        message = message.replace(r".*\(60, 90\).*multiple of 32.*as \(64, 96\)", "")
    criterion = dt.YOLOv9Criterion(CLASSES, vec2box)
    right = head_of([(size[0] // s, size[1] // s) for s in strides])
    heads = {"main_preds": right, "aux_preds": right, argument: head_of(sizes)}
    with pytest.raises(ValueError, match=f"YOLOv9Criterion: {argument}.*{message}") as error:
        criterion(**heads, targets=torch.tensor([[[0.0, 8, 8, 40, 40]]] * 2))
    assert "\n" not in str(error.value)


def test_images_of_no_multiple_of_the_strides(device: torch.device) -> None:
    """Maps that are rounded down are right, whatever the images."""
    vec2box = anchors_of((60, 90), device=device)
    assert vec2box.map_sizes == [(7, 11), (3, 5), (1, 2)]
    head = yolov9_on(head_of(vec2box.map_sizes), device)
    targets = torch.tensor([[[0.0, 8, 8, 40, 40]]] * 2, device=device)
    dt.YOLOv9Criterion(CLASSES, vec2box)(head, targets)


@pytest.mark.parametrize(
    ("size", "maps", "stride"),
    [
        ((64, 96), (2, 3), 32),
        ((100, 100), (12, 12), 8),
        ((100, 100), (13, 13), None),
        ((104, 104), (6, 6), None),
        ((64, 96), (2, 6), None),
    ],
)
def test_strides_that_maps_do_not_tell(
    size: tuple[int, int], maps: tuple[int, int], stride: int | None
) -> None:
    def make() -> dt.Vec2Box:
        return dt.Vec2Box(lambda _: head_of([maps]), size, None)

    if stride is None:
        with pytest.raises(ValueError, match=r"detector, level 0: .*give `strides`, or an image_s"):
            make()
    else:
        assert make().strides == [stride]


@pytest.mark.parametrize(
    ("size", "strides", "message"),
    [
        (64, [8], r"image_size must be \(height, width\), got 64"),
        ((3, 64, 64), [8], r"image_size must be \(height, width\), got \(3, 64, 64\)"),
        ((64, 64), [], r"strides must be positive, one per level, got \[\]"),
        ((64, 64), [8, 0], r"strides must be positive, one per level, got \[8, 0\]"),
    ],
)
def test_sizes_and_strides_that_are_none(size: Any, strides: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dt.Vec2Box(None, size, strides)


@pytest.mark.parametrize("kind", [TheirVec2Box, attributes])
def test_anchors_of_others(
    kind: Callable[[dt.Vec2Box], Any], backend: str, device: torch.device
) -> None:
    """Alone, and with a part that calls all of them one by one; after an update too."""
    for matcher in (False, True):
        ours, theirs = (yolov9(images=1, targets=2).on(device) for _ in range(2))
        vec2box, updated = (kind(anchors_of(size, device=device)) for size in ((32, 32), SIZE))
        criterion = dt.YOLOv9Criterion(CLASSES, vec2box)
        if matcher:
            criterion.matcher = MatcherModule(dt.BoxMatcher(CLASSES, updated.anchor_grid))
        vec2box.anchor_grid, vec2box.scaler = updated.anchor_grid, updated.scaler
        theirs = dataclasses.replace(theirs, make=lambda criterion=criterion, **_: criterion)
        losses, gradients = step(theirs, device)
        expected_losses, expected_gradients = step(ours, device)
        assert_same(losses, expected_losses, 1e-5)
        assert_same(gradients, expected_gradients, 1e-5)
        assert getattr(vec2box, "calls", 2) == 2


@pytest.mark.parametrize("missing", ["anchor_grid", "scaler", "strides"])
def test_what_a_vec2box_lacks_is_named(missing: str) -> None:
    lacks = attributes(anchors_of())
    delattr(lacks, missing)
    message = f"Criterion: vec2box must have .*, got a SimpleNamespace without {missing}$"
    with pytest.raises(ValueError, match=message):
        dt.YOLOv9Criterion(CLASSES, lacks)
    criterion, batch = dt.YOLOv9Criterion(CLASSES, anchors_of()), yolov9()
    for value in (torch.zeros(7, 3), [1, 2]):
        wrong = attributes(anchors_of())
        if missing != "strides":
            setattr(wrong, missing, value)
            criterion.vec2box = wrong
            with pytest.raises((ValueError, TypeError), match=f"vec2box: {missing} must"):
                dt.YOLOv9Criterion(CLASSES, wrong)
    criterion.vec2box = lacks
    if missing == "anchor_grid":
        with pytest.raises(ValueError, match=message):
            criterion(**batch.inputs)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float16, torch.float64])
@pytest.mark.parametrize("otx", [False, True])
def test_targets_of_any_type(
    dtype: torch.dtype, otx: bool, backend: str, device: torch.device
) -> None:
    """Whole pixels and classes are the same targets, and what is computed in is the heads' type."""
    losses = []
    for of_targets in (torch.float32, dtype):
        batch = yolov9(images=1, size=32, targets=2).on(device)
        batch.inputs["targets"] = batch.inputs["targets"].round().to(of_targets)
        slots = {"loss_iou": TwiceBoxLoss()} if otx else {}
        losses.append(step(batch, device, **slots))
    (expected, expected_gradients), (found, gradients) = losses
    assert {x.dtype for x in found.values()} == {torch.float32}
    assert_same(found, expected, 0)
    assert_same(gradients, expected_gradients, 0)


class TwiceBoxLoss(dt.BoxLoss):
    def forward(self, *args: Any) -> Tensor:
        return 2 * super().forward(*args)


@pytest.mark.parametrize("otx", [False, True])
def test_targets_are_detached(otx: bool, backend: str, device: torch.device) -> None:
    ours, theirs = (yolov9(images=1, size=32, targets=2).on(device) for _ in range(2))
    slots = {"loss_iou": TwiceBoxLoss()} if otx else {}
    expected, _ = step(ours, device, **slots)
    targets = theirs.inputs["targets"].requires_grad_()
    losses = theirs.criterion(device, **slots)(**theirs.inputs)
    losses["total_loss"].backward()
    assert targets.grad is None
    assert_same({key: x.detach() for key, x in losses.items()}, expected, 0)


@pytest.mark.parametrize("otx", [False, True])
@pytest.mark.parametrize("argument", ["targets", "main_preds", "aux_preds", "vec2box", "matcher"])
def test_devices_that_differ_are_named(argument: str, otx: bool) -> None:
    batch, meta = yolov9(), torch.device("meta")
    criterion = dt.YOLOv9Criterion(
        CLASSES, anchors_of(), loss_iou=TwiceBoxLoss() if otx else dt.BoxLoss()
    )
    message = "must be on cpu as vec2box.anchor_grid is, got meta"
    if argument == "vec2box":
        criterion.vec2box.update(SIZE, meta)
        message = "main_preds, level 0 must be on meta as vec2box is, got cpu: call vec2box.update"
    elif argument == "matcher":
        criterion.matcher = dt.BoxMatcher(CLASSES, anchors_of(device="meta").anchor_grid)
        message = f"matcher.anchors {message}"
    else:
        batch.inputs[argument] = yolov9_on(batch.inputs[argument], meta)
        if argument != "targets":
            message = "level 0 must be on cpu as vec2box is, got meta: call vec2box.update"
        message = f"{argument}.* {message}"
    with pytest.raises(ValueError, match=f"YOLOv9Criterion: {message}"):
        criterion(**batch.inputs)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda levels: levels[0][0], "must be a list with an entry per level, got .*Tensor"),
        (lambda levels: levels[0], "level 0 must be .*distances.*, got .*Tensor"),
        (lambda levels: dict(enumerate(levels)), "must be a list with an entry per level, got .*d"),
        (lambda levels: [levels[0], None, levels[2]], "level 1 must be .*distances.*, got .*None"),
        (lambda levels: [levels[0], (*levels[1][:2], None), levels[2]], "level 1: distances must"),
    ],
)
def test_heads_that_are_no_levels(head: Callable[[Any], Any], message: str) -> None:
    batch = yolov9()
    for argument in ("main_preds", "aux_preds"):
        inputs = {**batch.inputs, argument: head(batch.inputs[argument])}
        with pytest.raises(TypeError, match=f"YOLOv9Criterion: {argument}(:|,)? {message}"):
            batch.criterion("cpu")(**inputs)


def boxes(*rows: list[float]) -> Tensor:
    return torch.tensor([list(rows)])


UNITS = [
    ("normalised", boxes([0, 0.1, 0.1, 0.6, 0.6]), False),
    ("the first image's only", boxes([-1, 0, 0, 0, 0], [1, 0.5, 0.5, 1, 1]), False),
    ("beside padding in pixels", boxes([-1, 5, 5, 40, 40], [1, 0.5, 0.5, 1, 1]), False),
    ("beside a class of none", boxes([1, 0.5, 0.5, 1, 1], [0, 0.2, 0.1, 0.3, 0.5]), False),
    ("normalised, beyond the image", boxes([0, -0.3, 0.1, 1.2, 0.6]), False),
    ("whole numbers", boxes([0, 0, 0, 1, 1]).long(), False),
    ("pixels", boxes([0, 8, 8, 40, 40]), True),
    ("a sliver beside pixels", boxes([0, 0, 0, 0.4, 0.9], [1, 8, 8, 40, 40]), True),
    ("outside of the image", boxes([0, -80, -90, -20, 100]), True),
    ("without area", boxes([0, 0, 0, 0, 0]), True),
    ("none", boxes([-1, 0, 0, 1, 1]), True),
]


@pytest.mark.parametrize(("targets", "is_right"), [x[1:] for x in UNITS], ids=[x[0] for x in UNITS])
def test_boxes_are_in_pixels(targets: Tensor, is_right: bool) -> None:
    criterion = dt.YOLOv9Criterion(CLASSES, anchors_of())
    head = head_of([(8, 8), (4, 4), (2, 2)], images=1)
    criterion(head, targets)
    with validation(True):
        if is_right:
            criterion(head, targets)
            return
        message = r"Criterion: targets, image 0, entry \[\d\]: expected boxes in pixels.*got \["
        with pytest.raises(ValueError, match=message):
            criterion(head, targets)


MATCHER_ARGUMENTS: dict[str, tuple[Callable[..., Any], str]] = {
    "target": (lambda t, p, b: (t[..., :4], (p, b)), r"target must have shape .* 5\).*got \(2, 4,"),
    "images": (lambda t, p, b: (t[:1], (p, b)), r"target must have shape .*= \(2, T, 5\)"),
    "classes": (lambda t, p, b: (t, (p[..., :3], b)), r"predict\[0\] must have .* = \(B, 84, 5\)"),
    "anchors": (lambda t, p, b: (t, (p[:, 1:], b[:, 1:])), r"predict\[0\] must have .*\(B, 84, 5"),
    "boxes": (lambda t, p, b: (t, (p, b[:, 1:])), r"predict\[1\] must have .* = \(2, 84, 4\)"),
    "no pair": (lambda t, p, b: (t, p), r"predict must be \(logits, boxes\), got .*Tensor"),
    "no tensor": (lambda t, p, b: (t.tolist(), (p, b)), "target must be a tensor, got list"),
    "its device": (lambda t, p, b: (t.to("meta"), (p, b)), "target must be on cpu as anchors is"),
    "a device": (lambda t, p, b: (t, (p, b.to("meta"))), r"predict\[1\] must be on cpu as anchors"),
}


@pytest.mark.parametrize("wrong", list(MATCHER_ARGUMENTS))
def test_a_matchers_arguments_are_named(wrong: str) -> None:
    batch, vec2box = yolov9(), anchors_of()
    change, message = MATCHER_ARGUMENTS[wrong]
    classes, _, predicted = vec2box(batch.inputs["main_preds"])
    matcher = dt.BoxMatcher(CLASSES, vec2box.anchor_grid)
    with pytest.raises((ValueError, TypeError), match=f"^BoxMatcher: {message}"):
        matcher(*change(batch.inputs["targets"], classes, predicted))


def test_a_matchers_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"factor must have the keys 'iou' and 'cls', got \['iou'"):
        dt.BoxMatcher(CLASSES, anchors_of().anchor_grid, factor={"iou": 6.0})
    with pytest.raises(ValueError, match=r"BoxMatcher: anchors must have shape \(A, 2\), got"):
        dt.BoxMatcher(CLASSES, anchors_of().scaler)


def test_a_matcher_without_targets_or_gradients(backend: str, device: torch.device) -> None:
    """No row matches nothing, and what it returns requires no gradient, whatever it is given."""
    batch, vec2box = yolov9().on(device), anchors_of(device=device)
    classes, _, predicted = vec2box(batch.inputs["main_preds"])
    matcher = dt.BoxMatcher(CLASSES, vec2box.anchor_grid)
    aligned, valid = matcher(batch.inputs["targets"][:, :0], (classes, predicted))
    assert aligned.shape == (2, 84, CLASSES + 4) and valid.shape == (2, 84)
    assert not aligned.any() and not valid.any()
    targets = batch.inputs["targets"].requires_grad_()
    aligned, valid = matcher(targets, (classes, predicted))
    assert valid.any() and not aligned.requires_grad
