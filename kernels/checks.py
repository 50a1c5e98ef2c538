"""Input checks shared by the kernels: a failure is a ValueError of one line that names the argument and what was expected."""

import torch


def require_shape(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], meaning: str) -> None:
    """`shape` may hold None where any size will do; `meaning` is the shape in letters, such as "[T, d]"."""
    actual = tuple(tensor.shape)
    if len(actual) != len(shape) or any(want is not None and want != have for have, want in zip(actual, shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: shape {list(actual)}, expected {meaning} = [{wanted}]")


def require_dtype(name: str, tensor: torch.Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")


def require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: {value}, expected a number above 0")
