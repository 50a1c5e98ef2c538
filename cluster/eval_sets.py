"""What a set of weights is tested on, by `softrl eval` and by a run of a matrix: problems to solve, and multiple choice.

--datasets, a matrix's eval --> EvalSets --> evaluate_sets, the engines hold the weights --> RUN/eval/{test,out_of_domain}_STEP
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.evaluation import evaluate
from cluster.evaluation_records import SettingSummary
from cluster.out_of_domain import evaluate_choices
from cluster.progress import Progress
from cluster.rollouts import Rollouts, require_prompts_fit
from cluster.waits import Waiting
from configs.errors import InputError
from configs.schema import Config
from rollout import multiple_choice
from rollout.multiple_choice import Item, Summary, load_items, require_items_fit
from rollout.tasks import Problem, load_task

OUT_OF_DOMAIN = "ood"  # among data sets: all of rollout.multiple_choice.SETS


@dataclass(frozen=True, slots=True)
class EvalSets:
    """The data sets, each with its name."""

    tasks: list[tuple[Any, list[Problem]]]  # a task.* value and its problems
    choices: list[tuple[str, list[Item]]]

    def require_fit(self, config: Config, tokenizer: Any) -> None:
        """Raises InputError for a problem or an item that is too long for the engine."""
        for _, problems in self.tasks:
            require_prompts_fit(config, tokenizer, problems, config.eval_cot_tokens)
        for _, items in self.choices:
            require_items_fit(items, tokenizer.encode, config.engine.max_model_len)


@dataclass(frozen=True, slots=True)
class EvalResults:
    """What one set of weights made of them."""

    tasks: list[list[SettingSummary]]  # of each task, a summary of each setting
    choices: list[tuple[str, Summary]]


def load_datasets(config: Config, names: Sequence[str] | None, most: int | None) -> EvalSets:
    """The named sets: tasks as in task.test; multiple choice by NAME or NAME=FILE, `ood` for all that have a name, and
    `choices=FILE` for a set of one's own, which is called as its file.

    None stands for the config's task.test. `most` problems of each, the first ones. Raises InputError for one that is not known.
    """
    tasks: list[tuple[Any, list[Problem]]] = []
    choices: list[tuple[str, list[Item]]] = []
    if names is None:
        tasks.append((config.task.test, load_task(config.task.test)[:most]))
    for name in names or ():
        set_name, _, path = name.partition("=")
        if name == OUT_OF_DOMAIN:
            choices += [(each, load_items(each)[:most]) for each in multiple_choice.SETS]
        elif set_name in (*multiple_choice.SETS, multiple_choice.OWN):
            called = Path(path).stem if set_name == multiple_choice.OWN and path else set_name
            choices.append((called, load_items(set_name, path or None)[:most]))
        else:
            tasks.append((name, load_task(name)[:most]))
    by_name = dict(choices)
    for called, items in choices:
        if by_name[called] != items:
            raise InputError(f"data sets: two are called {called}, and results are kept by name; rename a file, or leave one out")
    return EvalSets(tasks, choices)


async def evaluate_sets(
    rollouts: Rollouts, run: Path, step: int, sets: EvalSets, waiting: Waiting, progress: Callable[[str, int], Progress]
) -> EvalResults:
    """Draw and record what `run`/eval lacks of the sets under the `eval.settings` of `rollouts`, whose engines hold the weights
    after `step` steps. Raises as `evaluate` and `evaluate_choices` do."""
    tasks = [await evaluate(rollouts, run, "test", step, task, problems, waiting, progress) for task, problems in sets.tasks]
    choices = [(name, await evaluate_choices(rollouts, run, step, name, items, waiting, progress)) for name, items in sets.choices]
    return EvalResults(tasks, choices)
