# SPDX-License-Identifier: Apache-2.0
"""The trace reader: what goes in comes out, and what is broken is refused by line."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quire.replay.synthetic import synthetic_trace
from quire.replay.trace import InputError, Trace, read_trace

SHARED = Path(__file__).resolve().parents[3] / "shared" / "traces"
FAST = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

lengths = st.integers(1, 5000)
times = st.floats(0, 1e9) | st.integers(0, 10**9)


@st.composite
def requests(draw, block_size: int = 16):
    length = draw(lengths)
    ids = draw(st.lists(st.integers(0, 2**62), min_size=length // block_size, max_size=400))
    return {
        "timestamp": draw(times),
        "input_length": length,
        "output_length": draw(lengths),
        "hash_ids": ids[: length // block_size],
    }


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check_same(trace: Trace, rows: list[dict]) -> None:
    rows = sorted(rows, key=lambda row: float(row["timestamp"]))
    assert trace.timestamps.tolist() == [float(row["timestamp"]) for row in rows]
    assert trace.input_lengths.tolist() == [row["input_length"] for row in rows]
    assert trace.output_lengths.tolist() == [row["output_length"] for row in rows]
    ids = [trace.request_ids(i).tolist() for i in range(len(trace))]
    assert ids == [row.get("hash_ids", []) for row in rows]


@FAST
@given(rows=st.lists(requests(), min_size=1, max_size=8), pack=st.booleans())
def test_jsonl_round_trip(tmp_path, rows, pack):
    path = write_jsonl(tmp_path / "trace", [row | {"extra": "x"} for row in rows])
    if pack:
        path.write_bytes(gzip.compress(path.read_bytes()))
    check_same(read_trace(path, hash_block_size=16), rows)


@FAST
@given(rows=st.lists(requests(), min_size=1, max_size=8), data=st.data())
def test_csv_round_trip_with_any_column_order(tmp_path, rows, data):
    rows = [{k: v for k, v in row.items() if k != "hash_ids"} for row in rows]
    columns = data.draw(st.permutations([*rows[0], "extra"]))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval='a "quoted", field')
    writer.writeheader()
    writer.writerows(rows)
    path = tmp_path / "trace.csv"
    path.write_text(text.getvalue())
    trace = read_trace(path)
    check_same(trace, rows)
    assert trace.hash_block_size == 0


@FAST
@given(data=st.data())
def test_a_corrupted_line_is_named(tmp_path, data):
    rows = [{"timestamp": i, "input_length": 5 + i, "output_length": 3} for i in range(6)]
    lines = [json.dumps(row) for row in rows]
    number = data.draw(st.integers(1, len(lines)))
    field = data.draw(st.sampled_from(["timestamp", "input_length", "output_length"]))
    bad = data.draw(st.sampled_from([None, "7", "x", -1e999, [], {}, True]))
    lines[number - 1] = data.draw(
        st.sampled_from(
            [
                json.dumps(rows[number - 1] | {field: bad}),
                json.dumps({k: v for k, v in rows[number - 1].items() if k != field}),
                lines[number - 1][: data.draw(st.integers(1, len(lines[number - 1]) - 1))],
                "[1, 2, 3]",
            ]
        )
    )
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=rf":{number}: .*expected .*, got ") as caught:
        read_trace(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", ["", "x", "0", "-3", "1.5", "1e3", "1_0", "nan", "9" * 30])
def test_a_bad_length_in_csv(tmp_path, bad):
    path = tmp_path / "trace.csv"
    path.write_text(f"timestamp,input_length,output_length\n1,2,3\n\n2,{bad},3\n")
    with pytest.raises(InputError, match=r":4: input_length: expected an integer from 1 to"):
        read_trace(path)


HEADER = b"timestamp,input_length,output_length\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty file"),
        (b"\n \n", "got an empty file"),
        (HEADER, "got none"),
        (b"a,b\n1,2\n", "expected the columns timestamp, input_length, output_length"),
        (HEADER + b"1,2\n", ":2: expected 3 fields, got 2"),
        (b"[1, 2]\n", ":1: expected a JSON object"),
        (b"\x7fELF\x02\x01\x00\xff\xfe", "expected CSV or JSON lines"),
        (HEADER + b"1,2,3\0\n", "NUL"),
        (gzip.compress(HEADER + b"1,2,3\n" * 999)[:-20], "expected a whole gzip file"),
        (b"\x1f\x8b\x08garbage", "expected a whole gzip file"),
        (
            b'{"timestamp":0,"input_length":9,"output_length":1,"hash_ids":[1.5]}',
            "hash_ids: expected a list of integers",
        ),
    ],
)
def test_a_file_that_is_no_trace(tmp_path, content, message):
    path = tmp_path / "trace"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_trace(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        read_trace(tmp_path / "none")
    with pytest.raises(InputError, match="directory"):
        read_trace(tmp_path)


@pytest.mark.parametrize("size", [16, 512])
@pytest.mark.parametrize("partial", [False, True])
def test_the_hash_block_size_is_inferred(tmp_path, size, partial):
    rows = []
    for i, length in enumerate([700, 1500, 512, 3000]):
        count = -(-length // size) if partial else length // size
        ids = list(range(1000 * i, 1000 * i + count))
        rows.append(dict(timestamp=i, input_length=length, output_length=1, hash_ids=ids))
    path = write_jsonl(tmp_path / "trace", rows)
    assert read_trace(path).hash_block_size == size
    assert read_trace(path, hash_block_size=size).hash_block_size == size
    with pytest.raises(InputError, match="expected an id for every 64 tokens of"):
        read_trace(path, hash_block_size=64)


def test_the_request_against_the_inferred_block_size_is_named(tmp_path):
    rows = [
        dict(timestamp=i, input_length=1000, output_length=1, hash_ids=[1, 2]) for i in range(5)
    ]
    rows[3]["hash_ids"] = [1, 2, 3]
    with pytest.raises(InputError, match=r":4: hash_ids: .* of 1000, got 3 ids"):
        read_trace(write_jsonl(tmp_path / "trace", rows))


def test_head_and_max_length():
    trace = synthetic_trace(50, seed=1)
    head = trace.head(10)
    assert len(head) == 10 and len(trace.head(99)) == 50
    assert np.array_equal(head.request_ids(9), trace.request_ids(9))
    assert head.max_length == (head.input_lengths + head.output_lengths).max()


@pytest.mark.parametrize(
    ("name", "count", "size"),
    [
        ("azure2023_conv.csv.gz", 19366, 0),
        ("mooncake_conversation_a.jsonl.gz", 6848, 512),
        ("agents_magagent_blk16.jsonl.gz", 746, 16),
        ("agents_taubench_blk16.jsonl.gz", 471, 16),
    ],
)
def test_public_traces(name, count, size):
    if not (SHARED / name).exists():
        pytest.skip("the public traces are not beside this repository")
    trace = read_trace(SHARED / name)
    assert (len(trace), trace.hash_block_size) == (count, size)
