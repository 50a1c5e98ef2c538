"""Spec "sn1": counter-based random numbers that are the same bits on every device, in every batch and in every order.

A number is a pure function of (seed, stream, position, coordinate). Nothing is drawn in sequence, so a replay, another batch
slot, another tensor-parallel rank or a preempted request cannot change it, and noise never has to be stored or sent.

```
 key     = (seed low 32 bits, seed high 32 bits)            64-bit trajectory seed
 counter = (coordinate // 4, position, stream, 0)           absolute position in the sequence
      |
 Philox4x32-10 (Random123)  -->  4 words of 32 bits  -->  2 x Box-Muller  -->  normals of coordinates 4j .. 4j+3
```

Box-Muller is written with integer operations, fp32 additions and multiplications (each rounded, never fused) and a correctly
rounded square root: IEEE 754 fixes every bit. torch.randn and cuRAND depend on the number of SMs; libm's log and cos differ by
an ulp from one library to the next. Hence also no addcmul, no `add(alpha=...)` here: both may become a fused multiply-add.
"""

import torch
from torch import Tensor

from kernels.checks import require_dtype, require_same_device, require_shape

STREAM_SOFT = 0  # noise of soft embeddings
STREAM_COT = 1  # sampling of hard CoT tokens
STREAM_ANSWER = 2  # sampling of answer tokens

MASK32 = 0xFFFFFFFF
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio and sqrt(3) - 1, the Weyl sequence of the key
PHILOX_ROUNDS = 10
Words = tuple[Tensor, Tensor, Tensor, Tensor]  # int64, broadcastable, every element in [0, 2**32)

# Polynomials of Cephes logf, sinf and cosf, highest power first; a constant is rounded to fp32 by the operation that uses it.
LOG_POLYNOMIAL = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
SIN_POLYNOMIAL = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS_POLYNOMIAL = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # ln 2 in two parts: exponent * LN2_HIGH is exact
HALF_PI = 1.5707963267948966
SQRT_HALF_BITS = 0x3F3504F3  # the fp32 bits of sqrt(1/2)

CPU_BLOCK = 1 << 14  # counters per block: the temporaries of one block stay in a core's cache


def normal_rows(seeds: Tensor, positions: Tensor, width: int, stream: int = STREAM_SOFT) -> Tensor:
    """Standard normals float32 [R, width]: row r belongs to (seeds[r], positions[r]), whatever the other rows are.

    seeds, positions: int64 [R]; seeds in [0, 2**63), positions in [0, 2**32). The largest magnitude possible is 5.77.
    Raises ValueError on wrong shapes, dtypes or devices; values are not looked at, because a GPU would have to be waited for.
    """
    check_keys(seeds, positions)
    if seeds.is_cuda:
        from kernels import triton_noise  # not at the top: a CPU needs no Triton

        return triton_noise.normal_rows(seeds.contiguous(), positions.contiguous(), width, stream)
    groups = -(-width // 4)
    normals = torch.empty(len(seeds), groups, 4, dtype=torch.float32, device=seeds.device)
    coordinates = torch.arange(groups, device=seeds.device)
    block = max(1, CPU_BLOCK // max(groups, 1))
    for start in range(0, len(seeds), block):
        rows = slice(start, start + block)
        words = philox(coordinates, positions[rows, None], stream, seeds[rows, None])
        _box_muller(torch.stack((words[0], words[2])), torch.stack((words[1], words[3])), normals[rows])
    return normals.flatten(1)[:, :width].contiguous()


def uniform_rows(seeds: Tensor, positions: Tensor, stream: int) -> Tensor:
    """Uniforms float32 [R] in (0, 1), one per (seed, position): odd multiples of 2**-24, so neither 0 nor 1 and exact in fp32.

    seeds, positions: int64 [R], as for `normal_rows`. Raises ValueError as it does.
    """
    check_keys(seeds, positions)
    if seeds.is_cuda:
        from kernels import triton_noise

        return triton_noise.uniform_rows(seeds.contiguous(), positions.contiguous(), stream)
    word = philox(torch.zeros_like(positions), positions, stream, seeds)[0]
    return ((word >> 9) * 2 + 1).to(torch.float32) * 2.0**-24


def philox(coordinates: Tensor, positions: Tensor, stream: int, seeds: Tensor) -> Words:
    """Philox4x32-10 of counter (coordinates, positions, stream, 0) under key `seeds`: four int64 tensors of 32-bit words.

    All int64, broadcast against each other. Checked against Random123's known answers through `philox_words`.
    """
    return philox_words(
        (coordinates, positions, torch.full_like(positions, stream), torch.zeros_like(positions)),
        (seeds & MASK32, (seeds >> 32) & MASK32),
    )


def philox_words(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """The Philox4x32-10 bijection on int64 tensors that hold 32-bit words (Random123, philox.h).

    A product of two words wraps modulo 2**64 in int64: its high word is (product >> 32) & MASK32, the low one product & MASK32.
    A low word stays unmasked while it waits to be xored into the next round's word, which is masked anyway.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        product0, product1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1 = ((product1 >> 32) ^ (c1 ^ k0)) & MASK32, product1
        c2, c3 = ((product0 >> 32) ^ (c3 ^ k1)) & MASK32, product0
        k0, k1 = (k0 + PHILOX_KEY_STEPS[0]) & MASK32, (k1 + PHILOX_KEY_STEPS[1]) & MASK32
    return c0, c1 & MASK32, c2, c3 & MASK32


def check_keys(seeds: Tensor, positions: Tensor) -> None:
    """Seeds and positions that fit each other, int64 [R] on one device; ValueError otherwise."""
    require_shape("seeds", seeds, (None,), "[R]")
    require_shape("positions", positions, (len(seeds),), "[R]")
    require_dtype("seeds", seeds, torch.int64)
    require_dtype("positions", positions, torch.int64)
    require_same_device("positions", positions, "seeds", seeds)


def _box_muller(radius_words: Tensor, angle_words: Tensor, out: Tensor) -> None:
    """Words int64 [2, rows, groups] (two pairs per counter) -> normals into out [rows, groups, 4] as cos, sin, cos, sin."""
    radius = _radius(radius_words)
    quadrant = angle_words >> 30
    sin, cos = _sin_cos(angle_words)
    odd = (quadrant & 1).bool()  # a quarter turn swaps sine and cosine
    pairs = out.unflatten(2, (2, 2)).permute(2, 0, 1, 3)
    torch.mul(radius * (1 - ((quadrant + 1) & 2)), torch.where(odd, sin, cos), out=pairs[..., 0])
    torch.mul(radius * (1 - (quadrant & 2)), torch.where(odd, cos, sin), out=pairs[..., 1])


def _radius(words: Tensor) -> Tensor:
    """sqrt(-2 ln u) float32 for u = ((word >> 8) + 1) * 2**-24 in (0, 1]."""
    bits = ((words >> 8) + 1).to(torch.float32).view(torch.int32) - SQRT_HALF_BITS
    exponent = ((bits >> 23) - 24).to(torch.float32)  # u = mantissa * 2**exponent, mantissa in [sqrt(1/2), sqrt(2))
    x = ((bits & 0x7FFFFF) + SQRT_HALF_BITS).view(torch.float32) - 1.0
    square = x * x
    log = x * LOG_POLYNOMIAL[0]
    for coefficient in LOG_POLYNOMIAL[1:]:
        log.add_(coefficient).mul_(x)
    log.mul_(square).add_(exponent * LN2_LOW).sub_(square * 0.5)
    log = log.add_(x).add_(exponent * LN2_HIGH)
    # fp32 torch.sqrt is an ulp off for 17% of inputs on MKL builds; through float64 it is correctly rounded.
    # Adding +0 turns the -0 of u = 1 into +0.
    return log.double().mul_(-2.0).clamp_min_(0.0).add_(0.0).sqrt_().to(torch.float32)


def _sin_cos(words: Tensor) -> tuple[Tensor, Tensor]:
    """(sin, cos) float32 of an angle in (-pi/4, pi/4), given by 24 bits below the two quadrant bits."""
    angle = ((words >> 6) & 0xFFFFFF).to(torch.float32).mul_(2.0**-24).sub_(0.5).add_(2.0**-25).mul_(HALF_PI)
    square = angle * angle
    sin = square * SIN_POLYNOMIAL[0]
    sin.add_(SIN_POLYNOMIAL[1]).mul_(square).add_(SIN_POLYNOMIAL[2]).mul_(square).mul_(angle).add_(angle)
    cos = square * COS_POLYNOMIAL[0]
    cos.add_(COS_POLYNOMIAL[1]).mul_(square).add_(COS_POLYNOMIAL[2]).mul_(square).mul_(square).sub_(square * 0.5).add_(1.0)
    return sin, cos
