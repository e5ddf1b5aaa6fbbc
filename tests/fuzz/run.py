# SPDX-License-Identifier: Apache-2.0
"""Builds the libFuzzer targets with clang and runs each for some seconds.

    python tests/fuzz/run.py [--seconds 60] [kv_cache] [file_store] [call_log]

The corpus grows in build-fuzz/corpus. A finding ends the run with an error and leaves the input
in build-fuzz; run the target with that file as its argument to see it again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build-fuzz"
TARGETS = ["kv_cache", "file_store", "call_log"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", default=TARGETS, metavar="target")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--jobs", type=int, default=2, help="of the build")
    arguments = parser.parse_args()
    subprocess.run(
        ["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", "-DQUIRE_FUZZ=ON"]
        + ["-DCMAKE_CXX_COMPILER=clang++", "-DCMAKE_BUILD_TYPE=None"]
        + ["-DCMAKE_CXX_FLAGS=-O1 -g1"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    names = [f"fuzz_{target}" for target in arguments.targets]
    build = ["cmake", "--build", BUILD, "-j", str(arguments.jobs), "--target", *names]
    subprocess.run(build, check=True)
    environment = dict(os.environ)
    if Path("/dev/shm").is_dir():  # a disk would take most of the time
        environment["TMPDIR"] = "/dev/shm"
    for name in names:
        corpus = BUILD / "corpus" / name
        corpus.mkdir(parents=True, exist_ok=True)
        print(f"== {name}, {arguments.seconds} s", flush=True)
        limits = [f"-max_total_time={arguments.seconds}", "-max_len=2048", "-print_final_stats=1"]
        command = [BUILD / "tests/fuzz" / name, corpus, *limits, f"-artifact_prefix={BUILD}/"]
        subprocess.run(command, check=True, cwd=BUILD, env=environment)


if __name__ == "__main__":
    main()
