from __future__ import annotations

import functools

import pytest

from gradbench import registry
from gradbench.task import TaskPair
from gradbench.testing import MakeTask, TaskContract

NAMES = [row.name for row in registry.listing(registry.TASKS)]


@functools.cache
def load(name: str) -> MakeTask:
    made: MakeTask = registry.load_class(registry.TASKS, name, TaskPair).obj
    return made


class TestInstalledTasks(TaskContract):
    @pytest.fixture(params=NAMES)
    def make_task(self, request: pytest.FixtureRequest) -> MakeTask:
        return load(request.param)


def test_the_first_tasks_are_among_them() -> None:
    assert "digits" in NAMES
