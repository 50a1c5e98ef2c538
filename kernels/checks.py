"""Input checks shared by the kernels: a failure is a ValueError of one line that names the argument and what was expected."""

import torch
from torch import Tensor

from kernels.segments import segment_sum

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def require_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...], meaning: str) -> None:
    """`shape` may hold None where any size will do; `meaning` is the shape in letters, such as "[T, d]"."""
    actual = tuple(tensor.shape)
    if len(actual) != len(shape) or any(want is not None and want != have for have, want in zip(actual, shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: shape {list(actual)}, expected {meaning} = [{wanted}]")


def require_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    """One of `dtypes` and no other: nothing is cast silently."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")


def require_positive(name: str, value: float) -> None:
    """Above 0; a NaN is not."""
    if not value > 0:
        raise ValueError(f"{name}: {value}, expected a number above 0")


def require_contiguous(name: str, tensor: Tensor) -> None:
    """Elements in a row in memory, as a kernel reads them: nothing is copied silently."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: shape {list(tensor.shape)} with strides {list(tensor.stride())}, expected a contiguous tensor")


def require_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Where `other` is: nothing is moved silently."""
    if tensor.device != other.device:
        raise ValueError(f"{name}: on {tensor.device}, expected {other.device}, where {other_name} is")


def require_ids(name: str, ids: Tensor, count: int) -> None:
    """Every id in [0, count). Waits for the device."""
    if len(ids):
        low, high = torch.stack(ids.aminmax()).tolist()
        if low < 0 or high >= count:
            raise ValueError(f"{name}: values from {low} to {high}, expected ids in [0, {count})")


def require_offsets(name: str, offsets: Tensor, entries: int) -> None:
    """CSR offsets int64 [R + 1]: from 0 to `entries`, never falling. Waits for the device."""
    if not len(offsets) or not bool((offsets[0] == 0) & (offsets[-1] == entries) & (offsets.diff() >= 0).all()):
        raise ValueError(f"{name}: shape {list(offsets.shape)}, expected offsets that rise from 0 to {entries}, the entries")


def require_mass(name: str, mass: Tensor, offsets: Tensor) -> None:
    """Every row of CSR `offsets` [R + 1] that has entries has `mass` [R] above 0; a NaN is not. Waits for the device."""
    none = int(((offsets.diff() > 0) & ~(mass > 0)).sum())
    if none:
        raise ValueError(f"{name}: {none} of {len(mass)} rows have entries of no mass, expected probabilities that sum to 1")


def require_every(name: str, holds: Tensor, meaning: str) -> None:
    """`holds` is true for every element of the argument `name`, as it is not for a NaN. Waits for the device."""
    if not bool(holds.all()):
        wrong = int((~holds).sum())
        raise ValueError(f"{name}: shape {list(holds.shape)} with {wrong} elements not {meaning}, expected every element {meaning}")


# What makes or rebuilds a soft embedding, on a CPU as on a GPU


def check_record(ids: Tensor, probs: Tensor, offsets: Tensor, embedding: Tensor, dtype: torch.dtype) -> None:
    """What `mix` is given, on any device, for which it waits to see the values."""
    require_shape("ids", ids, (None,), "[N]")
    require_dtype("ids", ids, torch.int32, torch.int64)
    require_shape("probs", probs, (len(ids),), "[N]")
    require_dtype("probs", probs, torch.float32)
    require_shape("offsets", offsets, (None,), "[R + 1]")
    require_dtype("offsets", offsets, torch.int64)
    for name, part in (("ids", ids), ("probs", probs), ("offsets", offsets)):
        require_contiguous(name, part)
        require_same_device(name, part, "embedding", embedding)
    check_table(embedding, dtype, ids)
    require_offsets("offsets", offsets, len(ids))
    require_ids("ids", ids, len(embedding))
    require_mass("probs", segment_sum(probs, offsets), offsets)


def check_rebuild(
    ids: Tensor,
    probs: Tensor,
    offsets: Tensor,
    embedding: Tensor,
    sigma: Tensor,
    seeds: Tensor,
    positions: Tensor,
    dtype: torch.dtype,
) -> None:
    """What `rebuild` is given, on any device, for which it waits to see the values."""
    check_record(ids, probs, offsets, embedding, dtype)
    check_noise(sigma, seeds, positions, len(offsets) - 1, ids)
    require_every("sigma", sigma >= 0, "at least 0")


def check_table(embedding: Tensor, dtype: torch.dtype, ids: Tensor) -> None:
    """The matrix whose rows are mixed, and the engine's dtype that they are rounded to. Values are not looked at."""
    require_shape("embedding", embedding, (None, None), "[V, n0]")
    require_dtype("embedding", embedding, *FLOATS)
    require_contiguous("embedding", embedding)
    require_same_device("embedding", embedding, "ids", ids)
    if dtype not in FLOATS:
        raise ValueError(f"dtype: {dtype}, expected {' or '.join(map(str, FLOATS))}")


def check_noise(sigma: Tensor, seeds: Tensor, positions: Tensor, rows: int, like: Tensor, like_name: str = "ids") -> None:
    """The noise's scale and keys, [rows] each, on the device of `like`. Values are not looked at: a CUDA graph cannot wait."""
    for name, values, dtype in (
        ("sigma", sigma, torch.float32),
        ("seeds", seeds, torch.int64),
        ("positions", positions, torch.int64),
    ):
        require_shape(name, values, (rows,), "[R]")
        require_dtype(name, values, dtype)
        require_same_device(name, values, like_name, like)
