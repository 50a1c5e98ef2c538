"""A config says what was meant, or one line says what is wrong with it: where, which key, which value, what was expected."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import InputError
from configs.load import COMMAND_LINE, config_hash, dump_config, load_config
from configs.schema import Advantage, Config, Dtype, Mode, PushBackend

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return write


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as error:
        load_config(path, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


# What a good config becomes


def test_an_empty_file_is_all_defaults_with_the_papers_temperature(write: Write) -> None:
    config = load_config(write(""))
    assert config == replace(Config(), policy=replace(Config().policy, tau=0.5), engine=config.engine, learner=config.learner)
    assert isinstance(config, Config)
    assert (config.engine.dtype, config.learner.dtype) == (Dtype.bfloat16, Dtype.bfloat16)


def test_values_have_the_schemas_types(write: Write) -> None:
    config = load_config(write("learner: {lr: 1e-5, advantage: grpo, clip: 2}\nrun: {name: 007}\npolicy: {mode: hard}"))
    assert config.learner.lr == 1e-5 and isinstance(config.learner.clip, float)
    assert config.learner.advantage is Advantage.grpo and config.policy.mode is Mode.hard
    assert isinstance(config.run.name, str)


def test_model_dtype_reaches_engine_and_learner_unless_they_have_their_own(write: Write) -> None:
    config = load_config(write("model: {dtype: float32}\nlearner: {dtype: bfloat16}"))
    assert (config.engine.dtype, config.learner.dtype) == (Dtype.float32, Dtype.bfloat16)


@pytest.mark.parametrize(("mode", "tau"), [("hard", 1.0), ("soft", 0.5), ("fuzzy", 1e-4)])
def test_unset_tau_is_the_papers_own_for_the_mode(write: Write, mode: str, tau: float) -> None:
    assert load_config(write(""), [f"policy.mode={mode}"]).policy.tau == tau


def test_a_new_mode_drops_the_tau_of_another_mode(write: Write) -> None:
    path = write("policy: {mode: soft, tau: 0.7}")
    assert load_config(path).policy.tau == 0.7
    assert load_config(path, ["policy.mode=soft"]).policy.tau == 0.7
    assert load_config(path, ["policy.mode=fuzzy"]).policy.tau == 1e-4
    assert load_config(path, ["policy.mode=fuzzy", "policy.tau=0.01"]).policy.tau == 0.01
    assert load_config(path, ["policy.tau=null"]).policy.tau == 0.5


def test_async_is_the_field_async_(write: Write) -> None:
    config = load_config(write("async: {max_staleness: 0}"), ["async.max_staleness=0"])
    assert config.async_.max_staleness == 0
    assert "\nasync:\n" in dump_config(config)


def test_extends_chains_are_relative_to_each_file_and_the_nearest_wins(write: Write) -> None:
    write("run: {steps: 1, seed: 1}\nlearner: {lr: 1e-3}", "grand.yaml")
    write("extends: ../grand.yaml\nrun: {steps: 2}", "inner/base.yaml")
    path = write("extends: inner/base.yaml\nlearner:\n  lr: 1e-4\n")
    config = load_config(path, ["run.seed=3"])
    assert (config.run.steps, config.run.seed, config.learner.lr) == (2, 3, 1e-4)


def test_a_section_without_keys_sets_nothing(write: Write) -> None:
    assert load_config(write("policy:\n  # tau: 0.4\nrun: {seed: 4}")).policy.tau == 0.5


def test_overrides_keep_text_as_typed(write: Write) -> None:
    prompt = r"Q: {question}, 50%: \boxed{x=1} # A:"
    config = load_config(
        write(""),
        [f"task.prompt={prompt}", "task.train=arithmetic:train?low=1&high=9", "run.name=1e-6", "eval.settings=[soft_greedy]"],
    )
    assert (config.task.prompt, config.task.train) == (prompt, "arithmetic:train?low=1&high=9")
    assert (config.run.name, config.eval.settings) == ("1e-6", ["soft_greedy"])


def test_a_task_can_be_a_file_with_named_columns(write: Write) -> None:
    task = {"path": "sums.jsonl", "question": "q", "answer": "a"}
    assert load_config(write(f"task:\n  train: {task}")).task.train == task
    assert load_config(write(""), ["task.train={path: sums.jsonl, question: q, answer: a}"]).task.train == task


def test_names_may_hold_other_values(write: Write) -> None:
    config = load_config(write("run: {name: 'sums_${policy.mode}_${run.seed}'}"), ["policy.mode=fuzzy", "run.seed=2"])
    assert config.run.name == "sums_fuzzy_2"


def test_a_dumped_config_loads_back_equal(write: Write) -> None:
    overrides = [
        "policy.mode=fuzzy",
        "engine.kv_cache_gib=1.5",
        "learner.threads=2",
        "eval.settings=[soft_sample, hard_greedy]",
    ]
    config = load_config(write("task:\n  train: {path: a, question: b, answer: c}"), overrides)
    again = load_config(write(dump_config(config), "dumped.yaml"))
    assert again == config
    assert config_hash(again) == config_hash(config)


@settings(max_examples=60, deadline=None)
@given(name=st.text(alphabet="abc \\$@{}:'\"#-1e.6~", min_size=1), tail=st.text(alphabet="\\$ {}:\n\t'\"#éa"))
def test_any_text_survives_the_round_trip(tmp_path_factory: pytest.TempPathFactory, name: str, tail: str) -> None:
    config = Config()
    config.policy.tau = 0.5
    config.engine.dtype = config.learner.dtype = Dtype.bfloat16
    config.run.dir, config.task.prompt = "x" + name, "{question}" + tail
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_the_hash_is_twelve_digits_and_follows_every_value(write: Write) -> None:
    path = write("")
    hashes = [config_hash(load_config(path, o)) for o in ([], [], ["run.seed=1"], ["learner.lr=7e-6"], ["policy.mode=hard"])]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4
    assert all(len(h) == 12 and int(h, 16) >= 0 for h in hashes)


# What a bad one says


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        ("run:\n  steps: 3\n  sede: 1", 3, ["unknown key run.sede", "did you mean run.seed?"]),
        ("lerner: {lr: 1e-5}", 1, ["unknown key lerner", "did you mean learner?"]),
        ("run: {steps: 2}\nlr: 1e-5", 2, ["unknown key lr", "did you mean learner.lr?"]),
        ("policy:\n  lr: 1e-5", 2, ["unknown key policy.lr", "did you mean learner.lr?"]),
        ("async:\n  zzz: 1", 2, ["unknown key async.zzz", "expected one of max_staleness"]),
        ("async_: {max_staleness: 0}", 1, ["unknown key async_", "did you mean async?"]),
        ("run:\n  steps: many", 2, ["run.steps = many", "expected a whole number"]),
        ("run:\n  steps: 1.5", 2, ["run.steps = 1.5", "expected a whole number"]),
        ("run:\n  steps: true", 2, ["run.steps = True", "expected a whole number"]),
        ("run:\n  steps:", 2, ["run.steps = null", "expected a whole number"]),
        ("run:\n  name: [a, b]", 2, ["run.name = ['a', 'b']", "expected text"]),
        ("learner:\n  lr: fast", 2, ["learner.lr = fast", "expected a number"]),
        ("learner:\n  lr: {a: 1}", 2, ["learner.lr = {'a': 1}", "expected a number"]),
        ("engine:\n  enforce_eager: maybe", 2, ["engine.enforce_eager = maybe", "expected true or false"]),
        ("engine:\n  threads: few", 2, ["engine.threads = few", "expected a whole number or null"]),
        ("policy:\n  mode: sotf", 2, ["policy.mode = sotf", "one of hard, soft, fuzzy", "did you mean soft?"]),
        ("learner:\n\n  advantage: ppo", 3, ["learner.advantage = ppo", "one of rloo, grpo"]),
        ("eval:\n  settings: hard_greedy", 2, ["eval.settings = hard_greedy", "expected a list of names"]),
        ("policy: soft", 1, ["policy = soft", "expected a section with keys mode, tau"]),
        ("run:\n  seed: 1\n  seed: 2", 3, ["run.seed stands twice", "line 2"]),
        ("run: {seed: 1}\nrun: {steps: 2}", 2, ["run stands twice", "line 1"]),
        ("run:\n  seed: ${run.sed}", 2, ["run.seed", "expected ${section.key}"]),
        ("run:\n  steps: 2\n seed: 1", 3, ["not valid YAML"]),
        ("run: {steps: 2", 1, ["not valid YAML"]),
        ("- run", 1, ["expected `key: value` lines"]),
        ("extends: [a.yaml, b.yaml]", 1, ["extends = ['a.yaml', 'b.yaml']", "expected the name of one YAML file"]),
        ("policy:\n  tau: -1", 2, ["policy.tau = -1.0", "expected a finite number above 0"]),
    ],
)
def test_a_mistake_in_a_file_is_named_with_its_line(write: Write, text: str, line: int, parts: list[str]) -> None:
    path = write(text)
    message = refusal(path)
    assert message.startswith(f"{path}:{line}")
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("policy.mode", ["expected key=value"]),
        ("policy.mod=soft", ["unknown key policy.mod", "did you mean policy.mode?"]),
        ("mode=soft", ["unknown key mode", "did you mean policy.mode?"]),
        ("policy.mode.x=1", ["unknown key policy.mode.x", "did you mean policy.mode?"]),
        ("policy=soft", ["policy = soft", "policy.mode=soft"]),
        ("async_.max_staleness=0", ["unknown key async_.max_staleness", "did you mean async.max_staleness?"]),
        ("extends=base.yaml", ["unknown key extends"]),
        ("policy.mode=SOFT", ["policy.mode = SOFT", "one of hard, soft, fuzzy", "did you mean soft?"]),
        ("run.steps=ten", ["run.steps = ten", "expected a whole number"]),
        ("run.steps=null", ["run.steps = null", "expected a whole number"]),
        ("eval.settings=soft_greedy", ["eval.settings = soft_greedy", "expected a list of names"]),
        ("eval.settings=[soft", ["eval.settings = [soft", "expected a list of names"]),
        ("task.train={path", ["task.train = {path", "expected a name or {path"]),
    ],
)
def test_a_mistake_on_the_command_line_is_named(write: Write, override: str, parts: list[str]) -> None:
    message = refusal(write(""), override)
    assert message.startswith(f"{COMMAND_LINE}: ")
    assert [part for part in parts if part not in message] == []


def test_a_missing_file_names_its_nearest_neighbours(write: Write, tmp_path: Path) -> None:
    write("", "demo.yaml")
    assert "dmeo.yaml: no such file; did you mean demo.yaml?" in refusal(tmp_path / "dmeo.yaml")
    assert "YAML files there: demo.yaml" in refusal(tmp_path / "42")
    assert f"no folder {tmp_path / 'gone'}" in refusal(tmp_path / "gone" / "demo.yaml")


def test_files_that_are_no_yaml_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.yaml").write_bytes(b"\x00\xff\xfe")
    assert "expected a YAML file in UTF-8" in refusal(tmp_path / "weights.yaml")
    assert "cannot be read: Is a directory" in refusal(tmp_path)


def test_a_missing_base_names_the_line_that_wants_it(write: Write) -> None:
    write("", "base.yaml")
    path = write("run: {seed: 1}\nextends: bas.yaml")
    message = refusal(path)
    assert message.startswith(f"{path}:2: extends = ")
    assert "did you mean base.yaml?" in message


def test_files_that_extend_each_other_are_refused(write: Write) -> None:
    first, second = write("extends: b.yaml", "a.yaml"), write("extends: ./a.yaml", "b.yaml")
    message = refusal(first)
    assert message.startswith(f"{second}:1: extends = ")
    assert f"{first} -> {second} -> " in message


def test_a_mistake_in_a_base_is_named_there(write: Write) -> None:
    base = write("run:\n  steps: 0", "base.yaml")
    assert refusal(write("extends: base.yaml")).startswith(f"{base}:2: run.steps = 0: expected")


@pytest.mark.parametrize("on_gpu", [False, True])
def test_auto_pushes_with_nccl_where_there_are_gpus_and_through_memory_elsewhere(on_gpu: bool) -> None:
    found = {backend: backend.resolved(on_gpu) for backend in PushBackend}
    assert found.pop(PushBackend.auto) is (PushBackend.nccl if on_gpu else PushBackend.shm)
    assert all(resolved is backend for backend, resolved in found.items())
