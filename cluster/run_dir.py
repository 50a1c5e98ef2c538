"""The folder of a run, and the only place that writes its small files.

    runs/NAME/config.yaml               what runs, resolved
    runs/NAME/metrics.jsonl             one flat JSON object per optimiser step, numbered from 1; each step once
    runs/NAME/metrics.superseded.jsonl  rows that a resume went back behind, and what a kill left of a line
    runs/NAME/events.jsonl              pushes, checkpoints, alarms, restarts: {"time", "kind", ...}
    runs/NAME/status.json               who waits for whom, since when; rewritten whole
    runs/NAME/{checkpoints,rollouts,eval}/

Lines are appended by one write each, so a reader may tail them at any time and a killed run leaves at most one broken line.
"""

import fcntl
import json
import math
import os
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Self

from cluster.waits import named
from configs.errors import InputError, RunError
from configs.load import LEAVES, dump_config, load_config
from configs.schema import Config
from learner.checkpoint import FOLDER as CHECKPOINTS
from learner.checkpoint import latest, recover
from rollout.files import cannot_write, replace_file

CONFIG, METRICS, SUPERSEDED = "config.yaml", "metrics.jsonl", "metrics.superseded.jsonl"
EVENTS, STATUS = "events.jsonl", "status.json"

# Keys that a resumed run may change: where it lies, how often it looks, and how the work is cut up. Everything else decides what
# is learned (run.steps too: the cosine schedule ends there), so that a key added to the schema is held fixed until it is named.
FREE_SECTIONS = {"checkpoint", "eval", "push"}
FREE_KEYS = {
    *("run.name", "run.dir"),
    *("engine.count", "engine.tensor_parallel", "engine.max_num_seqs", "engine.max_model_len", "engine.kv_cache_gib"),
    *("engine.enforce_eager", "engine.threads", "engine.start_timeout_s", "engine.request_timeout_s"),
    *("learner.ranks", "learner.micro_batch_tokens", "learner.activation_checkpointing", "learner.threads"),
    *("learner.compile", "learner.step_timeout_s"),
}


class RunDir:
    """An open run folder; use `create`. One process writes to it at a time."""

    def __init__(self, folder: Path, created: bool, resume_from: Path | None, events: "JsonLines", metrics: "MetricsLog") -> None:
        self.folder, self.metrics, self._events = folder, metrics, events
        self.created = created  # this command made the run; False where it resumes one, even from its start
        self.resume_from = resume_from  # the checkpoint to go on from; None in a new run
        self.step = _steps_done(resume_from)
        self._status: dict[str, Any] = {"state": "starting", "since": now()}
        self._waits: dict[int, dict[str, Any]] = {}
        self._guard = threading.Lock()

    @classmethod
    def create(cls, config: Config, resume: bool) -> Self:
        """Make the folder `run.dir/run.name`, or open it to resume from its newest checkpoint, from the start if it has none.

        Raises InputError as `check` does, and when another process writes to the folder; RunError when it cannot be written.
        """
        folder, checkpoint, changed = cls.check(config, resume)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
        events = JsonLines(folder / EVENTS)
        events.lock()
        if resume:
            recover(folder)
            checkpoint = latest(folder)
        moved = _supersede(folder, _steps_done(checkpoint))
        replace_file(folder / CONFIG, lambda partial: partial.write_text(dump_config(config)))
        run = cls(folder, not resume, checkpoint, events, MetricsLog(folder / METRICS))
        run.event("resume" if resume else "start", step=run.step, changed=changed, superseded_rows=moved)
        run.status("starting")
        return run

    @staticmethod
    def check(config: Config, resume: bool) -> tuple[Path, Path | None, dict[str, Any]]:
        """The run's folder, the checkpoint to go on from, and the free keys that changed; writes nothing.

        Raises InputError when a new run's folder exists already; when there is no folder to resume, or a key that decides what is
        learned has changed.
        """
        # Absolute, because actors on a cluster write checkpoints from working directories of their own.
        folder = (Path(config.run.dir).expanduser() / config.run.name).resolve()
        if not resume:
            _require_new(folder)
            return folder, None, {}
        return folder, _checkpoint_to_resume(folder), _check_unchanged(folder / CONFIG, config)

    def discard(self) -> None:
        """Remove the folder of a new run that turned out to be bad input, so that the corrected command can use its name.

        Only for a run that this command `created`: any other folder holds somebody's work.
        """
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.metrics.close()
        self._events.close()

    @property
    def learned(self) -> bool:
        """Whether there is a step's row or a checkpoint: work that nobody wants to lose."""
        return self.checkpoints.exists() or (self.folder / METRICS).stat().st_size > 0

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints (learner.checkpoint), absent until the first is written."""
        return self.folder / CHECKPOINTS

    def event(self, kind: str, **fields: Any) -> None:
        """Append to events.jsonl with the time. Raises RunError when it cannot be written."""
        self._events.append({"time": now(), "kind": kind, **fields})

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file such as "eval/step_000040.json" below the folder, whole or not at all; returns its path."""
        path = self.folder / name
        text = json.dumps(value, indent=1, default=_jsonable)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(path, error) from error
        replace_file(path, lambda partial: partial.write_text(text + "\n"))
        return path

    def status(self, state: str, **fields: Any) -> None:
        """Rewrite status.json: what the run does ("starting", "training", "done", "failed"), and anything to say of it."""
        with self._guard:
            since = self._status["since"] if state == self._status["state"] else now()
            self._status = {"state": state, "since": since, **fields}
            self._write_status()

    @contextmanager
    def waiting(self, name: str, for_whom: str, deadline_s: float) -> Iterator[None]:
        """Round every wait: status.json says that `name` waits for `for_whom` until the body ends.

        A TimeoutError of the body becomes a RunError that names the wait.
        """
        wait = {"name": name, "for": for_whom, "since": now(), "deadline_s": deadline_s}
        with self._guard:
            self._waits[id(wait)] = wait
            self._write_status()
        try:
            with named(name, for_whom, deadline_s):
                yield
        finally:
            with self._guard:
                del self._waits[id(wait)]
                self._write_status()

    def _write_status(self) -> None:
        process = {"host": socket.gethostname(), "pid": os.getpid(), "updated": now()}
        self.write_json(STATUS, {**self._status, **process, "waiting": list(self._waits.values())})


class JsonLines:
    """A file that only grows, one JSON object a line, one write a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
            self._file: IO[bytes] = open(path, "ab", buffering=0)  # noqa: SIM115  open as long as the run
            if torn:  # a killed run's last line must not swallow the next
                self._file.write(b"\n")
        except OSError as error:
            raise cannot_write(path, error) from error

    def lock(self) -> None:
        """Hold the file until this process ends. Raises InputError when another process does."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{self.path.parent}: another process writes to this run; wait for it, or set another run.name"
            ) from None
        except OSError:
            pass  # a file system without locks

    def append(self, row: Mapping[str, Any]) -> None:
        """Raises RunError when the line cannot be written whole; none of it is then left in the file."""
        rest = json.dumps(row, default=_jsonable).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(end)
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """End the writing, and give up the lock if it was taken."""
        self._file.close()


class MetricsLog(JsonLines):
    """metrics.jsonl."""

    def write(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Append the row of a step and return it. Raises RunError, with nothing written, for a number that is not finite."""
        row: dict[str, float] = {"step": step}
        for key, value in values.items():
            row[key] = number = _number(value)
            if not math.isfinite(number):
                raise RunError(
                    f"step {step}: {key} = {number}: not finite; lower learner.lr, or --resume from an earlier checkpoint"
                )
        self.append(row)
        return row


def now() -> str:
    """ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


# Opening a folder


def _steps_done(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix("step_"))


def _require_new(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: a file stands where the run's folder should be; set another run.name")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder}: this run folder exists already; go on with it by --resume, or set another run.name")


def _checkpoint_to_resume(folder: Path) -> Path | None:
    if not (folder / CONFIG).is_file():
        others = sorted(path.name for path in folder.parent.glob("*") if (path / CONFIG).is_file())
        there = f"runs there: {', '.join(others)}" if others else f"no runs in {folder.parent}"
        raise InputError(f"{folder}: no such run to resume; {there}; start it without --resume")
    return latest(folder)


def _check_unchanged(path: Path, config: Config) -> dict[str, Any]:
    """The free keys that changed since `path` was written, as {key: [old, new]}. Raises InputError for a fixed one."""
    before = load_config(path)
    changed: dict[str, Any] = {}
    for key in LEAVES:
        old, new = _value(before, key), _value(config, key)
        if old == new:
            continue
        if key not in FREE_KEYS and key.split(".")[0] not in FREE_SECTIONS:
            raise InputError(
                f"{path}: {key} = {_text(old)}: a resumed run keeps it, this command has {_text(new)}; "
                "set it back, or start another run.name"
            )
        changed[key] = [old, new]
    return changed


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, "async_" if section == "async" else section), name)


def _supersede(folder: Path, step: int) -> int:
    """Move the metrics rows that a run at `step` will write again, and broken lines, to SUPERSEDED; returns how many."""
    path = folder / METRICS
    rows = list(_rows(path)) if path.exists() else []
    kept = [line for row, line in rows if row is not None and row.get("step", step + 1) <= step]
    moved = [line for row, line in rows if row is None or row.get("step", step + 1) > step]
    if moved:
        try:  # first the copy, then the cut: a crash between the two leaves a row twice, never nowhere
            with open(folder / SUPERSEDED, "ab") as file:
                file.write(b"\n".join(moved) + b"\n")
        except OSError as error:
            raise cannot_write(folder / SUPERSEDED, error) from error
        replace_file(path, lambda partial: partial.write_bytes(b"".join(line + b"\n" for line in kept)))
    return len(moved)


def _rows(path: Path) -> Iterator[tuple[dict[str, Any] | None, bytes]]:
    """(row, line) of each line; the row is None where the line is no JSON object."""
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        yield (row if isinstance(row, dict) else None), line


def _number(value: Any) -> Any:
    """A scalar of numpy or torch as Python's own, which is what JSON holds."""
    return value.item() if hasattr(value, "item") else value


def _jsonable(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"expected what JSON can hold, found {type(value).__name__}")


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
