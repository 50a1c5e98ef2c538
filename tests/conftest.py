"""Order and threads for every test: cheap truths first, and one thread a process, because spinning OpenMP teams that share
cores slow each other down by an order of magnitude."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

FOLDERS = ("configs", "kernels", "rollout", "learner", "cluster", "end_to_end")  # the direction of imports


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked slow last; within each half in the direction of imports."""

    def rank(item: pytest.Item) -> tuple[bool, int]:
        folder = item.path.parent.name
        return item.get_closest_marker("slow") is not None, FOLDERS.index(folder) if folder in FOLDERS else 0

    items.sort(key=rank)
