"""An evaluation draws what is lacking, all settings at once, and an interrupted one ends as if it had not been."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.evaluation import evaluate, forget_after, require_same_evaluation
from cluster.evaluation_records import SettingSummary, read_plan, read_records
from cluster.progress import Progress
from cluster.transcripts import KEPT_PROBLEMS, kept_samples
from cluster.waits import named
from configs.errors import InputError
from configs.load import load_config
from configs.schema import EVAL_SETTINGS, Config
from rollout.reward import Scorer
from rollout.tasks import Problem
from rollout.trajectory import SampleRequest
from tests.cluster.engines import FakeEngine, byte_tokenizer, rollouts

PROBLEMS = [Problem(index, f"What is {index} + 1?", str(index + 1)) for index in range(10)]
DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
TOKENIZER = byte_tokenizer()


def six(*overrides: str) -> Config:
    return load_config(DEMO, [f"eval.settings=[{', '.join(EVAL_SETTINGS)}]", "eval.samples=3", *overrides])


def answer(request: SampleRequest) -> str:
    """Right for two samples of three."""
    return str(request.prompt_index + 1 + (request.prompt_index + request.sample_index) % 3 // 2)


def draw(
    run: Path, *engines: FakeEngine, config: Config | None = None, problems: int = 10, step: int = 4
) -> tuple[list[SettingSummary], list[str]]:
    """Evaluate with the engines; the summaries and what the progress said."""
    said: list[str] = []
    with Scorer(workers=1) as scorer:
        drawn = rollouts(config or six(), list(engines), TOKENIZER, scorer)
        task = "arithmetic:test"
        found = asyncio.run(
            evaluate(
                drawn,
                run,
                "test",
                step,
                task,
                PROBLEMS[:problems],
                named,
                lambda what, total: Progress(what, total, said.append, 0),
            )
        )
    return found, said


@pytest.mark.parametrize("change", [{"question": "What is 2 + 9?"}, {"answer": "4"}])
def test_records_of_other_data_of_that_name_are_refused(tmp_path: Path, change: dict[str, str]) -> None:
    draw(tmp_path, FakeEngine(TOKENIZER, answer), problems=4)
    changed = [replace(p, **change) if p.index == 2 else p for p in PROBLEMS]
    with pytest.raises(InputError, match=r"arithmetic_test.json: problem 2 of arithmetic:test had another question or answer"):
        require_same_evaluation(six(), tmp_path, "test", 4, "arithmetic:test", changed)
    require_same_evaluation(six(), tmp_path, "test", 4, "arithmetic:test", PROBLEMS)
    require_same_evaluation(six(), tmp_path, "test", 5, "arithmetic:test", changed)  # nothing there


def rows(found: list[SettingSummary]) -> list[dict[str, object]]:
    return [summary.row() for summary in found]


def test_all_settings_are_one_batch_and_every_sample_is_recorded(tmp_path: Path) -> None:
    engine = FakeEngine(TOKENIZER, answer)
    found, said = draw(tmp_path, engine)
    assert [len(call) for call in engine.calls] == [10 * (3 + 3 * 3)]
    assert [summary.setting for summary in found] == list(EVAL_SETTINGS)
    by_setting = {summary.setting: summary for summary in found}
    assert by_setting["hard_greedy"].share == pytest.approx(7 / 10)  # problem % 3 != 2
    assert by_setting["soft_sample"].share == pytest.approx(2 / 3)
    assert all(summary.missing == 0 for summary in found)
    assert json.loads((tmp_path / "eval" / "test_000004.json").read_text()) == rows(found)
    assert said[-1].startswith("test at step 4: arithmetic:test: 120/120 (100%)") and said[-1].endswith("ETA 0 s")


def test_an_interrupted_evaluation_draws_the_rest_and_equals_one_that_was_not(tmp_path: Path) -> None:
    whole, _ = draw(tmp_path / "whole", FakeEngine(TOKENIZER, answer))
    with pytest.raises(ConnectionError):
        draw(tmp_path / "cut", FakeEngine(TOKENIZER, answer, fails_after=50))
    path = tmp_path / "cut" / "eval" / "test_000004" / "arithmetic_test.jsonl"
    recorded = len(list(read_records(path)))
    assert 0 < recorded <= 50  # what was drawn but not yet scored is lost
    engine = FakeEngine(TOKENIZER, answer)
    found, _ = draw(tmp_path / "cut", engine)
    assert [len(call) for call in engine.calls] == [120 - recorded]
    assert rows(found) == rows(whole)
    again = FakeEngine(TOKENIZER, answer)
    assert rows(draw(tmp_path / "cut", again)[0]) == rows(whole) and not again.calls
    kept = {name: kept_samples(tmp_path / name / "rollouts", "test_000004_arithmetic_test") for name in ("whole", "cut")}
    assert kept["whole"].keys() == kept["cut"].keys() == {(p, s) for p in range(KEPT_PROBLEMS) for s in EVAL_SETTINGS}
    for place, sample in kept["whole"].items():
        assert sample.answer_text == kept["cut"][place].answer_text
        assert sample.trajectory.support_probs.tolist() == kept["cut"][place].trajectory.support_probs.tolist()


def test_two_engines_draw_what_one_draws(tmp_path: Path) -> None:
    engines = [FakeEngine(TOKENIZER, answer) for _ in range(2)]
    two, _ = draw(tmp_path / "two", *engines)
    assert [len(engine.calls[0]) for engine in engines] == [60, 60]
    assert rows(two) == rows(draw(tmp_path / "one", FakeEngine(TOKENIZER, answer))[0])


def test_asking_for_more_keeps_what_is_there_and_asking_for_less_forgets_nothing(tmp_path: Path) -> None:
    greedy = six("eval.settings=[hard_greedy]")
    draw(tmp_path, FakeEngine(TOKENIZER, answer), config=greedy, problems=4)
    engine = FakeEngine(TOKENIZER, answer)
    whole, _ = draw(tmp_path, engine)
    assert len(engine.calls[0]) == 120 - 4
    less, _ = draw(tmp_path, FakeEngine(TOKENIZER, answer), config=greedy, problems=4)
    assert rows(less) == rows(whole)[:1]
    plan = read_plan(tmp_path / "eval" / "test_000004" / "arithmetic_test.json")
    assert plan.problems == 10 and dict(plan.samples) == {setting: 1 if "greedy" in setting else 3 for setting in EVAL_SETTINGS}


def test_records_of_another_evaluation_are_refused(tmp_path: Path) -> None:
    draw(tmp_path, FakeEngine(TOKENIZER, answer), problems=1)
    with pytest.raises(InputError, match="max_cot_tokens = 14: this evaluation has 20"):
        draw(tmp_path, FakeEngine(TOKENIZER, answer), problems=1, config=six("eval.max_cot_tokens=20"))


def test_going_back_behind_an_evaluation_forgets_it(tmp_path: Path) -> None:
    for step in (0, 4, 8):
        draw(tmp_path, FakeEngine(TOKENIZER, answer), problems=1, step=step)
    (tmp_path / "eval" / "out_of_domain_000008.json").write_text("[]")
    removed = forget_after(tmp_path, 4)
    assert removed and all("_000008" in name for name in removed) and "out_of_domain_000008.json" in removed
    left = {path.name for folder in ("eval", "rollouts") for path in (tmp_path / folder).iterdir()}
    assert {name[:11] for name in left} == {"test_000000", "test_000004"}
    assert forget_after(tmp_path, 4) == []


def test_progress_says_rate_and_eta_now_and_then() -> None:
    said: list[str] = []
    progress = Progress("test", 10, said.append, every_s=3600)
    for _ in range(5):
        progress.advance(tokens=40)
    assert not said
    assert progress.line(20.0) == "test: 5/10 (50%), 10 tokens/s, ETA 20 s"
