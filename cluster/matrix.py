"""`softrl matrix`: a table of runs from one file, trained and evaluated one after another, and reported.

    recipes: [base.yaml, ...]     one or several, beside this file            \\
    set: {key: value}             for every run                                >  the product of recipes and axes: one run each
    axes: {key: [value, ...]}     one run for each combination of values      /
    eval: {settings: all, datasets: [...], problems: N}     what each run's best weights are tested on, and the untrained model once
                                                            a seed; leave it out for task.test under eval.settings. Files of
                                                            data sets (NAME=FILE) may stand beside this one
    keep_checkpoints: false       remove the weights of a run when it is trained and tested; they are kept unless told so

    expand --> check every run --> each in turn (matrix_runs.py) --> softrl report of the folder

Runs lie in runs/NAME_OF_FILE unless `set` says run.dir. A finished run is left as it is; `--resume` goes on with a begun one.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from cluster.controller import prepare
from cluster.eval_sets import EvalSets, load_datasets
from cluster.live import make_table
from cluster.matrix_runs import BEGUN, MatrixRun, complete_all
from cluster.report import report
from configs.errors import InputError, Interrupted, RunError
from configs.load import load_config
from configs.schema import EVAL_SETTINGS
from rollout.models import load_tokenizer

KEYS = {"recipes": list, "set": dict, "axes": dict, "eval": dict, "keep_checkpoints": bool}
EVAL_KEYS = {"settings": str | list, "datasets": list, "problems": int}
EXPECTED = {list: "a list", dict: "a mapping", int: "a whole number", bool: "true or false"}


def matrix(path: Path, dry_run: bool, resume: bool) -> None:
    """Run `softrl matrix`.

    Raises InputError, with nothing started, for a file that is no matrix, a run that cannot be, or one that was begun and is not to
    be resumed; RunError when a run failed (the others are run all the same), Interrupted after Ctrl-C.
    """
    content = read_matrix(path)
    runs = checked(path, content, list(expand(path, content)))
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
        failed = complete_all(console, runs, states, content.get("keep_checkpoints", True))
    except Interrupted:
        raise Interrupted(f"{path}: interrupted; go on with --resume") from None
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
    if content.get("eval", {}).get("problems", 1) < 1:
        raise InputError(
            f"{path}: eval.problems = {content['eval']['problems']}: expected at least 1; leave it out for all of them"
        )
    if both := set(content.get("set", {})) & set(content.get("axes", {})):
        raise InputError(f"{path}: {both.pop()} stands in set and in axes: expected one of them")
    return content


def _expect(path: Path, prefix: str, content: Mapping[Any, Any], keys: Mapping[str, Any]) -> None:
    for key, value in content.items():
        if key not in keys:
            raise InputError(f"{path}: unknown key {prefix}{key}: expected one of {', '.join(keys)}")
        if not isinstance(value, keys[key]):
            expected = EXPECTED.get(keys[key], "all, or a list of settings")
            raise InputError(f"{path}: {prefix}{key} = {value}: expected {expected}")


def expand(path: Path, content: Mapping[str, Any]) -> Iterator[MatrixRun]:
    """The runs, recipes first, then the axes in their order, the last one fastest. Raises InputError as `load_config` does."""
    fixed = {"run.dir": f"runs/{path.stem}"} | content.get("set", {})
    axes = content.get("axes", {})
    tested = [f"eval.settings=[{_settings(content['eval']['settings'])}]"] if "settings" in content.get("eval", {}) else []
    for name, *values in itertools.product(content["recipes"], *axes.values()):
        recipe = path.parent / name
        place = dict(zip(axes, values, strict=True))
        overrides = [f"{key}={_as_override(value)}" for key, value in (fixed | place).items()]
        shown = {"recipe": Path(name).stem} | {key: str(value) for key, value in place.items()}
        config, test_config = load_config(recipe, overrides), load_config(recipe, [*overrides, *tested])
        yield MatrixRun(shown, config, test_config, EvalSets([], []))


def _settings(settings: str | list[str]) -> str:
    names = list(EVAL_SETTINGS) if settings == "all" else [settings] if isinstance(settings, str) else settings
    return ", ".join(names)


def _as_override(value: Any) -> str:
    """A YAML value as it is written behind key= on a command line."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=2**20).partition("\n")[0]


def checked(path: Path, content: Mapping[str, Any], runs: Sequence[MatrixRun]) -> list[MatrixRun]:
    """The runs with what they are tested on. Raises InputError unless each has a folder of its own, in one place, and its model and
    data are there and fit."""
    folders: dict[Path, MatrixRun] = {}
    sets: dict[str, EvalSets] = {}
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
        if (needs := _needs(run)) not in sets:
            prepare(run.config)
            sets[needs] = _sets(path, content.get("eval"), run)
            sets[needs].require_fit(run.config, load_tokenizer(run.config.model.path))
    return [replace(run, sets=sets[_needs(run)]) for run in runs]


def _needs(run: MatrixRun) -> str:
    """What decides whether model and data are there and fit."""
    config = run.config
    lengths = config.policy.max_cot_tokens, config.eval_cot_tokens, config.policy.max_answer_tokens, config.engine.max_model_len
    return repr((config.model, config.task, lengths, config.rollout.prompts_per_step, config.eval))


def _sets(path: Path, evaluation: Mapping[str, Any] | None, run: MatrixRun) -> EvalSets:
    """What a run is tested on; a file that is not where NAME=FILE says may lie beside the matrix."""
    if evaluation is None:
        return load_datasets(run.config, None, run.config.eval.problems)
    names = []
    for name in evaluation.get("datasets", []):
        set_name, _, file = name.partition("=")
        beside = path.parent / file
        names.append(f"{set_name}={beside}" if file and not Path(file).exists() and beside.is_file() else name)
    return load_datasets(run.config, names or None, evaluation.get("problems"))


def _shown(run: MatrixRun) -> str:
    return ", ".join(f"{name}={value}" for name, value in run.place.items())
