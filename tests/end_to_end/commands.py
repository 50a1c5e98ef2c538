"""softrl's commands as processes, for the tests that run them."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
SOFTRL = str(Path(sys.executable).with_name("softrl"))
SMALL = [
    "run.steps=3",
    "rollout.prompts_per_step=3",
    "rollout.samples_per_prompt=4",
    "policy.max_cot_tokens=12",
    "policy.max_answer_tokens=5",
    "engine.max_num_seqs=12",
    "engine.kv_cache_gib=0.25",
    "checkpoint.every=2",
    "checkpoint.keep=9",
    "push.verify_every=2",
    "eval.every=0",
    "eval.problems=12",
    "eval.settings=[hard_greedy]",
]
DEADLINE_S = 600

# Every softrl command that README shows, up to the two spaces before its explanation.
README = [
    shlex.split(line)[1:]
    for block in (ROOT / "README.md").read_text().split("```")[1::2]
    for line in re.findall(r"^(softrl .*?)(?:  .*)?$", block, re.MULTILINE)
]


def reader_folder(folder: Path) -> Path:
    """Where the commands are run: an empty folder but for the recipes."""
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


def readme(*words: str) -> list[str]:
    """The README's one command that has all the words and no other option."""
    options = {word for word in words if word.startswith("--")}
    [command] = [c for c in README if set(words) <= set(c) and {w for w in c if w.startswith("--")} == options]
    return command


def softrl(where: Path, command: list[str], *overrides: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([SOFTRL, *command, *overrides], cwd=where, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["kind"] == kind]


def hear_ctrl_c() -> None:
    """In a new process: a shell that runs the tests in the background has made it deaf to SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop_once_saved(run: Path, step: int, how: signal.Signals, command: list[str], *overrides: str) -> int:
    """Start a run, send it a signal once the checkpoint of `step` is there, and return its exit code. Nothing may outlive it."""
    process = subprocess.Popen(
        [SOFTRL, *command, *overrides],
        cwd=run.parents[1],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )
    deadline = time.monotonic() + DEADLINE_S
    while not ((run / "events.jsonl").exists() and step in [event["step"] for event in events(run, "checkpoint")]):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended, or hung, before it was to be stopped"
        time.sleep(0.05)
    others = psutil.Process(process.pid).children(recursive=True)
    ours = [other for other in others if "Agent" not in other.name()]  # Ray's own agents take some minutes to notice
    os.kill(process.pid, how)
    code = process.wait(timeout=120)
    _, left = psutil.wait_procs(ours, timeout=60)
    assert not left
    return code
