"""Division of a data set into parts, by group and in proportion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from gradbench.task import Indices

DRAWS = 10  # divisions of groups, of which the most even is taken; groups of one are even at once
EVERYTHING = -1  # a mark that every example has

Bundle = Counter[int]  # how many examples of a group have each mark
Unevenness = tuple[int, float]  # parts without a mark, and examples away from what was wished


def divide(
    marks: Sequence[Iterable[int]],
    groups: Sequence[str] | None,
    shares: Sequence[float],
    random: np.random.Generator,
) -> Indices:
    """Return the part of each example (N,), an index into ``shares``, which sum to 1.

    The marks of an example are its class, or for each of its labels which of the two it has; every
    mark is spread over the parts in proportion, as far as groups allow, which are kept whole. A
    mark of at least as many examples as there are parts goes to every part, if groups allow.

    Source: iterative stratification, Sechidis et al. 2011, doi:10.1007/978-3-642-23808-6_10.
    Departs from it: whole groups are handed out, all of the rarest mark's at once, and the last
    ones of a mark to the parts that have none; of several divisions the most even is taken.
    """
    places: dict[object, list[int]] = {}
    for place in range(len(marks)):
        places.setdefault(place if groups is None else groups[place], []).append(place)
    members = list(places.values())
    bundles = [
        Counter(mark for place in bundle for mark in (EVERYTHING, *marks[place]))
        for bundle in members
    ]
    draws = 1 if len(members) == len(marks) else DRAWS
    found = min((_draw(bundles, shares, random) for _ in range(draws)), key=lambda draw: draw[0])
    part = np.empty(len(marks), dtype=np.int64)
    for bundle, chosen in zip(members, found[1], strict=True):
        part[bundle] = chosen
    return part


def _draw(
    bundles: Sequence[Bundle], shares: Sequence[float], random: np.random.Generator
) -> tuple[Unevenness, list[int]]:
    """Return the part of each bundle in one drawn division, and how uneven that is."""
    left: Bundle = Counter()
    for bundle in bundles:
        left.update(bundle)
    every = range(len(shares))
    wishes = {mark: [share * count for share in shares] for mark, count in left.items()}
    without = {mark: set(every) for mark in left}
    having: dict[int, list[int]] = {mark: [] for mark in left}
    for place in random.permutation(len(bundles)).tolist():
        for mark in bundles[place]:
            having[mark].append(place)
    waiting = {mark: len(places) for mark, places in having.items()}
    ties = random.permutation(len(shares)).tolist()
    parts = [-1] * len(bundles)
    while left:
        # the rarest has the least choice, what every example has comes last
        mark = min(left, key=lambda mark: (left[mark], mark == EVERYTHING, mark))
        for place in having[mark]:
            if parts[place] >= 0:
                continue
            # the last groups of a mark are kept for the parts that have none yet
            is_last = len(having[mark]) >= len(shares) and waiting[mark] <= len(without[mark])
            parts[place] = part = max(
                without[mark] if is_last else every,
                key=lambda part: (wishes[mark][part], wishes[EVERYTHING][part], ties[part]),
            )
            for other, count in bundles[place].items():
                wishes[other][part] -= count
                left[other] -= count
                waiting[other] -= 1
                without[other].discard(part)
        del left[mark]
    lacking = sum(len(each) for each in without.values())
    return (lacking, sum(abs(wish) for each in wishes.values() for wish in each)), parts
