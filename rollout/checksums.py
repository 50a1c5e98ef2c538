"""Checksums of tensors, fast enough to take at every push, and the tensors of a vLLM model that they can be taken of."""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def tensor_checksum(tensor: Tensor) -> str:
    """CRC-32 of the tensor's bytes and length, as hex; about 1 GB a second on one core."""
    data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return f"{zlib.crc32(data.numpy().data):08x}-{data.numel()}"


def readable_tensors(model: Any, shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of those tensors of a checkpoint, of these names and shapes, that a vLLM model holds as they came.

    Whole parameters and their parts in stacked ones (the model class's packed_modules_mapping, as q_proj in qkv_proj); the rows
    of a padded vocabulary without the padding. Not what a kernel has packed anew, and not what tensor parallelism has split.
    """
    held = dict(model.named_parameters())
    stacks: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    stack_of = {part: (whole, parts) for whole, parts in stacks.items() for part in parts}
    for name, shape in shapes.items():
        module, kind = ["", *name.split(".")][-2:]
        path = name.removesuffix(f"{module}.{kind}")
        whole, parts = stack_of.get(module, (module, [module]))
        parameter = held.get(f"{path}{whole}.{kind}")
        rows = [shapes.get(f"{path}{part}.{kind}", [0])[0] for part in parts]
        if parameter is None or list(parameter.shape[1:]) != list(shape[1:]):
            continue
        if parameter.shape[0] == sum(rows) or (module in ("embed_tokens", "lm_head") and parameter.shape[0] > sum(rows)):
            begin = sum(rows[: parts.index(module)])
            yield name, parameter[begin : begin + shape[0]]
