"""One evaluation of one data set, during training or by `softrl eval`: every setting in one batch, recorded sample by sample.

    problems x settings x samples, less what is recorded --> requests --> engines --> scorer --> a line of the records at once
                                                                                         \\--> the first problems' transcripts

    runs/NAME/eval/test_000040/         one file of records for each data set      (evaluation_records.py)
    runs/NAME/eval/test_000040.json     one row for each data set and setting
    runs/NAME/rollouts/test_000040_*    whole trajectories of a few problems       (transcripts.py)

Step 0 stands for the untrained model.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.evaluation_records import (
    FOLDER,
    EvaluationPlan,
    EvaluationRecords,
    SettingSummary,
    dataset_name,
    plan_path,
    read_plan,
    read_records,
    require_same,
    summarise,
)
from cluster.progress import Progress
from cluster.rollouts import Rollouts
from cluster.transcripts import FOLDER as TRANSCRIPTS
from cluster.transcripts import Transcripts
from cluster.waits import Waiting, each
from configs.schema import Config
from rollout.evaluation import evaluation_requests, samples_per_setting, setting_of
from rollout.files import replace_file
from rollout.tasks import Problem

FULL_ENGINES = 32  # times: what is queued at once; the idle end of such a batch is some 3 % of it


async def evaluate(
    rollouts: Rollouts,
    run: Path,
    what: str,
    step: int,
    task: str | Mapping[str, Any],
    problems: Sequence[Problem],
    waiting: Waiting,
    progress: Callable[[str, int], Progress],
) -> list[SettingSummary]:
    """Draw and record what `run`/eval/WHAT_STEP lacks of the `eval.settings`, and summarise them; the engines hold the weights.

    `progress` makes the Progress of (what is done, samples to draw). Raises InputError where the records there are of another
    evaluation, RunError when drawing fails: what was recorded until then stays, and is not drawn again.
    """
    config, place = rollouts.config, run / FOLDER / f"{what}_{step:06d}"
    plan = evaluation_plan(config, step, dataset_name(task), problems, rollouts.sigma)
    requests = evaluation_requests(config, problems, rollouts.prompt_ids, rollouts.sigma)
    gold = {problem.index: problem.answer for problem in problems}
    with EvaluationRecords(place, plan) as records:
        transcripts = Transcripts(config, run / TRANSCRIPTS, f"{place.name}_{records.path.stem}", step, bool(records.done))
        lacking = [r for r in requests if (r.prompt_index, setting_of(r), r.sample_index) not in records.done]
        counted = progress(f"{what} at step {step}: {plan.dataset}", len(lacking))
        size = FULL_ENGINES * config.engine.max_num_seqs * len(rollouts.engines)
        for first in range(0, len(lacking), size):
            scored = rollouts.scored(lacking[first : first + size], gold)
            async for sample in each(waiting, what, "the next sample", config.engine.request_timeout_s, scored):
                setting = setting_of(sample.trajectory)
                transcripts.keep(setting, sample)  # before the record: what is recorded is not drawn again
                records.add(setting, sample)
                counted.advance(sample.trajectory.generated)
        found = {summary.setting: summary for summary in records.summaries()}
    write_summary(place)
    return [found[setting] for setting in plan.samples]


def evaluation_plan(config: Config, step: int, dataset: str, problems: Sequence[Problem], sigma: float) -> EvaluationPlan:
    """What an evaluation of the weights after `step` steps is."""
    return EvaluationPlan(
        dataset=dataset,
        weights=weights_label(step),
        model=config.model.path,
        dtype=str(config.engine.dtype),
        prompt=config.task.prompt,
        seed=config.run.seed,
        sigma=sigma,
        max_cot_tokens=config.eval_cot_tokens,
        max_answer_tokens=config.policy.max_answer_tokens,
        fingerprints=[problem.fingerprint for problem in problems],
        samples=samples_per_setting(config),
    )


def require_same_evaluation(
    config: Config, run: Path, what: str, step: int, task: str | Mapping[str, Any], problems: Sequence[Problem]
) -> None:
    """Raises InputError where `run`/eval/WHAT_STEP holds records of this task's name that `evaluate` would not add to."""
    path = plan_path(run / FOLDER / f"{what}_{step:06d}", dataset_name(task))
    if path.exists():
        before = read_plan(path)  # the run's own sigma is not in the config
        require_same(path, before, evaluation_plan(config, step, before.dataset, problems, before.sigma))


def weights_label(step: int) -> str:
    """The weights of a run after so many steps, in words."""
    return f"step {step}" if step else "base"


def write_summary(place: Path) -> None:
    """Write place.json beside the folder `place`: the rows of all its data sets, from their records."""
    rows = [
        summary.row()
        for path in sorted(place.glob("*.jsonl"))
        for summary in summarise(read_plan(path.with_suffix(".json")), read_records(path))
    ]
    text = json.dumps(rows, indent=1) + "\n"
    replace_file(place.with_name(f"{place.name}.json"), lambda partial: partial.write_text(text))


def read_rows(run: Path, name: str) -> list[dict[str, Any]]:
    """The rows of `run`/eval/NAME, such as test_000040.json; none where it is not there."""
    path = run / FOLDER / name
    return json.loads(path.read_text()) if path.exists() else []


def forget_after(run: Path, step: int) -> list[str]:
    """Remove the evaluations of weights after more than `step` steps: a run that goes on from there makes those anew.

    Returns the names of what was removed.
    """
    removed = []
    for path in sorted([*(run / FOLDER).glob("*"), *(run / TRANSCRIPTS).glob("*")]):
        match = re.match(r"[a-z_]+_(\d{6})(?!\d)", path.name)
        if match and int(match[1]) > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            removed.append(path.name)
    return removed
