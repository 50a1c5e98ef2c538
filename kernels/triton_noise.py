"""Spec "sn1" on a GPU, in Triton: bit for bit what kernels.noise computes on a CPU, whose docstring defines it.

Only operations that IEEE 754 fixes are used, in the order of kernels.noise: additions and multiplications that are each rounded
(`enable_fp_fusion=False`, always explicit, because Triton's default differs between versions), a correctly rounded square
root, and integers. tl.randn will not do: it compiles to approximate square roots, logarithms and cosines.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import noise
from kernels.checks import require_contiguous

GROUPS = 256  # counters per program of `_normals`: 4 normals each
ROWS = 256  # rows per program of `_uniforms`
WARPS = 4

LOG = tl.constexpr(noise.LOG_POLYNOMIAL)
SIN = tl.constexpr(noise.SIN_POLYNOMIAL)
COS = tl.constexpr(noise.COS_POLYNOMIAL)
LN2_HIGH, LN2_LOW = tl.constexpr(noise.LN2_HIGH), tl.constexpr(noise.LN2_LOW)
HALF_PI = tl.constexpr(noise.HALF_PI)
SQRT_HALF_BITS = tl.constexpr(noise.SQRT_HALF_BITS)


def normal_rows(seeds: Tensor, positions: Tensor, width: int, stream: int = noise.STREAM_SOFT) -> Tensor:
    """As `kernels.noise.normal_rows`: float32 [R, width]. Raises ValueError before any launch."""
    _check_keys(seeds, positions)
    normals = torch.empty(len(seeds), width, dtype=torch.float32, device=seeds.device)
    if normals.numel():
        grid = (len(seeds), triton.cdiv(width, GROUPS * 4))
        _normals[grid](seeds, positions, normals, width, stream, GROUPS=GROUPS, num_warps=WARPS, enable_fp_fusion=False)
    return normals


def uniform_rows(seeds: Tensor, positions: Tensor, stream: int) -> Tensor:
    """As `kernels.noise.uniform_rows`: float32 [R]. Raises ValueError before any launch."""
    _check_keys(seeds, positions)
    uniforms = torch.empty(len(seeds), dtype=torch.float32, device=seeds.device)
    if len(seeds):
        grid = (triton.cdiv(len(seeds), ROWS),)
        _uniforms[grid](seeds, positions, uniforms, len(seeds), stream, ROWS=ROWS, num_warps=WARPS, enable_fp_fusion=False)
    return uniforms


def _check_keys(seeds: Tensor, positions: Tensor) -> None:
    noise.check_keys(seeds, positions)
    require_contiguous("seeds", seeds)
    require_contiguous("positions", positions)


@triton.jit
def _normals(seeds, positions, out, width, stream, GROUPS: tl.constexpr):
    """Grid (R, cdiv(width, 4 GROUPS)): GROUPS counters of one row."""
    row, first = tl.program_id(0), tl.program_id(1) * GROUPS
    values = normal_block(tl.load(seeds + row), tl.load(positions + row), stream, first + tl.arange(0, GROUPS))
    coordinate = first * 4 + tl.arange(0, GROUPS * 4)
    tl.store(out + row.to(tl.int64) * width + coordinate, values, mask=coordinate < width)


@triton.jit
def _uniforms(seeds, positions, out, rows, stream, ROWS: tl.constexpr):
    """Grid (cdiv(R, ROWS),)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    seed, position = tl.load(seeds + row, mask=there, other=0), tl.load(positions + row, mask=there, other=0)
    word = philox_words(seed, position, stream, row * 0)[0]
    tl.store(out + row, ((word >> 9) * 2 + 1).to(tl.float32) * 5.9604644775390625e-08, mask=there)  # 2**-24


@triton.jit
def normal_block(seed, position, stream, groups):
    """The normals float32 [4 G] of counters `groups` int32 [G]: coordinates 4 g .. 4 g + 3 of one (seed, position)."""
    x0, x1, x2, x3 = philox_words(seed, position, stream, groups)
    cos0, sin0 = _box_muller(x0, x1)
    cos1, sin1 = _box_muller(x2, x3)
    return tl.interleave(tl.interleave(cos0, cos1), tl.interleave(sin0, sin1))


@triton.jit
def philox_words(seed, position, stream, coordinates):
    """Philox4x32-10 of counter (coordinates, position, stream, 0) under the 64-bit key `seed`: four uint32 blocks."""
    c0 = coordinates.to(tl.uint32)
    zero = c0 * 0
    return tl.philox(seed, c0, zero + position.to(tl.uint32), zero + stream, zero)


@triton.jit
def _box_muller(radius_words, angle_words):
    """Two uint32 words -> (cos, sin) parts of a pair of normals."""
    radius = _radius(radius_words)
    quadrant = angle_words >> 30
    sin, cos = _sin_cos(angle_words)
    odd = (quadrant & 1) == 1  # a quarter turn swaps sine and cosine
    # Times -1, not a minus sign: Triton's is 0 - x, which loses the sign of a zero.
    cos_sign = tl.where(((quadrant + 1) & 2) == 2, -1.0, 1.0)
    sin_sign = tl.where((quadrant & 2) == 2, -1.0, 1.0)
    return radius * cos_sign * tl.where(odd, sin, cos), radius * sin_sign * tl.where(odd, cos, sin)


@triton.jit
def _radius(words):
    """sqrt(-2 ln u) for u = ((word >> 8) + 1) * 2**-24 in (0, 1]."""
    bits = ((words >> 8) + 1).to(tl.float32).to(tl.int32, bitcast=True) - SQRT_HALF_BITS
    exponent = ((bits >> 23) - 24).to(tl.float32)
    x = ((bits & 0x7FFFFF) + SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    square = x * x
    log = x * LOG[0]
    for i in tl.static_range(1, 9):
        log = (log + LOG[i]) * x
    log = log * square + exponent * LN2_LOW - square * 0.5 + x + exponent * LN2_HIGH
    twice = log * -2.0
    return tl.sqrt_rn(tl.where(twice > 0.0, twice, 0.0))  # a selection, not a maximum: u = 1 must give +0, not -0


@triton.jit
def _sin_cos(words):
    """(sin, cos) of an angle in (-pi/4, pi/4), given by 24 bits below the two quadrant bits."""
    angle = (((words >> 6) & 0xFFFFFF).to(tl.float32) * 5.9604644775390625e-08 - 0.5 + 2.98023223876953125e-08) * HALF_PI
    square = angle * angle
    sin = ((square * SIN[0] + SIN[1]) * square + SIN[2]) * square * angle + angle
    cos = ((square * COS[0] + COS[1]) * square + COS[2]) * square * square - square * 0.5 + 1.0
    return sin, cos
