"""What every drawn film has in common: chests, a grid over them, smooth shapes, the beam.

Everything is an attenuation: soft tissue and bones add to it, the air in the lungs takes from it,
and a finding is a lung that holds less air, or a heart that is larger. A film is what is left of
the beam, windowed as on a viewing station. Lengths are in half heights of the film.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Field = NDArray[Any]  # float32, (N, H, W) or what broadcasts to it

HEIGHT, WIDTH = 128, 148  # pixels
ASPECT = WIDTH / HEIGHT

# the lead letter that says which side is the patient's left
MARKER = np.array([[240, 240, 0, 0, 0, 0]] * 7 + [[240] * 6] * 2, dtype=np.uint8)


@dataclass(frozen=True)
class Chests:
    """N chests as they are filmed: each attribute (N,), the findings' severities in [0, 1].

    ``side`` is -1 for the patient's right, which is on the left of a frontal film, or 1.
    """

    width: Field  # of the thorax, from the midline
    height: Field  # of the domes below the middle of the film; deep breath is larger
    heart: Field  # cardiothoracic ratio, without enlargement
    tilt: Field  # of the heart's axis
    knob: Field  # of the aorta; grows with age
    ribs: Field  # spacing
    phase: Field
    bone: Field  # density
    bulk: Field  # soft tissue in the beam, 0 is slim
    breast: Field
    curve: Field  # of the spine
    portable: Field  # 1 for AP, 0 for PA: magnified heart, less breath, less contrast
    turn: Field  # rotation in the plane, radians
    shift: Field  # (N, 2)
    zoom: Field
    exposure: Field
    side: Field  # of what is on one side
    both: Field  # 1 if effusion is on both sides
    place: Field  # (N, 4) uniform numbers: where findings are
    wires: Field  # 1 if there are leads and lines
    cardiomegaly: Field
    edema: Field
    consolidation: Field
    atelectasis: Field
    effusion: Field


def wide(values: Field) -> Field:
    """Return (N, 1, 1)."""
    return values[:, None, None]


def step(distance: Field, softness: float | Field) -> Field:
    """Return 0 for far below zero, 1 for far above, with a smooth edge of this width."""
    ramp: Field = distance / softness
    ramp += 0.5
    np.clip(ramp, 0, 1, out=ramp)
    smooth = 3 - 2 * ramp
    smooth *= ramp
    smooth *= ramp
    return smooth


def hill(distance: Field, spread: float | Field) -> Field:
    """Return exp(-(distance / spread)²)."""
    bell: Field = distance / spread
    bell *= bell
    np.negative(bell, out=bell)
    return np.exp(bell, out=bell)


def noise(draw: np.random.Generator, count: int, cells: int) -> Field:
    """Return smooth random fields (count, H, W) of unit variance, ``cells`` waves high."""
    across = round(cells * ASPECT)
    grid = draw.standard_normal((count, cells + 3, across + 3), dtype=np.float32)
    return _spline(HEIGHT, cells) @ grid @ _spline(WIDTH, across).T


@functools.cache
def _spline(pixels: int, cells: int) -> Field:
    """Return the weights (pixels, cells + 3) of a cubic B-spline, rows of unit length."""
    places = (np.arange(pixels) + 0.5) / pixels * cells + 1
    distance = np.abs(places[:, None] - np.arange(cells + 3))
    near, far = 2 / 3 - distance**2 + distance**3 / 2, (2 - distance) ** 3 / 6
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    unit: Field = (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)
    return unit


def grid(chests: Chests) -> tuple[Field, Field]:
    """Return where each pixel is in its patient, (N, H, W) across and down."""
    across = np.linspace(-ASPECT, ASPECT, WIDTH, dtype=np.float32)[None, None, :]
    down = np.linspace(-1, 1, HEIGHT, dtype=np.float32)[None, :, None]
    x, y = across - wide(chests.shift[:, 0]), down - wide(chests.shift[:, 1])
    cos, sin = wide(np.cos(chests.turn)), wide(np.sin(chests.turn))
    zoom = wide(chests.zoom)
    return (cos * x + sin * y) / zoom, (cos * y - sin * x) / zoom


def develop(attenuation: Field, chests: Chests, draw: np.random.Generator) -> NDArray[np.uint8]:
    """Return films from attenuations: quantum noise, window, edges of the collimated beam."""
    count = len(attenuation)
    grain: Field = draw.standard_normal((count, HEIGHT, WIDTH), dtype=np.float32)
    grain = grain + 0.7 * noise(draw, count, HEIGHT // 3)
    portable = wide(chests.portable)
    dense = np.clip(attenuation, 0, 1.4)
    attenuation = attenuation + grain * (0.006 + 0.012 * dense) * (1 + 0.6 * portable)
    core = attenuation[:, HEIGHT // 4 : -HEIGHT // 6 : 3, WIDTH // 7 : -WIDTH // 7 : 3]
    low, high = (np.quantile(core, share, axis=(1, 2)) for share in (0.02, 0.97))
    spread = wide((high - low).astype(np.float32)) * (1.2 + 0.15 * portable)
    light = np.clip((attenuation - wide(low.astype(np.float32))) / spread + 0.08, 0, 1)
    light = light ** np.exp(wide(chests.exposure))
    light = light * _collimator(draw.random((count, 4), dtype=np.float32))
    films: NDArray[np.uint8] = (light * 245).astype(np.uint8)
    marked = draw.random(count) < 0.7
    films[marked, 8 : 8 + len(MARKER), -20 : -20 + MARKER.shape[1]] |= MARKER
    return films


def _collimator(numbers: Field) -> Field:
    """Return 1 in the beam and nearly 0 outside; ``numbers`` (N, 4) say how far each side is in."""
    margins = np.clip(numbers - 0.75, 0, None) * 0.2  # three of four sides are outside the film
    row = (np.arange(HEIGHT, dtype=np.float32)[None, :, None] + 0.5) / HEIGHT
    column = (np.arange(WIDTH, dtype=np.float32)[None, None, :] + 0.5) / WIDTH
    upper, lower, left, right = (wide(margins[:, side]) for side in range(4))
    inside = (row >= upper) & (row <= 1 - lower) & (column >= left) & (column <= 1 - right)
    open_: Field = np.where(inside, np.float32(1), np.float32(0.04))
    return open_


def rib_bands(phase: Field, share: float) -> Field:
    """Return bands of period 1 that fill this share, brighter at their lower edge."""
    place = phase - np.floor(phase)
    within = np.minimum(place, share * 2 - place) / share  # 1 in the middle, 0 at the edges
    return step(within - 0.15, 0.5) * (0.75 + 0.6 * hill(place - 1.7 * share, 0.35 * share))
