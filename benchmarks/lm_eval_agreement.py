"""Out of domain, item by item: softrl through its vLLM engine beside EleutherAI's lm-evaluation-harness through transformers.

    python -m benchmarks.lm_eval_agreement hellaswag=FILE mmlu=FILE arc_easy=FILE arc_challenge=FILE --work DIR [--items 200]

Both read the same items, spread evenly over each file (in the hub's fields), in float32. lm-eval runs whole, `simple_evaluate` over
its HFLM, with its own task files; only where they read from is set to these items. It is no dependency of softrl: install
lm_eval 0.4.13 and accelerate beside it. What is in DIR is not computed again.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.eval_sets import EvalSets
from cluster.evaluate import run_evaluation
from cluster.evaluation_records import json_lines
from configs.load import load_config
from rollout.models import load_tokenizer, resolve_model
from rollout.multiple_choice import SETS, Item, ItemScore, encode_choices, load_items
from rollout.rows import file_rows

RESULTS = Path(__file__).parent / "results" / "lm_eval_agreement.json"
LM_EVAL_TASKS = {"hellaswag": "hellaswag/hellaswag", "arc_easy": "arc/arc_easy", "arc_challenge": "arc/arc_challenge"}
SPLIT = {"hellaswag": "validation"}  # that lm-eval scores; "test" of the others
BATCH = 16  # sequences at once in transformers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--work", type=Path, required=True, help="folder for scores as they come")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    compared = {}
    for name, file in (each.split("=", 1) for each in options.sets):
        place = options.work / name
        rows = pick(name, file, options.items, place)
        ours = softrl_scores(options.model, name, load_items(name, str(place / "items.jsonl")), place)
        theirs = lm_eval_scores(options.model, name, rows, place)
        compared[name] = agreement(ours, theirs)
        print(name, json.dumps(compared[name]), flush=True)
    before = json.loads(options.json.read_text())["sets"] if options.json.exists() else {}
    written = {"model": options.model, "dtype": "float32", "lm_eval": lm_eval_version(), "sets": before | compared}
    options.json.write_text(json.dumps(written, indent=1) + "\n")


def pick(name: str, file: str, items: int, place: Path) -> list[dict[str, Any]]:
    """So many rows, evenly spread over the file; also written to place/items.jsonl. Raises InputError for a row that is no item."""
    load_items(name, file)
    rows = [dict(row) for _, row in file_rows(Path(file))]
    picked = [rows[i] for i in np.linspace(0, len(rows) - 1, min(items, len(rows))).round().astype(int)]
    place.mkdir(parents=True, exist_ok=True)
    (place / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in picked))
    return picked


def softrl_scores(model: str, name: str, items: Sequence[Item], place: Path) -> list[ItemScore]:
    """What `softrl eval` makes of the items, in their order."""
    encode = load_tokenizer(model).encode
    longest = max(len(ids) for item in items for ids, _ in encode_choices(item, encode))
    room = [f"engine.max_model_len={max(256, longest + 1)}", "engine.max_num_seqs=16", "eval.settings=[hard_greedy]"]
    config = load_config("configs/demo.yaml", [f"model.path={model}", "model.dtype=float32", *room])
    scores = place / "softrl" / "eval" / "out_of_domain_000000" / f"{name}.jsonl"
    if not scores.exists() or len(scores.read_text().splitlines()) < len(items):
        run_evaluation(config, None, EvalSets([], [(name, list(items))]), place / "softrl")
    found = []
    for _, row in json_lines(scores):
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
        found.append(ItemScore(**fields))
    return sorted(found, key=lambda score: score.index)


def lm_eval_scores(model: str, name: str, rows: Sequence[Mapping[str, Any]], place: Path) -> list[dict[str, Any]]:
    """lm-eval's log-likelihoods of the choices and its `acc` and `acc_norm` of each row, in their order."""
    scores = place / "lm_eval.json"
    if not scores.exists():
        scores.write_text(json.dumps(_run_lm_eval(model, name, rows, place)))
    found: list[dict[str, Any]] = json.loads(scores.read_text())
    return found


def _run_lm_eval(model: str, name: str, rows: Sequence[Mapping[str, Any]], place: Path) -> list[dict[str, Any]]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks._yaml_loader import load_yaml

    by_task: dict[str, list[int]] = defaultdict(list)  # lm-eval's file of the task: places of its rows
    for i, row in enumerate(rows):
        by_task[LM_EVAL_TASKS.get(name) or f"mmlu/default/mmlu_{row['subject']}"].append(i)
    tasks = []
    for number, (file, places) in enumerate(by_task.items()):
        data = place / f"lm_eval_{number}.jsonl"
        data.write_text("".join(json.dumps(rows[i]) + "\n" for i in places))
        split = SPLIT.get(name, "test")
        task = load_yaml(Path(lm_eval.__file__).parent / "tasks" / f"{file}.yaml", resolve_func=True)
        task |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {split: str(data)}}}
        task |= {"task": f"set_{number}", "fewshot_split": split, "training_split": None}
        task |= {f"{other}_split": None for other in ("validation", "test") if other != split}
        tasks.append({key: value for key, value in task.items() if key not in ("tag", "group")})
    path = str(resolve_model(model))
    harness = HFLM(pretrained=path, tokenizer=path, dtype="float32", device="cpu", batch_size=BATCH)
    samples = lm_eval.simple_evaluate(harness, tasks=tasks, bootstrap_iters=0)["samples"]
    found: list[dict[str, Any]] = [{} for _ in rows]
    for number, places in enumerate(by_task.values()):
        for sample in samples[f"set_{number}"]:
            log_likelihoods = [float(response[0][0]) for response in sample["resps"]]
            acc = sample["acc"]
            found[places[sample["doc_id"]]] = {"lls": log_likelihoods, "acc": acc, "acc_norm": sample.get("acc_norm", acc)}
    return found


def agreement(ours: Sequence[ItemScore], theirs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracies of both in shares, items on which they differ, and differences of the choices' log-likelihoods in nats: of a whole
    choice, and a token of the right one (what NLL per token is made of)."""
    gaps = [np.subtract(mine.log_likelihoods, other["lls"]) for mine, other in zip(ours, theirs, strict=True)]
    per_token = [abs(gap[mine.gold]) / mine.tokens[mine.gold] for mine, gap in zip(ours, gaps, strict=True)]
    tokens = sum(mine.tokens[mine.gold] for mine in ours)
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "items": len(ours),
        "accuracy": {"softrl": _mean(s.correct for s in ours), "lm_eval": _mean(t["acc"] for t in theirs)},
        "accuracy_norm": {"softrl": _mean(s.correct_norm for s in ours), "lm_eval": _mean(t["acc_norm"] for t in theirs)},
        "items_that_differ": sum(s.correct != bool(t["acc"]) or s.correct_norm != bool(t["acc_norm"]) for s, t in pairs),
        "nll_per_token": {
            "softrl": -sum(s.log_likelihoods[s.gold] for s in ours) / tokens,
            "lm_eval": -sum(t["lls"][s.gold] for s, t in pairs) / tokens,
        },
        "nll_difference": {"max": float(max(per_token)), "mean": float(np.mean(per_token))},
        "log_likelihood_difference": {
            "max": float(max(np.abs(gap).max() for gap in gaps)),
            "mean": float(np.mean(np.abs(np.concatenate(gaps)))),
        },
    }


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def lm_eval_version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


if __name__ == "__main__":
    assert set(LM_EVAL_TASKS) | {"mmlu"} == set(SETS)
    main()
