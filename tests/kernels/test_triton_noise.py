"""Triton's noise is, bit for bit, the CPU's: whatever the width, the row and the extremes of the words."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import noise, triton_noise

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
SEEDS = torch.tensor([0, 1, 2**63 - 1, 0xDEADBEEF_01234567 >> 1, 2**32])
POSITIONS = torch.tensor([0, 1, 2**32 - 1, 4097, 131072])


def bits(values: Tensor) -> Tensor:
    return values.cpu().view(torch.int32)


@triton.jit
def philox_of_counter(seed, counter, out):
    """tl.philox, on which `philox_words` rests, with all four words of a counter."""
    zero = tl.zeros((1,), tl.uint32)
    i = tl.arange(0, 1)
    c0, c1, c2, c3 = (
        zero + tl.load(counter).to(tl.uint32),
        zero + tl.load(counter + 1).to(tl.uint32),
        zero + tl.load(counter + 2).to(tl.uint32),
        zero + tl.load(counter + 3).to(tl.uint32),
    )
    x0, x1, x2, x3 = tl.philox(tl.load(seed), c0, c1, c2, c3)
    tl.store(out + i, x0.to(tl.int64))
    tl.store(out + 1 + i, x1.to(tl.int64))
    tl.store(out + 2 + i, x2.to(tl.int64))
    tl.store(out + 3 + i, x3.to(tl.int64))


@triton.jit
def box_muller_of_words(radius_words, angle_words, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    words = tl.load(radius_words + i).to(tl.uint32), tl.load(angle_words + i).to(tl.uint32)
    cos, sin = triton_noise._box_muller(words[0], words[1])
    tl.store(out + i, cos)
    tl.store(out + SIZE + i, sin)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected, device):
    signed = [part - 2**32 if part >= 2**31 else part for part in key]
    seed = torch.tensor([(signed[1] << 32) | key[0]], device=device)
    out = torch.zeros(4, dtype=torch.int64, device=device)
    philox_of_counter[(1,)](seed, torch.tensor(counter, device=device), out)
    assert tuple(out.tolist()) == expected


@pytest.mark.parametrize("width", [1, 3, 64, 575, 1027, 4096])
@pytest.mark.parametrize("stream", [noise.STREAM_SOFT, 7])
def test_normals_are_bit_for_bit_those_of_a_cpu(width, stream, device):
    normals = triton_noise.normal_rows(SEEDS.to(device), POSITIONS.to(device), width, stream)
    assert normals.shape == (5, width) and normals.is_contiguous()
    assert torch.equal(bits(normals), bits(noise.normal_rows(SEEDS, POSITIONS, width, stream)))


def test_box_muller_is_bit_exact_at_the_extremes(device):
    edges = torch.tensor([0, 1, 255, 256, 0x3FFFFFFF, 0x40000000, 0x7FFFFFFF, 0x80000000, 0xBFFFFFC0, 0xFFFFFF00, 0xFFFFFFFF])
    words = torch.cat((torch.cartesian_prod(edges, edges), torch.randint(0, 2**32, (4096 - 121, 2))))
    x1, x2 = words.T.contiguous()
    out = torch.empty(2, 4096, device=device)
    box_muller_of_words[(1,)](x1.to(device), x2.to(device), out, SIZE=4096, enable_fp_fusion=False)
    expected = torch.empty(1, 4096, 4)
    noise._box_muller(x1.expand(2, 1, -1), x2.expand(2, 1, -1), expected)
    assert torch.equal(bits(out[0]), bits(expected[0, :, 0].contiguous()))
    assert torch.equal(bits(out[1]), bits(expected[0, :, 1].contiguous()))


def test_uniforms_are_bit_for_bit_those_of_a_cpu(device):
    seeds, positions = torch.cat((SEEDS, torch.arange(300))), torch.cat((POSITIONS, torch.arange(300)))
    uniforms = triton_noise.uniform_rows(seeds.to(device), positions.to(device), noise.STREAM_ANSWER)
    assert torch.equal(bits(uniforms), bits(noise.uniform_rows(seeds, positions, noise.STREAM_ANSWER)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_public_functions_are_these():
    for function, argument in ((noise.normal_rows, 4096), (noise.uniform_rows, noise.STREAM_COT)):
        assert torch.equal(bits(function(SEEDS.cuda(), POSITIONS.cuda(), argument)), bits(function(SEEDS, POSITIONS, argument)))
    assert noise.normal_rows(SEEDS.cuda()[:1].expand(5), POSITIONS.cuda(), 8).shape == (5, 8)


def test_no_rows_and_wrong_inputs(device):
    none, three = torch.empty(0, dtype=torch.int64, device=device), torch.arange(3, device=device)
    assert triton_noise.normal_rows(none, none, 8).shape == (0, 8)
    assert triton_noise.uniform_rows(none, none, 1).shape == (0,)
    for function in (triton_noise.normal_rows, triton_noise.uniform_rows):
        with pytest.raises(ValueError, match=r"positions: shape \[2\], expected \[R\] = \[3\]"):
            function(three, three[:2], 8)
        with pytest.raises(ValueError, match=r"seeds: dtype torch.int32, expected torch.int64"):
            function(three.int(), three, 8)
        with pytest.raises(ValueError, match=r"positions: shape \[3\] with strides \[2\], expected a contiguous tensor"):
            function(three, torch.arange(6, device=device)[::2], 8)
        with pytest.raises(ValueError, match=r"positions: on meta, expected (cpu|cuda:0), where seeds is"):
            function(three, three.to("meta"), 8)
