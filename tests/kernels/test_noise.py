"""The noise is spec sn1: the same bits from torch as from a numpy transcription of the spec, in any batch, and normal."""

import math

import numpy as np
import pytest
import torch

from kernels import noise
from kernels.noise import STREAM_ANSWER, STREAM_COT, STREAM_SOFT, normal_rows, philox, philox_words, uniform_rows

# Random123, kat_vectors: philox4x32 10 rounds, counter, key, expected.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32)


def reference_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 on Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second & 0xFFFFFFFF, (first >> 32) ^ c[3] ^ k[1], first & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def reference_pair(x1: np.ndarray, x2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two uint32 arrays -> two normals, in numpy float32: every operation rounds once."""
    f = np.float32
    m, e = np.frexp(((x1 >> np.uint32(8)) + np.uint32(1)).astype(f))
    low = m < f(math.sqrt(0.5))
    m, e = np.where(low, m + m, m).astype(f), (e - 24 - low).astype(f)
    x = m - f(1)
    y = np.full_like(x, f(noise.LOG_POLYNOMIAL[0]))
    for coefficient in noise.LOG_POLYNOMIAL[1:]:
        y = y * x + f(coefficient)
    y = y * x * (x * x) + e * f(noise.LN2_LOW) - (x * x) * f(0.5)
    log = (x + y) + e * f(noise.LN2_HIGH)
    radius = np.sqrt(np.abs(f(-2) * log))
    quadrant = x2 >> np.uint32(30)
    t = ((x2 >> np.uint32(6)) & np.uint32(0xFFFFFF)).astype(f) * f(2.0**-24) - f(0.5) + f(2.0**-25)
    a = t * f(noise.HALF_PI)
    z = a * a
    s0, s1, s2 = map(f, noise.SIN_POLYNOMIAL)
    c0, c1, c2 = map(f, noise.COS_POLYNOMIAL)
    sin = ((s0 * z + s1) * z + s2) * z * a + a
    cos = ((c0 * z + c1) * z + c2) * z * z - z * f(0.5) + f(1)
    turned_cos = np.choose(quadrant, [cos, -sin, -cos, sin])
    turned_sin = np.choose(quadrant, [sin, cos, -sin, -cos])
    return radius * turned_cos, radius * turned_sin


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    words = philox_words(tuple(torch.tensor([word]) for word in counter), tuple(torch.tensor([word]) for word in key))
    assert tuple(int(word) for word in words) == expected
    assert tuple(reference_philox(counter, key)) == expected


@pytest.mark.parametrize("width", [1, 6, 64, 575])
@pytest.mark.parametrize("stream", [STREAM_SOFT, 7])
def test_normals_are_bit_for_bit_those_of_the_numpy_reference(width, stream):
    seeds = [0, 1, 2**63 - 1, 0xDEADBEEF_01234567 >> 1, 2**32]
    positions = [0, 1, 2**32 - 1, 4097, 131072]
    groups = -(-width // 4)
    expected = np.empty((len(seeds), groups * 4), np.float32)
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        words = [reference_philox([j, position, stream, 0], [seed & 0xFFFFFFFF, seed >> 32]) for j in range(groups)]
        w = np.array(words, np.uint32)
        expected[row, 0::4], expected[row, 1::4] = reference_pair(w[:, 0], w[:, 1])
        expected[row, 2::4], expected[row, 3::4] = reference_pair(w[:, 2], w[:, 3])
    result = normal_rows(torch.tensor(seeds), torch.tensor(positions), width, stream)
    assert result.shape == (5, width) and result.is_contiguous()
    assert torch.equal(bits(result), bits(torch.from_numpy(expected[:, :width].copy())))


def test_box_muller_is_bit_exact_over_a_million_words_and_at_the_extremes():
    words = [w.reshape(-1) for w in philox(torch.arange(1 << 18), torch.tensor([5]), 0, torch.tensor([99]))]
    edges = torch.tensor([0, 1, 255, 256, 0x3FFFFFFF, 0x40000000, 0x7FFFFFFF, 0x80000000, 0xBFFFFFC0, 0xFFFFFF00, 0xFFFFFFFF])
    grid = torch.cartesian_prod(edges, edges)
    x1, x2 = torch.cat((words[0], words[2], grid[:, 0])), torch.cat((words[1], words[3], grid[:, 1]))
    out = torch.empty(1, len(x1), 4)
    noise._box_muller(x1.expand(2, 1, -1), x2.expand(2, 1, -1), out)
    cos, sin = reference_pair(x1.numpy().astype(np.uint32), x2.numpy().astype(np.uint32))
    assert torch.equal(bits(out[0, :, 0]), bits(torch.from_numpy(cos)))
    assert torch.equal(bits(out[0, :, 3]), bits(torch.from_numpy(sin)))
    u, quarter_turns = ((x1 >> 8) + 1).double() * 2.0**-24, (x2.double() // 64 + 0.5) * 2.0**-24 - 0.5
    exact = (-2 * u.log()).sqrt() * (quarter_turns * math.pi / 2).cos()
    assert (out[0, :, 0].double() - exact).abs().max() < 8e-7  # half an ulp at 5.77 is 2.4e-7
    assert out.abs().max() < 5.77


def test_a_row_does_not_depend_on_its_batch(monkeypatch):
    seeds, positions = torch.randint(0, 2**62, (37,)), torch.randint(0, 5000, (37,))
    batch = normal_rows(seeds, positions, 50)
    for row in (0, 17, 36):
        assert torch.equal(normal_rows(seeds[row : row + 1], positions[row : row + 1], 50)[0], batch[row])
    shuffle = torch.randperm(37)
    assert torch.equal(normal_rows(seeds[shuffle], positions[shuffle], 50), batch[shuffle])
    assert torch.equal(normal_rows(seeds, positions, 23), batch[:, :23])
    monkeypatch.setattr(noise, "CPU_BLOCK", 40)  # 3 rows at a time
    assert torch.equal(normal_rows(seeds, positions, 50), batch)
    uniforms = uniform_rows(seeds, positions, STREAM_COT)
    assert torch.equal(uniform_rows(seeds[shuffle], positions[shuffle], STREAM_COT), uniforms[shuffle])


def kolmogorov(sorted_cdf: torch.Tensor) -> float:
    """sqrt(n) times the Kolmogorov-Smirnov distance; above 1.95 with probability 0.001."""
    n = len(sorted_cdf)
    grid = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum(grid[1:] - sorted_cdf, sorted_cdf - grid[:-1]).max()) * math.sqrt(n)


def test_the_noise_is_standard_normal_and_uncorrelated():
    rows, width = 2048, 512
    x = normal_rows(torch.arange(rows) // 16 + 2**40, torch.arange(rows) % 16, width).double()
    n = x.numel()
    assert abs(x.mean()) < 4 / math.sqrt(n)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((x**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert kolmogorov(torch.special.ndtr(x.flatten().sort().values)) < 1.95
    neighbours = {
        "coordinates": (x[:, :-1] * x[:, 1:]).mean(),
        "positions": (x[:-1] * x[1:]).mean(),
        "seeds": (x[:-16] * x[16:]).mean(),
    }
    for what, correlation in neighbours.items():
        assert abs(correlation) < 4 / math.sqrt(n), what


def test_streams_are_distinct_and_uniforms_are_uniform():
    seeds, positions = torch.full((1 << 17,), 3), torch.arange(1 << 17)
    cot, answer = uniform_rows(seeds, positions, STREAM_COT), uniform_rows(seeds, positions, STREAM_ANSWER)
    assert cot.dtype == torch.float32 and cot.min() > 0 and cot.max() < 1
    assert torch.equal((cot * 2**24).long() % 2, torch.ones(1 << 17, dtype=torch.int64))
    for uniforms in (cot, answer):
        assert kolmogorov(uniforms.double().sort().values) < 1.95
    correlation = 12 * ((cot - 0.5) * (answer - 0.5)).double().mean()
    assert abs(correlation) < 4 / math.sqrt(1 << 17)
    assert len({STREAM_SOFT, STREAM_COT, STREAM_ANSWER}) == 3


def test_no_rows_and_wrong_inputs():
    none = torch.empty(0, dtype=torch.int64)
    assert normal_rows(none, none, 8).shape == (0, 8)
    assert uniform_rows(none, none, STREAM_COT).shape == (0,)
    with pytest.raises(ValueError, match=r"positions: shape \[2\], expected \[R\] = \[3\]"):
        normal_rows(torch.arange(3), torch.arange(2), 8)
    with pytest.raises(ValueError, match=r"seeds: dtype torch.int32, expected torch.int64"):
        uniform_rows(torch.arange(3, dtype=torch.int32), torch.arange(3), STREAM_COT)
    for rows in (lambda *keys: normal_rows(*keys, 8), lambda *keys: uniform_rows(*keys, STREAM_COT)):
        with pytest.raises(ValueError, match=r"positions: on meta, expected cpu, where seeds is"):
            rows(torch.arange(3), torch.arange(3, device="meta"))
