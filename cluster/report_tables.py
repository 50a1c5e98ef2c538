"""Tables from the evaluations of the best checkpoint, beside the untrained model's: one Arm is one row or several.

    accuracy                      the paper's main table: hard greedy pass@1, hard sample pass@1 and pass@32
    settings                      all six inference settings
    pass_at_k                     k = 1, 2, 4, ... n, with intervals
    mixtures, mixture_by_index    entropy, support size and dropped mass of the soft steps
    out_of_domain                 HellaSwag, MMLU, ARC

Accuracies are percent, as in the paper.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cluster.evaluation_records import BOOTSTRAP_SEED, SettingSummary
from cluster.paper_numbers import COLUMNS, paper_number
from cluster.report_format import Cell, Measured, Table, over_seeds
from cluster.report_runs import Arm
from configs.schema import EVAL_SETTINGS
from rollout.eval_statistics import IndexMeans, bootstrap_interval

WHERE = {"model": "", "train": "", "trained": "", "seeds": ""}


def datasets(arms: Iterable[Arm]) -> list[str]:
    """Names of the tested data sets, in order of first appearance."""
    return list(dict.fromkeys(dataset for arm in arms for tests in arm.tests for dataset, _ in tests))


def scores(arm: Arm, dataset: str, setting: str, k: int) -> Measured | None:
    """pass@k in percent over seeds, with the paper's number where the arm was trained as the paper trains."""
    paper = paper_number(arm.model, arm.train, dataset, arm.trained, setting, k) if arm.like_paper else None
    curves = [summary.pass_at_k() for summary in arm.summaries(dataset, setting)]
    return over_seeds((100 * float(curve[:, k - 1].mean()) for curve in curves if curve.shape[1] >= k), paper)


def accuracy_table(arms: Sequence[Arm]) -> Table:
    """The paper's main table."""
    columns = {f"{setting.replace('_', ' ')} pass@{k}": (setting, k) for setting, k in COLUMNS}
    rows = [
        {**_where(arm), "test": dataset} | {name: scores(arm, dataset, *place) for name, place in columns.items()}
        for arm, dataset in _tested(arms)
    ]
    return Table(
        name="accuracy",
        title="Accuracy, as the paper's main table",
        columns={**WHERE, "test": ""} | dict.fromkeys(columns, ".1f"),
        rows=rows,
        note="Percent; mean ± standard deviation over seeds, in brackets the paper's mean of three seeds. "
        "`-`: not evaluated, or with fewer than k samples a problem.",
    )


def settings_table(arms: Sequence[Arm]) -> Table:
    """The six inference settings, and how their thoughts and answers ended."""
    rows = []
    for arm, dataset, setting, found in _evaluated(arms):
        most = min(curve.pass_at_k().shape[1] for curve in found)
        rows.append(
            {
                **_where(arm),
                "test": dataset,
                "setting": setting,
                "problems": len(found[0].problems),
                "n": most,
                "pass@1": scores(arm, dataset, setting, 1),
                "pass@n": scores(arm, dataset, setting, most),
                "majority": over_seeds(100 * float(s.majority.mean()) for s in found),
                "CoT tokens": over_seeds(float(s.cot_lengths.mean()) for s in found),
                "CoT ended itself %": over_seeds(100 * s.phrase_found / s.samples for s in found),
                "no box %": over_seeds(100 * (1 - s.boxed / s.samples) for s in found),
                "timed out": sum(s.timed_out for s in found),
                "missing": sum(s.missing for s in found),
            }
        )
    percent = dict.fromkeys(("pass@1", "pass@n", "majority", "CoT tokens", "CoT ended itself %", "no box %"), ".1f")
    counts = {"problems": "d", "n": "d"}, {"timed out": "d", "missing": "d"}
    return Table(
        name="settings",
        title="Six inference settings",
        columns={**WHERE, "test": "", "setting": ""} | counts[0] | percent | counts[1],
        rows=rows,
        note="n samples a problem. Timed out: answers that math-verify did not finish, counted as wrong. "
        "Missing: planned samples that an unfinished evaluation has not drawn.",
    )


def pass_at_k_table(arms: Sequence[Arm]) -> Table:
    """pass@k of the sampled settings at powers of two and at n, with intervals."""
    rows: list[dict[str, Cell]] = []
    for arm, dataset, setting, found in _evaluated(arms):
        low, mean, high = pass_curve(found)
        for k in [k for k in range(1, len(mean) + 1) if k & (k - 1) == 0 or k == len(mean)] if len(mean) > 1 else []:
            bounds: dict[str, Cell] = {"low": _percent(low[k - 1]), "high": _percent(high[k - 1])}
            place: dict[str, Cell] = {**_where(arm), "test": dataset, "setting": setting, "k": k}
            rows.append(place | {"pass@k": scores(arm, dataset, setting, k)} | bounds)
    return Table(
        name="pass_at_k",
        title="pass@k",
        columns={**WHERE, "test": "", "setting": "", "k": "d", "pass@k": ".1f", "low": ".1f", "high": ".1f"},
        rows=rows,
        note="1 - C(n-c, k) / C(n, k), mean over problems and seeds. Low and high: 95 % bootstrap interval over problems.",
        shown=False,
    )


def _percent(share: np.float64) -> float | None:
    """None where there is no interval: seeds without a problem in common."""
    return None if np.isnan(share) else 100 * float(share)


def pass_curve(found: Sequence[SettingSummary]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """(low, mean, high) of pass@k over seeds, each float64 [K] as shares: the bootstrap draws problems, each with all its seeds.

    K is the fewest samples of any problem of any seed; problems that not every seed has are left out of the interval.
    """
    curves = [summary.pass_at_k() for summary in found]
    most = min(curve.shape[1] for curve in curves)
    shared = sorted(set.intersection(*(set(summary.problems.tolist()) for summary in found)))
    rows = [curve[np.searchsorted(s.problems, shared), :most] for s, curve in zip(found, curves, strict=True)]
    mean = np.mean([curve[:, :most].mean(axis=0) for curve in curves], axis=0)
    if not shared:
        return np.full(most, np.nan), mean, np.full(most, np.nan)
    low, high = bootstrap_interval(np.mean(rows, axis=0), BOOTSTRAP_SEED)
    return low, mean, high


def mixture_table(arms: Sequence[Arm]) -> Table:
    """How soft the thoughts were, over all CoT steps."""
    rows = [
        {
            **_where(arm),
            "test": dataset,
            "setting": setting,
            "entropy": over_seeds(_over_steps(s.entropy) for s in found),
            "support": over_seeds(_over_steps(s.support_size) for s in found),
            "dropped mass": over_seeds(_over_steps(s.dropped_mass) for s in found),
        }
        for arm, dataset, setting, found in _evaluated(arms)
        if len(found[0].entropy.counts)
    ]
    return Table(
        name="mixtures",
        title="Mixtures of the soft steps",
        columns={**WHERE, "test": "", "setting": "", "entropy": ".3f", "support": ".1f", "dropped mass": ".1e"},
        rows=rows,
        note="Means over CoT steps: entropy in nats, tokens in the support, probability outside it.",
    )


def mixture_by_index_table(arms: Sequence[Arm]) -> Table:
    """The same by CoT index; samples of all seeds count alike."""
    rows: list[dict[str, Cell]] = []
    for arm, dataset, setting, found in _evaluated(arms):
        means = [IndexMeans.merged(getattr(s, name) for s in found) for name in ("entropy", "support_size", "dropped_mass")]
        for index, count in enumerate(means[0].counts.tolist()):
            values = dict(zip(("entropy", "support", "dropped mass"), (float(m.mean[index]) for m in means), strict=True))
            rows.append({**_where(arm), "test": dataset, "setting": setting, "index": index, "samples": count} | values)
    return Table(
        name="mixture_by_index",
        title="Mixtures by CoT index",
        columns={**WHERE, "test": "", "setting": "", "index": "d", "samples": "d"}
        | {"entropy": ".4f", "support": ".2f", "dropped mass": ".2e"},
        rows=rows,
        shown=False,
    )


def out_of_domain_table(arms: Sequence[Arm]) -> Table:
    """HellaSwag, MMLU, ARC: what training on mathematics did to the rest."""
    rows = []
    for arm in arms:
        for dataset in dict.fromkeys(name for found in arm.out_of_domain for name in found):
            found = [of_seed[dataset] for of_seed in arm.out_of_domain if dataset in of_seed]
            rows.append(
                {
                    **_where(arm),
                    "test": dataset,
                    "items": int(found[0]["items"]),
                    "accuracy": over_seeds(100 * row["accuracy"] for row in found),
                    "by character": over_seeds(100 * row["accuracy_norm"] for row in found),
                    "NLL per token": over_seeds(row["nll_per_token"] for row in found),
                }
            )
    forms = {"items": "d", "accuracy": ".1f", "by character": ".1f", "NLL per token": ".3f"}
    return Table(
        name="out_of_domain",
        title="Out of domain",
        columns={**WHERE, "test": ""} | forms,
        rows=rows,
        note="Accuracy in percent, of the likeliest choice and of the likeliest by character; negative log-likelihood of the right "
        "answer in nats a token.",
    )


def _over_steps(means: IndexMeans) -> float | None:
    return float(means.mean @ means.counts / means.counts.sum()) if len(means.counts) else None


def _tested(arms: Iterable[Arm]) -> Iterator[tuple[Arm, str]]:
    for arm in arms:
        for dataset in datasets([arm]):
            yield arm, dataset


def _evaluated(arms: Iterable[Arm]) -> Iterator[tuple[Arm, str, str, list[SettingSummary]]]:
    for arm, dataset in _tested(arms):
        for setting in EVAL_SETTINGS:
            if found := arm.summaries(dataset, setting):
                yield arm, dataset, setting, found


def _where(arm: Arm) -> dict[str, Cell]:
    return {"model": Path(arm.model).name, "train": arm.train, "trained": arm.label, "seeds": arm.seeds}
