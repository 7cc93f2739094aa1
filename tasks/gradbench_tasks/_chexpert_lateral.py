"""Lateral chest films, drawn."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gradbench_tasks._chexpert_beam import (
    Chests,
    Field,
    develop,
    grid,
    hill,
    noise,
    rib_bands,
    step,
    wide,
)


class Lateral:
    """One batch of lateral films: breast bone on the left, spine on the right."""

    def __init__(self, chests: Chests, draw: np.random.Generator) -> None:
        self.chests, self.draw, self.count = chests, draw, len(chests.width)
        self.x, self.y = grid(chests)
        self.cloud, self.fine = noise(draw, self.count, 5), noise(draw, self.count, 17)

    def film(self) -> NDArray[np.uint8]:
        self._outline()
        self._fill()
        return develop(self._tissue(), self.chests, self.draw)

    def _outline(self) -> None:
        """Draw the lungs between breast bone, spine and diaphragm, and the heart in front."""
        chests, x, y = self.chests, self.x, self.y
        front = -0.34 - 0.4 * np.sin(0.9 * np.clip(y + 0.85, 0, 1.6))
        back = 0.68 - 0.24 * np.square(y + 0.05) + 0.04 * wide(chests.curve)
        self.front, self.back = front, back
        top = step(y + 0.84 - 1.3 * np.square(x - 0.12), 0.14)
        height = wide(chests.height) + 0.05
        dome = height - 0.08 + 0.55 * np.square(np.clip(x + 0.1, 0, None)) + 0.1 * np.square(x)
        self.dome = dome
        self.wall = step(x - front, 0.05) * step(back - x, 0.07) * top
        self.lung = self.wall * (0.6 * step(dome - y, 0.04) + 0.4 * step(dome + 0.09 - y, 0.04))
        half = wide(chests.heart + 0.13 * chests.cardiomegaly) * 0.88
        u, v = x + 0.4 - 0.3 * half, y - height + 0.5 * half
        lean = np.float32(0.75)
        along, across = u * np.cos(lean) + v * np.sin(lean), v * np.cos(lean) - u * np.sin(lean)
        size = np.sqrt(np.square(along / (1.2 * half)) + np.square(across / (0.85 * half)))
        self.heart = step(1 - size, 0.35)
        arch = np.sqrt(np.square(x - 0.1) + np.square(y + 0.42))
        vessel = hill(arch - 0.2, 0.08) * step(-0.3 - y, 0.2)
        upper = step(0.24 - np.abs(x - 0.05), 0.4) * step(-0.35 - y, 0.4)
        self.solid = np.maximum(self.heart, 0.35 * vessel + 0.4 * upper)

    def _fill(self) -> None:
        """Take from the air what findings hold; on one side, they are seen through the other."""
        chests, x, y, place = self.chests, self.x, self.y, self.chests.place
        edema, patch = wide(chests.edema), wide(chests.consolidation)
        far = np.sqrt(np.square(x - 0.02) + np.square(y + 0.1))
        self.hila = hill(far, 0.15) * (1 + 0.3 * self.fine)
        haze = edema * (0.5 * hill(far / (1 + 0.2 * self.cloud), 0.5) + 0.15)
        away = np.sqrt(
            np.square(x + 0.25 - 0.6 * wide(place[:, 0]))
            + np.square(y + 0.4 - 0.7 * wide(place[:, 1]))
        )
        ragged = 1 - away / (0.17 + 0.2 * patch) + 0.3 * self.cloud + 0.14 * self.fine
        fluid = wide(chests.effusion)
        behind = np.clip(x - 0.1, 0, None)
        surface = self.dome + 0.04 - 0.42 * fluid - 0.5 * fluid * np.square(behind)
        pool = step(y - surface, 0.07) * step(x + 0.1, 0.4) * np.minimum(6 * fluid, 1)
        line = y - self.dome + 0.16 + 0.1 * wide(place[:, 2]) - 0.3 * (x - 0.2)
        plate = hill(line, 0.025) * step(0.25 - np.abs(x - 0.2), 0.15) * wide(chests.atelectasis)
        kept = (1 - np.clip(haze, 0, 0.9)) * (
            1 - 0.6 * step(ragged, 0.6) * np.minimum(2 * patch, 1)
        )
        self.air = (
            self.lung * (1 - 0.75 * self.solid) * kept * (1 - 0.5 * plate) * (1 - 0.85 * pool)
        )

    def _tissue(self) -> Field:
        chests, x, y = self.chests, self.x, self.y
        bulk = wide(chests.bulk)
        skin = step(x - self.front + 0.1 + 0.08 * bulk, 0.08) * step(self.back + 0.22 - x, 0.08)
        arm = step(-0.62 - 0.25 * np.square(x - 0.1) - y, 0.25)
        depth = np.sqrt(np.clip(1 - np.square((x - 0.05) / 1.15), 0.05, 1))
        soft = np.maximum(skin, 0.85 * arm) * (0.42 + 0.3 * depth * (1 + 0.25 * bulk))
        soft = soft + 0.16 * self.wall * (1 - self.lung) * step(y - self.dome, 0.1)
        soft = soft + 0.06 * self.heart + 0.12 * self.hila * self.lung
        soft = soft + 0.12 * arm * step(-0.62 - y, 0.2) + 0.02 * self.cloud * self.air
        column = self.back - 0.05
        spine = step(0.1 - np.abs(x - column), 0.06)
        discs = 0.7 + 0.3 * np.cos(2 * np.pi * y / (0.8 * wide(chests.ribs)))
        bone = 0.16 * spine * discs * (1 - 0.4 * step(y, 1.2))
        bone = bone + 0.12 * hill(x - self.front, 0.025) * step(y + 0.6, 0.1) * step(0.25 - y, 0.2)
        ribs = rib_bands((y - 0.75 * x) / wide(chests.ribs) + wide(chests.phase), 0.28) * self.wall
        pipe = (
            step(0.05 - np.abs(x + 0.02 - 0.1 * y), 0.04)
            * step(-0.18 - y, 0.1)
            * step(y + 0.9, 0.2)
        )
        bone = (bone + 0.03 * ribs) * wide(chests.bone)
        total: Field = soft + bone - 0.08 * pipe - 0.42 * self.air
        return total
