"""No impossible value starts a run, and the message says where it was set and what would be possible."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from configs.errors import InputError
from configs.load import load_config
from configs.schema import EVAL_SETTINGS, Config
from configs.validate import NOT_NEGATIVE, POSITIVE_INTS, POSITIVE_NUMBERS, validate


def refusal(tmp_path: Path, *overrides: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text("")
    with pytest.raises(InputError) as error:
        load_config(path, overrides)
    return str(error.value)


@pytest.mark.parametrize("key", POSITIVE_INTS)
@pytest.mark.parametrize("value", [0, -1])
def test_counts_start_at_one(tmp_path: Path, key: str, value: int) -> None:
    assert refusal(tmp_path, f"{key}={value}") == f"command line: {key} = {value}: expected a whole number of at least 1"


@pytest.mark.parametrize("key", POSITIVE_NUMBERS)
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_and_deadlines_are_above_zero_and_finite(tmp_path: Path, key: str, value: float) -> None:
    assert refusal(tmp_path, f"{key}={value}") == f"command line: {key} = {value}: expected a finite number above 0"


@pytest.mark.parametrize("key", NOT_NEGATIVE)
def test_nothing_is_negative(tmp_path: Path, key: str) -> None:
    assert f"{key} = -1" in refusal(tmp_path, f"{key}=-1")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["rollout.samples_per_prompt=1"], ["rollout.samples_per_prompt = 1", "at least 2", "learner.advantage=rloo"]),
        (["async.max_staleness=1"], ["async.max_staleness = 1", "expected 0", "on-policy"]),
        (["policy.gamma=0"], ["policy.gamma = 0.0", "above 0 in soft mode"]),
        (["policy.mode=fuzzy", "policy.tau=0.5"], ["policy.tau = 0.5", "at most 0.1", "policy.mode=soft"]),
        (["policy.max_cot_tokens=2000"], ["default: engine.max_model_len = 2048", "more than 2048", "room for the prompt"]),
        (["learner.micro_batch_tokens=100"], ["learner.micro_batch_tokens = 100", "one sample has to fit"]),
        (["learner.ranks=65"], ["learner.ranks = 65", "at most 64"]),
        (["engine.count=65"], ["engine.count = 65", "at most 64"]),
        (["push.backend=ipc"], ["push.backend = ipc", "auto, shm or nccl"]),
        (["engine.max_num_batched_tokens=8"], ["engine.max_num_batched_tokens = 8", "at least engine.max_num_seqs = 256"]),
        (["eval.settings=[hard_gredy]"], ["eval.settings", "found hard_gredy", "did you mean hard_greedy?"]),
        (["eval.settings=[]"], ["eval.settings = []", "at least one name"]),
        (["eval.settings=[hard_greedy, hard_greedy]"], ["none twice"]),
        (["task.prompt=Solve it."], ["task.prompt = Solve it.", "contains {question}"]),
        (["task.train="], ["task.train = ", "the name of a data set"]),
        (["task.test={path: a, question: b}"], ["task.test", "a value for answer too"]),
        (["task.test={path: a, question: b, anwser: c}"], ["found anwser", "did you mean answer?"]),
        (["task.test={path: a, question: b, answer: 3}"], ["text for answer"]),
        (
            [
                "task.train={path: a, question: b, answer: c}",
                "task.validation={path: ./a, question: b, answer: c, split: validation}",
            ],
            ["task.train = {'path': 'a'", "split: train too", "task.validation"],
        ),
        (["eval.max_cot_tokens=2000"], ["engine.max_model_len = 2048", "more than 2048", "eval.max_cot_tokens is 2000"]),
        (["run.name=a/b"], ["run.name = a/b", "without slashes"]),
        (["run.name=.."], ["run.name = .."]),
        (["model.path= "], ["model.path", "a model name"]),
        (["run.seed=9223372036854775808"], ["run.seed", "below 2**63"]),
    ],
)
def test_keys_that_do_not_go_together_are_refused(tmp_path: Path, overrides: list[str], parts: list[str]) -> None:
    message = refusal(tmp_path, *overrides)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == []


def test_a_task_must_be_a_name_or_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("task:\n  train: 3\n")
    with pytest.raises(InputError, match=r"run.yaml:2: task.train = 3: expected a name such as gsm8k, or \{path"):
        load_config(path)


@pytest.mark.parametrize(
    "overrides",
    [
        ["learner.lr=0"],
        ["learner.cot_weight=0"],
        ["eval.every=0"],
        ["policy.mode=hard", "policy.gamma=0"],
        ["policy.mode=fuzzy", "policy.tau=0.1"],
        ["push.backend=shm"],
        [
            "task.train={path: a, question: b, answer: c, split: train}",
            "task.validation={path: a, question: b, answer: c, split: validation}",
        ],
        ["eval.max_cot_tokens=512"],
        ["engine.max_num_batched_tokens=256", "push.in_flight=recompute"],
        [f"eval.settings=[{', '.join(EVAL_SETTINGS)}]"],
    ],
)
def test_useful_extremes_are_possible(tmp_path: Path, overrides: list[str]) -> None:
    (tmp_path / "run.yaml").write_text("")
    load_config(tmp_path / "run.yaml", overrides)


def test_the_tables_name_existing_keys_once() -> None:
    keys = [*POSITIVE_INTS, *POSITIVE_NUMBERS, *NOT_NEGATIVE]
    numbers = {
        f"{'async' if section == 'async_' else section}.{name}"
        for section, fields in Config.__dataclass_fields__.items()
        for name, field in fields.default_factory.__dataclass_fields__.items()  # type: ignore[misc, union-attr]
        if field.type in (int, float, int | None, float | None)
    }
    assert sorted(keys) == sorted(numbers)  # so no new number goes unchecked


def test_validate_needs_no_origin() -> None:
    config = Config()
    config.policy.tau = 0.5
    config.run.steps = 0
    origin: Mapping[str, str] = {}
    for arguments in ((config,), (config, origin)):
        with pytest.raises(InputError, match=r"default: run\.steps = 0"):
            validate(*arguments)
