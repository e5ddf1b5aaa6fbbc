# SPDX-License-Identifier: Apache-2.0
"""The command: exit codes, what goes to stdout and to stderr, JSON, the report, Ctrl-C."""

from __future__ import annotations

import gzip
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import quire

for package in ("typer", "rich", "matplotlib"):
    pytest.importorskip(package)

SMALL = ["--num-heads", "4", "--num-kv-heads", "2", "--head-dim", "16", "--dtype", "float32"]
LONG_TRACE = "timestamp,input_length,output_length\n" + "".join(
    f"{i},100,2000\n" for i in range(20_000)
)


def quire_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quire", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl.gz"
    rows = [
        {"timestamp": i, "input_length": 40 + i, "output_length": 5, "hash_ids": [0, 1 + i % 3]}
        for i in range(8)
    ]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return path


def test_version_and_info():
    version = quire_command("--version")
    assert (version.returncode, version.stdout) == (0, f"quire {quire.__version__}\n")
    info = quire_command("info")
    assert info.returncode == 0
    for text in (quire.__version__, quire.cpu_isa(), quire.cuda_state(), "bfloat16"):
        assert text in info.stdout


def test_replay_with_attention(trace):
    result = quire_command("replay", str(trace), *SMALL)
    assert result.returncode == 0, result.stderr
    for text in (
        "hash ids stand for 16 tokens each",
        "saturated",
        "paged + prefix cache",
        "blocks leaked",
        "attention GB/s",
        "random rows against float64: passed",
    ):
        assert text in result.stdout
    assert "paged: 8 requests in" in result.stderr and "\x1b" not in result.stderr


def test_bookkeeping_alone_has_no_attention_rows(trace):
    result = quire_command("replay", str(trace), "--attention", "none", "--kv-memory", "unlimited")
    assert result.returncode == 0, result.stderr
    assert "attention GB/s" not in result.stdout and "verify" not in result.stdout
    assert "bookkeeping alone" in result.stdout and "unlimited" in result.stdout


def test_json_is_alone_on_stdout(trace):
    result = quire_command("replay", str(trace), *SMALL, "--json", "--limit", "6", "--verify", "9")
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["trace"] == {
        "name": "trace.jsonl.gz",
        "synthetic": False,
        "requests": 6,
        "requests_in_file": 8,
        "prompt_tokens": sum(range(40, 46)),
        "output_tokens": 30,
        "max_length": 50,
        "hash_block_size": 16,
        "ids_seen_before": pytest.approx(8 / 12),
    }
    names = [policy["policy"] for policy in values["policies"]]
    assert names == ["contiguous", "paged", "paged + prefix cache"]
    for policy in values["policies"]:
        assert policy["requests"] == 6 and policy["leaked_blocks"] == 0
        assert 0 < policy["filled_share"] <= 1 and 0 < policy["held_share"] <= 1
    assert values["verify"]["passed"] and values["verify"]["num_rows"] == 9
    assert values["quire"] == quire.__version__ and "--limit 6" in values["command"]


def test_the_report_is_one_page_with_the_figures(trace, tmp_path):
    page = tmp_path / "report.html"
    arguments = ["replay", str(trace), "--attention", "none", "--json", "--report", str(page)]
    result = quire_command(*arguments)
    assert result.returncode == 0, result.stderr
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["']?https?:|@import|<script|<link""", text)
    assert text.count("<svg") == 2 and "--attention none" in text
    for policy in json.loads(result.stdout)["policies"]:
        assert f"<td>{policy['steps']:,}</td>" in text
        assert f"<td>{policy['filled_share']:.1%}</td>" in text
        assert policy["policy"] in text


def test_without_a_trace_it_says_synthetic():
    result = quire_command("replay", "--attention", "none", "--limit", "20")
    assert result.returncode == 0 and "synthetic trace, no real traffic" in result.stdout
    again = quire_command("replay", "--attention", "none", "--limit", "20", "--seed", "1")
    assert again.stdout != result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.csv"], "No such file"),
        (["--kv-memory", "12 apples"], "--kv-memory: expected a size"),
        (["--kv-memory", "unlimited"], "--kv-memory: expected a size, as attention"),
        (["--kv-memory", "1KiB"], "--kv-memory: expected .* for the longest request"),
        (["--num-heads", "3"], "--num-heads: expected a multiple"),
        (["--dtype", "int8"], "--dtype: expected"),
        (["--report", "no/such/folder/x.html"], "--report: expected a file"),
        (["--attention", "none", "--verify", "3"], "--verify: expected"),
    ],
)
def test_what_can_not_be_used_is_one_line_and_code_2(arguments, message):
    result = quire_command("replay", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(f"quire replay: .*{message}.*\n", result.stderr)


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b\x08", b"\0\xff", b"a,b\n1,2\n", b"{}"])
def test_a_broken_file_is_one_line_and_code_2(tmp_path, content):
    path = tmp_path / "broken"
    path.write_bytes(content)
    result = quire_command("replay", str(path))
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"quire replay: .*broken.*: expected .*, got .*\n", result.stderr)


def test_a_failed_check_is_code_1(monkeypatch, trace, capsys):
    from quire.commands import app

    monkeypatch.setattr(quire, "append_kv", lambda *_: None)
    with pytest.raises(SystemExit) as exit_info:
        app(["replay", str(trace), *SMALL])
    assert exit_info.value.code == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_missing_package_is_one_line():
    code = "import sys; sys.modules['typer'] = None; from quire.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1 and 'pip install "quire[cli]"' in result.stderr
    assert result.stderr.count("\n") == 1


def test_import_quire_loads_neither_replay_nor_its_packages():
    code = (
        "import sys, quire; print([m for m in sys.modules"
        " if m.split('.')[0] in ('typer', 'rich', 'matplotlib') or 'replay' in m])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout == "[]\n"


def start_long_replay(path: Path, **streams) -> subprocess.Popen[bytes]:
    path.write_text(LONG_TRACE)
    command = [sys.executable, "-m", "quire", "replay", str(path), "--attention", "none"]
    return subprocess.Popen(command, **streams)


HEADLINE = b"bookkeeping alone"  # the replay begins
LAST_LINE = rb"quire replay: interrupted; contiguous: [\d,]+ of 20,000 requests, .*"


def test_ctrl_c_says_what_was_done(tmp_path):
    process = start_long_replay(tmp_path / "t.csv", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while HEADLINE not in process.stdout.readline():
        pass
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert re.fullmatch(LAST_LINE + rb"\n", stderr)


def test_ctrl_c_leaves_the_terminal_clean(tmp_path):
    reader, writer = pty.openpty()
    process = start_long_replay(tmp_path / "t.csv", stdout=writer, stderr=writer)
    os.close(writer)
    shown, interrupted = b"", False
    while True:
        try:
            shown += os.read(reader, 1 << 16)
        except OSError:  # the terminal is closed
            break
        if not interrupted and b"tokens/s" in shown:
            process.send_signal(signal.SIGINT)
            interrupted = True
    os.close(reader)
    assert process.wait(timeout=20) == 130
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l") > 0  # the cursor is back
    assert re.search(LAST_LINE + rb"\r\n$", shown)
