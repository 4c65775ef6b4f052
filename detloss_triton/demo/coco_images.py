"""Images annotated in COCO format, scaled to the detector's square input."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from .coco import Entry, read_coco
from .samples import InputError, Sample

VALIDATION_SHARE = 0.2
MOST_VALIDATION_IMAGES = 200
CACHE_BYTES = 2**28
BORDER_GREY = 114
# What makes a picture upright, by its EXIF orientation; from `FIRST_ON_ITS_SIDE` on, sides swap.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FIRST_ON_ITS_SIDE = 5
# A PNG may say how it is turned after its pixels, and pillow turns a TIFF while it decodes it.
DECODED_BEFORE_TURNED = ("PNG", "TIFF")
# Pillow's modes of 16-bit grey, and the formats in which a wider one holds 16 bits too.
GREY_16, WIDE, WIDE_IS_16_IN = "I;16", "I", ("PNG", "PPM")
GREY_LEVELS_16_BY_8 = 257


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
            _check_header(entry)
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
        with warnings.catch_warnings(), Image.open(entry.path) as file:
            # What is wrong with a file is said once, by the error.
            warnings.simplefilter("ignore")
            if file.mode == "F" or (file.mode == WIDE and file.format not in WIDE_IS_16_IN):
                raise InputError(
                    f"--images: {entry.path}: expected colours, or grey of at most 16 bits, got "
                    f"pillow's mode {file.mode!r}, in which no number is white"
                )
            yield file
    except InputError:
        raise
    except Exception as error:  # Decoders of damaged files raise nearly anything.
        reason = str(error) or type(error).__name__
        raise InputError(f"--images: expected an image in {entry.path} ({reason})") from None


def _check_header(entry: Entry) -> None:
    """Find a wrong file in little time: without its pixels, where that can be done."""
    with _opened(entry) as file:
        waits = file.format in DECODED_BEFORE_TURNED and "exif" not in file.info
        if not (waits and file.size == (entry.width, entry.height)):
            _checked_orientation(entry, file)


def _checked_orientation(entry: Entry, file: Image.Image) -> int:
    """EXIF's number for how the stored pixels are turned; the size of the upright is checked."""
    if file.format in DECODED_BEFORE_TURNED:
        file.load()
    try:
        orientation = file.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Damaged camera data say nothing, and the picture may be fine.
        orientation = 1
    size, turned = file.size, ""
    if orientation in TURNS and orientation >= FIRST_ON_ITS_SIDE:
        size, turned = size[::-1], f" when turned upright (EXIF orientation {orientation})"
    if size != (entry.width, entry.height):
        raise InputError(
            f"--images: {entry.path} has {size[0]}x{size[1]} pixels{turned}, expected "
            f"{entry.width}x{entry.height} as the annotations say"
        )
    return orientation


def _rgb(file: Image.Image) -> Image.Image:
    """8-bit colours; what can be seen through shows the grey of the borders."""
    if file.mode.startswith(GREY_16) or file.mode == WIDE:
        # Pillow would cut values off at 255.
        grey = np.asarray(file)
        hidden = grey == file.info.get("transparency")
        grey = np.where(hidden, BORDER_GREY, grey // GREY_LEVELS_16_BY_8)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if not file.has_transparency_data:
        return file.convert("RGB")
    ground = Image.new("RGBA", file.size, (BORDER_GREY,) * 3)
    return Image.alpha_composite(ground, file.convert("RGBA")).convert("RGB")


def letterbox(entry: Entry, side: int) -> Sample:
    """Scale an image to fit a square of `side` pixels, centred between grey borders.

    It is turned upright first, as its EXIF orientation says: so it is annotated.

    Raises:
        InputError: if the file is not an image of the size that the annotations give, upright.
    """
    with _opened(entry) as file:
        orientation = _checked_orientation(entry, file)
        # JPEG files are decoded near the size needed, which is several times faster.
        file.draft("RGB", (side, side))
        picture = _rgb(file)
    if orientation in TURNS:
        picture = picture.transpose(TURNS[orientation])
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
