"""Images annotated in COCO format, scaled to the detector's square input."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from .coco import Entry, read_coco
from .samples import InputError, Sample

VALIDATION_SHARE = 0.2
MOST_VALIDATION_IMAGES = 200
CACHE_BYTES = 2**28
BORDER_GREY = 114


class CocoImages:
    """Training images in random order, half of them mirrored; a fifth of all is held out.

    Raises:
        InputError: if the files cannot be used, naming the argument and what was expected.
    """

    def __init__(self, images: Path, annotations: Path, image_size: int, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        names, entries = read_coco(images, annotations)
        self.class_names: Sequence[str] = names
        # Headers only, which is quick: a wrong file should not end a run that is half done.
        for entry in entries:
            with _opened(entry):
                pass
        with_boxes = [entry for entry in entries if len(entry.labels)]
        without = [entry for entry in entries if not len(entry.labels)]
        if len(with_boxes) < 2:
            raise InputError(
                f"--annotations {annotations}: expected at least 2 images with boxes (crowds do "
                f"not count), to train on and to validate on, got {len(with_boxes)}"
            )
        training, held_out = self._split(with_boxes, at_least=1)
        for mine, theirs in zip((training, held_out), self._split(without, 0), strict=True):
            mine.extend(theirs)
        self._training = training
        # As many scaled images as fit in CACHE_BYTES are kept: small sets are read once.
        self._load = functools.lru_cache(max(1, CACHE_BYTES // (3 * image_size**2)))(
            lambda index: letterbox(training[index], image_size)
        )
        self.validation = [letterbox(entry, image_size) for entry in held_out]

    def batch(self, size: int, share: slice = slice(None)) -> list[Sample]:
        """Draw the next `size` training images, and load a share of them."""
        chosen = self._rng.integers(len(self._training), size=size).tolist()[share]
        mirrored = (self._rng.random(size) < 0.5)[share]
        return [
            mirror(self._load(index)) if flip else self._load(index)
            for index, flip in zip(chosen, mirrored, strict=True)
        ]

    def _split(self, entries: list[Entry], at_least: int) -> tuple[list[Entry], list[Entry]]:
        held_out = max(at_least, round(VALIDATION_SHARE * len(entries)))
        held_out = min(held_out, MOST_VALIDATION_IMAGES)
        shuffled = [entries[index] for index in self._rng.permutation(len(entries))]
        return shuffled[held_out:], shuffled[:held_out]


@contextmanager
def _opened(entry: Entry) -> Iterator[Image.Image]:
    """The image file, its header read; what goes wrong with it, then or later, is an InputError."""
    try:
        with Image.open(entry.path) as file:
            if file.size != (entry.width, entry.height):
                raise InputError(
                    f"--images: {entry.path} has {file.width}x{file.height} pixels, expected "
                    f"{entry.width}x{entry.height} as the annotations say"
                )
            yield file
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"--images: expected an image in {entry.path} ({error})") from None


def letterbox(entry: Entry, side: int) -> Sample:
    """Scale an image to fit a square of `side` pixels, centred between grey borders.

    Raises:
        InputError: if the file is not an image of the size that the annotations give.
    """
    with _opened(entry) as file:
        # JPEG files are decoded near the size needed, which is several times faster.
        file.draft("RGB", (side, side))
        picture = file.convert("RGB")
    scale = side / max(entry.width, entry.height)
    width, height = (max(1, round(scale * length)) for length in (entry.width, entry.height))
    left, top = (side - width) // 2, (side - height) // 2
    canvas = Image.new("RGB", (side, side), (BORDER_GREY,) * 3)
    canvas.paste(picture.resize((width, height), Image.Resampling.BILINEAR), (left, top))
    # The two sides may be rounded by different factors.
    factors = np.array([width / entry.width, height / entry.height] * 2)
    boxes = entry.boxes * factors + np.array([left, top] * 2)
    return Sample(np.asarray(canvas), boxes.astype(np.float32), entry.labels)


def mirror(sample: Sample) -> Sample:
    """Swap left and right."""
    boxes = sample.boxes.copy()
    boxes[:, [0, 2]] = sample.image.shape[1] - boxes[:, [2, 0]]
    return Sample(sample.image[:, ::-1], boxes, sample.labels)
