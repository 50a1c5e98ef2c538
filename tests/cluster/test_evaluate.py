"""What `softrl eval` evaluates is what was named, or nothing is started."""

import json
from pathlib import Path

import pytest

from cluster.eval_sets import load_datasets
from cluster.evaluate import find_weights
from configs.errors import InputError
from configs.load import dump_config, load_config
from rollout.tasks import load_task

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
ARC = {"question": "Is ice cold?", "choices": {"text": ["yes", "no"], "label": ["A", "B"]}, "answerKey": "A"}


def a_run(folder: Path, *overrides: str) -> Path:
    """A run's folder with the best checkpoint at step 6; returns the checkpoint."""
    best = folder / "first" / "checkpoints" / "best"
    best.mkdir(parents=True)
    (folder / "first" / "config.yaml").write_text(dump_config(load_config(DEMO, overrides)))
    (best / "controller.json").write_text(json.dumps({"step": 6, "sigma": 0.1}))
    return best


def test_without_a_checkpoint_it_is_the_model_that_a_run_starts_from(tmp_path: Path) -> None:
    config = load_config(DEMO, [f"run.dir={tmp_path}", "run.name=base"])
    _, weights = find_weights(config, None, None)
    assert (weights.step, weights.run, weights.checkpoint, weights.sigma) == (0, tmp_path / "base", None, None)
    assert find_weights(config, None, tmp_path / "out")[1].run == tmp_path / "out"


def test_a_checkpoint_knows_its_step_its_run_and_its_noise(tmp_path: Path) -> None:
    best = a_run(tmp_path)
    config = load_config(DEMO)
    _, weights = find_weights(config, best, None)
    assert (weights.step, weights.run, weights.checkpoint, weights.sigma) == (6, tmp_path / "first", best, 0.1)
    louder = load_config(DEMO, ["policy.gamma=0.66"])
    assert find_weights(louder, best, None)[1].sigma == pytest.approx(0.2)  # of the same embedding


def test_an_exported_model_is_evaluated_as_a_model(tmp_path: Path) -> None:
    model = tmp_path / "my-model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    config, weights = find_weights(load_config(DEMO), model, tmp_path / "out")
    assert config.model.path == str(model) and (weights.step, weights.run, weights.checkpoint) == (0, tmp_path / "out", None)
    with pytest.raises(InputError, match="does not say which run it is of; give --out"):
        find_weights(load_config(DEMO), model, None)


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    best = a_run(tmp_path, "model.path=org/other")
    with pytest.raises(
        InputError, match=r"trained from model.path = org/other, this config has smollm2-135m; evaluate it with .*config"
    ):
        find_weights(load_config(DEMO), best, None)
    with pytest.raises(InputError, match=r"neither a run's checkpoint \(controller.json\) nor a model"):
        find_weights(load_config(DEMO), tmp_path, None)
    (tmp_path / "first" / "config.yaml").unlink()
    with pytest.raises(InputError, match="no run around it"):
        find_weights(load_config(DEMO), best, None)


def test_data_sets_are_tasks_and_multiple_choice_sets(tmp_path: Path) -> None:
    file = tmp_path / "arc.jsonl"
    file.write_text(3 * (json.dumps(ARC) + "\n"))
    config = load_config(DEMO)
    found = load_datasets(config, ["arithmetic:far", f"arc_easy={file}"], 2)
    assert [(task, len(problems)) for task, problems in found.tasks] == [("arithmetic:far", 2)]
    assert [(name, len(items)) for name, items in found.choices] == [("arc_easy", 2)]
    own = load_datasets(config, [f"choices={file}"], None)
    assert [(name, len(items)) for name, items in own.choices] == [("arc", 3)] and own.tasks == []
    other = tmp_path / "other" / "arc.jsonl"
    other.parent.mkdir()
    other.write_text(json.dumps(ARC | {"answerKey": "B"}) + "\n")
    with pytest.raises(InputError, match="two are called arc, and results are kept by name; rename a file, or leave one out"):
        load_datasets(config, [f"choices={file}", f"choices={other}"], None)
    with pytest.raises(InputError, match="choices: expected choices=FILE"):
        load_datasets(config, ["choices"], None)
    [(task, problems)] = load_datasets(config, None, None).tasks
    assert task == "arithmetic:test" and len(problems) == len(load_task("arithmetic:test"))
    with pytest.raises(InputError, match="unknown task 'gsm9k'; did you mean 'gsm8k'"):
        load_datasets(config, ["gsm9k"], None)
