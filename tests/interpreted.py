"""Tests of Triton's kernels: on a GPU where there is one. Elsewhere Triton's interpreter runs the kernels on CPU tensors, which
Triton must know before its first import: so each file test_triton_*.py becomes one test that runs the file in a process of its
own. A folder's conftest.py imports `device` and `pytest_pycollect_makemodule` from here. To choose tests within such a file:
`TRITON_INTERPRET=1 pytest tests/kernels/test_triton_noise.py -k philox`.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

INTERPRETED = "TRITON_INTERPRET"
HAS_GPU = torch.cuda.is_available()


class InterpretedFile(pytest.File):
    """A test file as one test."""

    def collect(self) -> Iterator[pytest.Item]:
        yield InterpretedItem.from_parent(self, name="in_the_interpreter")


class InterpretedItem(pytest.Item):
    def runtest(self) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(self.path)]
        env = os.environ | {INTERPRETED: "1"}
        done = subprocess.run(command, env=env, cwd=self.config.rootpath, capture_output=True, text=True)
        if done.returncode:
            pytest.fail(done.stdout + done.stderr, pytrace=False)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.File | None:
    if module_path.name.startswith("test_triton_") and not HAS_GPU and os.environ.get(INTERPRETED) != "1":
        return InterpretedFile.from_parent(parent, path=module_path)
    return None


@pytest.fixture
def device() -> torch.device:
    """Where Triton's kernels run."""
    return torch.device("cuda" if HAS_GPU else "cpu")
