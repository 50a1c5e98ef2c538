"""Items are kept as they are scored: an interrupted set ends as if it had not been, and is read as the report reads it."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from cluster.out_of_domain import evaluate_choices
from cluster.progress import Progress
from cluster.report_runs import read_run
from cluster.waits import named
from configs.errors import InputError
from configs.load import dump_config, load_config
from rollout.multiple_choice import ITEMS_PER_CALL, Item, Summary
from rollout.reward import Scorer
from tests.cluster.engines import FakeEngine, byte_tokenizer, rollouts

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
TOKENIZER = byte_tokenizer()
ITEMS = [Item(i, f"Question: {i} of many?\nAnswer:", ("yes" * (1 + i % 3), "no", f"{i}"), i % 3) for i in range(3 * ITEMS_PER_CALL)]


def score(run: Path, *engines: FakeEngine, items: Sequence[Item] = ITEMS, dtype: str = "float32") -> Summary:
    config = load_config(DEMO, [f"model.dtype={dtype}"])
    return asyncio.run(
        evaluate_choices(
            rollouts(config, list(engines), TOKENIZER, Scorer()),
            run,
            4,
            "arc_easy",
            items,
            named,
            lambda what, total: Progress(what, total, print),
        )
    )


def engine(fails_after: int | None = None) -> FakeEngine:
    return FakeEngine(TOKENIZER, lambda _: "", fails_after)


def test_an_interrupted_set_scores_the_rest_and_equals_one_that_was_not(tmp_path: Path) -> None:
    whole = score(tmp_path / "whole", engine())
    with pytest.raises(ConnectionError):
        score(tmp_path / "cut", engine(fails_after=2))
    path = tmp_path / "cut" / "eval" / "out_of_domain_000004" / "arc_easy.jsonl"
    assert len(path.read_text().splitlines()) == 2 * ITEMS_PER_CALL
    path.write_text(path.read_text()[:-20])  # as a kill leaves it
    rest = engine()
    assert score(tmp_path / "cut", rest) == whole
    assert rest.scored == [3 * ITEMS_PER_CALL, 3]


def test_two_engines_score_what_one_scores(tmp_path: Path) -> None:
    engines = [engine(), engine()]
    assert score(tmp_path / "two", *engines) == score(tmp_path / "one", engine())
    assert engines[0].scored == engines[1].scored == [96] * 3


def test_the_report_reads_it(tmp_path: Path) -> None:
    summary = score(tmp_path / "run", engine())
    (tmp_path / "run" / "config.yaml").write_text(dump_config(load_config(DEMO)))
    run = read_run(tmp_path / "run")
    assert run.tested_step == 4 and run.out_of_domain == {"arc_easy": asdict(summary)}


def test_a_set_has_one_row_however_often_it_is_evaluated(tmp_path: Path) -> None:
    score(tmp_path, engine(), items=ITEMS[:5])
    score(tmp_path, engine())
    [row] = json.loads((tmp_path / "eval" / "out_of_domain_000004.json").read_text())
    assert row["dataset"] == "arc_easy" and row["items"] == len(ITEMS)


def test_scores_of_another_evaluation_are_refused(tmp_path: Path) -> None:
    score(tmp_path, engine(), items=ITEMS[:5])
    with pytest.raises(InputError, match=r"arc_easy.json: scores of .*float32.*this evaluation is .*bfloat16.*remove"):
        score(tmp_path, engine(), items=ITEMS[:5], dtype="bfloat16")
    for change in ({"choices": ("yea", "no", "0")}, {"context": "Question: None of many?\nAnswer:"}, {"gold": 1}):
        with pytest.raises(InputError, match=r"arc_easy.jsonl:1: item 0 was another when it was scored: the data have changed"):
            score(tmp_path, engine(), items=[replace(ITEMS[0], **change)])
