"""Every launch of a Triton kernel compiles for Hopper, which needs no GPU; the interpreter checks no types.

The public functions are called on CPU tensors; each kernel they launch is compiled for the very arguments and then not run.
"""

import os
import re
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from kernels import triton_noise, triton_segments, triton_select, triton_soft_embedding, triton_softmax

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreted kernel cannot be compiled")

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip
BF16, F32 = torch.bfloat16, torch.float32


def compiled(kernel: JITFunction, args: tuple, options: dict) -> str:
    """The PTX of a launch kernel[grid](*args, **options). As at run time, an argument that is 1 or None is a constant."""
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    of_args = zip(kernel.arg_names, args, strict=False)
    constants |= {name: value for name, value in of_args if value is None or (type(value) is int and value == 1)}
    signature, aligned = dict.fromkeys(kernel.arg_names, "constexpr"), {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        elif name not in constants:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature={n: signature[n] for n in kernel.arg_names}, constexprs=constants, attrs=aligned)
    rest = {name: value for name, value in options.items() if name not in kernel.arg_names}
    return triton.compile(source, target=HOPPER, options=rest).asm["ptx"]


@pytest.fixture
def launches(monkeypatch) -> Callable[..., dict[str, str]]:
    """Calls a function and returns the PTX of each kernel of `modules` that it launched."""

    def call(modules: list[ModuleType], function: Callable, *arguments: object) -> dict[str, str]:
        found: dict[str, str] = {}
        for module in modules:
            for name, kernel in vars(module).items():
                if isinstance(kernel, JITFunction):

                    def run(*args, grid, warmup, name=name, kernel=kernel, **options) -> None:
                        found[name] = compiled(kernel, args, options)

                    monkeypatch.setattr(kernel, "run", run)
        function(*arguments)
        return found

    return call


@pytest.mark.parametrize(("rows", "argument"), [(3, 576), (1, 1)])
def test_noise_is_compiled_to_operations_that_round_once(rows, argument, launches):
    for function in (triton_noise.normal_rows, triton_noise.uniform_rows):
        (ptx,) = launches([triton_noise], function, torch.arange(rows), torch.arange(rows), argument).values()
        arithmetic = set(re.findall(r"\b((?:add|sub|mul|fma|mad|div|sqrt|sin|cos|ex2|lg2)\.[a-z.]*f32)", ptx))
        assert "mul.rn.f32" in arithmetic and arithmetic <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "sqrt.rn.f32"}


@pytest.mark.parametrize(("vocabulary", "capacity"), [(1, 1), (128256, 1024)])
def test_selection_compiles(vocabulary, capacity, launches):
    support = triton_select.allocate(2, vocabulary, capacity, torch.device("cpu"))
    found = launches([triton_select], triton_select.select, support, torch.empty(2, vocabulary), torch.ones(2))
    assert set(found) == {"_stats", "_count", "_write"}


@pytest.mark.parametrize(("width", "table", "dtype"), [(576, BF16, BF16), (1, F32, BF16)])
def test_the_gather_compiles_and_fuses_nothing(width, table, dtype, launches):
    embedding, keys = torch.zeros(130, width, dtype=table), (torch.ones(2), torch.arange(2), torch.arange(2))
    support = triton_select.allocate(2, 130, 64, torch.device("cpu"))
    out = torch.empty(2, width, dtype=dtype)
    modules = [triton_soft_embedding]
    record = torch.tensor([1, 2]).int(), torch.tensor([0.5, 0.5]), torch.tensor([0, 2, 2]), embedding
    logits = torch.empty(2, 130)
    found = launches(modules, triton_soft_embedding.soft_embeddings, support, logits, torch.ones(2), embedding, *keys, out)
    assert "_embed_fixed" in found
    found |= launches(modules, triton_soft_embedding.rebuild, *record, *keys, dtype)
    assert not any("fma.rn.f32" in ptx for ptx in found.values())
    assert set(launches(modules, triton_soft_embedding.mix, *record, dtype)) == {"_embed_csr"}


@pytest.mark.parametrize(("tokens", "width", "table"), [(3, 576, BF16), (1, 1, F32)])
def test_ragged_rows_compile(tokens, width, table, launches):
    offsets = torch.arange(tokens + 1)
    rows, ids, entries = torch.arange(tokens), torch.zeros(tokens).int(), torch.ones(tokens)
    matrix, left = torch.zeros(130, width, dtype=table), torch.zeros(tokens, width)
    modules = [triton_segments]
    assert "_entry_dots" in launches(modules, triton_segments.entry_dots, left, rows, matrix, ids)
    assert "_segment_softmax" in launches(modules, triton_segments.segment_softmax, entries, entries, offsets)
    assert "_softmax_gradient" in launches(modules, triton_segments.softmax_gradient, entries, entries, entries, offsets)
    for dtype in (F32, BF16):
        assert "_entry_sums" in launches(modules, triton_segments.entry_sums, matrix, ids, entries, offsets, dtype)


@pytest.mark.parametrize(("vocabulary", "dtype"), [(128256, torch.float16), (1, F32)])
def test_a_chunk_of_logits_compiles(vocabulary, dtype, launches):
    logits, targets, row, column = torch.zeros(2, vocabulary), torch.zeros(2).long(), torch.ones(2), torch.ones(2, 1)
    modules = [triton_softmax]
    for peak in (None, column):
        assert "_softmax_weights" in launches(modules, triton_softmax.softmax_weights, logits, row, dtype, peak)
    assert "_weight_gradients" in launches(modules, triton_softmax.weight_gradients, logits.to(dtype), column, logits)
    assert "_token_statistics" in launches(modules, triton_softmax.token_statistics, logits, targets, row)
    assert "_token_gradient" in launches(modules, triton_softmax.token_gradient, logits, targets, row, row, dtype)
