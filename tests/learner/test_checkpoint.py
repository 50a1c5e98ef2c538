"""Resumed == uninterrupted, nothing half-written, and an export that stock transformers loads."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from configs.errors import InputError, RunError
from configs.schema import Config, Dtype, Mode
from learner import export as export_module
from learner.checkpoint import latest, prune, recover, step_folder
from learner.export import export
from learner.learner import Learner
from rollout.trajectory import Group
from tests.full_disk import files_of_at_most
from tests.learner.tiny import load_model, mixed_group, tiny_config

MODES = [Mode.soft, Mode.hard, Mode.fuzzy]


def start(folder: Path) -> Learner:
    return Learner(tiny_config(lr=1e-3, warmup_steps=2), folder, 0, 1, torch.device("cpu"))


def groups_of(folder: Path, count: int) -> list[Group]:
    model = load_model(folder)
    return [mixed_group(model, MODES, seed=seed) for seed in range(count)]


def train(learner: Learner, group: Group) -> dict[str, float]:
    learner.begin_step(learner.step)
    learner.accumulate(group)
    return {key: value for key, value in learner.finish_step().items() if "seconds" not in key and "per_s" not in key}


def trained(folder: Path, run: Path, steps: int = 1) -> Learner:
    """A learner after some steps, saved as `run`'s checkpoint of that step."""
    learner = start(folder)
    for group in groups_of(folder, steps):
        train(learner, group)
    learner.save(step_folder(run, steps), {"next_prompt": 11})
    return learner


@pytest.mark.parametrize("tied", [True, False])
def test_resumed_is_uninterrupted_to_the_bit(tied_dir: Path, untied_dir: Path, tmp_path: Path, tied: bool) -> None:
    folder = tied_dir if tied else untied_dir
    groups = groups_of(folder, 4)
    whole = start(folder)
    metrics = [train(whole, group) for group in groups]

    first = start(folder)
    assert [train(first, group) for group in groups[:2]] == metrics[:2]
    first.save(step_folder(tmp_path, 2), {"next_prompt": 7})
    second = start(folder)
    checkpoint = latest(tmp_path)
    assert checkpoint == tmp_path / "checkpoints" / "step_000002"
    assert second.load(checkpoint) == {"next_prompt": 7}
    assert second.step == 2 and second.rms_embedding() == whole.rms_embedding()
    assert [train(second, group) for group in groups[2:]] == metrics[2:]
    for (name, a), (_, b) in zip(whole.full_tensors(torch.float32), second.full_tensors(torch.float32), strict=True):
        assert torch.equal(a, b), name


def test_saving_does_not_disturb_training(tied_dir: Path, tmp_path: Path) -> None:
    groups = groups_of(tied_dir, 2)
    plain, saving = start(tied_dir), start(tied_dir)
    saving.save(step_folder(tmp_path, 0), {})  # before the first step, when AdamW has no moments yet
    assert train(plain, groups[0]) == train(saving, groups[0])
    saving.save(step_folder(tmp_path, 1), {})
    assert train(plain, groups[1]) == train(saving, groups[1])


def base_model(source: Path, folder: Path) -> Path:
    """A copy of a model folder with tokenizer files, as real ones have."""
    shutil.copytree(source, folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "merges.txt").write_text("a b")
    return folder


def config_of(model_dir: Path, dtype: Dtype) -> Config:
    config = tiny_config(dtype)
    config.model.path = str(model_dir)
    return config


def test_a_full_disk_leaves_nothing_half_written(tied_dir: Path, tmp_path: Path) -> None:
    learner = trained(tied_dir, tmp_path)
    with files_of_at_most(20_000), pytest.raises(RunError, match="step_000002: could not write") as error:
        learner.save(step_folder(tmp_path, 2), {})
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]
    assert start(tied_dir).load(latest(tmp_path)) == {"next_prompt": 11}
    learner.save(step_folder(tmp_path, 2), {"next_prompt": 12})  # after space was made
    assert start(tied_dir).load(latest(tmp_path)) == {"next_prompt": 12}


def test_saving_a_step_again_replaces_it(tied_dir: Path, tmp_path: Path) -> None:
    learner = trained(tied_dir, tmp_path)
    learner.save(step_folder(tmp_path, 1), {"next_prompt": 99})
    assert start(tied_dir).load(step_folder(tmp_path, 1)) == {"next_prompt": 99}
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]


class Killed(BaseException):
    """What no handler of the code under test takes for an error."""


@pytest.mark.parametrize(("moment", "stays"), [("before the first rename", 1), ("between the renames", 1), ("while removing", 2)])
@pytest.mark.parametrize("resumed", [True, False])
def test_a_kill_while_a_checkpoint_is_replaced_costs_none(
    tied_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, stays: int, resumed: bool
) -> None:
    learner, best = start(tied_dir), tmp_path / "checkpoints" / "best"
    learner.save(best, {"save": 1})
    rename = Path.rename

    def killed_at(path: Path, target: Path) -> Path:
        if {best: "before the first rename", best.with_name(".best.partial"): "between the renames"}.get(path) == moment:
            raise Killed
        return rename(path, target)

    def half_removed(path: Path) -> None:
        next(path.glob("*.distcp")).unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_at)
        patch.setattr(shutil, "rmtree", half_removed)
        with pytest.raises(Killed):
            learner.save(best, {"save": 2})
    assert len(list(best.parent.iterdir())) == 2  # something was left behind
    if resumed:
        recover(tmp_path)
        assert start(tied_dir).load(best) == {"save": stays}
        assert [path.name for path in best.parent.iterdir()] == ["best"]
    learner.save(best, {"save": 3})
    assert start(tied_dir).load(best) == {"save": 3}
    assert [path.name for path in best.parent.iterdir()] == ["best"]


def test_a_rename_that_fails_leaves_the_old_checkpoint(tied_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, best = start(tied_dir), tmp_path / "checkpoints" / "best"
    learner.save(best, {"save": 1})
    rename = Path.rename

    def second_fails(path: Path, target: Path) -> Path:
        if path.name == ".best.partial":
            raise OSError("Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(RunError, match="best: could not write the checkpoint"):
        learner.save(best, {"save": 2})
    assert start(tied_dir).load(best) == {"save": 1}
    assert [path.name for path in best.parent.iterdir()] == ["best"]


def test_a_half_deleted_checkpoint_is_never_restored(tied_dir: Path, tmp_path: Path) -> None:
    trained(tied_dir, tmp_path)
    deleted = tmp_path / "checkpoints" / ".step_000000.deleted"  # a kill while `prune` removed it
    shutil.copytree(step_folder(tmp_path, 1), deleted)
    (deleted / "__0_0.distcp").unlink()
    recover(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]


def test_latest_and_prune_see_whole_checkpoints_only(tied_dir: Path, tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    learner = start(tied_dir)
    for step in (5, 10, 100):
        learner.save(step_folder(tmp_path, step), {})
    killed = tmp_path / "checkpoints" / ".step_000200.partial"
    killed.mkdir()
    (killed / "__0_0.distcp").write_bytes(b"half")
    assert latest(tmp_path) == step_folder(tmp_path, 100)
    assert prune(tmp_path, keep=2) == [step_folder(tmp_path, 5)]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000010", "step_000100"]


def test_what_is_no_checkpoint_of_this_model_is_refused(tied_dir: Path, untied_dir: Path, tmp_path: Path) -> None:
    trained(tied_dir, tmp_path)
    with pytest.raises(InputError, match=r"no \.metadata"):
        start(tied_dir).load(tmp_path)
    with pytest.raises(InputError, match="not a checkpoint of this model"):
        start(untied_dir).load(step_folder(tmp_path, 1))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
def test_the_export_has_the_learner_s_logits(
    tied_dir: Path, untied_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool, shard_bytes: int
) -> None:
    folder = tied_dir if tied else untied_dir
    learner = trained(folder, tmp_path)
    monkeypatch.setattr(export_module, "SHARD_BYTES", shard_bytes)
    base = base_model(folder, tmp_path / "base")
    export(step_folder(tmp_path, 1), tmp_path / "out", config_of(base, Dtype.float32))
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and model.dtype == torch.float32
    tokens = torch.arange(20)
    expected = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    np.testing.assert_allclose(learner.token_logprobs([tokens.numpy()])[0], expected.detach().numpy(), atol=1e-5)
    stored = {name: tensor for file in (tmp_path / "out").glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in learner.full_tensors(torch.float32):
        assert torch.equal(stored.pop(name), tensor), name
    assert not stored


def test_the_export_keeps_the_model_s_other_files_and_its_dtype(tied_dir: Path, tmp_path: Path) -> None:
    learner = trained(tied_dir, tmp_path)
    base = base_model(tied_dir, tmp_path / "base")
    export(step_folder(tmp_path, 1), tmp_path / "out", config_of(base, Dtype.bfloat16))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["config.json", "generation_config.json", "merges.txt", "model.safetensors", "tokenizer.json"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in learner.full_tensors(torch.bfloat16))


def test_export_refuses_to_overwrite_and_cleans_up(tied_dir: Path, tmp_path: Path) -> None:
    trained(tied_dir, tmp_path)
    config = config_of(base_model(tied_dir, tmp_path / "base"), Dtype.float32)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        export(step_folder(tmp_path, 1), taken, config)
    with pytest.raises(InputError, match="not a checkpoint"):
        export(tmp_path, tmp_path / "out", config)
    with files_of_at_most(20_000), pytest.raises(RunError, match="could not write"):
        export(step_folder(tmp_path, 1), tmp_path / "out", config)
    (step_folder(tmp_path, 1) / "__0_0.distcp").write_bytes(b"lost")
    with pytest.raises(InputError, match="cannot be read"):
        export(step_folder(tmp_path, 1), tmp_path / "out", config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "checkpoints", "taken"]
