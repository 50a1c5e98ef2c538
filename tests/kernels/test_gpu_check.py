"""gpu_check runs without a GPU, survives what its sections do to it, and says what it found. Its own checks are run by itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_plan import FULL, QUICK, TINY, Check, Setting, violations

ROOT = Path(gpu_check.__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
NEITHER_THERE_NOR_NEEDED = ("vllm", "ray", "omegaconf", "rich", "typer", "datasets", "gguf")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")


def check(*arguments: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], dict]:
    """gpu_check as a user of another folder starts it, and its JSON."""
    path = folder / "found.json"
    command = [sys.executable, str(SCRIPT), "--json", str(path), *arguments]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return done, json.loads(path.read_text())


@NO_GPU
def test_without_a_gpu_it_says_so_and_checks_in_the_interpreter(tmp_path):
    done, found = check("--only", "noise", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("no GPU here: the kernels run in Triton's interpreter")
    assert found["mode"] == "interpreter" and found["passed"] and list(found["sections"]) == ["noise"]
    assert found["versions"]["torch"] == torch.__version__ and found["device"]["name"] == "Triton's interpreter"
    checks = found["sections"]["noise"]["checks"]
    assert len(checks) == 4 and all(set(check) == {"name", "error", "bar", "passed"} for check in checks)
    assert "noise      passed, 4 of 4 checks" in done.stdout


@NO_GPU
@pytest.mark.slow
def test_every_section_passes_or_is_rehearsed_without_a_gpu(tmp_path):
    done, found = check(folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    sections = found["sections"]
    assert list(sections) == list(gpu_check.SECTIONS) and all(section["status"] == "passed" for section in sections.values())
    assert sum(len(section.get("checks", [])) for section in sections.values()) > 60
    for name in ("rollout", "kernels"):
        lines = sections[name]["rehearsal"]["timings"]
        assert {"name", "seconds", "bytes", "flops", "roofline", "of_roofline"} <= set(lines[0]) and lines[-1]["seconds"] > 0
        assert not any("bar" in line for line in lines)  # a time of the interpreter meets no bar
    assert set(sections["memory"]["rehearsal"]["peak_bytes"]) == {"token", "support", "dense", "dense forward"}
    learner = sections["learner"]["rehearsal"]
    for form in ("soft", "soft dense", "hard"):
        assert learner[form]["1"]["seconds"] > 0 and learner[form]["1"]["loss"] == learner[form]["1"]["loss"]
        assert "at_32_layers" in learner[form]  # of two times so short, the line may lead anywhere
    assert learner["soft"]["1"]["generated_tokens"] == learner["hard"]["1"]["generated_tokens"]


def test_the_machine_with_the_gpu_needs_nothing_but_torch_triton_and_transformers():
    modules = sorted({f"benchmarks.{module}" for module, _ in gpu_check.SECTIONS.values()})
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in NEITHER_THERE_NOR_NEEDED)
    script = f"import sys, importlib; {blocked}[importlib.import_module(name) for name in {modules}]"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def workers(monkeypatch, *acts):
    """`supervise` starts these instead of processes: each act is handed the sections and their names, and returns an exit code,
    or None if it goes on for ever."""
    turns = iter(acts)

    class Worker:
        def __init__(self, command, env):
            self.path = Path(command[command.index("--json") + 1])
            results = gpu_check.read(self.path)
            self.code = next(turns)(results["sections"], [word for word in command if word in gpu_check.SECTIONS])
            gpu_check.write(self.path, results)

        def wait(self, timeout=None):
            if self.code is None:
                raise subprocess.TimeoutExpired("worker", timeout)
            return self.code

        def kill(self):
            self.code = -9

    monkeypatch.setattr(gpu_check.subprocess, "Popen", Worker)


def begins_select(code):
    def act(sections, names):
        sections |= {"noise": {"status": "passed"}, "select": {"status": "running"}}
        return code

    return act


def finishes(sections, names):
    assert names == ["embedding"]
    sections["embedding"] = {"status": "passed"}
    return 0


@pytest.mark.parametrize(("code", "error"), [(-11, "the worker ended with code -11"), (None, "no end after 0 s")])
def test_a_section_that_kills_or_blocks_its_worker_costs_only_itself(code, error, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "SECTION_LIMIT_S", dict.fromkeys(gpu_check.SECTION_LIMIT_S, 0.0))
    workers(monkeypatch, begins_select(code), finishes)
    gpu_check.supervise(["noise", "select", "embedding"], tmp_path / "found.json", quick=False)
    found = gpu_check.read(tmp_path / "found.json")
    assert [section["status"] for section in found["sections"].values()] == ["passed", "failed", "passed"]
    assert found["sections"]["select"]["error"] == error and not found["passed"]


def test_a_worker_that_does_not_start_or_has_no_time_left_ends_the_run(monkeypatch, tmp_path):
    workers(monkeypatch, lambda sections, names: 1)
    gpu_check.supervise(["noise", "select"], tmp_path / "found.json", quick=False)
    found = gpu_check.read(tmp_path / "found.json")["sections"]
    assert {section["error"] for section in found.values()} == {"the worker ended with code 1"}

    monkeypatch.setattr(gpu_check, "LIMIT_S", dict.fromkeys(gpu_check.LIMIT_S, 0.0))
    workers(monkeypatch, begins_select(None))
    gpu_check.supervise(["noise", "select", "embedding"], tmp_path / "found.json", quick=False)
    found = gpu_check.read(tmp_path / "found.json")["sections"]
    assert found["noise"]["status"] == "passed"
    assert {found[name]["error"] for name in ("select", "embedding")} == {"the time of the whole run is over"}


def test_a_failure_is_the_error_of_its_section(monkeypatch):
    monkeypatch.setitem(gpu_check.SECTIONS, "noise", ("gpu_plan", "violations"))  # a Setting is no tensor
    section = gpu_check.run_section("noise", Setting(torch.device("cpu"), TINY))
    assert section["status"] == "failed" and section["error"].startswith("RuntimeError: ") and "violations" in section["traceback"]


def test_checks_fail_beyond_their_bar_and_for_a_nan():
    assert Check("", 1e-6, 1e-6).passed and not Check("", 2e-6, 1e-6).passed and not Check("", float("nan"), 1e-6).passed
    assert violations(True, torch.tensor([True, False]), False) == 2


def test_the_printed_lines_tell_rooflines_bars_and_steps(capsys):
    timing = {"name": "mixture", "seconds": 4e-5, "bytes": 1.0, "flops": 0.0, "roofline": 1e-5, "of_roofline": 0.25}
    timing |= {"bar": 3.5e-5, "met": False, "against": "dense", "against_seconds": 4e-4, "speed_up": 10.0}
    whole = {"seconds": 2.0, "generated_tokens_per_s": 5000.0, "parts": {"inputs": 0.1, "logprobs": 0.4}}
    absent = {"name": "token", "seconds": 2e-3, "roofline": 0.0, "liger": "liger-kernel is not installed"}
    beside = absent | {"liger": "Liger", "liger_seconds": 3e-3, "liger_speed_up": 1.5}
    figures = {
        "timings": [timing, absent, beside],
        "bars": [{"name": "rows", "value": 3.0, "bar": 16.0, "met": True}],
        "soft": {"at_32_layers": whole},
    }
    checks = [{"name": "words", "error": 3.0, "bar": 0, "passed": False}]
    sections = {"noise": {"status": "failed", "checks": checks}, "rollout": {"status": "passed", "figures": figures}}
    gpu_check.print_results({"passed": False, "sections": sections})
    text = capsys.readouterr().out
    for line in (
        "noise      failed, 0 of 1 checks",
        "FAILED words: 3, at most 0",
        "0.040 ms  mixture,  25% of roofline, dense 0.400 ms (10.00x), bar 0.035 NOT MET",
        "2.000 ms  token, liger-kernel is not installed\n",
        "2.000 ms  token, Liger 3.000 ms (1.50x)\n",
        "3  rows, bar 16 met",
        "2000 ms  soft step, on a line to 32 layers: inputs 100, logprobs 400 ms; 5,000 generated tokens/s",
    ):
        assert line in text


def test_the_straight_line_through_two_sizes():
    from benchmarks.gpu_learner import PARTS, extrapolated

    def measured(layers: int) -> dict:
        parts = dict.fromkeys(PARTS, 0.1) | {"transformer": 0.05 * layers}
        return {"seconds": sum(parts.values()), "parts": parts, "rows": 100, "generated_tokens": 80}

    whole = extrapolated({"4": measured(4), "8": measured(8)})
    assert whole["seconds"] == pytest.approx(0.3 + 0.05 * 32) and whole["parts"]["transformer"] == pytest.approx(1.6)
    assert whole["generated_tokens_per_s"] == pytest.approx(80 / 1.9)


@pytest.mark.parametrize("scale", [FULL, QUICK, TINY])
def test_the_batch_of_a_step_is_as_large_as_the_scale_says(scale):
    from benchmarks.gpu_learner import make_batch
    from configs.schema import Mode

    soft, hard = (make_batch(scale, mode, 0.05) for mode in (Mode.soft, Mode.hard))
    assert soft.rows == hard.rows and len(soft.soft.weight) == len(hard.hard.weight) > 0
    assert scale is TINY or soft.rows == scale.learner_rows
