"""Images that are read from files."""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from gradbench.errors import DataError
from gradbench.task import Examples, ExampleSet, Indices

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
MEMORY = 2 * 2**30  # bytes of decoded images that a set keeps; a larger one decodes at each take
PIXELS = 89_478_485  # that a file may hold, Pillow's own limit: a quarter of a GiB in colour
NAMED = 20  # things that one error names; more would fill the screen
WORKERS = 4  # threads; the decoders leave the interpreter to the others while they work
SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})


class ImageFiles(ExampleSet):
    """Images in files, upright, the shorter side scaled to ``size`` and the centre cut out.

    Nothing is opened before the first ``take``. That decodes the whole set where it fits into
    ``MEMORY``; a larger set is decoded as it is taken. An example is its ``image``, uint8
    (3, size, size), beside its rows of ``targets``. A film of more than 8 bits is stretched from
    its own darkest to its own brightest value, for 10, 12 and 16 bits are stored alike.
    """

    def __init__(
        self,
        ids: Sequence[str],
        paths: Sequence[Path],
        targets: Mapping[str, Tensor],
        *,
        size: int,
        strata: Indices | None = None,
    ) -> None:
        self.ids, self.strata = tuple(ids), strata
        self._paths, self._targets, self._size = tuple(paths), dict(targets), size
        self._decoded: NDArray[np.uint8] | None = None

    def take(self, indices: Indices) -> Examples:
        """Return the examples at ``indices`` (B,), in that order.

        Raises:
            DataError: naming every file that can not be read.
        """
        rows = torch.from_numpy(indices)
        images = torch.from_numpy(self._images(indices))
        return {"image": images, **{name: values[rows] for name, values in self._targets.items()}}

    def _images(self, indices: Indices) -> NDArray[np.uint8]:
        if 3 * self._size**2 * len(self) > MEMORY:
            return decode([self._paths[i] for i in indices], self._size)
        if self._decoded is None:
            self._decoded = decode(self._paths, self._size)
        return self._decoded[indices]


def decode(paths: Sequence[Path], size: int) -> NDArray[np.uint8]:
    """Return the images in files, (N, 3, size, size).

    Raises:
        DataError: naming every file that can not be read.
    """
    images = np.empty((len(paths), 3, size, size), dtype=np.uint8)

    def read(position: int) -> None:
        images[position] = _decode(paths[position], size)

    _for_each(paths, read)
    return images


def digests(paths: Sequence[Path]) -> list[str]:
    """Return a SHA-256 of the bytes of each file, having looked at what the file says it holds.

    Raises:
        DataError: naming every file that can not be opened or says that it is no image.
    """
    found = [""] * len(paths)

    def read(position: int) -> None:
        with paths[position].open("rb") as file:
            found[position] = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            with Image.open(file) as image:
                _check_size(image)

    _for_each(paths, read)
    return found


def image_tree(folder: Path) -> tuple[tuple[str, ...], tuple[Path, ...], Indices]:
    """Return the classes of a folder of class folders, the images' paths, and their classes (N,).

    Images may lie at any depth below their class folder. Classes and paths are sorted by name; no
    image is opened. Hidden files, and files that end in none of ``SUFFIXES``, are left aside.

    Raises:
        DataError: if there are no two classes with an image each.
    """
    entries = _listing(folder)
    found = {entry.name: _images_below(folder / entry.name) for entry in entries if entry.is_dir()}
    classes = tuple(sorted(found))
    if len(classes) < 2:
        loose = sum(_is_image(entry.name) for entry in entries)
        what = f"one, {classes[0]!r}" if classes else f"none, and {loose} images outside of any"
        raise DataError(
            f"Expected a folder a class in {folder}, at least two, found "
            f"{what if entries else 'an empty folder'}; sort the images into class folders."
        )
    if SPLIT_NAMES.issuperset(name.lower() for name in classes):
        raise DataError(
            f"Expected a folder a class in {folder}, found {listed(classes)}, which look like "
            f"splits of the data; name one of them, such as {folder / classes[0]}."
        )
    if empty := [name for name in classes if not found[name]]:
        raise DataError(
            f"Expected images in every class folder of {folder}, found none in {listed(empty)}; "
            f"add some ({', '.join(sorted(SUFFIXES))}) or remove the folder."
        )
    paths = tuple(folder / name / below for name in classes for below in found[name])
    counts = [len(found[name]) for name in classes]
    return classes, paths, np.repeat(np.arange(len(classes)), counts)


def listed(items: Sequence[str], limit: int = NAMED, separator: str = ", ") -> str:
    """Return the items after each other; those beyond ``limit`` are counted."""
    rest = len(items) - limit
    return separator.join(items[:limit]) + (f" … and {rest} more" if rest > 0 else "")


def _for_each(paths: Sequence[Path], act: Callable[[int], None]) -> None:
    """Call ``act`` for every position in ``paths``, in a small pool of threads."""
    faults: dict[int, str] = {}
    stop = threading.Event()

    def work(first: int) -> None:
        for position in range(first, len(paths), WORKERS):
            if stop.is_set():
                return
            try:
                act(position)
            except MemoryError:
                raise
            except Exception as error:  # decoders raise whatever a damaged file leads them to
                faults[position] = _reason(error)

    Image.init()  # here, for it is not made for being called by two threads at once
    with warnings.catch_warnings(), ThreadPoolExecutor(WORKERS) as pool:
        warnings.simplefilter("ignore")  # of odd metadata; and sizes are checked here
        try:
            for working in [pool.submit(work, first) for first in range(WORKERS)]:
                working.result()
        finally:
            stop.set()  # whatever stopped this one, an interrupt too, stops the others
    if faults:
        names = [f"{paths[position]} ({reason})" for position, reason in sorted(faults.items())]
        raise DataError(
            f"Expected images that can be read, found {len(names)} of {len(paths)} files that can "
            f"not: {listed(names)}; mend them or leave them out."
        )


def _decode(path: Path, size: int) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        _check_size(image)
        image.draft(None, (2 * size, 2 * size))  # JPEG is read at a fraction, at least this large
        image.load()
        colours = _in_colour(_upright(image))
    fitted = ImageOps.fit(colours, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(fitted).transpose(2, 0, 1)


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > PIXELS:
        raise Image.DecompressionBombError(f"{width}×{height} pixels")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata of an image whose pixels are fine
        return image


def _in_colour(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # integers of 16 and 32 bits, floating point
        values = np.asarray(image, dtype=np.float64)
        low, high = float(values.min()), float(values.max())
        if not np.isfinite([low, high]).all():
            raise ValueError("values that are no numbers")
        scaled = (values - low) * (255 / (high - low) if high > low else 0)
        return Image.fromarray(scaled.round().astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    """Say in a few words what is wrong with a file."""
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {PIXELS / 1e6:.0f} megapixels"
    if isinstance(error, UnidentifiedImageError):
        return "no image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if "truncated" in str(error).lower():
        return "truncated"
    return f"damaged: {str(error).partition(chr(10))[0] or type(error).__name__}"


def _listing(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is in a folder, without what is hidden.

    Raises:
        DataError: if the folder can not be listed or a name in it is no text.
    """
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        what = "no such folder" if isinstance(error, FileNotFoundError) else error.strerror
        raise DataError(f"Expected a folder at {folder}, found {what}.") from error
    if odd := [repr(entry.name) for entry in found if not _is_text(entry.name)]:
        raise DataError(
            f"Expected names of files in UTF-8 in {folder}, found {listed(odd)}; rename them."
        )
    return found


def _images_below(folder: Path) -> list[str]:
    """Return the images at any depth below a folder, as sorted paths from there."""
    found: list[str] = []
    seen: set[str] = set()
    left = [""]
    while left:
        below = left.pop()
        real = os.path.realpath(folder / below)
        if real in seen:  # a link that leads back
            continue
        seen.add(real)
        for entry in _listing(folder / below):
            path = f"{below}/{entry.name}" if below else entry.name
            # a link that is named like an image is not followed: it may be a test image
            if entry.is_dir(follow_symlinks=not _is_image(entry.name)):
                left.append(path)
            elif _is_image(entry.name):
                found.append(path)
    return sorted(found)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes of another encoding, kept as surrogates
        return False
    return True
