"""Are the kernels right and fast on this GPU? Needs torch, triton and transformers, and this checkout; nothing is installed.

    python benchmarks/gpu_check.py [--json FILE] [--quick] [--only SECTION ...]

    no GPU     says so, and runs everything in Triton's interpreter on small shapes; exit code 0 when the checks pass, 1 when not
    a GPU      the same checks at an 8B model's sizes, and timings; exit code 1 when a check fails, not when a speed bar is missed

| section | what |
|---|---|
| noise, select, embedding, graph | the rollout's kernels: the CPU's bits, brute force, the definition, a captured graph |
| stages, logprob | the learner's kernels, values and gradients, against float64 |
| rollout, kernels | timings against the roofline, the dense form and torch's own |
| memory | peak of the log-probabilities as tokens grow |
| learner | an optimiser step of a model of Llama-3.1-8B's shape |

Sections run in a worker process. FILE is written after each; a section that fails, or kills or blocks the worker, is recorded as
failed, and the others run in a new one. The whole run ends after LIMIT_S.
"""

import argparse
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

INTERPRETED = "TRITON_INTERPRET"  # Triton must know before its first import
SECTIONS = {  # name: module of this folder, function of a Setting
    "noise": ("gpu_correctness", "check_noise"),
    "select": ("gpu_correctness", "check_select"),
    "embedding": ("gpu_correctness", "check_embedding"),
    "graph": ("gpu_correctness", "check_graph"),
    "stages": ("gpu_gradients", "check_stages"),
    "logprob": ("gpu_gradients", "check_logprob"),
    "rollout": ("gpu_timing", "time_rollout"),
    "kernels": ("gpu_timing", "time_learner_kernels"),
    "memory": ("gpu_timing", "measure_memory"),
    "learner": ("gpu_learner", "time_learner"),
}
LIMIT_S = {"full": 470.0, "quick": 115.0, "interpreter": 300.0}  # of the whole run
SECTION_LIMIT_S = {"full": 150.0, "quick": 60.0, "interpreter": 150.0}
POLL_S = 0.5
BROKEN = 3  # exit code of a worker whose GPU does not answer any more after a failure
PACKAGES = ("torch", "triton", "transformers", "numpy")
TRACEBACK_CHARS = 2000

Results = dict[str, Any]


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here, after every section")
    parser.add_argument("--quick", action="store_true", help="fewer and smaller: under two minutes")
    parser.add_argument("--only", action="append", choices=list(SECTIONS), metavar="SECTION", help="one section; may be repeated")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.only or list(SECTIONS)
    if arguments.worker:
        return work(names, arguments.json, arguments.quick)
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.json or Path(folder) / "gpu_check.json"
        supervise(names, path, arguments.quick)
        results = read(path)
    print_results(results)
    return 0 if results["passed"] else 1


# The process that starts others


def supervise(names: list[str], path: Path, quick: bool) -> None:
    """Run the sections in workers until each has a result in the file."""
    import torch

    on_gpu = torch.cuda.is_available()
    mode = ("quick" if quick else "full") if on_gpu else "interpreter"
    if not on_gpu:
        print("no GPU here: the kernels run in Triton's interpreter on small shapes, and no time means anything", flush=True)
    write(path, {"mode": mode, "passed": False, "sections": {}})
    environment = {name: value for name, value in os.environ.items() if name != INTERPRETED} | (
        {} if on_gpu else {INTERPRETED: "1"}
    )
    ends = time.monotonic() + LIMIT_S[mode]
    while left := [name for name in names if name not in read(path)["sections"]]:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--json", str(path)]
        command += ["--quick"] * quick + [word for name in left for word in ("--only", name)]
        reason = watch(subprocess.Popen(command, env=environment), path, ends, SECTION_LIMIT_S[mode])
        results = read(path)
        sections = results["sections"]
        struck = [name for name, section in sections.items() if section["status"] == "running"]
        if time.monotonic() >= ends or left[0] not in sections:  # nothing more will come
            struck += [name for name in left if name not in sections]
        for name in struck:
            sections[name] = {"status": "failed", "error": reason}
        write(path, results)
    results = read(path)
    write(path, results | {"passed": all(section["status"] == "passed" for section in results["sections"].values())})


def watch(worker: "subprocess.Popen[bytes]", path: Path, ends: float, section_limit_s: float) -> str:
    """Why the worker ended: by itself, or because its section or the whole run took too long."""
    current, begun = "", time.monotonic()
    while True:
        try:
            return f"the worker ended with code {worker.wait(timeout=POLL_S)}"
        except subprocess.TimeoutExpired:
            now = time.monotonic()
        running = next((name for name, section in read(path)["sections"].items() if section["status"] == "running"), "")
        if running != current:
            current, begun = running, now
        if now >= ends or now - begun >= section_limit_s:
            worker.kill()
            worker.wait()
            return "the time of the whole run is over" if now >= ends else f"no end after {section_limit_s:g} s"


def read(path: Path) -> Results:
    """The results so far."""
    found: Results = json.loads(path.read_text())
    return found


def write(path: Path, results: Results) -> None:
    """The file is always a whole one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


# The worker


def work(names: list[str], path: Path, quick: bool) -> int:
    """Run the sections one after another, writing the file after each; the exit code."""
    import torch

    from benchmarks.gpu_plan import FULL, QUICK, TINY, Setting

    interpreted = os.environ.get(INTERPRETED) == "1"
    device = torch.device("cpu" if interpreted else "cuda")
    setting = Setting(device, TINY if interpreted else QUICK if quick else FULL)
    write(path, read(path) | {"device": describe_device(), "versions": versions()})
    for name in names:
        results = read(path)
        results["sections"][name] = {"status": "running"}
        write(path, results)
        begun = time.monotonic()
        torch.manual_seed(0)
        section = run_section(name, setting)
        results["sections"][name] = section | {"wall_seconds": round(time.monotonic() - begun, 2)}
        write(path, results)
        print(f"{name}: {section['status']} after {time.monotonic() - begun:.1f} s", flush=True)
        gc.collect()
        if not interpreted:
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                return BROKEN
    return 0


def run_section(name: str, setting: Any) -> Results:
    """The section's checks, or its figures, and whether it passed; a failure is its error."""
    module, function = SECTIONS[name]
    try:
        found = getattr(importlib.import_module(f"benchmarks.{module}"), function)(setting)
    except Exception as error:
        text = traceback.format_exc()[-TRACEBACK_CHARS:]
        return {"status": "failed", "error": f"{type(error).__name__}: {error}"[:TRACEBACK_CHARS], "traceback": text}
    if isinstance(found, list):
        checks = [check.record() for check in found]
        return {"status": "passed" if all(check["passed"] for check in checks) else "failed", "checks": checks}
    return {"status": "passed", "figures" if setting.on_gpu else "rehearsal": found}


def describe_device() -> Results:
    """What the kernels run on."""
    import torch

    if not torch.cuda.is_available():
        return {"name": "Triton's interpreter", "machine": platform.machine()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that matter."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


# What is printed


def print_results(results: Results) -> None:
    """One line per section, failed check, timing and bar."""
    packages = ", ".join(f"{name} {version}" for name, version in results.get("versions", {}).items())
    print(f"\n{results.get('device', {}).get('name', 'no worker started')} ({packages})")
    for name, section in results["sections"].items():
        checks = section.get("checks", [])
        counted = f", {sum(check['passed'] for check in checks)} of {len(checks)} checks" if checks else ""
        print(f"{name:<10} {section['status']}{counted}{': ' + section['error'] if 'error' in section else ''}")
        for check in checks:
            if not check["passed"]:
                print(f"    FAILED {check['name']}: {check['error']:.3g}, at most {check['bar']:.3g}")
        for line in format_figures(section.get("figures", {})):
            print(f"    {line}")


def format_figures(figures: Results) -> list[str]:
    """Timings, then bars, then the learner's steps."""
    lines = []
    for t in figures.get("timings", []):
        roofline = f", {t['of_roofline']:4.0%} of roofline" if t["roofline"] else ""
        other = f", {t['against']} {1e3 * t['against_seconds']:.3f} ms ({t['speed_up']:.2f}x)" if "speed_up" in t else ""
        bar = f", bar {1e3 * t['bar']:.3f} {'met' if t['met'] else 'NOT MET'}" if "bar" in t else ""
        if "liger" in t:
            took = f" {1e3 * t['liger_seconds']:.3f} ms ({t['liger_speed_up']:.2f}x)" if "liger_seconds" in t else ""
            other += f", {t['liger']}{took}"
        lines.append(f"{1e3 * t['seconds']:10.3f} ms  {t['name']}{roofline}{other}{bar}")
    for b in figures.get("bars", []):
        lines.append(f"{b['value']:10.3g}  {b['name']}, bar {b['bar']:.3g} {'met' if b['met'] else 'NOT MET'}")
    for form, step in figures.items():
        if isinstance(step, dict) and "at_32_layers" in step:
            whole = step["at_32_layers"]
            parts = ", ".join(f"{part} {1e3 * seconds:.0f}" for part, seconds in whole["parts"].items())
            speed = f"{whole['generated_tokens_per_s']:,.0f} generated tokens/s"
            lines.append(f"{1e3 * whole['seconds']:10.0f} ms  {form} step, on a line to 32 layers: {parts} ms; {speed}")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
