"""`softrl matrix`: a table of runs from one file, trained and evaluated one after another, and reported.

    recipes: [base.yaml, ...]     one or several, beside this file            \\
    set: {key: value}             for every run                                >  the product of recipes and axes: one run each
    axes: {key: [value, ...]}     one run for each combination of values      /
    eval: {settings: all, datasets: [...], problems: N}     what `softrl eval` draws of each run's best checkpoint, and of the
                                                            untrained model once a seed; leave it out to do without

    expand --> check every run --> for each: softrl train, softrl eval --> softrl report of the folder

Each run is a process of its own: what one leaves in memory, or how it fails, is no other's concern. Runs lie in runs/NAME_OF_FILE
unless `set` says run.dir. A finished run is left as it is; `--resume` goes on with one that was begun.
"""

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.text import Text

from cluster.controller import BEST, prepare
from cluster.evaluate import load_datasets
from cluster.evaluation_records import FOLDER as EVALUATIONS
from cluster.evaluation_records import dataset_name
from cluster.live import make_table
from cluster.report import report
from cluster.run_dir import CONFIG, STATUS, RunDir
from configs.errors import InputError, RunError
from configs.load import load_config
from configs.schema import EVAL_SETTINGS, Config
from learner.checkpoint import CONTROLLER
from learner.checkpoint import FOLDER as CHECKPOINTS

KEYS = {"recipes": list, "set": dict, "axes": dict, "eval": dict}
EVAL_KEYS = {"settings": str | list, "datasets": list, "problems": int}
NEW, BEGUN, FINISHED = "new", "begun", "finished"


@dataclass(frozen=True, slots=True)
class MatrixRun:
    """One run of the matrix."""

    recipe: Path
    overrides: tuple[str, ...]  # key=value, as on a command line
    place: Mapping[str, str]  # what tells it from the others: recipe and axes
    config: Config

    @property
    def folder(self) -> Path:
        return (Path(self.config.run.dir).expanduser() / self.config.run.name).resolve()

    def state(self) -> str:
        """NEW, BEGUN or FINISHED. Raises InputError for a run there that was made with other settings."""
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return NEW
        RunDir.check(self.config, resume=True)
        try:
            ended = json.loads((self.folder / STATUS).read_text())["state"] == "done"
        except (OSError, ValueError, KeyError):
            return BEGUN
        return FINISHED if ended else BEGUN


def matrix(path: Path, dry_run: bool, resume: bool) -> None:
    """Run `softrl matrix`.

    Raises InputError, with nothing started, for a file that is no matrix, a run that cannot be, or one that was begun and is not to
    be resumed; RunError when a run failed (the others are run all the same), or when interrupted.
    """
    content = read_matrix(path)
    runs = list(expand(path, content))
    _check(path, runs)
    states = [run.state() for run in runs]
    console = Console()
    names = list(runs[0].place)
    rows = [[run.folder.name, *(run.place[name] for name in names), state] for run, state in zip(runs, states, strict=True)]
    console.print(make_table(f"{path}: {len(runs)} runs in {runs[0].folder.parent}", ["run", *names, "state"], rows))
    if dry_run:
        console.print("nothing was started")
        return
    if BEGUN in states and not resume:
        name = runs[states.index(BEGUN)].folder.name
        raise InputError(f"{path}: run {name} was begun and is not finished; go on with it by --resume, or remove its folder")
    try:
        first, wanted = bases(runs), content.get("eval")
        failed = [
            run.folder.name
            for run, state in zip(runs, states, strict=True)
            if not _complete(console, run, state, wanted, run.folder.name in first)
        ]
    except KeyboardInterrupt:
        raise RunError(f"{path}: interrupted; go on with --resume") from None
    if len(failed) < len(runs):
        report(runs[0].folder.parent, None)
    if failed:
        raise RunError(f"{path}: {len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; see above, go on with --resume")


# --- from the file to runs -------------------------------------------------------------------------------------------


def read_matrix(path: Path) -> dict[str, Any]:
    """The file's content, checked for keys and types. Raises InputError naming the file and the key."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a matrix, such as configs/matrix/small.yaml") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a matrix with the keys {', '.join(KEYS)}")
    _expect(path, "", content, KEYS)
    _expect(path, "eval.", content.get("eval", {}), EVAL_KEYS)
    if not content.get("recipes") or not all(isinstance(recipe, str) for recipe in content["recipes"]):
        raise InputError(f"{path}: recipes = {content.get('recipes')}: expected a list of recipes, such as [../demo.yaml]")
    for key, values in content.get("axes", {}).items():
        if not isinstance(values, list) or not values or len(set(map(str, values))) < len(values):
            raise InputError(f"{path}: axes.{key} = {values}: expected a list of values, none twice, such as [0, 1, 2]")
    if both := set(content.get("set", {})) & set(content.get("axes", {})):
        raise InputError(f"{path}: {both.pop()} stands in set and in axes: expected one of them")
    return content


def _expect(path: Path, prefix: str, content: Mapping[Any, Any], keys: Mapping[str, Any]) -> None:
    for key, value in content.items():
        if key not in keys:
            raise InputError(f"{path}: unknown key {prefix}{key}: expected one of {', '.join(keys)}")
        if not isinstance(value, keys[key]):
            expected = {list: "a list", dict: "a mapping", int: "a whole number"}.get(keys[key], "all, or a list of settings")
            raise InputError(f"{path}: {prefix}{key} = {value}: expected {expected}")


def expand(path: Path, content: Mapping[str, Any]) -> Iterator[MatrixRun]:
    """The runs, recipes first, then the axes in their order, the last one fastest. Raises InputError as `load_config` does."""
    fixed = {"run.dir": f"runs/{path.stem}"} | content.get("set", {})
    axes = content.get("axes", {})
    for name, *values in itertools.product(content["recipes"], *axes.values()):
        recipe = path.parent / name
        place = dict(zip(axes, values, strict=True))
        overrides = tuple(f"{key}={_as_override(value)}" for key, value in (fixed | place).items())
        shown = {"recipe": Path(name).stem} | {key: str(value) for key, value in place.items()}
        yield MatrixRun(recipe, overrides, shown, load_config(recipe, overrides))


def _as_override(value: Any) -> str:
    """A YAML value as it is written behind key= on a command line."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=2**20).partition("\n")[0]


def _check(path: Path, runs: Sequence[MatrixRun]) -> None:
    """Every run has a folder of its own, in one place, and its model and data are there. Raises InputError."""
    folders: dict[Path, MatrixRun] = {}
    checked: set[str] = set()
    for run in runs:
        if (other := folders.setdefault(run.folder, run)) is not run:
            raise InputError(
                f"{path}: run.name = {run.config.run.name} is that of two runs ({_shown(other)}; {_shown(run)}); "
                "name the axes in it, such as run.name: small_${policy.mode}_seed${run.seed}"
            )
        if run.folder.parent != runs[0].folder.parent:
            raise InputError(
                f"{path}: run.dir = {run.config.run.dir}: expected one folder for all runs, also {runs[0].config.run.dir}"
            )
        config = run.config
        lengths = config.policy.max_cot_tokens, config.eval_cot_tokens, config.policy.max_answer_tokens, config.engine.max_model_len
        needs = repr((config.model, config.task, lengths, config.rollout.prompts_per_step, config.eval.problems))
        if needs not in checked:
            prepare(run.config)
            checked.add(needs)


def _shown(run: MatrixRun) -> str:
    return ", ".join(f"{name}={value}" for name, value in run.place.items())


# --- running ---------------------------------------------------------------------------------------------------------


def bases(runs: Sequence[MatrixRun]) -> set[str]:
    """The names of the runs that evaluate the untrained model for all that would evaluate it alike."""
    first: dict[str, str] = {}
    for run in runs:
        c = run.config
        alike = c.task.train, c.model.path, c.engine.dtype, c.task.prompt, c.run.seed, c.policy.gamma, c.eval_cot_tokens
        first.setdefault(repr(alike), run.folder.name)
    return set(first.values())


def _complete(console: Console, run: MatrixRun, state: str, wanted: Mapping[str, Any] | None, with_base: bool) -> bool:
    """Train and evaluate what is not yet; whether that went well. `wanted` is the matrix's `eval`."""
    if state != FINISHED:
        again = ["--resume"] if state == BEGUN else []
        if not _softrl(console, "train", str(run.recipe), *run.overrides, *again):
            return False
    if wanted is None:
        return True
    best = run.folder / CHECKPOINTS / BEST
    step = int(json.loads((best / CONTROLLER).read_text())["step"])
    options = [f"--{key}={','.join(map(str, value)) if isinstance(value, list) else value}" for key, value in wanted.items()]
    weights = {step: ["--checkpoint", str(best)]} | ({0: []} if with_base else {})
    lacking = [which for step, which in weights.items() if not evaluated(run, step, wanted)]
    return all(_softrl(console, "eval", str(run.folder / CONFIG), *which, *options) for which in lacking)


def evaluated(run: MatrixRun, step: int, wanted: Mapping[str, Any]) -> bool:
    """Whether nothing of `wanted` is missing in the run's evaluation of the weights after `step` steps."""
    config = run.config
    datasets = load_datasets(config, wanted.get("datasets"), wanted.get("problems"))
    settings = wanted.get("settings", config.eval.settings)
    settings = list(EVAL_SETTINGS) if settings == "all" else settings.split(",") if isinstance(settings, str) else settings
    tested = {(row["dataset"], row["setting"]): row for row in _rows(run.folder, f"test_{step:06d}.json")}
    scored = {row["dataset"]: row["items"] for row in _rows(run.folder, f"out_of_domain_{step:06d}.json")}

    def whole(task: Any, setting: str, problems: int) -> bool:
        samples = 1 if setting.endswith("greedy") else config.eval.samples
        row = tested.get((dataset_name(task), setting))
        return row is not None and not row["missing"] and row["problems"] >= problems and row["samples"] >= samples * problems

    return all(whole(task, setting, len(problems)) for task, problems in datasets.tasks for setting in settings) and all(
        scored.get(name, 0) >= len(items) for name, items in datasets.choices
    )


def _rows(run: Path, name: str) -> list[dict[str, Any]]:
    path = run / EVALUATIONS / name
    return json.loads(path.read_text()) if path.exists() else []


def _softrl(console: Console, *arguments: str) -> bool:
    """A softrl command in a process of its own, its output on this terminal; whether it ended well."""
    console.print(Text(f"softrl {' '.join(arguments)}", style="bold"), soft_wrap=True)
    # In a session of its own, so that Ctrl-C reaches it once and it leaves a run that can be resumed.
    process = subprocess.Popen([sys.executable, "-m", "cluster.cli", *arguments], start_new_session=True)
    try:
        return process.wait() == 0
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
