# SPDX-License-Identifier: Apache-2.0
"""A trace of requests: its columns in memory, and the reader of CSV and JSONL files."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

COLUMNS = ("timestamp", "input_length", "output_length")
HASH_BLOCK_SIZES = (512, 16)  # tokens; tried in this order
MAX_LENGTH = 2**31 - 1


class InputError(ValueError):
    """What the user gave can't be used; one line names the file and line, or the option."""


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival; request i has hash_ids[hash_begin[i]:hash_begin[i + 1]]."""

    name: str
    timestamps: npt.NDArray[np.float64]  # [n] milliseconds
    input_lengths: Int64Array  # [n] tokens
    output_lengths: Int64Array  # [n] tokens
    hash_ids: Int64Array  # [ids of all requests, or more]
    hash_begin: Int64Array  # [n + 1]
    hash_block_size: int = 0  # tokens an id stands for; 0: the trace has no ids
    synthetic: bool = False

    def __len__(self) -> int:
        """How many requests."""
        return len(self.input_lengths)

    @property
    def max_length(self) -> int:
        """Tokens of the longest request, its output included."""
        return int((self.input_lengths + self.output_lengths).max())

    def request_ids(self, index: int) -> Int64Array:
        """The hash ids of one request."""
        return self.hash_ids[self.hash_begin[index] : self.hash_begin[index + 1]]

    def head(self, count: int) -> Trace:
        """The first `count` requests."""
        return replace(
            self,
            timestamps=self.timestamps[:count],
            input_lengths=self.input_lengths[:count],
            output_lengths=self.output_lengths[:count],
            hash_begin=self.hash_begin[: count + 1],
        )


@dataclass(frozen=True)
class _Row:
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int]


def read_trace(path: Path, hash_block_size: int | None = None) -> Trace:
    """Reads a CSV or JSONL file, plain or gzip; raises InputError with one line that says where.

    `hash_block_size`: tokens that a hash id stands for; inferred where None.
    """
    lines = io.StringIO(_read_text(path), newline="")
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise InputError(f"{path}: expected a CSV header or JSON lines, got an empty file")
    lines.seek(0)
    parse = _json_rows if first.lstrip()[0] in "{[" else _csv_rows
    numbered = list(parse(path, lines))
    if not numbered:
        raise InputError(f"{path}: expected at least one request after the header, got none")
    numbered.sort(key=lambda item: item[1].timestamp)  # stable: ties keep the file's order
    rows = [row for _, row in numbered]
    counts = np.array([len(row.hash_ids) for row in rows], np.int64)
    trace = Trace(
        path.name,
        np.array([row.timestamp for row in rows], np.float64),
        np.array([row.input_length for row in rows], np.int64),
        np.array([row.output_length for row in rows], np.int64),
        np.array([hash_id for row in rows for hash_id in row.hash_ids], np.int64),
        np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]),
    )
    if not len(trace.hash_ids):
        return trace
    block_size = _hash_block_size(path, trace, numbered, hash_block_size)
    return replace(trace, hash_block_size=block_size)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{path}: expected a whole gzip file, got a broken one ({error})"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte {data[error.start]:#04x}"
        raise InputError(f"{path}: expected CSV or JSON lines, got {byte}") from error
    if "\0" in text:
        raise InputError(f"{path}: expected CSV or JSON lines, got a NUL byte")
    return text


def _json_rows(path: Path, lines: io.StringIO) -> Iterator[tuple[int, _Row]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: expected a JSON object, got {_quote(line)}") from error
        if not isinstance(value, dict):
            raise InputError(f"{where}: expected a JSON object, got {_quote(line)}")
        if missing := [name for name in COLUMNS if name not in value]:
            raise InputError(f"{where}: expected {', '.join(missing)}, got {_quote(line)}")
        ids = value.get("hash_ids", [])
        if not isinstance(ids, list) or not all(type(i) is int and abs(i) < 2**63 for i in ids):
            raise InputError(f"{where}: hash_ids: expected a list of integers, got {_quote(ids)}")
        yield number, _row(where, [value[name] for name in COLUMNS], ids)


def _csv_rows(path: Path, lines: io.StringIO) -> Iterator[tuple[int, _Row]]:
    reader = csv.reader(lines)
    header: list[str] | None = None
    indices: list[int] = []
    try:
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            where = f"{path}:{reader.line_num}"
            if header is None:
                header = [field.strip() for field in fields]
                if missing := [name for name in COLUMNS if name not in header]:
                    wanted = "the columns " + ", ".join(COLUMNS)
                    raise InputError(
                        f"{where}: expected {wanted}, got {_quote(','.join(fields))}"
                        f" without {', '.join(missing)}"
                    )
                indices = [header.index(name) for name in COLUMNS]
                continue
            if len(fields) != len(header):
                raise InputError(f"{where}: expected {len(header)} fields, got {len(fields)}")
            numbers = [_number(fields[index].strip()) for index in indices]
            yield reader.line_num, _row(where, numbers, [])
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: expected CSV, got {error}") from error


def _number(text: str) -> Any:
    """The number that a CSV field holds; the text itself where it holds none."""
    if re.fullmatch("[+-]?[0-9]{1,18}", text):
        return int(text)
    try:
        return text if "_" in text else float(text)
    except ValueError:
        return text


def _row(where: str, values: list[Any], ids: list[int]) -> _Row:
    timestamp, input_length, output_length = values
    if type(timestamp) not in (int, float) or not abs(timestamp) < 1e18:  # refuses nan, too
        raise InputError(f"{where}: timestamp: expected milliseconds, got {_quote(timestamp)}")
    for name, value in (("input_length", input_length), ("output_length", output_length)):
        if type(value) is not int or not 1 <= value <= MAX_LENGTH:
            wanted = f"an integer from 1 to {MAX_LENGTH}"
            raise InputError(f"{where}: {name}: expected {wanted}, got {_quote(value)}")
    return _Row(float(timestamp), input_length, output_length, ids)


def _hash_block_size(
    path: Path, trace: Trace, numbered: list[tuple[int, _Row]], given: int | None
) -> int:
    """The block size under which every request has an id for each block (the last may be partial).

    Both conventions count: ids for full blocks alone, and one more for a partial last block.
    """
    counts = np.diff(trace.hash_begin)
    candidates = HASH_BLOCK_SIZES if given is None else (given,)
    fits = [
        (counts == trace.input_lengths // size) | (counts == -(-trace.input_lengths // size))
        for size in candidates
    ]
    for size, fit in zip(candidates, fits, strict=True):
        if fit.all():
            return size
    # The request that speaks against the candidate that fits most of the others.
    line, row = numbered[int(np.argmin(max(fits, key=np.count_nonzero)))]
    sizes = " or ".join(str(size) for size in candidates)
    raise InputError(
        f"{path}:{line}: hash_ids: expected an id for every {sizes} tokens of {row.input_length},"
        f" got {len(row.hash_ids)} ids (--hash-block-size names another block size)"
    )


def _quote(value: object) -> str:
    text = value.strip() if isinstance(value, str) else repr(value)
    return (
        repr(text if len(text) <= 60 else text[:57] + "...")
        if isinstance(value, str)
        else text[:60]
    )
