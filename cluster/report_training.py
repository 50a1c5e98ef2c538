"""Tables from metrics.jsonl: where training ended, what it cost against hard tokens, and studies of one key.

training    of every group
cost        time, tokens and FLOPs of a group over those of hard-token RL at equal settings
study_*     groups that differ in exactly one key: group size, gamma, tau
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.report_format import Cell, Table, over_seeds
from cluster.report_runs import Run, RunGroup, trained_arm
from cluster.report_tables import WHERE, datasets, scores
from configs.schema import Dtype, Mode

LAST = 0.1  # of the steps: where a training curve ended
ITEM_BYTES = {Dtype.bfloat16: 2, Dtype.float32: 4}
DECODE_FLOPS, LEARN_FLOPS, RECOMPUTE_FLOPS = 2, 6, 2  # per weight and token

STUDIED = {"rollout.samples_per_prompt": "group size", "policy.gamma": "gamma", "policy.tau": "CoT temperature"}


@dataclass(frozen=True, slots=True)
class Study:
    """At least two groups that differ in `key` alone, by its value."""

    key: str
    groups: tuple[RunGroup, ...]

    @property
    def label(self) -> str:
        """What the groups have in common beyond model and data."""
        return self.groups[0].label_without(self.key)

    def value(self, group: RunGroup) -> float:
        return float(group.settings[self.key])


def training_table(groups: Sequence[RunGroup]) -> Table:
    """Where training ended."""
    rows = [
        {
            **_where(group),
            "steps": min(len(run.metrics) for run in group.runs),
            "reward": over_seeds(at_the_end(run, "reward/mean") for run in group.runs),
            "correct": over_seeds(_percent(at_the_end(run, "reward/correct")) for run in group.runs),
            "best validation": over_seeds(_percent(best_validation(run)) for run in group.runs),
            "CoT tokens": over_seeds(at_the_end(run, "rollout/cot_length_mean") for run in group.runs),
            "CoT entropy": over_seeds(at_the_end(run, "learner/cot_entropy_mean") for run in group.runs),
            "residual": over_seeds(at_the_end(run, "learner/residual_mean") for run in group.runs),
            "mismatch s": over_seeds(at_the_end(run, "learner/mismatch_s_mean") for run in group.runs),
        }
        for group in groups
        if any(run.metrics for run in group.runs)
    ]
    forms = {"steps": "d", **dict.fromkeys(("reward", "correct", "best validation", "CoT tokens"), ".1f")}
    return Table(
        name="training",
        title="Training",
        columns=WHERE | forms | {"CoT entropy": ".3f", "residual": ".4f", "mismatch s": ".4f"},
        rows=rows,
        note="Means of the last tenth of the steps; correct and validation (first greedy of eval.settings) in percent; "
        "entropy in nats, at the temperature of training. A residual of 1 is on-policy.",
    )


def at_the_end(run: Run, key: str) -> float | None:
    """Mean of a metric over the last tenth of the steps that have it."""
    values = [row[key] for row in run.metrics if key in row]
    return float(np.mean(values[-max(1, round(LAST * len(values))) :])) if values else None


def best_validation(run: Run) -> float | None:
    """Highest share right of a validation after step 0, by the first greedy of eval.settings."""
    key = f"eval/{run.config.selecting_setting}"
    return max((row[key] for row in run.metrics if key in row), default=None)


# --- cost ------------------------------------------------------------------------------------------------------------


def cost_table(groups: Sequence[RunGroup]) -> Table:
    """Time, tokens and FLOPs beside those of hard-token RL at equal settings, over as many steps as both have."""
    rows = []
    for group in groups:
        hard = hard_counterpart(group, groups)
        steps = min(len(run.metrics) for g in (group, hard or group) for run in g.runs)
        if steps == 0:
            continue
        row: dict[str, Cell] = {**_where(group), "steps": steps}
        for name, cost in (("hours", hours), ("Mtokens", mtokens), ("PFLOP", pflop)):
            row[name] = own = over_seeds(cost(run, steps) for run in group.runs)
            reference = over_seeds(cost(run, steps) for run in hard.runs) if hard else None
            row[f"{name} / hard"] = own.mean / reference.mean if own and reference and own.mean and reference.mean else None
        row["tokens/s"] = over_seeds(tokens_per_s(run, steps) for run in group.runs)
        row["best validation"] = over_seeds(_percent(best_validation(run)) for run in group.runs)
        rows.append(row)
    forms = {"steps": "d", "hours": ".3g", "hours / hard": ".2f", "Mtokens": ".3g", "Mtokens / hard": ".2f", "PFLOP": ".3g"}
    return Table(
        name="cost",
        title="Cost against hard-token RL at equal settings",
        columns=WHERE | forms | {"PFLOP / hard": ".2f", "tokens/s": ",.0f", "best validation": ".1f"},
        rows=rows,
        note="Over the steps that a group and its hard counterpart both have; hours are those of the steps, without evaluation. "
        "Tokens are generated ones. FLOPs are 2 N a token to decode and 6 N to learn (8 N with activations recomputed), N all "
        "weights; attention, prompts and the mixture's gather are small beside that and not counted. `-`: no such hard run.",
    )


def hard_counterpart(group: RunGroup, groups: Iterable[RunGroup]) -> RunGroup | None:
    """The hard-token group with the same settings, as far as hard mode reads them; a hard group is its own."""
    if group.config.policy.mode is Mode.hard:
        return group
    hard = (g for g in groups if g.config.policy.mode is Mode.hard and g.hard_settings() == group.hard_settings())
    return next(hard, None)


def hours(run: Run, steps: int) -> float | None:
    """Wall clock of the first `steps` steps."""
    seconds = _total(run, "time/step", steps)
    return None if seconds is None else seconds / 3600


def mtokens(run: Run, steps: int) -> float | None:
    """Millions of generated tokens: CoT, forced prefill and answer."""
    tokens = _total(run, "rollout/tokens", steps)
    return None if tokens is None else tokens / 1e6


def tokens_per_s(run: Run, steps: int) -> float | None:
    """Generated tokens over wall clock."""
    tokens, seconds = _total(run, "rollout/tokens", steps), _total(run, "time/step", steps)
    return tokens / seconds if tokens is not None and seconds else None


def pflop(run: Run, steps: int) -> float | None:
    """10^15 floating-point operations; None where no push says how many weights there are."""
    pushed = next((row["push/bytes"] for row in run.metrics if row.get("push/bytes")), None)
    decoded, learned = (_total(run, key, steps) for key in ("rollout/tokens", "learner/tokens"))
    if pushed is None or decoded is None or learned is None:
        return None
    weights = pushed / ITEM_BYTES[run.config.engine.dtype]
    learn = LEARN_FLOPS + RECOMPUTE_FLOPS * run.config.learner.activation_checkpointing
    return weights * (DECODE_FLOPS * decoded + learn * learned) / 1e15


def _total(run: Run, key: str, steps: int) -> float | None:
    """None when a step lacks it: a sum over some of the steps would look like a cheap run."""
    values = [row.get(key) for row in run.metrics[:steps]]
    return None if None in values else float(sum(value for value in values if value is not None))


# --- studies ---------------------------------------------------------------------------------------------------------


def find_studies(groups: Iterable[RunGroup]) -> list[Study]:
    """Every set of groups that differ in exactly one of STUDIED. gamma does nothing in hard mode, so it is no study there."""
    found = []
    for key in STUDIED:
        equal: dict[tuple[tuple[str, str], ...], list[RunGroup]] = {}
        for group in groups:
            if not (key == "policy.gamma" and group.config.policy.mode is Mode.hard):
                rest = tuple((name, value) for name, value in group.settings.items() if name != key)
                equal.setdefault(rest, []).append(group)
        studies = (Study(key, tuple(members)) for members in equal.values() if len(members) > 1)
        found += [Study(key, tuple(sorted(study.groups, key=study.value))) for study in studies]
    return found


def study_table(key: str, studies: Sequence[Study]) -> Table:
    """All studies of one key, a row for each of its values and test sets."""
    rows = []
    for study in studies:
        for group in study.groups:
            arm = trained_arm(group)
            steps = min(len(run.metrics) for run in group.runs)
            row: dict[str, Cell] = {
                **_where(group),
                "trained": study.label,
                key: study.value(group),
                "steps": steps,
                "s / step": over_seeds(_per_step(run, "time/step") for run in group.runs),
                "tokens / step": over_seeds(_per_step(run, "rollout/tokens") for run in group.runs),
                "reward": over_seeds(at_the_end(run, "reward/mean") for run in group.runs),
                "best validation": over_seeds(_percent(best_validation(run)) for run in group.runs),
            }
            tested = {
                dataset: {
                    "hard greedy pass@1": scores(arm, dataset, "hard_greedy", 1),
                    "hard sample pass@1": scores(arm, dataset, "hard_sample", 1),
                    "hard sample pass@32": scores(arm, dataset, "hard_sample", 32),
                }
                for dataset in datasets([arm])
            }
            rows += [row | {"test": dataset} | columns for dataset, columns in tested.items()] or [row]
    forms = {"steps": "d", "s / step": ".2f", "tokens / step": ",.0f", "reward": ".1f", "best validation": ".1f", "test": ""}
    accuracies = dict.fromkeys(("hard greedy pass@1", "hard sample pass@1", "hard sample pass@32"), ".1f")
    return Table(
        name=f"study_{key.replace('.', '_')}",
        title=f"Study: {STUDIED[key]}",
        columns=WHERE | {key: "g"} | forms | accuracies,
        rows=rows,
        note=f"Runs that differ in {key} alone. Reward: the last tenth of the steps.",
    )


def _per_step(run: Run, key: str) -> float | None:
    total = _total(run, key, len(run.metrics))
    return total / len(run.metrics) if total is not None and run.metrics else None


def _where(group: RunGroup) -> dict[str, Cell]:
    return {"model": Path(group.model).name, "train": group.train, "trained": group.label, "seeds": group.seeds}


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
