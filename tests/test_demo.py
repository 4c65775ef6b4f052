"""The parts of the training demo, each on its own."""

from __future__ import annotations

import io
import json
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms

from detloss_triton import cli
from detloss_triton.demo.average_precision import average_precision
from detloss_triton.demo.coco import Entry
from detloss_triton.demo.coco_images import BORDER_GREY, CocoImages, letterbox, mirror
from detloss_triton.demo.decode import detections
from detloss_triton.demo.detectors import RECIPES
from detloss_triton.demo.dfine import moved_sides
from detloss_triton.demo.pictures import running_mean
from detloss_triton.demo.samples import (
    Array,
    Detections,
    InputError,
    Sample,
    stack_images,
)
from detloss_triton.demo.shape_images import CLASS_NAMES, MOST_SHAPES, ShapeImages
from detloss_triton.demo.train import Settings, evaluate, fit, rate
from detloss_triton.ops.queries import bin_positions, box_bins

CPU = torch.device("cpu")
# Steps in which a detector learns an image by heart.
SIGHTS = 25


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny work gains nothing from threads, and threads that wait for a busy core lose a lot."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sample(*rows: tuple[float, float, float, float, int], side: int = 64) -> Sample:
    """A black image with boxes `(x1, y1, x2, y2, label)`."""
    table = np.array(rows, np.float32).reshape(-1, 5)
    image = np.zeros((side, side, 3), np.uint8)
    return Sample(image, table[:, :4], table[:, 4].astype(np.int64))


def found(boxes: Array, labels: Array, scores: list[float]) -> Detections:
    return Detections(boxes, np.array(scores, np.float32), labels)


def test_shapes_lie_inside_and_repeat_with_the_seed() -> None:
    images, same, other = ShapeImages(96, 3), ShapeImages(96, 3), ShapeImages(96, 4)
    batch = images.batch(40)
    for a, b in zip(batch, same.batch(40), strict=True):
        assert np.array_equal(a.image, b.image) and np.array_equal(a.boxes, b.boxes)
    assert not np.array_equal(batch[0].image, other.batch(1)[0].image)
    assert not np.array_equal(batch[0].image, images.validation[0].image)
    for drawn in [*batch, *images.validation]:
        assert drawn.image.shape == (96, 96, 3) and drawn.image.dtype == np.uint8
        assert 1 <= len(drawn.boxes) == len(drawn.labels) <= MOST_SHAPES
        assert drawn.boxes.min() >= 0 and drawn.boxes.max() <= 96
        assert (drawn.boxes[:, 2:] - drawn.boxes[:, :2] > 4).all()
    assert set(np.concatenate([s.labels for s in batch])) == set(range(len(CLASS_NAMES)))


def test_shares_of_a_batch_make_it_up() -> None:
    whole = ShapeImages(64, 3).batch(5)
    shares = [ShapeImages(64, 3).batch(5, slice(rank, None, 2)) for rank in range(2)]
    assert [len(share) for share in shares] == [3, 2]
    for rank, share in enumerate(shares):
        for a, b in zip(share, whole[rank::2], strict=True):
            assert np.array_equal(a.image, b.image) and np.array_equal(a.boxes, b.boxes)


def test_moved_sides_undo_the_criterions_bins() -> None:
    torch.manual_seed(0)
    scale = torch.tensor([4.0])
    positions = bin_positions(32, torch.tensor([0.5]), scale)
    points = torch.rand(1, 2, 5, 4) * 0.2 + 0.4
    boxes = points + 0.02 * torch.randn_like(points)
    left, right_weight = box_bins(points, boxes, positions, scale)
    distances = torch.lerp(positions[left], positions[left + 1], right_weight)
    torch.testing.assert_close(moved_sides(points, distances, 4.0), boxes)
    assert torch.equal(moved_sides(points, torch.zeros_like(points), 4.0), points)


def test_stacked_images_keep_channels_innermost() -> None:
    images = stack_images([sample(), sample()], CPU)
    assert images.shape == (2, 3, 64, 64)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_perfect_detections_score_one_and_none_score_zero() -> None:
    truth = [sample((2, 2, 30, 40, 0), (40, 40, 60, 60, 1)), sample(), sample((5, 5, 9, 20, 1))]
    perfect = [found(s.boxes, s.labels, [0.9] * len(s.labels)) for s in truth]
    assert average_precision(truth, perfect, 3).ap == pytest.approx(1.0)
    nothing = [found(s.boxes[:0], s.labels[:0], []) for s in truth]
    assert average_precision(truth, nothing, 3).ap50 == 0.0
    wrong_class = [found(s.boxes, 1 - s.labels, [0.9] * len(s.labels)) for s in truth]
    assert average_precision(truth, wrong_class, 3).ap50 == 0.0


def test_ap50_forgives_what_ap_does_not() -> None:
    truth = [sample((10, 10, 50, 50, 0))]
    shifted = [found(truth[0].boxes + 6, truth[0].labels, [0.9])]
    precision = average_precision(truth, shifted, 1)
    assert precision.ap50 == pytest.approx(1.0)
    assert 0 < precision.ap < 0.5


def test_suppression_works_within_a_class() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 20, 30, 30]])
    scores = torch.tensor([[0.9, 0.8], [0.7, 0.0], [0.6, 0.0]])
    (result,) = detections(scores[None], boxes[None], image_size=32)
    assert list(zip(result.labels.tolist(), result.boxes[:, 0].tolist(), strict=True)) == [
        (0, 0.0),
        (1, 0.0),
        (0, 20.0),
    ]
    assert result.scores.tolist() == pytest.approx([0.9, 0.8, 0.6])


def test_letterbox_scales_boxes_with_the_image(tmp_path: Path) -> None:
    pixels = np.zeros((50, 100, 3), np.uint8)
    pixels[10:30, 20:60] = 255
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    box = np.array([[20, 10, 60, 30]], np.float32)
    boxed = letterbox(Entry(path, 100, 50, box, np.array([0])), side=200)
    assert boxed.boxes.tolist() == [[40, 70, 120, 110]]
    assert boxed.image[72:108, 42:118].min() > 250
    assert boxed.image[52:68, :].max() < 5

    flipped = mirror(boxed)
    assert flipped.boxes.tolist() == [[80, 70, 160, 110]]
    assert flipped.image[72:108, 82:158].min() > 250


WIDTH, HEIGHT, BOX = 96, 64, (8, 6, 38, 26)
RED, DARK = (250, 30, 30), (60, 60, 60)
# How a camera held so stores what is upright, by EXIF's number.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def red_on_dark(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    picture = Image.new("RGB", (width, height), DARK)
    picture.paste(RED, BOX)
    return picture


def entry(path: Path, width: int = WIDTH, height: int = HEIGHT) -> Entry:
    return Entry(path, width, height, np.array([BOX], np.float32), np.array([0]))


def colours(boxed: Sample) -> tuple[Array, Array]:
    """Mean colours within the box, and of all that lies around it: the edges are left out."""
    x1, y1, x2, y2 = boxed.boxes[0].round().astype(int)
    inside = boxed.image[y1 + 2 : y2 - 2, x1 + 2 : x2 - 2]
    picture = np.ones(boxed.image.shape[:2], bool)
    top = (picture.shape[0] - round(picture.shape[0] * HEIGHT / WIDTH)) // 2
    picture[:top] = picture[len(picture) - top :] = False
    picture[y1 - 2 : y2 + 2, x1 - 2 : x2 + 2] = False
    return inside.reshape(-1, 3).mean(0), boxed.image[picture].mean(0)


def oriented(orientation: object) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize("size", [(WIDTH, HEIGHT), (WIDTH, WIDTH)], ids=["oblong", "square"])
@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(
    orientation: int, kind: str, size: tuple[int, int], tmp_path: Path
) -> None:
    stored = red_on_dark(*size)
    if orientation in STORED:
        stored = stored.transpose(STORED[orientation])
    path = tmp_path / f"a.{kind}"
    stored.save(path, exif=oriented(orientation), quality=95)
    for side in (96, 160):
        boxed = letterbox(entry(path, *size), side)
        inside, around = colours(boxed)
        assert inside == pytest.approx(RED, abs=8) and around == pytest.approx(DARK, abs=8)


def test_an_orientation_behind_the_pixels_counts(tmp_path: Path) -> None:
    """As the PNG format allows: whoever looks at the header alone does not see it."""
    path = tmp_path / "0.png"
    file = io.BytesIO()
    red_on_dark().transpose(STORED[6]).save(file, "PNG", exif=oriented(6))
    content = file.getvalue()
    start = content.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", content[start : start + 4])[0]
    last = content.index(b"IEND") - 4
    path.write_bytes(content[:start] + content[end:last] + content[start:end] + content[last:])
    inside, _ = colours(letterbox(entry(path), 96))
    assert inside == pytest.approx(RED)


@pytest.mark.parametrize("exif", [oriented(0), oriented(9), b"Exif\0\0garbage"])
def test_an_orientation_without_a_meaning_is_none(exif: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    red_on_dark().save(path, exif=exif, quality=95)
    inside, around = colours(letterbox(entry(path), 96))
    assert inside == pytest.approx(RED, abs=8) and around == pytest.approx(DARK, abs=8)


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
def test_sizes_of_the_stored_pixels_are_refused(kind: str, tmp_path: Path) -> None:
    """Their boxes would be those of the stored pixels too, as no viewer shows them."""
    stored = red_on_dark()
    images = []
    for index in range(4):
        name = f"{index}.{kind}"
        stored.save(tmp_path / name, exif=oriented(6 if index == 2 else 1))
        images.append({"id": index, "file_name": name, "width": WIDTH, "height": HEIGHT})
    content = {
        "images": images,
        "categories": [{"id": 1, "name": "red"}],
        "annotations": [
            {"image_id": index, "category_id": 1, "bbox": [8, 6, 30, 20]} for index in range(4)
        ],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"2\.{kind} has 64x96 pixels.*, expected 96x64 as the"):
        CocoImages(tmp_path, tmp_path / "a.json", 96, 0)


def grey_16(kind: str) -> Image.Image:
    grey = np.asarray(red_on_dark().convert("L")).astype(kind) * 257
    return Image.fromarray(grey)


def lab() -> Image.Image:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    picture = ImageCms.applyTransform(
        red_on_dark(), ImageCms.buildTransform(srgb, lab, "RGB", "LAB")
    )
    assert picture is not None
    return picture


def transparent_around(mode: str) -> Image.Image:
    picture = red_on_dark().convert(mode)
    alpha = Image.new("L", picture.size, 0)
    alpha.paste(255, BOX)
    picture.putalpha(alpha)
    return picture


RED_AS_GREY = (96, 96, 96)
SEEN_THROUGH = (BORDER_GREY,) * 3
PICTURES: dict[str, tuple[Any, str, dict[str, Any], Any, Any]] = {
    "palette png": (lambda: red_on_dark().quantize(4), "png", {}, RED, DARK),
    "palette bmp": (lambda: red_on_dark().quantize(4), "bmp", {}, RED, DARK),
    "gif": (red_on_dark, "gif", {}, RED, DARK),
    "animated gif": (
        red_on_dark,
        "gif",
        {"save_all": True, "append_images": [Image.new("RGB", (WIDTH, HEIGHT), "blue")]},
        RED,
        DARK,
    ),
    "1-bit": (
        lambda: red_on_dark().split()[0].point(lambda value: 255 * (value > 99)).convert("1"),
        "png",
        {},
        (255, 255, 255),
        (0, 0, 0),
    ),
    "grey png": (lambda: red_on_dark().convert("L"), "png", {}, RED_AS_GREY, DARK),
    "grey jpg": (lambda: red_on_dark().convert("L"), "jpg", {"quality": 95}, RED_AS_GREY, DARK),
    "16-bit png": (lambda: grey_16("<u2"), "png", {}, RED_AS_GREY, DARK),
    "16-bit tif": (lambda: grey_16("<u2"), "tif", {}, RED_AS_GREY, DARK),
    "16-bit big-endian tif": (lambda: grey_16(">u2"), "tif", {}, RED_AS_GREY, DARK),
    "16-bit jp2": (lambda: grey_16("<u2"), "jp2", {}, RED_AS_GREY, DARK),
    "16-bit pgm": (lambda: grey_16("<u2"), "pgm", {}, RED_AS_GREY, DARK),
    "16-bit, one grey hidden": (
        lambda: grey_16("<u2"),
        "png",
        {"transparency": 60 * 257},
        RED_AS_GREY,
        SEEN_THROUGH,
    ),
    "cmyk jpg": (lambda: red_on_dark().convert("CMYK"), "jpg", {"quality": 95}, RED, DARK),
    "cmyk tif": (lambda: red_on_dark().convert("CMYK"), "tif", {}, RED, DARK),
    "lab tif": (lab, "tif", {}, RED, DARK),
    "alpha png": (lambda: transparent_around("RGB"), "png", {}, RED, SEEN_THROUGH),
    "alpha webp": (lambda: transparent_around("RGB"), "webp", {}, RED, SEEN_THROUGH),
    "alpha tif": (lambda: transparent_around("RGB"), "tif", {}, RED, SEEN_THROUGH),
    "grey with alpha": (lambda: transparent_around("L"), "png", {}, RED_AS_GREY, SEEN_THROUGH),
    "palette with alpha": (
        lambda: transparent_around("RGB").quantize(4),
        "png",
        {},
        RED,
        SEEN_THROUGH,
    ),
    "transparent gif": (lambda: transparent_around("RGB"), "gif", {}, RED, SEEN_THROUGH),
    "one colour hidden": (red_on_dark, "png", {"transparency": DARK}, RED, SEEN_THROUGH),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_pixels_keeps_its_colours(name: str, tmp_path: Path) -> None:
    made, kind, options, inside, around = PICTURES[name]
    path = tmp_path / f"a.{kind}"
    made().save(path, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        boxed = letterbox(entry(path), 96)
    found_inside, found_around = colours(boxed)
    assert found_inside == pytest.approx(inside, abs=8)
    assert found_around == pytest.approx(around, abs=8)


def encoded(kind: str, picture: Image.Image | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    (picture or red_on_dark()).save(file, kind, **options)
    return file.getvalue()


def cut(kind: str, **options: Any) -> bytes:
    content = encoded(kind, **options)
    return content[: len(content) * 2 // 3]


def huge() -> bytes:
    """A PNG whose header promises more pixels than a machine should be asked for."""
    header = struct.pack(">IIBBBBB", 2**16, 2**16, 8, 2, 0, 0, 0)
    return encoded("PNG").replace(encoded("PNG")[16:29], header)


def no_pixels() -> bytes:
    return encoded("PNG").replace(encoded("PNG")[16:20], b"\0\0\0\0")


DAMAGED = {
    "empty": lambda: b"",
    "text": lambda: b"no image at all",
    "random": lambda: np.random.default_rng(0).bytes(5000),
    "huge": huge,
    "no pixels": no_pixels,
    **{
        f"cut {kind}": lambda kind=kind: cut(kind)
        for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA", "JPEG2000")
    },
    "cut tif with exif": lambda: cut("TIFF", exif=oriented(6)),
    "32-bit grey": lambda: encoded("TIFF", grey_16("i4")),
    "real numbers": lambda: encoded("TIFF", red_on_dark().convert("F")),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.picture"
    path.write_bytes(DAMAGED[name]())
    with warnings.catch_warnings(), pytest.raises(InputError) as caught:
        warnings.simplefilter("error")
        letterbox(entry(path), 96)
    assert str(caught.value).startswith("--images: ") and str(path) in str(caught.value)


@pytest.mark.parametrize("steps", [1, 2, 7, 500])
def test_rate_rises_then_falls(steps: int) -> None:
    rates = [rate(step, steps) for step in range(steps)]
    assert all(0 < value <= 1 for value in rates)
    if steps == 500:
        assert rates[0] < 0.1 < 0.9 < max(rates) and rates[-1] < 0.02


def test_running_mean_is_centred() -> None:
    assert running_mean([1.0, 2.0, 6.0], window=1).tolist() == [1, 2, 6]
    assert running_mean([1.0, 2.0, 6.0], window=2).tolist() == [1.5, 3, 4]


@pytest.mark.parametrize("criterion", sorted(RECIPES))
def test_a_batch_without_boxes_trains(criterion: str) -> None:
    torch.manual_seed(0)
    model = RECIPES[criterion].build(3, 64, CPU).train()
    empty = [sample(), sample()]
    losses = model(stack_images(empty, CPU), empty)
    losses["total_loss"].backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("criterion", ["detr", "dfine"])
def test_train_sums_each_term_over_the_layers(criterion: str, tmp_path: Path) -> None:
    size = ["--steps", "2", "--batch-size", "4", "--image-size", "64", "--device", "cpu"]
    assert cli.main(["train", "--criterion", criterion, *size, "--output", str(tmp_path)]) == 0
    losses = json.loads((tmp_path / "metrics.json").read_text())["losses"]
    terms = {"loss_vfl", "loss_bbox", "loss_giou"}
    terms |= {"loss_fgl", "loss_ddf"} if criterion == "dfine" else set()
    for values in losses.values():
        assert set(values) == {*terms, "total_loss"}
        assert values["total_loss"] == pytest.approx(sum(values[term] for term in terms))
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert (tmp_path / "predictions.png").stat().st_size > 10_000


@pytest.mark.parametrize("criterion", ["atss", "rtmdet", "ssd", "yolox"])
def test_a_dense_detector_has_seen_its_image(criterion: str) -> None:
    """After a few steps on one image it finds the box there: what is decoded is what was learnt."""
    torch.manual_seed(0)
    shown = sample((12, 20, 40, 44, 1))
    shown.image[20:44, 12:40] = 255
    model = RECIPES[criterion].build(3, 64, CPU).train()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for _ in range(SIGHTS):
        losses = model(stack_images([shown] * 2, CPU), [shown] * 2)
        optimizer.zero_grad()
        losses["total_loss"].backward()
        optimizer.step()
    assert losses["total_loss"].item() == pytest.approx(
        sum(x.item() for name, x in losses.items() if name != "total_loss")
    )
    # Statistics of the batches have not settled yet.
    model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train()
    with torch.no_grad():
        first, _ = model(stack_images([shown] * 2, CPU))
    assert first.labels[0] == 1
    assert first.boxes[0] == pytest.approx(shown.boxes[0], abs=6)


# Steps, and the share of the loss that may be left: a transformer needs longer, and the better its
# boxes, the more its classification and distribution losses count.
SHORT_TRAININGS = {"detr": (100, 0.8), "dfine": (110, 0.9), "yolov9": (100, 0.5)}


@pytest.mark.slow
@pytest.mark.parametrize("criterion", sorted(SHORT_TRAININGS))
def test_a_short_training_finds_shapes(criterion: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    steps, share = SHORT_TRAININGS[criterion]
    settings = Settings(criterion, steps, 8, 96, 0, "torch", CPU, 1, tmp_path)
    images = ShapeImages(96, 0)
    model = RECIPES[criterion].build(len(CLASS_NAMES), 96, CPU)
    history = fit(model, images, RECIPES[criterion].learning_rate, settings)
    assert set(map(len, history.values())) == {steps}
    assert history["total_loss"][-1] < share * history["total_loss"][0]
    assert evaluate(model, images, settings).precision.ap50 > 0.1
