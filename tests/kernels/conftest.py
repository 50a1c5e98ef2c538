"""What the kernel tests share."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.interpreted import device, pytest_pycollect_makemodule

__all__ = ["LargestTensor", "device", "largest_tensor", "pytest_pycollect_makemodule", "seeded"]


class LargestTensor(TorchDispatchMode):
    """A context that notes how many elements the largest storage has of all that operations returned inside it."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def largest_tensor() -> LargestTensor:
    return LargestTensor()
