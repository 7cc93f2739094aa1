from __future__ import annotations

import functools

import pytest

from gradbench import registry
from gradbench.method import Method
from gradbench.testing import MakeMethod, MethodContract

NAMES = [row.name for row in registry.listing(registry.METHODS)]


@functools.cache
def load(name: str) -> MakeMethod:
    made: MakeMethod = registry.load_class(registry.METHODS, name, Method).obj
    return made


class TestInstalledMethods(MethodContract):
    @pytest.fixture(params=NAMES)
    def make_method(self, request: pytest.FixtureRequest) -> MakeMethod:
        return load(request.param)


def test_the_first_methods_are_among_them() -> None:
    assert {"attittud", "pcgrad", "primary-only", "weighted-sum"} <= set(NAMES)
