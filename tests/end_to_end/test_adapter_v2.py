"""vLLM's two model runners decode the same trajectories, whatever is preempted, discarded or prefilled in chunks under them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from rollout.record import SlotRecord
from rollout.wire import unpack_records
from tests.end_to_end.one_runner import cases

pytestmark = pytest.mark.slow

DEADLINE_S = 280
RUNNERS = ("v1", "v2")
CASES = ("calm", "crowded", "reset", "tail")


@dataclass(frozen=True)
class Decoded:
    """What one runner wrote."""

    report: dict[str, Any]
    seen: dict[str, dict[str, int]]  # case -> what happened how often
    plain: list[int]  # what vLLM's own sampler said beside a soft request
    records: dict[str, dict[str, SlotRecord]]  # case -> prompt index -> record


@pytest.fixture(scope="module")
def decoded(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Decoded]]:
    out = {runner: tmp_path_factory.mktemp(runner) for runner in RUNNERS}
    run_runners(tiny_llama, out)
    yield {runner: read(folder, CASES) for runner, folder in out.items()}


def run_runners(model: Path, out: dict[str, Path]) -> None:
    """Each into its folder, side by side."""
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    running: dict[str, subprocess.Popen[str]] = {}
    try:
        for runner, folder in out.items():
            command = [sys.executable, "-m", "tests.end_to_end.one_runner", runner, str(model), str(folder)]
            running[runner] = subprocess.Popen(
                command, cwd=Path(__file__).parents[2], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        for runner, process in running.items():
            log, _ = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 0, f"{runner}: {log[-4000:]}"
    finally:
        for process in running.values():
            process.kill()


def read(folder: Path, cases: Iterable[str]) -> Decoded:
    records: dict[str, dict[str, SlotRecord]] = {case: {} for case in cases}
    for case in cases:
        for file in folder.glob(f"{case}*.safetensors"):
            records[case] |= unpack_records(file.read_bytes())
    return Decoded(records=records, **json.loads((folder / "seen.json").read_text()))


def mixtures(record: SlotRecord) -> NDArray[np.float32]:
    """[C, V]; a token at the threshold may be in one support and not in another."""
    dense = np.zeros((len(record.shadow_ids), 49152), dtype=np.float32)
    if len(record.support.ids):
        dense[np.repeat(np.arange(len(dense)), np.diff(record.support.offsets)), record.support.ids] = record.support.probs
    return dense


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("runner", RUNNERS)
def test_a_trajectory_is_the_one_that_v1_decodes_undisturbed(decoded: dict[str, Decoded], runner: str, case: str) -> None:
    expected, found = decoded["v1"].records["calm"], decoded[runner].records[case]
    assert found.keys() == {str(request.prompt_index) for batch, _ in cases()[case] for request in batch}
    for index, record in found.items():
        known = expected[index]
        for name in ("shadow_ids", "answer_ids", "stop_code", "prefill_kind"):
            assert np.array_equal(getattr(record, name), getattr(known, name)), (index, name)
        assert np.abs(mixtures(record) - mixtures(known)).max() < 1e-5
        assert np.abs(record.answer_logprobs - known.answer_logprobs).max() < 1e-5
        assert (record.soft_embeddings is None) == (known.soft_embeddings is None)
        if record.soft_embeddings is not None and known.soft_embeddings is not None:
            fed, before = (r.soft_embeddings.view(np.float32) for r in (record, known))
            assert np.allclose(fed, before, rtol=0, atol=1e-5)


def test_each_runner_has_its_adapter(decoded: dict[str, Decoded]) -> None:
    assert {runner: one.report["adapter"] for runner, one in decoded.items()} == {"v1": "v1", "v2": "v2"}


def test_what_the_cases_stand_for_did_happen(decoded: dict[str, Decoded]) -> None:
    for one in decoded.values():
        assert not any(one.seen["calm"].values())
        assert all(one.seen[case]["preempted"] > 0 and one.seen[case]["replayed"] > 0 for case in CASES[1:])
    # Outputs under way are discarded by a reset, and only with asynchronous scheduling is there one.
    assert all(decoded["v2"].seen[case]["repeated"] > 0 for case in ("reset", "tail"))


def test_vllms_own_sampler_serves_the_other_requests(decoded: dict[str, Decoded]) -> None:
    assert decoded["v1"].plain == decoded["v2"].plain


@pytest.mark.study
def test_with_the_kernels_of_a_gpu_a_trajectory_is_the_undisturbed_one_bit_for_bit(tiny_llama: Path, tmp_path: Path) -> None:
    run_runners(tiny_llama, {"v2_kernels": tmp_path})
    one = read(tmp_path, ("calm", "reset"))
    assert not any(one.seen["calm"].values()) and all(one.seen["reset"].values())
    assert one.records["calm"].keys() == one.records["reset"].keys() == {"0", "1", "2"}
    for index, known in one.records["calm"].items():
        found = one.records["reset"][index]
        for name in ("shadow_ids", "answer_ids", "answer_logprobs", "stop_code", "prefill_kind", "dropped_mass", "soft_embeddings"):
            assert np.array_equal(getattr(found, name), getattr(known, name)), (index, name)
        for name in ("ids", "probs", "offsets"):
            assert np.array_equal(getattr(found.support, name), getattr(known.support, name)), (index, name)
