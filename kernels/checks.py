"""Input checks shared by the kernels: a failure is a ValueError of one line that names the argument and what was expected."""

import torch


def require_shape(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], meaning: str) -> None:
    """`shape` may hold None where any size will do; `meaning` is the shape in letters, such as "[T, d]"."""
    actual = tuple(tensor.shape)
    if len(actual) != len(shape) or any(want is not None and want != have for have, want in zip(actual, shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: shape {list(actual)}, expected {meaning} = [{wanted}]")


def require_dtype(name: str, tensor: torch.Tensor, *dtypes: torch.dtype) -> None:
    """One of `dtypes` and no other: nothing is cast silently."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")


def require_positive(name: str, value: float) -> None:
    """Above 0; a NaN is not."""
    if not value > 0:
        raise ValueError(f"{name}: {value}, expected a number above 0")


def require_contiguous(name: str, tensor: torch.Tensor) -> None:
    """Elements in a row in memory, as a kernel reads them: nothing is copied silently."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: shape {list(tensor.shape)} with strides {list(tensor.stride())}, expected a contiguous tensor")


def require_same_device(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name}: on {tensor.device}, expected {other.device}, where {other_name} is")


def require_ids(name: str, ids: torch.Tensor, count: int) -> None:
    """Every id in [0, count). Waits for the device."""
    if len(ids):
        low, high = torch.stack(ids.aminmax()).tolist()
        if low < 0 or high >= count:
            raise ValueError(f"{name}: values from {low} to {high}, expected ids in [0, {count})")


def require_offsets(name: str, offsets: torch.Tensor, entries: int) -> None:
    """CSR offsets int64 [R + 1]: from 0 to `entries`, never falling. Waits for the device."""
    if not len(offsets) or not bool((offsets[0] == 0) & (offsets[-1] == entries) & (offsets.diff() >= 0).all()):
        raise ValueError(f"{name}: shape {list(offsets.shape)}, expected offsets that rise from 0 to {entries}, the entries")


def require_every(name: str, holds: torch.Tensor, meaning: str) -> None:
    """`holds` is true for every element of the argument `name`, as it is not for a NaN. Waits for the device."""
    if not bool(holds.all()):
        wrong = int((~holds).sum())
        raise ValueError(f"{name}: shape {list(holds.shape)} with {wrong} elements not {meaning}, expected every element {meaning}")
