"""A rollout that was written is the rollout that is read: bit for bit, or a line that names the file and the key."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from configs.errors import InputError, RunError
from configs.schema import Dtype, Mode
from rollout.files import DESCRIPTION, list_rollouts, read_groups, write_rollouts
from rollout.trajectory import Group, Sample, Trajectory
from tests.full_disk import files_of_at_most

WIDTH = 6  # n0


def trajectory(rng: np.random.Generator, mode: Mode, cot: int, answer: int, full: Dtype | None) -> Trajectory:
    counts = np.zeros(cot, dtype=np.int64) if mode is Mode.hard else rng.integers(1, 5, cot)
    entries = int(counts.sum())
    itemsize = 2 if full is Dtype.bfloat16 else 4
    return Trajectory(
        prompt_ids=rng.integers(0, 50000, 7, dtype=np.int32),
        prompt_index=int(rng.integers(2**40)),
        sample_index=int(rng.integers(64)),
        mode=mode,
        tau=float(rng.random()),
        sigma=0.0 if mode is Mode.hard else 0.0436172850051,
        noise_seed=int(rng.integers(2**63)),
        shadow_ids=rng.integers(0, 50000, cot, dtype=np.int32),
        support_ids=rng.integers(0, 50000, entries, dtype=np.int32),
        support_probs=rng.random(entries, dtype=np.float32),
        support_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        dropped_mass=rng.random(cot, dtype=np.float32) * np.float32(1e-40),  # subnormal: no bit may be rounded away
        soft_embeddings=None if full is None else rng.integers(0, 256, (cot, WIDTH * itemsize), dtype=np.uint8),
        prefill_ids=rng.integers(0, 50000, 2, dtype=np.int32),
        answer_ids=rng.integers(0, 50000, answer, dtype=np.int32),
        answer_logprobs=-rng.random(answer, dtype=np.float32),
        stop_reason=str(rng.choice(["closed", "eos", "length"])),
        phrase_found=bool(rng.integers(2)),
        weight_versions=3 + np.arange(1 + cot % 3),
        weight_version_starts=2 * np.arange(1 + cot % 3),
    )


def batch(seed: int, cots: list[list[int]], modes: list[Mode], full: Dtype | None = None) -> list[Group]:
    """Groups of samples with the given CoT lengths, in modes taken round robin."""
    rng = np.random.default_rng(seed)
    modes = modes * (1 + sum(map(len, cots)))
    return [
        Group(
            step=40,
            prompt_index=17 + g,
            samples=tuple(
                Sample(
                    trajectory=trajectory(rng, modes.pop(0), cot, answer=i, full=full),
                    reward=float(rng.choice([0.0, 10.0, 100.0])),
                    correct=bool(i % 2),
                    timed_out=bool(i % 3),
                    answer_text='\\frac{1}{2} \u2192 \ud800\n"',  # JSON must take whatever a tokenizer decodes
                )
                for i, cot in enumerate(lengths)
            ),
        )
        for g, lengths in enumerate(cots)
    ]


def write(folder: Path, groups: list[Group], name: str = "step_000040", dtype: Dtype = Dtype.bfloat16) -> Path:
    return write_rollouts(folder, name, groups, model="org/model", weight_version=3, config_hash="abc", engine_dtype=dtype)


def read(folder: Path) -> list[list[Group]]:
    """The groups of each file of a folder."""
    return [read_groups(file) for file in list_rollouts(folder)]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and a == b


def assert_equal(left: list[Group], right: list[Group]) -> None:
    assert [(g.step, g.prompt_index, len(g.samples)) for g in left] == [(g.step, g.prompt_index, len(g.samples)) for g in right]
    for a, b in zip([s for g in left for s in g.samples], [s for g in right for s in g.samples], strict=True):
        assert (a.reward, a.correct, a.answer_text) == (b.reward, b.correct, b.answer_text)
        for field in fields(Trajectory):
            x, y = getattr(a.trajectory, field.name), getattr(b.trajectory, field.name)
            assert same(x, y), (field.name, x, y)


LENGTHS = [[3, 1], [0, 5], [2]]


@pytest.mark.parametrize("modes", [[Mode.hard], [Mode.soft], [Mode.fuzzy], [Mode.soft, Mode.hard, Mode.fuzzy]], ids=str)
@pytest.mark.parametrize("full", [None, Dtype.bfloat16, Dtype.float32], ids=str)
def test_what_is_read_is_what_was_written(tmp_path: Path, modes: list[Mode], full: Dtype | None) -> None:
    groups = batch(0, LENGTHS, modes, full)
    write(tmp_path, groups, dtype=full or Dtype.bfloat16)
    (back,) = read(tmp_path)
    assert_equal(groups, back)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.lists(st.integers(0, 6), max_size=4), max_size=4), st.booleans())
def test_any_shape_of_batch_comes_back(
    tmp_path_factory: pytest.TempPathFactory, seed: int, cots: list[list[int]], full: bool
) -> None:
    folder = tmp_path_factory.mktemp("rollouts")
    groups = batch(seed, cots, [Mode.soft, Mode.hard], Dtype.bfloat16 if full else None)
    write(folder, groups)
    (back,) = read(folder)
    assert_equal(groups, back)


def test_compact_and_full_records_lie_side_by_side(tmp_path: Path) -> None:
    compact, full = batch(1, [[3, 0]], [Mode.soft]), batch(2, [[2, 0, 4]], [Mode.fuzzy], Dtype.bfloat16)
    write(tmp_path, compact + full)
    (back,) = read(tmp_path)
    assert_equal(compact + full, back)


def test_files_come_in_the_order_of_steps_with_their_description(tmp_path: Path) -> None:
    for step in (10, 9, 100):
        write(tmp_path, batch(step, [[step % 7]], [Mode.soft]), name=f"step_{step:06d}")
    described = list_rollouts(tmp_path)
    assert [file.path.stem for file in described] == ["step_000009", "step_000010", "step_000100"]
    assert {(f.model, f.weight_version, f.config_hash, f.engine_dtype) for f in described} == {("org/model", 3, "abc", "bfloat16")}
    assert [len(groups) for groups in read(tmp_path)] == [1, 1, 1]
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".json", ".safetensors")]


def test_soft_embeddings_are_an_ordinary_tensor_in_the_engines_dtype(tmp_path: Path) -> None:
    groups = batch(3, [[2, 3]], [Mode.soft], Dtype.bfloat16)
    write(tmp_path, groups)
    tensor = load_file(tmp_path / "step_000040.safetensors")["soft_embeddings"]
    assert tensor.dtype is torch.bfloat16 and tensor.shape == (5, WIDTH)


def test_writing_a_name_again_replaces_both_halves(tmp_path: Path) -> None:
    write(tmp_path, batch(4, [[2]], [Mode.soft]))
    second = batch(5, [[4, 1]], [Mode.hard])
    path = write(tmp_path, second)
    (back,) = read(tmp_path)
    assert_equal(second, back)
    assert json.loads(path.with_suffix(".json").read_text()) == description(path)


class Killed(BaseException):
    """What no handler of the code under test takes for an error."""


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_while_a_pair_is_replaced_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int) -> None:
    """Killed before the first rename the old groups are there, after it the new ones; another write makes the name whole."""
    old, new = batch(11, [[2, 3]], [Mode.soft]), batch(12, [[4, 1], [2]], [Mode.hard])
    write(tmp_path, old)
    replace_now, left = os.replace, iter(range(renames))

    def killed_later(source: Path, target: Path) -> None:
        if next(left, None) is None:
            raise Killed
        replace_now(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_later)
        with pytest.raises(Killed):
            write(tmp_path, new)
    assert_equal([old, new][renames], read(tmp_path)[0])
    write(tmp_path, new)
    assert_equal(new, read(tmp_path)[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000040.json", "step_000040.safetensors"]


def test_a_reader_beside_a_writer_meets_whole_batches_only(tmp_path: Path) -> None:
    """As `softrl show` beside a running evaluation, which writes the name again with every kept sample."""
    batches = [batch(seed, [[2, 1]] * (1 + seed), [Mode.soft]) for seed in range(4)]
    write(tmp_path, batches[0])
    (listed,) = list_rollouts(tmp_path)
    done = threading.Event()

    def write_on() -> None:
        for turn in range(100):
            write(tmp_path, batches[turn % 4])
        done.set()

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write_on)
        while not done.is_set():
            for file in (listed, *list_rollouts(tmp_path)):  # what was listed may have grown since
                found = read_groups(file)
                assert_equal(batches[len(found) - 1], found)
        writing.result()


def test_half_a_pair_is_not_fatal(tmp_path: Path) -> None:
    groups = batch(13, [[2]], [Mode.soft])
    write(tmp_path, groups).with_suffix(".json").unlink()
    (tmp_path / "step_000041.json").write_text("{}")
    (back,) = read(tmp_path)
    assert_equal(groups, back)


# Files that cannot be used


def damage_array(path: Path, **changes: torch.Tensor | None) -> None:
    """Replace arrays of a safetensors file; None removes one."""
    content = description(path)
    tensors = load_file(path) | {name: tensor for name, tensor in changes.items() if tensor is not None}
    kept = {name: tensor for name, tensor in tensors.items() if changes.get(name, tensor) is not None}
    save_file(kept, path, {DESCRIPTION: json.dumps(content)})


def description(path: Path) -> dict[str, Any]:
    """What the metadata of a safetensors file say."""
    with safe_open(path, framework="pt") as arrays:
        return json.loads(arrays.metadata()[DESCRIPTION])


@pytest.mark.parametrize(
    ("key", "tensor", "says"),
    [
        ("shadow_ids", None, "missing"),
        ("shadow_ids", torch.zeros(3, dtype=torch.int32), r"expected int32 \[11\], found int32 \[3\]"),
        ("support_probs", torch.zeros(4, dtype=torch.bfloat16), r"expected float32 \[\d+\], found bfloat16 \[4\]"),
        ("cot_offsets", torch.tensor([0, 4, 3, 4, 9, 11]), "never fall"),
        ("tau", torch.zeros(5, 1, dtype=torch.float64), r"expected float64 \[5\], found float64 \[5, 1\]"),
        ("mode", torch.full((5,), 3, dtype=torch.uint8), "0 hard, 1 soft or 2 fuzzy, found 3"),
        ("soft_embeddings", torch.zeros(11, 6), r"expected bfloat16 \[11, n0\], found float32 \[11, 6\]"),
        ("soft_embeddings", None, "missing"),
    ],
)
def test_an_array_that_does_not_fit_is_named(tmp_path: Path, key: str, tensor: torch.Tensor | None, says: str) -> None:
    write(tmp_path, batch(6, LENGTHS, [Mode.soft], Dtype.bfloat16))
    damage_array(tmp_path / "step_000040.safetensors", **{key: tensor})
    with pytest.raises(InputError, match=rf"step_000040.safetensors: {key}: .*{says}"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model", None, "model: expected a JSON str, which is missing"),
        ("weight_version", "3", "weight_version: expected a JSON int, found '3'"),
        ("format", 7, "format = 7: expected 3"),
        ("engine_dtype", "float16", "engine_dtype = float16: expected one of bfloat16, float32"),
        ("stop_reason", ["eos"], "stop_reason: expected 5 texts"),
        ("groups", [{"step": 1, "samples": 5}], "groups: .*prompt_index"),
    ],
)
def test_a_key_of_the_description_that_does_not_fit_is_named(tmp_path: Path, key: str, value: Any, says: str) -> None:
    path = write(tmp_path, batch(7, LENGTHS, [Mode.soft]))
    content = {k: v for k, v in (description(path) | {key: value}).items() if v is not None}
    save_file(load_file(path), path, {DESCRIPTION: json.dumps(content)})
    with pytest.raises(InputError, match=rf"step_000040.safetensors: {says}"):
        list_rollouts(tmp_path)


def test_folders_and_files_that_are_no_rollouts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such folder"):
        list_rollouts(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no rollouts"):
        list_rollouts(tmp_path)
    path = write(tmp_path, batch(8, [[2]], [Mode.soft]))
    whole, tensors = path.read_bytes(), load_file(path)
    save_file(tensors, path, {DESCRIPTION: "{"})
    with pytest.raises(InputError, match=r"step_000040.safetensors: its description is no JSON"):
        list_rollouts(tmp_path)
    save_file(tensors, path)
    with pytest.raises(InputError, match=r"step_000040.safetensors: no rollouts of this version of softrl"):
        list_rollouts(tmp_path)
    path.write_bytes(whole[:-3])
    with pytest.raises(InputError, match=r"step_000040.safetensors: not a readable safetensors file"):
        read(tmp_path)


def test_a_full_disk_is_one_line_and_leaves_no_half(tmp_path: Path) -> None:
    groups = batch(9, [[50] * 8], [Mode.soft], Dtype.bfloat16)
    with files_of_at_most(4096), pytest.raises(RunError, match=r"step_000040.safetensors: cannot be written") as caught:
        write(tmp_path, groups)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_arrays_of_another_dtype_are_refused_rather_than_cast(tmp_path: Path) -> None:
    (group,) = batch(10, [[3]], [Mode.soft])
    wrong = replace(group.samples[0].trajectory, support_probs=group.samples[0].trajectory.support_probs.astype(np.float64))
    with pytest.raises(TypeError, match="float64"):
        write(tmp_path, [replace(group, samples=(replace(group.samples[0], trajectory=wrong),))])
    assert list(tmp_path.iterdir()) == []
