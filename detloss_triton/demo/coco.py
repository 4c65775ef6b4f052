"""Reading annotations in COCO format; whatever is wrong with them is said in one line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .samples import Array, InputError

# Annotation tools round: a box may stick out by this many pixels, and is then clipped.
BORDER_TOLERANCE = 1.0
CONTENT = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


@dataclass(frozen=True)
class Entry:
    """One image on disk and its true boxes.

    Its size and boxes are those of the upright picture.

    Shapes: boxes (n, 4) float32 xyxy in pixels of the file; labels (n,) int64 in [0, classes).
    """

    path: Path
    width: int
    height: int
    boxes: Array
    labels: Array


def read_coco(images: Path, annotations: Path) -> tuple[list[str], list[Entry]]:
    """Return the class names and one entry per image, images without boxes included.

    Category ids become 0..n-1 in the order of the file; crowd annotations are left out.

    Raises:
        InputError: naming `--images` or `--annotations`, the record and what was expected.
    """
    if not os.path.isdir(images):
        raise InputError(f"--images: expected a directory of images, got {images}")
    try:
        content = _checked_content(_read_json(annotations))
        sizes = _image_sizes(content["images"])
        classes = _by_id("categories", content["categories"])
        boxes = _boxes_by_image(content["annotations"], sizes, classes)
    except InputError as error:
        raise InputError(f"--annotations {annotations}: {error}") from None
    entries = []
    for record in content["images"]:
        path = images / record["file_name"]
        if not os.path.isfile(path):
            raise InputError(
                f"--images {images}: the annotations name {record['file_name']!r}, "
                "but there is no such file"
            )
        rows = np.array(boxes[record["id"]], np.float32).reshape(-1, 5)
        entries.append(
            Entry(path, *sizes[record["id"]], rows[:, 1:].copy(), rows[:, 0].astype(np.int64))
        )
    return [str(record["name"]) for record in content["categories"]], entries


def _read_json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"expected a readable JSON file ({error.strerror})") from None
    except ValueError:
        raise InputError("expected a JSON file, got bytes that are not UTF-8") from None
    if not text.strip():
        raise InputError("expected JSON in COCO format, got an empty file")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"expected JSON in COCO format ({error})") from None


def _checked_content(content: Any) -> dict[str, list[dict[str, Any]]]:
    """Check that the three lists are there and that their records have the keys used."""
    if not isinstance(content, dict):
        raise InputError(f"expected an object with {', '.join(CONTENT)}, got {_shown(content)}")
    for name, keys in CONTENT.items():
        if name not in content:
            raise InputError(f"expected the key {name!r}, found {_shown(sorted(content))}")
        if not isinstance(content[name], list) or not content[name]:
            raise InputError(f"expected {name!r} to be a list that is not empty")
        for place, record in enumerate(content[name]):
            if not isinstance(record, dict):
                raise InputError(f"{name}[{place}]: expected an object, got {_shown(record)}")
            for key in keys:
                if key not in record:
                    raise InputError(f"{name}[{place}]: expected the key {key!r}")
    return content


def _by_id(name: str, records: list[dict[str, Any]]) -> dict[Hashable, int]:
    """Map each record's id to its place."""
    places: dict[Hashable, int] = {}
    for place, record in enumerate(records):
        key = record["id"]
        if not isinstance(key, int | str):
            raise InputError(
                f"{name}[{place}]: expected 'id' to be a whole number, got {_shown(key)}"
            )
        if key in places:
            raise InputError(f"{name}[{place}]: expected a unique 'id', got {_shown(key)} again")
        places[key] = place
    return places


def _image_sizes(records: list[dict[str, Any]]) -> dict[Hashable, tuple[int, int]]:
    _by_id("images", records)
    sizes = {}
    for place, record in enumerate(records):
        size = record["width"], record["height"]
        if not all(isinstance(side, int) and side > 0 for side in size):
            raise InputError(
                f"images[{place}]: expected 'width' and 'height' to be positive whole numbers, "
                f"got {_shown(size)}"
            )
        if not isinstance(record["file_name"], str):
            raise InputError(
                f"images[{place}]: expected 'file_name' to be text, "
                f"got {_shown(record['file_name'])}"
            )
        sizes[record["id"]] = size
    return sizes


def _boxes_by_image(
    records: list[dict[str, Any]],
    sizes: dict[Hashable, tuple[int, int]],
    classes: dict[Hashable, int],
) -> dict[Hashable, list[list[float]]]:
    """Rows `[class, x1, y1, x2, y2]` of each image."""
    boxes: dict[Hashable, list[list[float]]] = {key: [] for key in sizes}
    for place, record in enumerate(records):
        for key, known in (("image_id", sizes), ("category_id", classes)):
            if not isinstance(record[key], int | str) or record[key] not in known:
                raise InputError(
                    f"annotations[{place}]: expected {key!r} to be one of the ids listed, "
                    f"got {_shown(record[key])}"
                )
        if record.get("iscrowd"):
            continue
        try:
            box = list(_corners(record["bbox"], *sizes[record["image_id"]]))
        except InputError as error:
            raise InputError(f"annotations[{place}]: {error}") from None
        boxes[record["image_id"]].append([classes[record["category_id"]], *box])
    return boxes


def _corners(bbox: Any, width: int, height: int) -> Iterator[float]:
    """Corners x1, y1, x2, y2 of `[x, y, width, height]`, clipped to the image."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(map(_is_finite, bbox)):
        raise InputError(f"expected 'bbox' to be [x, y, width, height], got {_shown(bbox)}")
    x, y, w, h = map(float, bbox)
    if w <= 0 or h <= 0:
        raise InputError(f"expected 'bbox' to have a positive width and height, got {_shown(bbox)}")
    x1, y1, x2, y2 = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
    moved = max(x1 - x, y1 - y, x + w - x2, y + h - y2)
    if moved > BORDER_TOLERANCE or x2 <= x1 or y2 <= y1:
        raise InputError(
            f"expected 'bbox' to lie inside its image of {width}x{height} pixels, "
            f"got {_shown(bbox)}"
        )
    yield from (x1, y1, x2, y2)


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:
        return False


def _shown(value: Any) -> str:
    """The value on one short line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
