"""The best checkpoint is that of the best greedy validation, whichever step it is of, and its folder alone says which."""

import asyncio
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from rich.console import Console

from cluster import controller
from cluster.best import Best, read_best
from cluster.controller import HeldOutTests, Training, recorded_end
from cluster.eval_sets import EvalSets
from cluster.evaluation import read_rows
from cluster.live import LiveView
from cluster.placement import Cluster
from cluster.report_runs import find_tested_step
from cluster.run_dir import RunDir
from configs.errors import InputError, RunError
from configs.load import load_config
from configs.schema import Config
from learner.learner import Learner
from rollout.reward import Scorer
from rollout.tasks import Problem
from rollout.trajectory import SampleRequest
from tests.cluster.engines import FakeEngine, byte_tokenizer
from tests.learner import tiny

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
TOKENIZER = byte_tokenizer()
PROBLEMS = [Problem(index, f"What is {index} + 1?", str(index + 1)) for index in range(4)]


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def model_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model with a token a byte. Actors are called in this process, so nothing goes through Ray's store."""
    monkeypatch.setattr(tiny, "VOCAB", 256)
    monkeypatch.setattr(controller, "load_tokenizer", lambda _: TOKENIZER)
    monkeypatch.setattr(ray, "put", lambda value: value)
    return tiny.save_tiny_model(tmp_path / "model")


class Engine(FakeEngine):
    """Stands for an engine: how many problems it solves depends on the weights that were pushed to it, and on nothing else.

    `right`: after so many steps, how many it solves greedily; of sampled ones it solves the more, the later.
    """

    def __init__(self, right: Mapping[int, int]) -> None:
        super().__init__(TOKENIZER, self.solve)
        self.right = right
        self.steps: dict[str, int] = {}  # digest of weights: after how many steps they came first
        self.pushed: list[tuple[int, str]] = []  # version, digest

    def solve(self, request: SampleRequest) -> str:
        if request.answer_temperature > 0:  # a sample to learn from
            return str(request.prompt_index + 1 + request.sample_index % 2)
        step = self.steps[self.pushed[-1][1]]
        solved = step if request.sigma > 0 else self.right[step]
        return str(request.prompt_index + 1) if request.prompt_index < solved else "no"

    def load(self, version: int, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for _, tensor in tensors)).hexdigest()[:8]
        self.steps.setdefault(digest, version)
        self.pushed.append((version, digest))


@dataclass
class Report:
    """As far as the controller reads learner.push.PushReport."""

    seconds: float = 0.0


class Actor:
    """Calls an object's methods as Ray does an actor's, in this process."""

    def __init__(self, **methods: Callable[..., Any]) -> None:
        for name, method in methods.items():
            setattr(self, name, Remote(method))


class Remote:
    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    async def remote(self, *args: Any) -> Any:
        return self._method(*args)


def rank(config: Config, model_dir: Path, engine: Engine, fails_at: str) -> Actor:
    """A real learner whose pushes go into `engine`; it fails to write the checkpoint called `fails_at`."""
    learner = Learner(config, model_dir, 0, 1, torch.device("cpu"))

    def save(folder: str, extra: dict[str, Any]) -> None:
        if Path(folder).name == fails_at:
            raise RunError("the disk is full")
        learner.save(Path(folder), extra)

    def push(version: int) -> Report:
        engine.load(version, learner.full_tensors(torch.float32))
        return Report()

    return Actor(
        address=lambda: ("", 0),
        start=lambda host, port: {},
        connect=lambda engines, sequences: None,
        verify=lambda version: 0.0,
        load=lambda folder: learner.load(Path(folder)),
        save=save,
        push=push,
        begin_step=learner.begin_step,
        accumulate=learner.accumulate,
        finish_step=learner.finish_step,
    )


def train(
    folder: Path, model_dir: Path, right: Mapping[int, int], *overrides: str, resume: bool = False, fails_at: str = ""
) -> Engine:
    """Three steps, each validated and saved; returns the engine."""
    fixed = [f"run.dir={folder}", "run.name=run", f"model.path={model_dir}", "model.dtype=float32", "run.steps=3", "eval.every=1"]
    fixed += ["rollout.prompts_per_step=1", "rollout.samples_per_prompt=2", "checkpoint.every=1", "learner.lr=1e-2"]
    fixed += ["eval.settings=[soft_sample, hard_greedy]", "eval.samples=1", "eval.problems=4"]
    config = load_config(DEMO, [*fixed, *overrides])
    engine = Engine(right)
    handle = Actor(start=lambda: {"rms_embedding": 0.1}, stats=lambda: {"preemptions": 0})
    handle.generate = engine.generate  # type: ignore[attr-defined]
    problems = PROBLEMS[: config.eval.problems]
    tests = HeldOutTests(config, EvalSets([("arithmetic:test", PROBLEMS)], []))
    cluster = Cluster([handle], [rank(config, model_dir, engine, fails_at)])
    view = LiveView(config, Console(file=io.StringIO()))
    with RunDir.create(config, resume) as run, recorded_end(run), Scorer(workers=1) as scorer:
        asyncio.run(Training(config, str(model_dir), PROBLEMS, problems, tests, cluster, scorer, run, view).run_all())
    return engine


def right_at(folder: Path, step: int) -> int:
    """How many test problems the weights of that step solved greedily, as recorded."""
    [row] = [row for row in read_rows(folder / "run", f"test_{step:06d}.json") if row["setting"] == "hard_greedy"]
    return row["correct"]


def test_the_best_weights_are_tested_though_they_are_not_the_last(tmp_path: Path, model_dir: Path) -> None:
    engine = train(tmp_path, model_dir, {0: 0, 1: 3, 2: 1, 3: 2})
    versions, digests = zip(*engine.pushed, strict=True)
    assert versions == (0, 1, 2, 3, 1) and len(set(digests)) == 4
    assert digests[4] == digests[1]  # bit for bit what step 1 had pushed
    best = read_best(tmp_path / "run")
    assert best is not None and (best.step, best.score, best.validation["setting"]) == (1, 0.75, "hard_greedy")
    assert find_tested_step(tmp_path / "run") == 1 and right_at(tmp_path, 1) == 3
    assert not (tmp_path / "run" / "eval" / "test_000003").exists()


def test_the_best_weights_of_a_later_step_than_that_resumed_from_keep_their_label(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(RunError, match="disk is full"):
        train(tmp_path, model_dir, {0: 0, 1: 1, 2: 3}, fails_at="step_000002")
    best = read_best(tmp_path / "run")
    assert best is not None and (best.step, best.score) == (2, 0.75)
    engine = train(tmp_path, model_dir, {0: 0, 1: 1, 2: 1, 3: 2}, resume=True)  # this time step 2 does worse
    assert read_best(tmp_path / "run") == best
    assert [version for version, _ in engine.pushed] == [1, 2, 3, 2] and find_tested_step(tmp_path / "run") == 2


def test_weights_of_the_last_step_from_before_a_resume_are_loaded_all_the_same(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(RunError, match="disk is full"):
        train(tmp_path, model_dir, {0: 0, 1: 1, 2: 1, 3: 4}, fails_at="step_000003")
    engine = train(tmp_path, model_dir, {0: 0, 1: 1, 2: 1, 3: 2}, resume=True)
    assert [version for version, _ in engine.pushed] == [2, 3, 3]
    best = read_best(tmp_path / "run")
    assert best is not None and (best.step, best.score) == (3, 1.0)


def test_scores_of_another_validation_do_not_compare(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(RunError, match="disk is full"):
        train(tmp_path, model_dir, {0: 0, 1: 3, 2: 1}, fails_at="step_000002")
    train(tmp_path, model_dir, {0: 0, 1: 3, 2: 1, 3: 0}, "eval.problems=2", resume=True)
    best = read_best(tmp_path / "run")
    assert best is not None and (best.step, best.score, best.validation["problems"]) == (2, 0.5, 2)


def test_only_equal_validations_compare() -> None:
    first, worse = Best(4, 0.5, {"problems": 8}), Best(6, 0.25, {"problems": 8})
    assert first.beats(None) and not worse.beats(first) and Best(6, 0.5, {"problems": 8}).beats(first)
    assert Best(6, 0.25, {"problems": 4}).beats(first)


def test_a_best_checkpoint_that_does_not_say_what_it_is_is_named(tmp_path: Path) -> None:
    assert read_best(tmp_path) is None
    folder = tmp_path / "checkpoints" / "best"
    folder.mkdir(parents=True)
    (folder / "controller.json").write_text(json.dumps({"step": 4}))
    with pytest.raises(
        InputError, match=r"best/controller.json: expected JSON with step, score and validation .*; remove .*best, "
    ):
        read_best(tmp_path)


def test_without_a_greedy_setting_nothing_is_started() -> None:
    with pytest.raises(InputError, match=r"eval.settings = \[soft_sample\]: expected a greedy one too, such as hard_greedy"):
        controller.prepare(load_config(DEMO, ["eval.settings=[soft_sample]"]))
