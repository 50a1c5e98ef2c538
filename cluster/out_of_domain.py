"""Multiple-choice sets under the weights that the engines hold, kept item by item.

    runs/NAME/eval/out_of_domain_000040/mmlu.json     which weights, model and dtype
    runs/NAME/eval/out_of_domain_000040/mmlu.jsonl    one rollout.multiple_choice.ItemScore a line, as soon as it is scored
    runs/NAME/eval/out_of_domain_000040.json          a list of {"dataset", **Summary}, one of each finished set

Every number comes from the lines, so an interrupted evaluation goes on with the items that have none.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.evaluation import weights_label
from cluster.evaluation_records import FOLDER, json_lines
from cluster.progress import Progress
from cluster.rollouts import Rollouts
from cluster.run_dir import JsonLines
from cluster.waits import Waiting, wait
from configs.errors import InputError
from configs.schema import Config
from rollout.files import cannot_write, replace_file
from rollout.multiple_choice import Item, ItemScore, Summary, TokenIds, score_items, summarise


async def evaluate_choices(
    rollouts: Rollouts,
    run: Path,
    step: int,
    dataset: str,
    items: Sequence[Item],
    waiting: Waiting,
    progress: Callable[[str, int], Progress],
) -> Summary:
    """Score what `run`/eval/out_of_domain_STEP lacks of one set's items, and summarise them; the engines hold the weights.

    Raises InputError where the scores there are of other weights or items, RunError when scoring fails: what was scored stays.
    """
    config, place = rollouts.config, _place(run, step)
    path = _open_place(place, dataset, _described(config, step, dataset))
    file = JsonLines(path)
    file.lock()
    try:
        scores = _read_scores(path, items)
        lacking = [item for item in items if item.index not in scores]
        counted = progress(f"out of domain at step {step}: {dataset}", len(lacking))
        logprobs = _over_engines(rollouts.engines, waiting, config.engine.request_timeout_s)
        async for score in score_items(lacking, rollouts.tokenizer.encode, logprobs):
            file.append(asdict(score))
            scores[score.index] = score
            counted.advance(sum(score.tokens))
    finally:
        file.close()
    summary = summarise([scores[item.index] for item in items])
    _write_summary(place.with_name(f"{place.name}.json"), dataset, summary)
    return summary


def require_same_scores(config: Config, run: Path, step: int, dataset: str, items: Sequence[Item]) -> None:
    """Raises InputError where `run`/eval/out_of_domain_STEP holds scores of that name that `evaluate_choices` would not add to."""
    place = _place(run, step)
    _require_same(place, dataset, _described(config, step, dataset))
    if (path := place / f"{dataset}.jsonl").exists():
        _read_scores(path, items)


def _place(run: Path, step: int) -> Path:
    return run / FOLDER / f"out_of_domain_{step:06d}"


def _described(config: Config, step: int, dataset: str) -> dict[str, str]:
    return {"dataset": dataset, "weights": weights_label(step), "model": config.model.path, "dtype": str(config.engine.dtype)}


def _require_same(place: Path, dataset: str, described: dict[str, str]) -> None:
    description = place / f"{dataset}.json"
    try:
        before = json.loads(description.read_text()) if description.exists() else described
    except ValueError:
        before = None
    if before != described:
        raise InputError(f"{description}: scores of {before}, this evaluation is {described}; remove {place / dataset}.*")


def _open_place(place: Path, dataset: str, described: dict[str, str]) -> Path:
    """The path of the set's scores; its description is written or found equal."""
    description = place / f"{dataset}.json"
    try:
        place.mkdir(parents=True, exist_ok=True)
        _require_same(place, dataset, described)
    except OSError as error:
        raise cannot_write(place, error) from error
    replace_file(description, lambda partial: partial.write_text(json.dumps(described, indent=1) + "\n"))
    return place / f"{dataset}.jsonl"


def _read_scores(path: Path, items: Sequence[Item]) -> dict[int, ItemScore]:
    """By item; what a kill left of a line is passed over. Raises InputError for a line that is no score of one of the items."""
    fingerprints = {item.index: item.fingerprint for item in items}
    scores: dict[int, ItemScore] = {}
    for number, row in json_lines(path):
        try:
            fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
            score = ItemScore(**fields)
        except TypeError as error:
            raise InputError(f"{path}:{number}: not an item's score; remove the line") from error
        if score.fingerprint != fingerprints.get(score.index, score.fingerprint):
            raise InputError(
                f"{path}:{number}: item {score.index} was another when it was scored: the data have changed, or are of another set "
                f"of that name; set them back, or remove {path.with_suffix('')}.*"
            )
        scores[score.index] = score
    return scores


def _over_engines(engines: Sequence[Any], waiting: Waiting, deadline_s: float) -> Callable[[list[TokenIds]], Any]:
    """RolloutEngine.token_logprobs with the sequences dealt out to all engines; the deadline is for one call."""

    async def token_logprobs(sequences: list[TokenIds]) -> list[Any]:
        count = len(engines)
        calls = [engine.token_logprobs.remote(sequences[i::count]) for i, engine in enumerate(engines) if sequences[i::count]]
        parts = await wait(waiting, "out of domain", "engines", deadline_s, asyncio.gather(*calls))
        found: list[Any] = [None] * len(sequences)
        for i, part in enumerate(parts):
            found[i::count] = part
        return found

    return token_logprobs


def _write_summary(path: Path, dataset: str, summary: Summary) -> None:
    """Put the set's row into the file, in the place of an older one."""
    rows = json.loads(path.read_text()) if path.exists() else []
    rows = [row for row in rows if row["dataset"] != dataset] + [{"dataset": dataset, **asdict(summary)}]
    replace_file(path, lambda partial: partial.write_text(json.dumps(rows, indent=1) + "\n"))
