"""Order and threads for every test: cheap truths first, and one thread a process, because spinning OpenMP teams that share
cores slow each other down by an order of magnitude."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

FOLDERS = ("configs", "kernels", "rollout", "learner", "cluster", "end_to_end")  # the direction of imports


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked slow last, those with the longest deadline first, so that two workers end together; within these halves in
    the direction of imports."""

    def rank(item: pytest.Item) -> tuple[bool, float, int]:
        folder, deadline = item.path.parent.name, item.get_closest_marker("timeout")
        slow = item.get_closest_marker("slow") is not None
        longest = -deadline.args[0] if slow and deadline else 0
        return slow, longest, FOLDERS.index(folder) if folder in FOLDERS else 0

    items.sort(key=rank)
