from __future__ import annotations

import pytest

from gradbench import registry
from gradbench.method import Method
from gradbench.testing import MakeMethod, MethodContract

NAMES = [row.name for row in registry.listing(registry.METHODS)]


class TestInstalledMethods(MethodContract):
    @pytest.fixture(params=NAMES)
    def make_method(self, request: pytest.FixtureRequest) -> MakeMethod:
        made: MakeMethod = registry.load_class(registry.METHODS, request.param, Method).obj
        return made


def test_the_first_methods_are_among_them() -> None:
    assert {"attittud", "pcgrad", "primary-only", "weighted-sum"} <= set(NAMES)
