"""A drawn token follows the softmax, and depends on nothing but its own row, seed, position and stream."""

import pytest
import torch
from torch import Tensor

from rollout.sampling import draw_uniforms, sample_tokens


def many(logits: Tensor, rows: int, temperature: float) -> tuple[Tensor, Tensor]:
    """`rows` draws from the same logits [V], each with a position of its own."""
    uniform = draw_uniforms(torch.full((rows,), 2**62 + 5), torch.arange(rows), torch.ones(rows, dtype=torch.bool))
    return sample_tokens(logits.expand(rows, -1), torch.full((rows,), temperature), uniform)


def one_at(u: float, logits: Tensor, temperature: float = 1.0) -> int:
    return int(sample_tokens(logits[None], torch.tensor([temperature]), torch.tensor([u]))[0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("vocabulary", [40, 128, 300])
def test_frequencies_follow_the_softmax(vocabulary: int, temperature: float) -> None:
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 1.5
    rows = 20_000
    token, logprob = many(logits, rows, temperature)
    expected = torch.softmax(logits.double() / temperature, 0) * rows
    counts = torch.bincount(token, minlength=vocabulary).double()
    common = expected >= 10  # the rest as one class
    expected = torch.cat([expected[common], expected[~common].sum()[None].clamp_min(1e-9)])
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    freedom = len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * (2 * freedom) ** 0.5
    assert torch.allclose(logprob, torch.log_softmax(logits, 0)[token], atol=1e-5)  # at temperature 1, whatever it was drawn at


def test_greedy_is_the_argmax_and_rows_have_their_own_temperature() -> None:
    logits = torch.randn(64, 300, generator=torch.Generator().manual_seed(1))
    logits[:, 200:] = -torch.inf
    temperature = torch.tensor([0.0, 1.0]).repeat(32)
    uniform = (torch.arange(64) + 0.5) / 64
    token, logprob = sample_tokens(logits, temperature, uniform)
    greedy = temperature == 0
    assert torch.equal(token[greedy], logits[greedy].argmax(1))
    assert torch.equal(sample_tokens(logits[greedy], temperature[greedy], None)[0], token[greedy])
    assert (token[~greedy] != logits[~greedy].argmax(1)).any() and token.max() < 200
    assert torch.allclose(logprob, torch.log_softmax(logits, 1).gather(1, token[:, None])[:, 0], atol=1e-5)


@pytest.mark.parametrize("allowed", [[0], [127], [128], [299], [5, 127], [128, 255], [3, 280], [130, 131]])
def test_what_has_no_probability_is_never_drawn(allowed: list[int]) -> None:
    logits = torch.full((300,), -torch.inf)
    logits[allowed] = torch.arange(len(allowed)) * 0.3
    assert set(many(logits, 500, 1.0)[0].tolist()) == set(allowed)
    cold = torch.full((300,), -1.0)  # exp(-1 / 1e-4) is 0 in float32
    cold[allowed] = 0.0
    assert set(many(cold, 500, 1e-4)[0].tolist()) == set(allowed)
    for u, id_ in ((2.0**-24, allowed[0]), (1 - 2.0**-24, allowed[-1])):  # the smallest and the largest there is
        assert one_at(u, logits) == one_at(u, cold, 1e-4) == id_


@pytest.mark.parametrize(("u", "token"), [(0.0, 0), (0.25, 64), (0.5, 128), (0.75, 192)])
def test_a_uniform_belongs_to_the_token_whose_interval_begins_there(u: float, token: int) -> None:
    assert one_at(u, torch.zeros(256)) == token


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("vocabulary", [1, 40, 128, 300])
def test_a_row_that_is_no_distribution_yields_some_id_and_its_neighbours_theirs(bad: float, vocabulary: int) -> None:
    logits = torch.zeros(3, vocabulary)
    logits[1] = bad
    token, _ = sample_tokens(logits, torch.ones(3), torch.full((3,), 0.999))
    assert 0 <= token[1] < vocabulary and token[0] == token[2] == one_at(0.999, logits[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_draw_depends_on_nothing_but_its_row_seed_position_and_stream(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(2)
    logits = (torch.randn(24, 49_152, generator=random) * 0.5).to(dtype)
    temperature = torch.tensor([1.0, 0.7, 0.0]).repeat(8)
    seed, position = torch.randint(0, 2**62, (24,), generator=random), torch.randint(0, 4096, (24,), generator=random)
    answering = torch.arange(24) % 2 == 0
    token, logprob = draw(logits, temperature, seed, position, answering)
    for rows in (slice(3, 4), slice(7, 20), torch.randperm(24, generator=random)):
        again, logprob_again = draw(logits[rows], temperature[rows], seed[rows], position[rows], answering[rows])
        assert torch.equal(again, token[rows]) and torch.equal(logprob_again, logprob[rows])
    drawn = temperature > 0
    for other in ((seed + 1, position, answering), (seed, position + 1, answering), (seed, position, ~answering)):
        assert (draw(logits, temperature, *other)[0] != token)[drawn].all()


def draw(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, answering: Tensor) -> tuple[Tensor, Tensor]:
    return sample_tokens(logits, temperature, draw_uniforms(seed, position, answering))
