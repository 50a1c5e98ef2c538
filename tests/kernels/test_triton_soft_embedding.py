"""Triton's soft embeddings: the sum in id order, the noise of the spec, one rounding, and the same bits from engine and record."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels import noise, soft_embedding
from kernels.triton_select import allocate, select, select_support, support_batch
from kernels.triton_soft_embedding import UNROLL, mix, partial_means, rebuild, soft_embeddings

TAUS = torch.tensor([1e-4, 1e-2, 0.5, 1.0, 2.0])
BF16, HALF, F32 = torch.bfloat16, torch.float16, torch.float32


def ragged(counts: list[int], vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A record (ids int32 [N] ascending in each row, probs [N] adding up to 1 in each row, offsets [R + 1])."""
    ids = [torch.randperm(vocabulary)[:count].sort().values.int() for count in counts]
    probs = [torch.rand(count).softmax(0) for count in counts]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return torch.cat(ids).to(device), torch.cat(probs).to(device), offsets.to(device)


def sequential_mix(ids: Tensor, probs: Tensor, offsets: Tensor, embedding: Tensor, dtype: torch.dtype) -> Tensor:
    """The definition: one entry after the other, product and sum each rounded to float32."""
    means = torch.zeros(len(offsets) - 1, embedding.shape[1], device=embedding.device)
    for row, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        for i in range(begin, end):
            means[row] += probs[i] * embedding[ids[i].long()].to(dtype).float()
    return means


def keys(rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(sigma, seeds, positions), sigma 0 in the first row."""
    return tuple(x.to(device) for x in (torch.linspace(0, 0.3, rows), torch.arange(rows) + 2**50, torch.arange(rows) * 11))


@pytest.mark.parametrize(
    ("width", "table", "dtype"),
    [(1, F32, F32), (40, F32, BF16), (40, F32, HALF), (40, BF16, F32), (257, BF16, BF16), (300, HALF, HALF)],
)
def test_the_mixture_is_the_sum_in_id_order_bit_for_bit(width, table, dtype, device):
    embedding = torch.randn(90, width, device=device).to(table)
    record = ragged([0, 1, UNROLL, UNROLL + 1, 0], 90, device)
    means = mix(*record, embedding, dtype)
    assert torch.equal(means, sequential_mix(*record, embedding, dtype))
    reference = soft_embedding.mix(*(part.cpu() for part in record), embedding.cpu(), dtype)
    assert (means.cpu() - reference).abs().max() < 1e-6
    assert torch.equal(mix(record[0].long(), *record[1:], embedding, dtype), means)


@pytest.mark.parametrize(("width", "dtype"), [(1, BF16), (300, F32), (258, HALF), (4096, BF16)])
def test_rebuild_is_the_mixture_plus_noise_rounded_once(width, dtype, device):
    embedding = torch.randn(90, width, device=device).to(dtype)
    record, noise_keys = ragged([3, 0, 12], 90, device), keys(3, device)
    sigma, seeds, positions = noise_keys
    result = rebuild(*record, embedding, *noise_keys, dtype)
    mean = sequential_mix(*record, embedding, dtype)
    normals = noise.normal_rows(seeds.cpu(), positions.cpu(), width).to(device)
    assert result.dtype == dtype and torch.equal(result, (mean + sigma[:, None] * normals).to(dtype))
    assert torch.equal(result[0], mean[0].to(dtype))  # sigma 0
    last = record[0][3:], record[1][3:], record[2][2:] - 3
    assert torch.equal(rebuild(*last, embedding, *(key[2:] for key in noise_keys), dtype)[0], result[2])


def test_rounding_to_bf16_is_to_nearest_even(device):
    """One token of probability 1 and no noise: float32 rows of E come out as torch rounds them."""
    patterns = torch.randint(-(2**31), 2**31, (1024,)).int().view(F32)
    ties = ((torch.arange(0x3F80, 0x4080) << 16) | 0x8000).int().view(F32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4028235e38, -3.3961e38, 65504.0])
    tiny = (patterns.abs() < 2**-126) & (patterns != 0)  # the interpreter's casts do not handle subnormals
    embedding = torch.cat((patterns.where(~tiny, 1.0), ties, -ties, special)).to(device)[None]
    record = torch.zeros(1, dtype=torch.int32, device=device), torch.ones(1, device=device), torch.tensor([0, 1], device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    for table in (embedding, embedding.to(BF16)):
        result, expected = rebuild(*record, table, zero.float(), zero, zero, BF16), embedding.to(BF16)
        assert torch.equal(result.isnan(), expected.isnan())
        assert torch.equal(result.nan_to_num(7.0) + 0.0, expected.nan_to_num(7.0) + 0.0)  # a sum with +0 has no -0


@pytest.mark.parametrize(("capacity", "table", "dtype"), [(1, BF16, BF16), (20, F32, F32), (100, F32, BF16)])
def test_engine_and_record_give_the_same_bits_even_for_rows_that_overflow(capacity, table, dtype, device):
    logits, tau = (torch.randn(5, 100) * 2).to(device), TAUS.to(device)
    logits[0, 3] = torch.nan
    logits[:, 90:] = -torch.inf
    embedding, noise_keys = torch.randn(100, 70, device=device).to(table), keys(5, device)
    support = allocate(6, 100, capacity, device)
    select(support, logits, tau)
    assert (int(support.counts.max()) > capacity) == (capacity < 100)
    fed = torch.full((6, 70), 9.0, dtype=dtype, device=device)
    soft_embeddings(support, logits, tau, embedding, *noise_keys, fed)
    record = support_batch(support, logits, tau)
    assert torch.equal(fed[:5], rebuild(record.ids, record.probs, record.offsets, embedding, *noise_keys, dtype))
    assert torch.equal(fed[5], torch.full((70,), 9.0, dtype=dtype, device=device))
    reference = soft_embedding.select_support(logits.cpu(), tau.cpu())
    cpu_keys = (key.cpu() for key in noise_keys)
    expected = soft_embedding.rebuild(reference.ids, reference.probs, reference.offsets, embedding.cpu(), *cpu_keys, dtype)
    ulp = 2**-8 * expected.float().abs() if dtype == BF16 else 0.0  # where the sums differ, one may round up and one down
    assert ((fed[:5].cpu().float() - expected.float()).abs() <= ulp + 2e-6).all()


@pytest.mark.parametrize("capacity", [1, 100])
@pytest.mark.parametrize("bounds", [[0, 100], [0, 37, 100], [0, 1, 1, 99, 100]])
def test_the_parts_of_all_ranks_add_up_to_the_means(bounds, capacity, device):
    """One rank has the very bits; more add the same terms in another order. A rank may hold nothing, and padding after its last."""
    logits, tau = (torch.randn(5, 100) * 2).to(device), TAUS.to(device)
    logits[1, 36:38] = 20.0
    embedding = torch.randn(100, 70, device=device).bfloat16()
    support = allocate(5, 100, capacity, device)
    select(support, logits, tau)
    record = support_batch(support, logits, tau)
    means = mix(record.ids, record.probs, record.offsets, embedding, BF16)
    parts = []
    for begin, end in pairwise(bounds):
        rows, out = embedding[begin:end], torch.full((6, 70), 9.0, device=device)
        if end == 100:  # vLLM pads the last
            rows = torch.cat((rows, torch.full((3, 70), torch.nan, dtype=BF16, device=device)))
        partial_means(support, logits, tau, rows, begin, out)
        assert (out[5] == 9.0).all()
        parts.append(out[:5])
    total = torch.stack(parts).sum(0)
    assert torch.equal(total, means) if len(parts) == 1 else (total - means).abs().max() < 1e-6
    for (begin, end), part in zip(pairwise(bounds), parts, strict=True):
        held = (record.ids >= begin) & (record.ids < end)
        offsets = torch.nn.functional.pad(held.cumsum(0), (1, 0))[record.offsets]
        alone = mix(record.ids[held], record.probs[held], offsets, embedding, BF16)
        assert torch.equal(part + 0.0, alone + 0.0)


def test_a_row_without_a_support_is_noise_alone(device):
    logits, tau = torch.full((2, 70), -torch.inf, device=device), torch.tensor([1.0, 0.0], device=device)
    logits[1] = torch.randn(70)  # skipped: tau is 0
    embedding, (_, seeds, positions) = torch.randn(70, 12, device=device), keys(2, device)
    support = allocate(2, 70, 8, device)
    select(support, logits, tau)
    out, sigma = torch.empty(2, 12, device=device), torch.tensor([0.5, 2.0], device=device)
    soft_embeddings(support, logits, tau, embedding, sigma, seeds, positions, out)
    assert torch.equal(out.cpu(), sigma.cpu()[:, None] * noise.normal_rows(seeds.cpu(), positions.cpu(), 12))


def test_no_rows(device):
    none = torch.empty(0, dtype=torch.int64, device=device)
    record = none.int(), none.float(), torch.zeros(1, dtype=torch.int64, device=device)
    embedding = torch.randn(10, 4, device=device)
    assert mix(*record, embedding, BF16).shape == (0, 4)
    assert rebuild(*record, embedding, none.float(), none, none, BF16).shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"ids": a["ids"].float()}, r"ids: dtype torch.float32, expected torch.int32 or torch.int64"),
        (lambda a: {"ids": a["ids"] + 8}, r"ids: values from 9 to 12, expected ids in \[0, 10\)"),
        (lambda a: {"ids": a["ids"] - 2}, r"ids: values from -1 to 2, expected ids in \[0, 10\)"),
        (lambda a: {"ids": a["ids"].repeat(2)[::2]}, r"ids: shape \[3\] with strides \[2\], expected a contiguous tensor"),
        (lambda a: {"probs": a["probs"].double()}, r"probs: dtype torch.float64, expected torch.float32"),
        (lambda a: {"probs": a["probs"][:2]}, r"probs: shape \[2\], expected \[N\] = \[3\]"),
        (lambda a: {"probs": a["probs"].to("meta")}, r"probs: on meta, expected .*, where embedding is"),
        (lambda a: {"offsets": a["offsets"] - 1}, r"offsets: shape \[3\], expected offsets that rise from 0 to 3"),
        (lambda a: {"offsets": a["offsets"].flip(0)}, r"offsets: shape \[3\], expected offsets that rise from 0 to 3"),
        (lambda a: {"offsets": a["offsets"][:0]}, r"offsets: shape \[0\], expected offsets that rise from 0 to 3"),
        (lambda a: {"embedding": a["embedding"].double()}, r"embedding: dtype torch.float64, expected torch.float32 or"),
        (lambda a: {"embedding": a["embedding"][:, ::2]}, r"embedding: shape \[10, 2\] with strides \[4, 2\], expected a contig"),
        (lambda a: {"embedding": a["embedding"][0]}, r"embedding: shape \[4\], expected \[V, n0\] = \[any, any\]"),
        (lambda a: {"dtype": torch.float64}, r"dtype: torch.float64, expected torch.float32 or"),
        (lambda a: {"sigma": a["sigma"][:1]}, r"sigma: shape \[1\], expected \[R\] = \[2\]"),
        (lambda a: {"sigma": a["sigma"].half()}, r"sigma: dtype torch.float16, expected torch.float32"),
        (lambda a: {"seeds": a["seeds"].int()}, r"seeds: dtype torch.int32, expected torch.int64"),
        (lambda a: {"positions": a["positions"].to("meta")}, r"positions: on meta, expected .*, where ids is"),
    ],
)
def test_wrong_inputs_are_named_before_any_launch(change: Callable, message, device, monkeypatch):
    a = {"ids": torch.tensor([1, 4, 2]).int(), "probs": torch.tensor([0.5, 0.5, 1.0]), "offsets": torch.tensor([0, 2, 3])}
    a |= {"embedding": torch.randn(10, 4), "sigma": torch.ones(2), "seeds": torch.arange(2), "positions": torch.arange(2)}
    a = {name: value.to(device) for name, value in a.items()} | {"dtype": BF16}
    a |= change(a)
    monkeypatch.setattr("kernels.triton_soft_embedding._embed_csr", None)  # a launch would be a TypeError
    with pytest.raises(ValueError, match=message):
        rebuild(**a)


def test_wrong_buffers_are_named_before_the_launch(device, monkeypatch):
    logits, tau = torch.randn(2, 10, device=device), torch.ones(2, device=device)
    support, embedding = allocate(2, 10, 4, device), torch.randn(10, 6, device=device)
    sigma, seeds, positions = keys(2, device)
    monkeypatch.setattr("kernels.triton_soft_embedding._embed_fixed", None)

    def fails(message: str, embedding: Tensor = embedding, sigma: Tensor = sigma, out: Tensor | None = None) -> None:
        out = torch.empty(2, 6, device=device) if out is None else out
        with pytest.raises(ValueError, match=message):
            soft_embeddings(support, logits, tau, embedding, sigma, seeds, positions, out)

    fails(r"embedding: shape \[9, 6\], expected a row for each of the 10 logits", embedding=embedding[:9])
    fails(r"sigma: shape \[1\], expected \[R\] = \[2\]", sigma=sigma[:1])
    fails(r"out: shape \[2, 5\], expected \[R, n0\] = \[any, 6\]", out=torch.empty(2, 5, device=device))
    fails(r"out: shape \[1, 6\], expected a row for each of the 2 rows", out=torch.empty(1, 6, device=device))
    fails(r"out: shape \[2, 6\] with strides \[12, 2\]", out=torch.empty(2, 12, device=device)[:, ::2])
    fails(r"dtype: torch.float64", out=torch.empty(2, 6, device=device, dtype=torch.float64))
    fails(r"out: on meta, expected", out=torch.empty(2, 6, device="meta"))
    with pytest.raises(ValueError, match=r"out: dtype torch.bfloat16, expected torch.float32"):
        partial_means(support, logits, tau, embedding[:3], 4, torch.empty(2, 6, dtype=BF16, device=device))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_replays_on_new_logits_with_the_bits_of_a_direct_call():
    device = torch.device("cuda")
    logits, tau = torch.randn(5, 5000, device=device) * 3, TAUS.cuda()
    embedding, noise_keys = torch.randn(5000, 576, device=device).bfloat16(), keys(5, device)
    support, fed = allocate(5, 5000, 64, device), torch.empty(5, 576, dtype=BF16, device=device)

    def step() -> None:
        select(support, logits, tau)
        soft_embeddings(support, logits, tau, embedding, *noise_keys, fed)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        logits.copy_(torch.randn(5, 5000) * 3)
        graph.replay()
        record = select_support(logits, tau)
        assert torch.equal(fed, rebuild(record.ids, record.probs, record.offsets, embedding, *noise_keys, BF16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_public_functions_are_these():
    device = torch.device("cuda")
    record = (*ragged([3, 0, 20], 90, device), torch.randn(90, 40, device=device))
    noise_keys = keys(3, device)
    assert torch.equal(soft_embedding.mix(*record, BF16), mix(*record, BF16))
    assert torch.equal(soft_embedding.rebuild(*record, *noise_keys, BF16), rebuild(*record, *noise_keys, BF16))
