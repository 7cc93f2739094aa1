from __future__ import annotations

import functools

import pytest

from gradbench import registry
from gradbench.task import TaskPair
from gradbench.testing import MakeTask, TaskContract

NAMES = [row.name for row in registry.listing(registry.TASKS)]


@functools.cache
def load(name: str) -> type[TaskPair]:
    found: type[TaskPair] = registry.load_class(registry.TASKS, name, TaskPair).obj
    return found


class TestInstalledTasks(TaskContract):
    @pytest.fixture(params=NAMES)
    def make_task(
        self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> MakeTask:
        folder = tmp_path_factory.getbasetemp() / f"example-{request.param}"
        folder.mkdir(exist_ok=True)
        return functools.partial(load(request.param).example, folder)


def test_the_first_tasks_are_among_them() -> None:
    assert "digits" in NAMES
