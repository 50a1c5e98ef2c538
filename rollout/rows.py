"""Rows of a data set, from a file or from the Hugging Face hub.

    FILE.jsonl, FILE.json (one object a line, or one list), both also .gz; FILE.parquet      -> file_rows
    anything else: a hub id, or a folder that `datasets` reads like one                      -> hub_rows, by split

Each row comes with its place, for error messages.
"""

import gzip
import hashlib
import json
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from configs.errors import InputError

FILE_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")

ID_FIELDS = ("id", "unique_id")  # what data sets call the name of a row

Row = tuple[str, Mapping[str, Any]]  # (where it stands; the fields)


def file_rows(path: Path) -> Iterator[Row]:
    """The rows of a file in its order. InputError names file and line: no such file, broken JSON, not UTF-8, not a table ..."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a {', '.join(FILE_SUFFIXES)} file or a hub id")
    if not path.name.endswith(FILE_SUFFIXES):
        raise InputError(f"{path}: expected a name that ends with {', '.join(FILE_SUFFIXES)}; convert the file")
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    text = _text(path)
    return _list_rows(path, text) if text.lstrip().startswith("[") else _line_rows(path, text)


def hub_rows(path: str, config: str | None) -> dict[str, Iterator[Row]]:
    """The rows of every split of a hub data set. InputError when the hub does not deliver it."""
    import datasets  # seconds to import, and only here

    try:
        splits = datasets.load_dataset(path, config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"task: {path}: the Hugging Face hub did not deliver it: {_first_line(error)}; check name, config and network, or "
            "download it and give {path: FILE.jsonl, question: FIELD, answer: FIELD}"
        ) from error
    return {name: ((f"{path} [{name}]: row {n}", row) for n, row in enumerate(rows)) for name, rows in splits.items()}


def repeated_id(where: str, row: Mapping[str, Any], places: dict[str, str]) -> str | None:
    """What is wrong with a row whose id was there before; `places` remembers where each stood first."""
    for field in ID_FIELDS:
        if row.get(field) is not None:
            first = places.setdefault(f"{field} {row[field]!r}", where)
            if first != where:
                return f"{field} {row[field]!r} is also that of {first}"
    return None


def fingerprint(*texts: str) -> str:
    """48 bits of SHA-256 over the texts and their bounds, as hex: what tells a problem from another in the same place."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]


def say(line: str) -> None:
    """Show a line on standard error."""
    print(f"softrl: {line}", file=sys.stderr, flush=True)


def _text(path: Path) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {_first_line(error)}; fetch or compress it again") from error
    try:
        return data.decode("utf-8-sig")  # Windows programs begin a file with a byte-order mark
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8 text; convert the file") from error


def _line_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(): JSON strings may hold U+2028 and its like
        if line.strip():
            yield f"{path}:{number}", _object(_json(path, line, first_line=number), f"{path}:{number}")


def _list_rows(path: Path, text: str) -> Iterator[Row]:
    for number, row in enumerate(_json(path, text, first_line=1), start=1):
        yield f"{path}: row {number}", _object(row, f"{path}: row {number}")


def _json(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{first_line + error.lineno - 1}: broken JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        raise InputError(f"{path}:{first_line}: JSON that cannot be read: {error}") from error


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object with fields, got {type(value).__name__}")
    return value


def _parquet_rows(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        rows = read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {_first_line(error)}") from error
    return ((f"{path}: row {number}", row) for number, row in enumerate(rows, start=1))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
