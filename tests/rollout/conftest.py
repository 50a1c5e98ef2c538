"""What makes Triton's kernels run in rollout's tests."""

from tests.interpreted import device, pytest_pycollect_makemodule

__all__ = ["device", "pytest_pycollect_makemodule"]
