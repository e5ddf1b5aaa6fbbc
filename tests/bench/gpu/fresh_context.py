# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for pytest-xdist: a worker whose CUDA context a test has broken ends, so that the
tests after it run in another one."""

from __future__ import annotations

import os

import torch

has_failed = False


def pytest_runtest_logreport(report) -> None:
    global has_failed
    has_failed |= report.failed


def pytest_runtest_logfinish() -> None:
    if not has_failed or "PYTEST_XDIST_WORKER" not in os.environ or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        os._exit(3)
