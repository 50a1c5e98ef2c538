"""What the parts of gpu_check share: how large everything is, what a check says, and how work becomes a CUDA graph."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kernels import matmul

THRESHOLD = 1e-6  # of the probability of a token that belongs to a support
TAUS = (1e-4, 1e-3, 1e-2, 0.1, 0.5, 1.0, 2.0)


@dataclass(frozen=True, slots=True)
class Scale:
    """How large everything is. V, d and the heads are Llama-3.1-8B's, but for TINY, which only shows that the code runs."""

    normals: int  # compared with the CPU's
    vocabulary: int  # V
    width: int  # d = n0
    heads: tuple[int, int]  # of queries, of keys and values
    intermediate: int  # of the MLP
    small_vocabulary: int  # for checks in float32 and of many cases
    small_width: int
    exact_tokens: int  # compared with float64
    batches: tuple[int, ...]  # rows of a decoding step
    tokens: int  # of the learner's log-probabilities
    memory_tokens: tuple[int, ...]
    layers: tuple[int, int]  # of the two models whose steps are extrapolated to the 32 of an 8B one
    learner_rows: int  # input tokens of the packed micro-batch
    seconds: float  # spent on each timing, at least
    every_dtype: bool  # or only those of a bf16 engine: each is compiled anew, for seconds


FULL = Scale(
    normals=10**8, vocabulary=128_256, width=4096, heads=(32, 8), intermediate=14_336,
    small_vocabulary=32_003, small_width=576, exact_tokens=64, batches=(1, 32, 256), tokens=16_384,
    memory_tokens=(2048, 8192, 32_768), layers=(4, 8), learner_rows=10_752, seconds=0.3, every_dtype=True,
)  # fmt: skip
QUICK = Scale(
    normals=10**7, vocabulary=128_256, width=4096, heads=(32, 8), intermediate=14_336,
    small_vocabulary=32_003, small_width=576, exact_tokens=16, batches=(1, 32, 256), tokens=4096,
    memory_tokens=(2048, 8192), layers=(2, 4), learner_rows=5376, seconds=0.05, every_dtype=False,
)  # fmt: skip
TINY = Scale(
    normals=4096, vocabulary=300, width=64, heads=(2, 1), intermediate=96,
    small_vocabulary=130, small_width=40, exact_tokens=12, batches=(1, 3), tokens=6,
    memory_tokens=(2, 4), layers=(1, 2), learner_rows=96, seconds=0.0, every_dtype=True,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setting:
    """Where a section runs, and how large."""

    device: torch.device
    scale: Scale

    @property
    def on_gpu(self) -> bool:
        """False in Triton's interpreter."""
        return self.device.type == "cuda"


@dataclass(frozen=True, slots=True)
class Check:
    """Something that must hold: an error (a count of violations where the bar is 0) and the most that it may be."""

    name: str
    error: float
    bar: float

    @property
    def passed(self) -> bool:
        """False for a NaN."""
        return self.error <= self.bar

    def record(self) -> dict[str, Any]:
        """As it stands in the JSON."""
        return asdict(self) | {"passed": self.passed}


def violations(*holds: bool | Tensor) -> float:
    """How many of the statements, and of the elements of each, do not hold."""
    return float(sum(int((~torch.as_tensor(statement)).sum()) for statement in holds))


def relative(result: Tensor, exact: Tensor) -> float:
    """|result - exact| / |exact|, in the dtype of `exact`."""
    return float((result.to(exact.dtype) - exact).norm() / exact.norm())


def worst(errors: Tensor) -> float:
    """The largest of the errors; 0 if there is none; a NaN if one is."""
    return float(errors.max()) if errors.numel() else 0.0


def through_triton(setting: Setting) -> AbstractContextManager[Any]:
    """A context in which CPU tensors, too, take the way of CUDA tensors, for the interpreter."""
    if setting.on_gpu:
        return nullcontext()
    return mock.patch.object(matmul, "uses_triton", lambda tensor: tensor.dtype != torch.float64)


def captured(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`work`, done once, as a CUDA graph's replay; `work` itself where there is no GPU."""
    work()
    if device.type != "cuda":
        return work
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
