"""gpu_check's sections on the rollout's side: noise, select, embedding, graph. Each gives a list of checks.

References are the CPU's bits for the noise, brute force in float64 for the support, the definition in float32 and float64 for the
mixture, a direct call for the captured graph.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.gpu_plan import TAUS, THRESHOLD, Check, Setting, captured, violations, worst
from kernels import noise, soft_embedding, triton_noise, triton_select, triton_soft_embedding
from kernels.segments import rows_of, segment_sum
from kernels.soft_embedding import SupportBatch

Record = tuple[Tensor, Tensor, Tensor]  # ids, probs, offsets
Keys = tuple[Tensor, Tensor, Tensor]  # sigma, seeds, positions

# Random123, kat_vectors: philox4x32 10 rounds, counter, key, expected.
KNOWN_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
SEEDS = torch.tensor([0, 1, 2**63 - 1, 0xDEADBEEF_01234567 >> 1, 2**32])
POSITIONS = torch.tensor([0, 1, 2**32 - 1, 4097, 131072])
NOISE_ROWS = 1024  # compared at once, so that the CPU's temporaries stay small
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SMALL_CAPACITY = 37  # of a FixedSupport that some rows overflow


# Noise


@triton.jit
def _philox_of_counter(seed, counter, out):  # type: ignore[no-untyped-def]
    """tl.philox, on which the noise rests, with all four words of a counter."""
    zero = tl.zeros((1,), tl.uint32)
    i = tl.arange(0, 1)
    x0, x1, x2, x3 = tl.philox(
        tl.load(seed),
        zero + tl.load(counter).to(tl.uint32),
        zero + tl.load(counter + 1).to(tl.uint32),
        zero + tl.load(counter + 2).to(tl.uint32),
        zero + tl.load(counter + 3).to(tl.uint32),
    )
    tl.store(out + i, x0.to(tl.int64))
    tl.store(out + 1 + i, x1.to(tl.int64))
    tl.store(out + 2 + i, x2.to(tl.int64))
    tl.store(out + 3 + i, x3.to(tl.int64))


def check_noise(setting: Setting) -> list[Check]:
    """The same words as Random123, the same normals and uniforms as the CPU, bit for bit."""
    device, wrong = setting.device, 0.0
    for counter, key, expected in KNOWN_ANSWERS:
        high, low = (part - 2**32 if part >= 2**31 else part for part in reversed(key))
        seed, out = (
            torch.tensor([(high << 32) | (low & 0xFFFFFFFF)], device=device),
            torch.zeros(4, dtype=torch.int64, device=device),
        )
        _philox_of_counter[(1,)](seed, torch.tensor(counter, device=device), out)
        wrong += violations(out.cpu() == torch.tensor(expected))
    differing = sum(_differing_normals(SEEDS, POSITIONS, width, stream, device) for width in (1, 3, 575, 1027) for stream in (0, 7))
    width = setting.scale.width
    many = 0.0
    for row in torch.arange(-(-setting.scale.normals // width)).split(NOISE_ROWS):
        many += _differing_normals(row * 0x9E3779B97F4A + 12345, row % 4096, width, noise.STREAM_SOFT, device)
    seeds, positions = torch.cat((SEEDS, torch.arange(300))), torch.cat((POSITIONS, torch.arange(300)))
    uniforms = triton_noise.uniform_rows(seeds.to(device), positions.to(device), noise.STREAM_ANSWER)
    equal = _bits(uniforms) == _bits(noise.uniform_rows(seeds, positions, noise.STREAM_ANSWER))
    return [
        Check("words that are not Random123's known answers", wrong, 0),
        Check("normals of extreme seeds and positions that differ from the CPU's", differing, 0),
        Check(f"of {setting.scale.normals:,} normals those that differ from the CPU's", many, 0),
        Check("uniforms that differ from the CPU's", violations(equal), 0),
    ]


def _bits(values: Tensor) -> Tensor:
    return values.cpu().view(torch.int32)


def _differing_normals(seeds: Tensor, positions: Tensor, width: int, stream: int, device: torch.device) -> float:
    found = triton_noise.normal_rows(seeds.to(device), positions.to(device), width, stream)
    return violations(_bits(found) == _bits(noise.normal_rows(seeds, positions, width, stream)))


# Select


def check_select(setting: Setting) -> list[Check]:
    """The support of brute force in float64, at any size and temperature; bad rows, ties, overflow; the same bits in any batch."""
    checks = []
    for vocabulary in (setting.scale.vocabulary, triton_select.BLOCK + 1, 65, 1):
        logits = (
            torch.randn(2, len(TAUS), vocabulary, device=setting.device)
            * torch.tensor([0.5, 6.0], device=setting.device)[:, None, None]
        )
        checks += _against_brute_force(logits.flatten(0, 1), _taus(setting).repeat(2), f"V = {vocabulary:,}")
    return [
        *checks,
        Check("ties: wrong supports", _wrong_ties(setting), 0),
        Check("NaN, infinite, padded and skipped rows: wrong supports", _wrong_bad_rows(setting), 0),
        Check("overflow: wrong flags, lists or fallbacks", _wrong_overflow(setting), 0),
        Check("rows that depend on their batch, the buffers or the run", _dependent_rows(setting), 0),
    ]


def _taus(setting: Setting) -> Tensor:
    return torch.tensor(TAUS, device=setting.device)


def _against_brute_force(logits: Tensor, tau: Tensor, shape: str) -> list[Check]:
    found = triton_select.select_support(logits, tau, THRESHOLD)
    exact = torch.softmax(logits.double() / tau.double()[:, None], -1)
    rows, ids = rows_of(found.offsets, len(found.ids)), found.ids.long()
    kept = torch.zeros_like(exact, dtype=torch.bool)
    kept[rows, ids] = True
    at_threshold = (exact / THRESHOLD - 1).abs() < 1e-5
    dropped, mass = exact.masked_fill(kept, 0).sum(-1), segment_sum(exact[rows, ids], found.offsets)
    order = torch.arange(logits.shape[1], device=logits.device)
    first = torch.where(logits == logits.amax(-1, keepdim=True), order, logits.shape[1]).amin(-1)
    return [
        Check(
            f"{shape}: tokens that do not belong, or miss, or stand out of order; wrong top ids",
            violations((kept == (exact > THRESHOLD)) | at_threshold, (ids.diff() > 0) | (rows.diff() > 0), found.top_ids == first),
            0,
        ),
        Check(f"{shape}: probabilities, relative", worst((found.probs * mass[rows] / exact[rows, ids] - 1).abs()), 4e-6),
        Check(f"{shape}: dropped mass, relative", worst((found.dropped_mass - dropped).abs() / (dropped + 1e-8)), 1e-4),
    ]


def _wrong_ties(setting: Setting) -> float:
    vocabulary = triton_select.BLOCK + 200
    logits = torch.zeros(4, vocabulary)
    logits[0, [vocabulary - 1, 70, vocabulary - 197]] = 9.0
    logits[1, [3, 4]] = 5.0
    logits[3, vocabulary - 195] = 1e-3
    tau = torch.tensor([1e-4, 1e-4, 1.0, 1.0], device=setting.device)
    # Every probability of the last two rows is below 1e-3: only what is most probable is selected.
    found = triton_select.select_support(logits.to(setting.device), tau, 1e-3)
    return violations(
        found.top_ids.tolist() == [70, 3, 0, vocabulary - 195],
        found.ids[:5].tolist() == [70, vocabulary - 197, vocabulary - 1, 3, 4],
        found.offsets.diff().tolist() == [3, 2, vocabulary, 1],
        torch.equal(found.probs[:5].cpu(), torch.tensor([1 / 3] * 3 + [0.5] * 2)),
    )


def _wrong_bad_rows(setting: Setting) -> float:
    logits = torch.randn(7, triton_select.BLOCK + 130) * 0.01
    logits[0, 7], logits[1, triton_select.BLOCK + 9], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[3:, 100:] = -torch.inf
    logits[4, :99] = -torch.inf
    tau = torch.tensor([0.5, 0.5, 0.5, 2.0, 1e-4, 0.0, 0.5])
    support = triton_select.allocate(7, logits.shape[1], 128, setting.device)
    triton_select.select(support, logits.to(setting.device), tau.to(setting.device), THRESHOLD)
    return violations(
        support.counts.tolist() == [0, 0, 0, 100, 1, 0, 100],
        support.dropped_mass[:3].tolist() == [0, 0, 0],
        support.top_ids[:3].tolist() == [0, 0, 0],
        not bool(support.overflow.any()),
        support.dropped_mass.isfinite(),
        support.ids[4, 0] == 99,
    )


def _wrong_overflow(setting: Setting) -> float:
    logits, tau = torch.randn(len(TAUS), 600, device=setting.device) * 4, _taus(setting)
    small, whole = (triton_select.allocate(len(TAUS), 600, capacity, setting.device) for capacity in (SMALL_CAPACITY, 600))
    for support in (small, whole):
        triton_select.select(support, logits, tau, THRESHOLD)
    listed = torch.arange(SMALL_CAPACITY, device=setting.device) < whole.counts[:, None]
    return violations(
        bool((whole.counts > SMALL_CAPACITY).any()),
        small.overflow == (whole.counts > SMALL_CAPACITY),
        small.counts == whole.counts,
        (small.ids == whole.ids[:, :SMALL_CAPACITY]) | ~listed,
        (small.probs == whole.probs[:, :SMALL_CAPACITY]) | ~listed,
        _same(triton_select.support_batch(small, logits, tau), triton_select.support_batch(whole, logits, tau)),
    )


def _dependent_rows(setting: Setting) -> float:
    vocabulary = setting.scale.small_vocabulary
    logits, tau = torch.randn(len(TAUS), vocabulary, device=setting.device) * 3, _taus(setting)
    buffers = triton_select.allocate(2 * len(TAUS), vocabulary, 64, setting.device)
    triton_select.select(buffers, logits.flip(0), tau)
    triton_select.select(buffers, logits, tau)
    batch = triton_select.support_batch(buffers, logits, tau)
    statements = [_same(batch, triton_select.select_support(logits, tau)) for _ in range(2)]
    if setting.on_gpu:
        statements.append(_same(batch, soft_embedding.select_support(logits, tau)))
    for row in range(len(TAUS)):
        alone = triton_select.select_support(logits[row : row + 1].clone(), tau[row : row + 1].clone())
        part = slice(int(batch.offsets[row]), int(batch.offsets[row + 1]))
        statements.append(torch.equal(alone.ids, batch.ids[part]) and torch.equal(alone.probs, batch.probs[part]))
    return violations(*statements)


def _same(left: SupportBatch, right: SupportBatch) -> bool:
    names = ("ids", "probs", "offsets", "dropped_mass", "top_ids")
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in names)


# Embedding


def check_embedding(setting: Setting) -> list[Check]:
    """The mixture is the sum in id order plus the noise of the spec, rounded once: the same bits from engine and from record."""
    cases = [(257, BFLOAT16, BFLOAT16), (setting.scale.width, BFLOAT16, BFLOAT16)]
    if setting.scale.every_dtype:
        cases += [(1, FLOAT32, BFLOAT16), (300, FLOAT32, FLOAT32)]
    mixed, far, rebuilt, engine = 0.0, 0.0, 0.0, 0.0
    for width, table, dtype in cases:
        logits, tau, embedding, keys = _problem(setting, width, table)
        found = triton_select.select_support(logits, tau, THRESHOLD)
        record = found.ids, found.probs, found.offsets
        mean, expected = triton_soft_embedding.mix(*record, embedding, dtype), _by_definition(record, embedding, dtype)
        mixed += violations(mean == expected)
        exact, size = _exact(record, embedding.to(dtype))
        far = max(far, worst((mean - exact).abs() / size))
        normals = noise.normal_rows(keys[1].cpu(), keys[2].cpu(), width).to(setting.device)
        noisy = triton_soft_embedding.rebuild(*record, embedding, *keys, dtype)
        rebuilt += violations(noisy == (expected + keys[0][:, None] * normals).to(dtype))
        rebuilt += violations(_row_alone(found, 3, embedding, keys, dtype) == noisy[3:4])
        if setting.on_gpu:
            rebuilt += violations(soft_embedding.rebuild(*record, embedding, *keys, dtype) == noisy)
        for capacity in (SMALL_CAPACITY, logits.shape[1]):
            engine += violations(*_fed(logits, tau, embedding, keys, dtype, capacity, noisy))
    return [
        Check("coordinates of the mixture that are not the sum in id order, bit for bit", mixed, 0),
        Check("mixture against float64, of the sum of magnitudes", far, 1e-6),
        Check("coordinates rebuilt from a record that differ from mixture plus noise, or from their row alone", rebuilt, 0),
        Check("coordinates that the engine is fed and the record does not give back, with overflow and without", engine, 0),
        Check("float32 values not rounded to bf16 as torch does", _wrongly_rounded(setting.device), 0),
    ]


def _row_alone(found: SupportBatch, row: int, embedding: Tensor, keys: Keys, dtype: torch.dtype) -> Tensor:
    part = slice(int(found.offsets[row]), int(found.offsets[row + 1]))
    record = found.ids[part].clone(), found.probs[part].clone(), found.offsets[row : row + 2] - found.offsets[row]
    sigma, seeds, positions = (key[row : row + 1].clone() for key in keys)
    return triton_soft_embedding.rebuild(*record, embedding, sigma, seeds, positions, dtype)


def _fed(
    logits: Tensor, tau: Tensor, embedding: Tensor, keys: Keys, dtype: torch.dtype, capacity: int, expected: Tensor
) -> tuple[Tensor, Tensor]:
    """Whether each coordinate that an engine with such buffers is fed is the expected one; and the spare row's, untouched."""
    rows, width = expected.shape
    support = triton_select.allocate(rows + 1, logits.shape[1], capacity, logits.device)
    fed = torch.zeros(rows + 1, width, dtype=dtype, device=logits.device)
    triton_select.select(support, logits, tau, THRESHOLD)
    triton_soft_embedding.soft_embeddings(support, logits, tau, embedding, *keys, fed)
    return fed[:-1] == expected, fed[-1] == 0


def _problem(setting: Setting, width: int, table: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Keys]:
    """(logits with a bad row, tau, embedding, keys) with a small vocabulary."""
    rows, vocabulary, device = len(TAUS), min(301, setting.scale.small_vocabulary), setting.device
    logits = torch.randn(rows, vocabulary, device=device) * 2
    logits[0, 3] = torch.nan
    logits[:, -11:] = -torch.inf
    embedding = torch.randn(vocabulary, width, device=device).to(table)
    order = torch.arange(rows, device=device)
    return logits, _taus(setting), embedding, (torch.linspace(0, 0.3, rows, device=device), order + 2**50, order * 11)


def _by_definition(record: Record, embedding: Tensor, dtype: torch.dtype) -> Tensor:
    """One entry after the other, product and sum each rounded to float32."""
    ids, probs, offsets = record
    counts = offsets.diff()
    mean = torch.zeros(len(counts), embedding.shape[1], device=embedding.device)
    for i in range(int(counts.max())):
        entry = (offsets[:-1] + i).clamp_max(len(ids) - 1)
        term = probs[entry, None] * embedding[ids[entry].long()].to(dtype).float()
        mean = torch.where((i < counts)[:, None], mean + term, mean)
    return mean


def _exact(record: Record, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """(mixture, sum of the magnitudes of its terms, 1 where there are none), float64 [R, n0]."""
    ids, probs, offsets = record
    rows = rows_of(offsets, len(ids))
    terms = probs.double()[:, None] * embedding.double()[ids.long()]
    zeros = torch.zeros(len(offsets) - 1, embedding.shape[1], dtype=torch.float64, device=embedding.device)
    size = zeros.index_add(0, rows, terms.abs())
    return zeros.index_add(0, rows, terms), size.where(size > 0, 1.0)


def _wrongly_rounded(device: torch.device) -> float:
    """One token of probability 1 and no noise: rows of E must come out as torch rounds them. A sum with +0 has no -0."""
    patterns = torch.randint(-(2**31), 2**31, (1024,)).int().view(torch.float32)
    patterns = patterns.where((patterns.abs() >= 2**-126) | patterns.isnan(), 1.0)
    ties = ((torch.arange(0x3F80, 0x4080) << 16) | 0x8000).int().view(torch.float32)
    special = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan, 3.4028235e38, -3.3961e38, 65504.0])
    embedding = torch.cat((patterns, ties, -ties, special)).to(device)[None]
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    record = zero.int(), torch.ones(1, device=device), torch.tensor([0, 1], device=device)
    found = triton_soft_embedding.rebuild(*record, embedding, zero.float(), zero, zero, torch.bfloat16)
    expected = embedding.bfloat16()
    return violations((found == expected) | (found.isnan() & expected.isnan()))


# Graph


def check_graph(setting: Setting) -> list[Check]:
    """Selection and gather captured once, replayed on new logits at the same addresses: the bits of a direct call."""
    device, vocabulary, width = setting.device, setting.scale.small_vocabulary, setting.scale.small_width
    rows = len(TAUS)
    logits, tau = torch.randn(rows, vocabulary, device=device) * 3, _taus(setting)
    embedding, order = torch.randn(vocabulary, width, device=device).bfloat16(), torch.arange(rows, device=device)
    keys = torch.full((rows,), 0.1, device=device), order + 2**40, order * 7
    support = triton_select.allocate(rows, vocabulary, 64, device)
    fed = torch.empty(rows, width, dtype=torch.bfloat16, device=device)

    def step() -> None:
        triton_select.select(support, logits, tau)
        triton_soft_embedding.soft_embeddings(support, logits, tau, embedding, *keys, fed)

    replay = captured(step, device)
    wrong, addresses, grown = 0.0, (support.ids.data_ptr(), fed.data_ptr()), 0
    for turn in range(3):
        logits.copy_(torch.randn(rows, vocabulary) * 3)
        keys[2].add_(turn)
        before = torch.cuda.memory_allocated() if setting.on_gpu else 0
        replay()
        grown += (torch.cuda.memory_allocated() if setting.on_gpu else 0) - before
        record = triton_select.select_support(logits, tau)
        expected = triton_soft_embedding.rebuild(record.ids, record.probs, record.offsets, embedding, *keys, torch.bfloat16)
        wrong += violations(fed == expected)
    moved = violations(addresses == (support.ids.data_ptr(), fed.data_ptr()), grown == 0)
    return [
        Check("coordinates of a replay that differ from a direct call", wrong, 0),
        Check("addresses that moved, or memory that a replay allocated", moved, 0),
    ]
