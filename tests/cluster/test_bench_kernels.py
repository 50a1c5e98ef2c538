"""The kernel benchmark measures what it says: realistic supports, true peaks, ratios of like with like."""

import json

import pytest
import torch
from rich.console import Console

from cluster import bench_kernels
from cluster.bench_kernels import measure_peak, peak_bytes, print_kernels
from cluster.bench_logprobs import make_inputs, make_logits, make_supports, run
from kernels.soft_embedding import select_support


def test_supports_are_as_large_and_as_alike_as_those_measured() -> None:
    ids, offsets = make_supports(4096, 49152, torch.Generator().manual_seed(3))
    sizes = offsets.diff().float()
    assert abs(sizes.mean() - 43) < 4 and abs(sizes.quantile(0.99) - 410) < 60 and sizes.min() >= 1 and sizes.max() <= 741
    rows = torch.repeat_interleave(offsets.diff())
    assert (ids.diff()[rows.diff() == 0] > 0).all() and ids.min() >= 0 and ids.max() < 49152
    unions = [ids[offsets[r] : offsets[r + 256]].unique().numel() for r in range(0, 4096, 256)]
    assert abs(sum(unions) / len(unions) - 2907) < 300


@pytest.mark.parametrize("width", [576, 2048])
def test_logits_are_like_a_language_models(width: int) -> None:
    inputs = make_inputs(64, 4096, width)
    logits = inputs.hidden.detach() @ inputs.head.detach().T
    assert 1.5 < logits.median(dim=-1).values.abs().add(logits.std(dim=-1)).mean() < 3
    assert 15 < logits.amax(-1).mean() < 21


def test_the_support_of_made_up_logits_is_the_one_put_there_but_for_its_tail() -> None:
    put, offsets = make_supports(32, 8192, torch.Generator().manual_seed(1))
    found = select_support(make_logits(32, 8192, torch.Generator().manual_seed(1)), torch.full((32,), 0.5))
    theirs, mine = (
        {(int(row), int(token)) for row, token in zip(torch.repeat_interleave(o.diff()), ids, strict=True)}
        for ids, o in ((put, offsets), (found.ids, found.offsets))
    )
    assert len(mine - theirs) < 0.01 * len(mine) and len(mine) > 0.7 * len(theirs)


def test_the_peak_is_that_of_what_was_alive_at_once() -> None:
    mebibyte = 2**20

    def two_after_each_other() -> None:
        for _ in range(2):
            torch.ones(64 * mebibyte // 4)

    assert abs(peak_bytes(two_after_each_other) - 64 * mebibyte) < 4 * mebibyte
    assert abs(peak_bytes(lambda: [torch.ones(64 * mebibyte // 4) for _ in range(2)]) - 128 * mebibyte) < 4 * mebibyte
    assert peak_bytes(lambda: None) < 2 * mebibyte


def test_a_process_of_its_own_measures_the_chunk_and_not_the_tokens() -> None:
    """V = 4096: logits of all tokens are 64 MiB, and plain autograd holds three of them; a chunk's are 16, and two are alive."""
    inputs = make_inputs(4096, 4096, 576)
    naive = peak_bytes(lambda: torch.softmax(inputs.hidden @ inputs.head.T, -1).sum().backward())
    assert measure_peak("dense", 4096, 4096) < 140 * 2**20 < 170 * 2**20 < naive


def test_every_form_yields_gradients_and_the_figures_are_printed_and_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(16, 512, 576)
    for form in ("token", "support", "dense", "torch"):
        run(form, inputs)
    peaks = {("token", 32): 10**8, ("token", 64): 10**8 + 32 * 4 * 576 * 5}
    monkeypatch.setattr(bench_kernels, "measure_peak", lambda form, tokens, _: peaks.get((form, tokens), tokens * 4 * 576))
    figures = bench_kernels.bench_kernels(tokens=16, rounds=2, memory_tokens=(32, 64), vocabulary=512)
    assert figures["memory"]["token"]["rows_per_token"] == 5 and figures["memory"]["dense"]["rows_per_token"] == 1
    assert all(len(seconds) == 2 for seconds in figures["rounds"].values())
    assert figures["support_over_token"] > 0 and figures["mixture"]["milliseconds"] > figures["mixture"]["select_milliseconds"]
    console = Console(record=True, width=120)
    print_kernels(json.loads(json.dumps(figures)), console)
    text = console.export_text()
    assert "soft, recorded support" in text and "64 tokens" in text
