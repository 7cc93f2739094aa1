"""What all contracts share: a plug-in may declare, with its reason, a check that it fails."""

from __future__ import annotations

from collections.abc import Mapping

import pytest


class PluginChecks:
    """The base of all contracts.

    A plug-in class whose ``known_failures: ClassVar[Mapping[str, str]]`` names a check, such as
    ``"test_positively_homogeneous"``, is expected to fail it, for the reason given; if it passes,
    the check fails. ``"test_x[zero primary]"`` names the cases with that text in their id.
    """

    @pytest.fixture
    def plugin(self) -> type:
        """Return the class that is checked; a contract defines it."""
        raise NotImplementedError

    @pytest.fixture(autouse=True)
    def expect_known_failure(self, request: pytest.FixtureRequest, plugin: type) -> None:
        """Expect the failures that the plug-in declares."""
        for name, reason in known_failures(plugin).items():
            check, _, case = name.partition("[")
            cases = getattr(request.node, "callspec", None)
            if check == request.node.originalname and case.rstrip("]") in getattr(cases, "id", ""):
                request.applymarker(pytest.mark.xfail(reason=reason, strict=True))


def known_failures(plugin: type) -> Mapping[str, str]:
    """Return what ``plugin`` declares to fail, by the name of the check."""
    declared: Mapping[str, str] = getattr(plugin, "known_failures", {})
    return declared


def checks_of(*contracts: type) -> set[str]:
    """Return the names of the checks in ``contracts``."""
    return {name for contract in contracts for name in dir(contract) if name.startswith("test_")}
