"""`softrl eval`: the six inference settings and the multiple-choice sets, for the untrained model, a checkpoint, or any model.

    CONFIG, --checkpoint --> Weights: which model folder, which step, whose run folder --> engines, no learner
    --datasets           --> eval_sets.py --> problems --> evaluation.py     --> RUN/eval/test_STEP/, RUN/eval/test_STEP.json
                                         \\-> items    --> out_of_domain.py  --> RUN/eval/out_of_domain_STEP/, .json

RUN is the checkpoint's own run, or run.dir/run.name of CONFIG, or --out: a folder that `softrl report` and `softrl show` read. The
same command goes on with an interrupted evaluation; what was drawn before, in training too, is not drawn again. A run that goes on
is not disturbed by the evaluation of one of its checkpoints, which has engines of its own.
"""

import asyncio
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from cluster.eval_sets import EvalResults, EvalSets, evaluate_sets
from cluster.evaluation import weights_label
from cluster.evaluation_records import SettingSummary
from cluster.live import make_table
from cluster.placement import Cluster, placed, ray_session
from cluster.progress import Progress, progress_line
from cluster.rollouts import Rollouts
from cluster.run_dir import CONFIG
from cluster.waits import named
from configs.errors import InputError, Interrupted
from configs.load import dump_config, load_config
from configs.schema import Config
from learner.checkpoint import CONTROLLER
from learner.export import export
from rollout.files import cannot_write, replace_file
from rollout.models import load_tokenizer, resolve_model
from rollout.reward import Scorer
from rollout.trajectory import STOP_ANSWER_CLOSED, STOP_ANSWER_EOS, STOP_ANSWER_LENGTH

LOG_WIDTH = 120  # characters, where no terminal says how many it has


@dataclass(frozen=True, slots=True)
class Weights:
    """What is evaluated, and where its results belong."""

    step: int  # of its run; 0 is the model that a run starts from
    run: Path  # the folder for results
    checkpoint: Path | None = None  # of a run; None where config.model.path is what is evaluated
    sigma: float | None = None  # noise of the run that made the checkpoint; None: from the model's own embedding


def run_evaluation(config: Config, checkpoint: Path | None, sets: EvalSets, out: Path | None) -> None:
    """Run `softrl eval`.

    Raises InputError before anything is started, RunError when the evaluation fails, Interrupted after Ctrl-C; all of them leave
    what is recorded.
    """
    config, weights = find_weights(config, checkpoint, out)
    tokenizer = load_tokenizer(config.model.path)
    sets.require_fit(config, tokenizer)
    _open_run(config, weights.run)
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    try:
        with (
            _model_folder(config, weights) as model_dir,
            ray_session(config),
            placed(config, model_dir, with_learner=False) as cluster,
            Scorer() as scorer,
            progress_line(console) as progress,
        ):
            asyncio.run(_evaluate(config, weights, sets, cluster, tokenizer, scorer, progress, console))
    except KeyboardInterrupt:
        raise Interrupted(f"{weights.run}: interrupted; the same command goes on") from None


async def _evaluate(
    config: Config,
    weights: Weights,
    sets: EvalSets,
    cluster: Cluster,
    tokenizer: Any,
    scorer: Scorer,
    progress: Callable[[str, int], Progress],
    console: Console,
) -> None:
    rollouts, _ = await Rollouts.start(config, [], cluster.engines, tokenizer, scorer, named)
    if weights.sigma is not None:
        rollouts.sigma = weights.sigma
    found = await evaluate_sets(rollouts, weights.run, weights.step, sets, named, progress)
    print_results(console, f"{weights.run.name}, {weights_label(weights.step)}", found)
    console.print(Text(f"records in {weights.run}/eval; next: softrl report {weights.run.parent}"), soft_wrap=True)


def print_results(console: Console, title: str, found: EvalResults) -> None:
    """A table of each task, and one of the multiple-choice sets."""
    for summaries in found.tasks:
        print_summaries(console, title, summaries)
    rows = [
        [name, summary.items, f"{summary.accuracy:.1%}", f"{summary.accuracy_norm:.1%}", f"{summary.nll_per_token:.4f}"]
        for name, summary in found.choices
    ]
    if rows:
        columns = ["set", "items", "accuracy", "by character", "NLL per token"]
        console.print(make_table(f"{title}: out of domain", columns, rows))


def print_summaries(console: Console, title: str, found: Sequence[SettingSummary]) -> None:
    """One row a setting: percent, with 95 % intervals over problems."""
    stops = (STOP_ANSWER_CLOSED, STOP_ANSWER_EOS, STOP_ANSWER_LENGTH)
    columns = ["setting", "pass@1", "pass@n", "vote", "CoT", "/".join(stops), "timed out"]
    rows = []
    for summary in found:
        row = summary.row()
        most = len(row["pass_at_k"])
        curves = [[100 * value for value in row[f"pass_at_k{bound}"]] for bound in ("", "_low", "_high")]
        passed = ["{:.1f} ({:.1f}-{:.1f})".format(*(curve[k - 1] for curve in curves)) for k in (1, most)]
        ends = "/".join(str(row["stop_reasons"].get(reason, 0)) for reason in stops)
        vote, length = f"{100 * row['majority']:.1f}", f"{row['cot_length_mean']:.1f}"
        rows.append([summary.setting, passed[0], f"@{most} {passed[1]}" if most > 1 else "-", vote, length, ends, row["timed_out"]])
    console.print(make_table(f"{title}: {found[0].dataset}, {len(found[0].problems)} problems", columns, rows))


# --- what is evaluated -----------------------------------------------------------------------------------------------


def find_weights(config: Config, checkpoint: Path | None, out: Path | None) -> tuple[Config, Weights]:
    """The weights, and the config to evaluate them with. `checkpoint` is a run's, an exported model, or None: model.path itself.

    Raises InputError for a folder that is neither, and for a checkpoint of another model than the config's.
    """
    if checkpoint is None:
        return config, Weights(0, (out or Path(config.run.dir).expanduser() / config.run.name).resolve())
    checkpoint = checkpoint.resolve()
    if not (checkpoint / CONTROLLER).is_file():
        if not (checkpoint / "config.json").is_file():
            raise InputError(f"--checkpoint {checkpoint}: neither a run's checkpoint ({CONTROLLER}) nor a model (config.json)")
        if out is None:
            raise InputError(f"--checkpoint {checkpoint}: a model folder does not say which run it is of; give --out a folder")
        return replace(config, model=replace(config.model, path=str(checkpoint))), Weights(0, out.resolve())
    run = checkpoint.parents[1]
    if not (run / CONFIG).is_file():
        raise InputError(f"--checkpoint {checkpoint}: no run around it (expected {run / CONFIG}); give RUN/checkpoints/step_N")
    trained = load_config(run / CONFIG)
    if trained.model.path != config.model.path:
        raise InputError(
            f"--checkpoint {checkpoint}: trained from model.path = {trained.model.path}, this config has {config.model.path}; "
            f"evaluate it with {run / CONFIG}"
        )
    try:
        stored = json.loads((checkpoint / CONTROLLER).read_text())
        step, sigma = int(stored["step"]), float(stored["sigma"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{checkpoint / CONTROLLER}: expected JSON with step and sigma ({type(error).__name__})") from error
    # sigma is gamma times the RMS of the embedding that training started from; its own gamma gives its own sigma, bit for bit
    sigma *= config.policy.gamma / trained.policy.gamma if trained.policy.gamma else 0.0
    return config, Weights(step, (out or run).resolve(), checkpoint, sigma)


def _open_run(config: Config, run: Path) -> None:
    """Make the folder of results one that a report can read. Raises InputError when it is the run of another model."""
    path = run / CONFIG
    if path.is_file():
        if (there := load_config(path).model.path) != config.model.path:
            raise InputError(
                f"{run}: a run of model.path = {there}, this config has {config.model.path}; give --out another folder"
            )
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(run, error) from error
    replace_file(path, lambda partial: partial.write_text(dump_config(config)))


@contextmanager
def _model_folder(config: Config, weights: Weights) -> Iterator[str]:
    """A model folder that an engine loads: the model's own, or a checkpoint exported for as long as it is needed."""
    if weights.checkpoint is None:
        yield str(resolve_model(config.model.path))
        return
    # In the engine's dtype, as a push rounds them; in the run's folder, which every node sees and which has room for a checkpoint.
    exported = replace(config, model=replace(config.model, dtype=config.engine.dtype))
    with tempfile.TemporaryDirectory(prefix=".weights_", dir=weights.run) as folder:
        export(weights.checkpoint, Path(folder) / "model", exported)
        yield str(Path(folder) / "model")
