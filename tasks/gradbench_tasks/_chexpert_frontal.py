"""Frontal chest films, drawn."""

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


class Frontal:
    """One batch of frontal films; each method adds one thing to air, tissue or bone."""

    def __init__(self, chests: Chests, draw: np.random.Generator) -> None:
        self.chests, self.draw, self.count = chests, draw, len(chests.width)
        self.x, self.y = grid(chests)
        self.outward = np.abs(self.x)
        self.left = step(self.x, 0.05)  # of the patient; on the right of the film
        self.width = wide(chests.width)
        self.cloud, self.fine = noise(draw, self.count, 5), noise(draw, self.count, 17)

    def film(self) -> NDArray[np.uint8]:
        self._lungs()
        self._heart()
        self.air = self.lung * (1 - 0.9 * self.solid)
        self._fill()
        return develop(self._tissue() + self._bones() + self._wires(), self.chests, self.draw)

    def _lungs(self) -> None:
        """Draw where the lungs are: domes of pleura above, domes of the diaphragm below."""
        chests, x, y, out = self.chests, self.x, self.y, self.outward
        peak = 0.47 * self.width
        barrel = self.width * (0.98 - 0.2 * np.square(y - 0.45))
        level, top = -0.22, -0.86 + 0.02 * wide(chests.tilt)
        lateral = step(out - peak, 0.01)
        reach = lateral * (barrel - peak) + (1 - lateral) * (peak - 0.02)
        high = np.clip((level - y) / (level - top), 0, None)
        oval = 1 - np.sqrt(np.square((out - peak) / reach) + np.square(high))
        above = step(level - y, 0.02)
        self.wall = step(above * oval + (1 - above) * (1 - out / barrel), 0.06)
        raised = 0.12 * wide(chests.atelectasis) * step(wide(chests.side) * x, 0.3)
        deep = wide(chests.height) - 0.09 * wide(chests.portable)
        self.base = deep + 0.05 * self.left - raised
        outer = np.clip((out - 0.45 * self.width) / (0.55 * self.width), -1, 1.2)
        falls = np.clip(outer, 0, None)
        self.dome = self.base + 0.3 * falls * falls * falls + 0.07 * np.square(outer - falls)
        below = step(self.dome - y, 0.04)
        self.lung = self.wall * below
        self.behind = self.wall * step(self.dome + 0.14 - y, 0.12) * (1 - below)

    def _heart(self) -> None:
        """Draw heart, great vessels and mediastinum as what lies between two borders."""
        chests, x, y = self.chests, self.x, self.y
        ratio = chests.heart * (1 + 0.09 * chests.portable) + 0.14 * chests.cardiomegaly
        half = wide(ratio) * self.width
        lean = wide(chests.tilt)
        apex = wide(chests.height - 0.09 * chests.portable) + 0.02 + 0.04 * lean
        start = apex - 1.15 * half - 0.16
        bent = x - 0.05 * wide(chests.curve) * np.sin(2.2 * y)
        stem = 0.115 + 0.04 * np.square(np.clip(-0.45 - y, 0, None) * 2)
        down = np.clip((y - start) / (apex - start), 0, 1)
        round_off = np.sqrt(np.clip(1 - np.square(np.clip(y - apex, 0, None) / 0.24), 0, 1))
        rise = np.sin((0.5 * np.pi) * down)
        swell = rise * np.sqrt(rise) + 0.05 * np.sin(np.pi * down)
        knob = (0.05 + 0.06 * wide(chests.knob)) * _bump((y + 0.46) / 0.13)
        trunk = 0.045 * _bump((y + 0.24) / 0.16)
        to_left = (stem + (1.3 * half - stem) * swell) * round_off + knob + trunk
        lower = np.clip((y - start - 0.12) / (apex + 0.3 - start), 0, 1)
        to_right = stem + (0.72 * half - stem) * np.sin(np.pi * lower) + 0.01
        self.heart = step(to_left - x, 0.06) * step(x + to_right, 0.06) * step(down - 0.2, 0.5)
        self.solid = step(to_left - bent, 0.055) * step(bent + to_right, 0.055)
        self.bent = bent

    def _fill(self) -> None:
        """Take from the air what vessels and findings hold."""
        edema = wide(self.chests.edema)
        dx = self.x + 0.2 - 0.41 * self.left
        dy = self.y + 0.1 + 0.06 * self.left
        far = np.sqrt(np.square(dx) + np.square(dy))
        tree = self._vessels(dx, dy, far, edema)
        self.hila = hill(far, 0.13) * (1 + 0.2 * edema) * (1 + 0.35 * self.fine)
        haze = edema * (0.62 * hill(far / (1 + 0.2 * self.cloud), 0.5) + 0.16)
        kept = 1 - np.clip(haze * (1 + 0.2 * self.fine), 0, 0.9)
        kept = kept * (1 - self._consolidation()) * (1 - self._plates()) * (1 - self._effusion())
        self.air *= np.clip(kept, 0.03, 1)
        self.tree = tree * (0.25 + 0.75 * kept)

    def _vessels(self, dx: Field, dy: Field, far: Field, edema: Field) -> Field:
        """Return lines that leave the hila and branch, the thinner the farther."""
        rings, spokes = 8, 40
        texture = self.draw.standard_normal((self.count, rings, spokes), dtype=np.float32)
        angle = (np.arctan2(dy, dx) / (2 * np.pi) + 0.5) * spokes + 0.7 * self.cloud
        ring = np.clip(np.sqrt(far) * 6.5 + 0.3 * self.fine, 0, rings - 1.001)
        waves = _sampled(texture, ring, angle)
        lines = hill(waves, 0.13 + 0.25 * edema + 0.15 * hill(far, 0.25))
        fade = np.exp(-far / (0.42 + 0.2 * edema)) * np.clip(0.75 + 0.3 * self.cloud, 0.2, 1.5)
        tree: Field = lines * fade * step(far - 0.1, 0.16) * (0.75 + 0.5 * edema)
        return tree

    def _consolidation(self) -> Field:
        """Return a ragged patch in one zone of a lung, darker lines of bronchi in it."""
        chests, place = self.chests, self.chests.place
        side = wide(chests.side)
        x0 = side * (0.4 + 0.22 * wide(place[:, 0])) * self.width
        y0 = -0.45 + 0.75 * wide(place[:, 1])
        size = 0.17 + 0.2 * wide(chests.consolidation)
        inside = 1 - np.sqrt(np.square((self.x - x0) / 1.15) + np.square(self.y - y0)) / size
        patch = step(inside + 0.3 * self.cloud + 0.14 * self.fine, 0.6)
        bronchi = 1 - 0.35 * hill(noise(self.draw, self.count, 9), 0.13)
        here: Field = patch * bronchi * np.minimum(2 * wide(chests.consolidation), 1)
        return 0.85 * here * (0.55 + 0.45 * wide(chests.consolidation))

    def _plates(self) -> Field:
        """Return plate-like bands across the base of one lung."""
        chests, place = self.chests, self.chests.place
        beside = wide(chests.side) * self.x
        total = np.zeros_like(self.x)
        for band in range(3):
            slope = 0.5 * (wide(place[:, (band + 1) % 4]) - 0.5)
            level = self.base - 0.1 - 0.14 * band - 0.1 * wide(place[:, band])
            line = self.y - level - slope * (beside - 0.5 * self.width)
            length = (0.2 + 0.12 * wide(place[:, 3 - band])) * self.width
            ends = step(length - np.abs(beside - 0.5 * self.width), 0.12)
            total = np.maximum(total, hill(line, 0.022 + 0.012 * band) * ends * (1 - 0.3 * band))
        bands: Field = 0.8 * total * wide(chests.atelectasis)
        return bands

    def _effusion(self) -> Field:
        """Return fluid that fills the base and climbs the wall in a meniscus."""
        chests = self.chests
        beside = wide(chests.side) * self.x
        sides = np.maximum(step(beside, 0.05), wide(chests.both))
        depth = wide(chests.effusion) * (0.7 + 0.3 * step(beside, 0.05))
        bottom = self.base + 0.3  # where the angle between wall and diaphragm ends
        climb = np.square(np.square(np.clip(self.outward / self.width, 0, 1.1)))
        surface = bottom - 0.5 * depth - (0.05 + 0.22 * depth) * climb
        fluid: Field = step(self.y - surface, 0.06 + 0.05 * depth) * sides
        return 0.95 * fluid * np.minimum(6 * depth, 1)

    def _tissue(self) -> Field:
        chests, x, y, out = self.chests, self.x, self.y, self.outward
        bulk = wide(chests.bulk)
        body = self.width + 0.13 + 0.1 * bulk
        shoulder = -0.98 + 0.22 * np.square(np.clip(out - 0.3, 0, None)) - 0.6 * hill(out, 0.27)
        arms = step(-0.1 - 0.5 * bulk - y, 0.5)
        torso = step(body + 0.5 * arms - out, 0.05) * step(y - shoulder, 0.05)
        thick = np.sqrt(np.clip(1 - np.square(x / (body * 1.15)), 0.1, 1))
        soft = torso * (0.4 + 0.36 * thick * (1 + 0.25 * bulk))
        belly = self.wall * (1 - self.lung) * step(y - self.dome, 0.05)
        soft = soft + belly * (0.17 + 0.08 * bulk - 0.13 * self.behind)
        gas = np.square((x - 0.3 - 0.25 * wide(chests.place[:, 1])) / 0.19)
        gas = gas + np.square((y - self.base - 0.2) / (0.06 + 0.08 * wide(chests.place[:, 0])))
        soft = soft - 0.16 * step(1 - gas, 0.8) * (wide(chests.place[:, 2]) > 0.4)
        under = np.square((out - 0.5 * self.width) / 0.4) + np.square((y - 0.25) / 0.38)
        soft = soft + wide(chests.breast) * 0.14 * step(1 - under, 0.45) * step(y, 0.6)
        soft = soft + (0.07 * self.solid + 0.07 * self.heart) * step(self.dome + 0.06 - y, 0.2)
        windpipe = step(0.06 - np.abs(self.bent), 0.04) * step(-0.26 - y, 0.12)
        soft = soft - 0.12 * windpipe
        depth = (0.47 - 0.06 * wide(chests.portable)) * (1 - 0.14 * bulk)
        depth = depth * (1 - 0.16 * hill((out - 0.3) / 0.5, 1) * step(y + 0.3, 0.9))
        inside = self.lung * (1 - self.solid)
        vessels = (0.34 * self.tree + 0.17 * self.hila) * inside
        mottle = 0.012 * self.cloud + 0.014 * self.fine
        total: Field = soft - depth * self.air + vessels + mottle * self.air
        return total

    def _bones(self) -> Field:
        """Return ribs behind and in front, collar bones, shoulder blades and the spine."""
        chests, y, out = self.chests, self.y, self.outward
        rel = out / self.width
        spacing = wide(chests.ribs)
        square = np.square(rel)
        cage = step(1.02 - rel, 0.06) * step(y + 0.95, 0.1) * step(self.dome + 0.25 - y, 0.3)
        back = (y + 0.2 * rel - 0.44 * square + 0.02 * np.sin(7 * rel)) / spacing
        front = (y + 0.75 * square - 0.2) / (1.2 * spacing)
        ribs = rib_bands(back + wide(chests.phase), 0.3) * step(rel - 0.13, 0.1)
        faint = rib_bands(front + 0.3 + wide(chests.phase), 0.3)
        faint = faint * step(rel - 0.45, 0.25) * step(y + 0.55, 0.4)
        bones = (0.075 * ribs + 0.035 * faint) * cage
        line = y + 0.66 + 0.12 * rel - 0.1 * np.sin(4.2 * rel)
        collar = _shaft(line, 0.036) * step(out - 0.1, 0.05) * step(1.15 - rel, 0.1)
        blade = np.sqrt(np.square((rel - 1.06) / 0.27) + np.square((y + 0.4) / 0.42))
        rim = hill(blade - 0.93, 0.06) * step(1.25 - rel, 0.2)
        bones = bones + 0.12 * collar + 0.04 * step(1 - blade, 0.25) + 0.04 * rim
        spine = step(0.09 - np.abs(self.bent), 0.04)
        discs = 0.7 + 0.3 * np.cos(2 * np.pi * y / (0.9 * spacing))
        through = (0.085 - 0.04 * self.heart) * step(self.dome + 0.1 - y, 0.5)
        total: Field = (bones + through * spine * discs) * wide(chests.bone)
        return total

    def _wires(self) -> Field:
        """Return the leads on a patient in bed, and a line in a great vein."""
        chests, x, y, place = self.chests, self.x, self.y, self.chests.place
        lead = x - 0.75 + wide(place[:, 0]) + 0.35 * np.sin(2.1 * y + 6 * wide(place[:, 1]))
        other = y - 0.3 + wide(place[:, 2]) - 0.25 * np.cos(1.7 * x + 6 * wide(place[:, 3]))
        pads = np.exp(-(np.square(lead) + np.square(other)) / np.float32(0.0016))
        vein = hill(x + 0.14 - 0.3 * np.square(np.clip(-0.5 - y, 0, None) * 2), 0.013)
        vein = vein * step(-0.02 - y, 0.04) * step(y + 0.9, 0.05)
        lines = np.maximum(hill(lead, 0.012), 0.8 * hill(other, 0.012) * step(x, 0.1))
        total: Field = wide(chests.wires) * (0.2 * lines + 0.22 * vein + 0.25 * pads)
        return total


def _bump(place: Field) -> Field:
    """Return half a circle on [-1, 1], zero elsewhere."""
    bump: Field = np.sqrt(np.clip(1 - np.square(place), 0, 1))
    return bump


def _sampled(texture: Field, row: Field, column: Field) -> Field:
    """Return ``texture`` (N, R, C) between its points; columns go round."""
    columns = texture.shape[2]
    flat = texture.reshape(-1)
    first = wide(np.arange(len(texture)) * texture.shape[1] * columns)
    above, beside = np.floor(row), np.floor(column)
    down, across = row - above, column - beside
    r, c = above.astype(np.int64), beside.astype(np.int64)
    across = across * across * (3 - 2 * across)
    here, there = c % columns, (c + 1) % columns
    upper, lower = first + r * columns, first + (r + 1) * columns
    top = flat[upper + here] * (1 - across) + flat[upper + there] * across
    bottom = flat[lower + here] * (1 - across) + flat[lower + there] * across
    values: Field = top * (1 - down) + bottom * down
    return values


def _shaft(distance: Field, half: float) -> Field:
    """Return a bone seen from the side: dense rims, marrow between them."""
    return step(half - np.abs(distance), 0.02) * (0.75 + 0.5 * hill(np.abs(distance) - half, 0.02))
