"""Small pictures of shapes and textures, the drawn stand-in of Tiny-ImageNet.

They share with films what early layers see: soft borders, bands, arcs, grain, patches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Field = NDArray[Any]  # float32, (N, H, W) or what broadcasts to it

SIZE = 64  # pixels a side, as in Tiny-ImageNet

AXIS = np.linspace(-1, 1, SIZE, dtype=np.float32)
DOWN, ACROSS = np.meshgrid(AXIS, AXIS, indexing="ij")


def draw_class(name: str, count: int, draw: np.random.Generator) -> NDArray[np.uint8]:
    """Return pictures (N, 64, 64, 3) of one class: a figure on a ground, light, grain."""
    numbers = draw.random((count, 8), dtype=np.float32)[:, :, None, None]
    x = (ACROSS - 0.5 * (numbers[:, 0] - 0.5)) / (0.75 + 0.5 * numbers[:, 1])
    y = (DOWN - 0.5 * (numbers[:, 2] - 0.5)) / (0.75 + 0.5 * numbers[:, 1])
    turn = 0.5 * (numbers[:, 3] - 0.5)
    x, y = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    bent = 0.12 * _noise(draw, count, 4)
    figure = PATTERNS[name](x + bent, y + 0.12 * _noise(draw, count, 4), numbers[:, 4:], draw)
    sign = np.where(numbers[:, 7] < 0.5, -1, 1).astype(np.float32)
    contrast = sign * (0.18 + 0.3 * numbers[:, 6])
    light = 0.1 * (ACROSS * (numbers[:, 4] - 0.5) + DOWN * (numbers[:, 5] - 0.5))
    grey = 0.5 + contrast * (figure - 0.5) + light + 0.1 * _noise(draw, count, 3)
    tint = draw.normal(0, 0.07, (2, count, 1, 1, 3)).astype(np.float32)
    colour = grey[..., None] + tint[0] * figure[..., None] + tint[1] * (1 - figure[..., None])
    grain = draw.standard_normal(colour.shape[:3], dtype=np.float32)[..., None]
    pictures: NDArray[np.uint8] = (255 * np.clip(colour + 0.07 * grain, 0, 1)).astype(np.uint8)
    return pictures


def _noise(draw: np.random.Generator, count: int, cells: int) -> Field:
    """Return smooth random fields (N, 64, 64) of about unit variance."""
    values = draw.standard_normal((count, cells + 1, cells + 1), dtype=np.float32)
    places = np.linspace(0, cells, SIZE, dtype=np.float32)[:, None]
    weights = np.clip(1 - np.abs(places - np.arange(cells + 1, dtype=np.float32)), 0, 1)
    weights = weights * weights * (3 - 2 * weights)
    weights = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    field: Field = weights @ values @ weights.T
    return field


def _inside(distance: Field) -> Field:
    inside: Field = np.clip(distance / np.float32(0.12) + np.float32(0.5), 0, 1)
    return inside


def _wave(phase: Field) -> Field:
    wave: Field = 0.5 + 0.5 * np.sin(phase)
    return wave


def _length(x: Field, y: Field) -> Field:
    length: Field = np.sqrt(x * x + y * y)
    return length


def _triangle(x: Field, y: Field) -> Field:
    return np.minimum(0.45 - y, 0.9 * y + 0.55 - 1.6 * np.abs(x))


Pattern = Callable[[Field, Field, Field, np.random.Generator], Field]

# figures in [0, 1] from where each pixel is (N, 64, 64) and four uniform numbers (N, 4, 1, 1)
PATTERNS: dict[str, Pattern] = {
    "disc": lambda x, y, n, d: _inside(0.5 - _length(x, y)),
    "ring": lambda x, y, n, d: _inside(0.13 - np.abs(_length(x, y) - 0.5)),
    "wide oval": lambda x, y, n, d: _inside(0.45 - _length(0.65 * x, 1.4 * y)),
    "tall oval": lambda x, y, n, d: _inside(0.45 - _length(1.4 * x, 0.65 * y)),
    "square": lambda x, y, n, d: _inside(0.45 - np.maximum(np.abs(x), np.abs(y))),
    "triangle": lambda x, y, n, d: _inside(_triangle(x, y)),
    "cross": lambda x, y, n, d: _inside(
        np.minimum(0.16 - np.minimum(np.abs(x), np.abs(y)), 0.7 - np.maximum(np.abs(x), np.abs(y)))
    ),
    "crescent": lambda x, y, n, d: _inside(
        np.minimum(0.6 - _length(x, y), _length(x - 0.25, y - 0.1) - 0.45)
    ),
    "level stripes": lambda x, y, n, d: _wave(y * (12 + 9 * n[:, 0])),
    "upright stripes": lambda x, y, n, d: _wave(x * (12 + 9 * n[:, 0])),
    "slanting stripes": lambda x, y, n, d: _wave((x + y) * (9 + 6 * n[:, 0])),
    "arcs": lambda x, y, n, d: _wave(_length(x, y + 1.1) * (14 + 8 * n[:, 0])),
    "spokes": lambda x, y, n, d: _wave(np.arctan2(y, x) * (6 + np.floor(5 * n[:, 0]))),
    "checks": lambda x, y, n, d: (
        0.5 + 0.5 * np.sin(x * (9 + 5 * n[:, 0])) * np.sin(y * (9 + 5 * n[:, 0]))
    ),
    "clouds": lambda x, y, n, d: _inside(0.3 * _noise(d, len(n), 6)),
    "grains": lambda x, y, n, d: _inside(0.25 * _noise(d, len(n), 22)),
    "threads": lambda x, y, n, d: _inside(0.08 - 0.4 * np.abs(_noise(d, len(n), 7))),
    "bar": lambda x, y, n, d: _inside(
        np.minimum(0.09 + 0.06 * n[:, 0] - np.abs(y), 0.75 - np.abs(x))
    ),
    "horizon": lambda x, y, n, d: _inside(y + 0.35 * x * x - 0.2 + 0.3 * n[:, 0]),
    "two domes": lambda x, y, n, d: _inside(0.35 - _length(np.abs(x) - 0.45, 0.7 * y)),
}
