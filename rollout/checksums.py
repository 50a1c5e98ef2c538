"""A checksum of a tensor's bytes, fast enough to take at every push."""

import zlib

import torch
from torch import Tensor


def tensor_checksum(tensor: Tensor) -> str:
    """CRC-32 of the tensor's bytes and length, as hex; about 1 GB a second on one core."""
    data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return f"{zlib.crc32(data.numpy().data):08x}-{data.numel()}"
