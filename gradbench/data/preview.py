"""A contact sheet: what the objectives of a task pair are fed in training, and its targets."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gradbench import seeding
from gradbench.seeding import ExampleRandom
from gradbench.task import ExampleSet, Objective, Splits

COLUMNS = 8
TILE = 136  # pixels a side that a small image is enlarged to, about
GAP, MARGIN = 8, 16
LINE = 15  # pixels a line of text
LINES = 3  # of text below an image
FONT, TITLE = 10, 14  # sizes of text
CHARACTER = 6.1  # pixels that one takes, on the average

Tile = tuple[Image.Image, str]


def contact_sheet(
    objectives: Sequence[Objective], splits: Splits, *, title: str, count: int, seed: int
) -> Image.Image:
    """Return ``count`` training examples of each objective, drawn with the seed, with targets."""
    rows: list[tuple[str, list[Tile]]] = []
    for k, objective in enumerate(objectives):
        part = splits.train if k == 0 else splits.auxiliaries[k - 1]
        role = "primary" if k == 0 else "auxiliary"
        heading = f"{role}: {objective.name}, {len(part)} training examples"
        rows.append((heading, _tiles(objective, part, count, seed, k)))
    return _sheet(title, rows)


def _tiles(objective: Objective, part: ExampleSet, count: int, seed: int, k: int) -> list[Tile]:
    """Return drawn examples as the trunk is fed them, and what their targets say."""
    draw = seeding.rng(seed, "preview", k)
    indices = np.sort(draw.permutation(len(part))[:count])
    examples = part.subset(indices).take(np.arange(len(indices)))
    random = ExampleRandom(seeding.derive(seed, "preview", k), np.zeros_like(indices), indices)
    inputs, target = objective.batch(examples, random)
    return [(_picture(inputs, i), caption(objective, target, i)) for i in range(len(indices))]


def caption(objective: Objective, target: Any, i: int) -> str:
    """Say what the target of example ``i`` of a batch is: labels, a class or a number."""
    if not isinstance(target, Tensor):
        return ""
    row = target[i]
    labels: Sequence[str] | None = getattr(objective, "labels", None)
    if labels is not None and row.shape == (len(labels),):
        marks = {1.0: "", 0.0: None}  # a label that is neither is not known
        named = [
            (label, marks.get(value, "?"))
            for label, value in zip(labels, row.tolist(), strict=True)
        ]
        return ", ".join(f"{label}{mark}" for label, mark in named if mark is not None) or "none"
    if row.dim() == 0:
        return f"{row:.3g}" if row.is_floating_point() else f"class {int(row)}"
    return f"target of {'×'.join(map(str, row.shape))}"


def _picture(inputs: Any, i: int) -> Image.Image:
    """Return example ``i`` of a batch, each channel from its darkest to its brightest value."""
    if not isinstance(inputs, Tensor) or inputs.dim() != 4 or inputs.shape[1] not in (1, 3):
        blank = Image.new("RGB", (TILE, TILE), "white")
        ImageDraw.Draw(blank).text((GAP, TILE // 2), "not an image", "grey", _font(FONT))
        return blank
    image = inputs[i].detach().to("cpu", torch.float32)
    low, high = image.amin((1, 2), keepdim=True), image.amax((1, 2), keepdim=True)
    image = (image - low) / (high - low).clamp_min(1e-12)
    pixels = (255 * image).round().to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0).numpy()
    height, width = pixels.shape[:2]
    times = max(1, round(TILE / max(height, width)))
    return Image.fromarray(pixels).resize((width * times, height * times), Image.Resampling.BICUBIC)


def _sheet(title: str, rows: Sequence[tuple[str, Sequence[Tile]]]) -> Image.Image:
    tiles = [tile for _, row in rows for tile in row]
    wide = max([TILE, *(picture.width for picture, _ in tiles)])
    columns = min(COLUMNS, max([1, *(len(row) for _, row in rows)]))
    heights = [
        max((picture.height for picture, _ in row), default=0) + LINES * LINE + GAP
        for _, row in rows
    ]
    lines = [-(-len(row) // columns) for _, row in rows]
    tall = sum(height * count for height, count in zip(heights, lines, strict=True))
    headings = (1 + len(rows)) * 2 * LINE
    width = 2 * MARGIN + columns * (wide + GAP) - GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + headings + tall), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, "black", _font(TITLE))
    top = MARGIN + 2 * LINE
    for (heading, row), height, count in zip(rows, heights, lines, strict=True):
        draw.text((MARGIN, top), heading, "black", _font(FONT + 2))
        top += 2 * LINE
        for place, (picture, words) in enumerate(row):
            x = MARGIN + place % columns * (wide + GAP)
            y = top + place // columns * height
            sheet.paste(picture, (x, y))
            text = textwrap.wrap(words, int(wide / CHARACTER), max_lines=LINES)
            for number, line in enumerate(text):
                draw.text((x, y + picture.height + 2 + number * LINE), line, "black", _font(FONT))
        top += height * count
    return sheet


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
