"""What the methods make of one pair of gradients in conflict, worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from gradbench.method import Method
from gradbench.testing import direction
from gradbench_methods.attittud import ATTITTUD
from gradbench_methods.pcgrad import PCGrad
from gradbench_methods.pcgrad_asymmetric import PCGradAsymmetric
from gradbench_methods.primary_only import PrimaryOnly
from gradbench_methods.weighted_sum import WeightedSum

PAIR = [[1.0, 0.0], [-1.0, 1.0]]  # a cosine of -0.7071, lengths 1 and √2

DIRECTIONS: list[tuple[Method, list[float]]] = [
    (WeightedSum(), [0.0, 1.0]),
    (PrimaryOnly(), [1.0, 0.0]),
    (PCGrad(), [0.5, 1.5]),
    (PCGradAsymmetric(), [1.0, 1.0]),
    (ATTITTUD(basis="primary", eta_good=1, eta_bad=0, eta_neutral=1), [1.0, 1.0]),
    (ATTITTUD(basis="primary", eta_good=1, eta_bad=-1, eta_neutral=1), [2.0, 1.0]),
]


@pytest.mark.parametrize(
    ("method", "expected"), DIRECTIONS, ids=[repr(method) for method, _ in DIRECTIONS]
)
def test_direction(method: Method, expected: list[float]) -> None:
    found = direction(method, torch.tensor(PAIR, dtype=torch.float64))
    assert_close(found, torch.tensor(expected, dtype=torch.float64))
