"""What "Soft Tokens, Hard Truths" (arXiv 2509.19170v2) reports: means of three seeds, in percent."""

from pathlib import Path

from configs.schema import Mode

BASE = "none"  # the row of the untrained model

MODELS = {"Llama-3.2-3B-Instruct": "Llama-3B", "Llama-3.1-8B-Instruct": "Llama-8B", "Qwen2.5-3B-Instruct": "Qwen-3B"}
TRAINS = {"gsm8k": "GSM8K", "gsm8k:train": "GSM8K", "math": "MATH", "math:train": "MATH"}
TESTS = {"gsm8k:test": "GSM8K", "math500": "MATH-500", "math500:test": "MATH-500"}
COLUMNS = {("hard_greedy", 1): 0, ("hard_sample", 1): 1, ("hard_sample", 32): 2}  # (inference setting, k): place in a row

Row = tuple[float, float, float]  # hard greedy pass@1, hard sample pass@1, hard sample pass@32

NUMBERS: dict[tuple[str, str, str], dict[str, Row]] = {  # (model, training set, test set): trained how
    ("Llama-3B", "GSM8K", "GSM8K"): {
        Mode.hard: (75.9, 74.3, 94.1),
        Mode.fuzzy: (76.7, 66.4, 97.4),
        Mode.soft: (77.2, 70.5, 97.9),
    },
    ("Llama-3B", "GSM8K", "MATH-500"): {
        BASE: (38.0, 25.2, 82.0),
        Mode.hard: (34.6, 31.2, 72.4),
        Mode.fuzzy: (42.6, 32.6, 83.2),
        Mode.soft: (43.5, 37.0, 84.8),
    },
    ("Llama-3B", "MATH", "MATH-500"): {
        BASE: (38.0, 25.2, 82.0),
        Mode.hard: (49.1, 47.9, 78.7),
        Mode.fuzzy: (48.5, 37.5, 81.5),
        Mode.soft: (44.5, 39.1, 82.2),
    },
    ("Llama-8B", "GSM8K", "GSM8K"): {
        BASE: (82.6, 64.9, 98.5),
        Mode.hard: (81.2, 80.6, 95.1),
        Mode.fuzzy: (83.7, 73.2, 98.2),
        Mode.soft: (82.6, 73.3, 98.3),
    },
    ("Llama-8B", "GSM8K", "MATH-500"): {
        BASE: (44.4, 31.1, 79.8),
        Mode.hard: (20.2, 19.8, 45.4),
        Mode.fuzzy: (44.6, 33.7, 83.1),
        Mode.soft: (44.7, 34.8, 83.9),
    },
    ("Qwen-3B", "MATH", "MATH-500"): {
        BASE: (29.0, 25.5, 81.0),
        Mode.hard: (59.0, 57.1, 83.6),
        Mode.fuzzy: (58.1, 55.5, 84.4),
        Mode.soft: (54.7, 52.2, 84.4),
    },
}


def paper_number(model: str, train: str, test: str, trained: str, setting: str, k: int) -> float | None:
    """The paper's pass@k in percent, or None where it has none. `model` is a model.path, `train` and `test` are dataset names as
    tasks spell them, `trained` a mode or BASE, `setting` one of EVAL_SETTINGS."""
    place = (MODELS.get(Path(model).name, ""), TRAINS.get(train, ""), TESTS.get(test, ""))
    row = NUMBERS.get(place, {}).get(trained)
    return row[COLUMNS[setting, k]] if row is not None and (setting, k) in COLUMNS else None
