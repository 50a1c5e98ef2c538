"""Small scored samples and run folders with numbers that are known by hand."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from cluster.evaluation_records import EvaluationPlan, EvaluationRecords
from configs.load import dump_config, load_config
from configs.schema import EVAL_SETTINGS, Mode
from rollout.trajectory import Sample, Trajectory

PLAN = EvaluationPlan(
    dataset="gsm8k:test",
    weights="step 4",
    model="smollm2-135m",
    dtype="float32",
    prompt="paper",
    seed=0,
    sigma=0.25,
    max_cot_tokens=8,
    max_answer_tokens=4,
    fingerprints=["0", "1"],
    samples={"hard_greedy": 1, "soft_sample": 3},
)
RIGHT, WRONG = "7", "8"


def scored(
    problem: int, sample: int, answer: str | None, *, setting: str = "hard_greedy", steps: Sequence[Sequence[float]] = ([1.0],)
) -> Sample:
    """A sample that answered RIGHT, something else, or nothing; `steps` are the probabilities of each soft step."""
    mode = EVAL_SETTINGS[setting][0]
    supports = [[]] * len(steps) if mode is Mode.hard else steps
    trajectory = Trajectory(
        prompt_ids=np.zeros(5, np.int32),
        prompt_index=problem,
        sample_index=sample,
        mode=mode,
        tau=0.5,
        sigma=0.25,
        noise_seed=0,
        shadow_ids=np.zeros(len(steps), np.int32),
        support_ids=np.zeros(sum(map(len, supports)), np.int32),
        support_probs=np.array([p for step in supports for p in step], np.float32),
        support_offsets=np.concatenate([[0], np.cumsum([len(step) for step in supports])]).astype(np.int64),
        dropped_mass=np.full(len(steps), 0.0 if mode is Mode.hard else 1.23456e-5, np.float32),
        soft_embeddings=None,
        prefill_ids=np.zeros(3, np.int32),
        answer_ids=np.zeros(2, np.int32),
        answer_logprobs=np.zeros(2, np.float32),
        stop_reason="length" if answer is None else "closed",
        phrase_found=len(steps) < PLAN.max_cot_tokens,
        weight_versions=np.array([4]),
        weight_version_starts=np.array([0]),
    )
    reward = 0.0 if answer is None else 100.0 if answer == RIGHT else 10.0
    return Sample(trajectory=trajectory, reward=reward, correct=answer == RIGHT, answer_text=answer or "")


def write_run(
    runs: Path,
    name: str,
    overrides: Sequence[str] = (),
    *,
    metrics: Sequence[Mapping[str, float]] = (),
    tests: Mapping[int, Mapping[str, Sequence[Sequence[bool]]]] | None = None,
    dataset: str = "gsm8k:test",
    plan: EvaluationPlan | None = None,
) -> Path:
    """A run folder. `tests`: by step and setting, for each problem which of its samples are right; `plan` says of what, but for the
    samples, where that matters."""
    config = load_config("configs/demo.yaml", [f"run.dir={runs}", f"run.name={name}", *overrides])
    folder = runs / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    lines = [json.dumps({"step": step, **row}) + "\n" for step, row in enumerate(metrics, start=1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    for step, settings in (tests or {}).items():
        samples = {setting: len(problems[0]) for setting, problems in settings.items()}
        count = len(next(iter(settings.values())))
        numbers = [str(problem) for problem in range(count)]
        of_step = replace(PLAN, dataset=dataset, weights=f"step {step}", seed=config.run.seed, fingerprints=numbers)
        with EvaluationRecords(folder / "eval" / f"test_{step:06d}", replace(plan or of_step, samples=samples)) as records:
            for setting, problems in settings.items():
                steps = [[1.0]] if setting.startswith("hard") else [[0.5, 0.5], [0.25] * 4]
                for problem, outcomes in enumerate(problems):
                    for sample, right in enumerate(outcomes):
                        answer = RIGHT if right else WRONG
                        records.add(setting, scored(problem, sample, answer, setting=setting, steps=steps))
    return folder
