"""A signal ends the suite, whatever a test does with it, and nothing it started is left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = """
import os, signal, subprocess, sys
import pytest

@pytest.fixture(scope="session")
def process():
    child = subprocess.Popen(["sleep", "600"])
    print("child", child.pid, file=sys.stderr)
    yield
    # Nothing ends it here, as nothing ends the agents of a Ray whose start was interrupted.

def raise_exit(number, frame):
    sys.exit(number)  # as Ray does

@pytest.mark.parametrize("handler", [None, raise_exit])
def test_swallows(process, handler):
    if handler is not None:
        signal.signal(signal.{name}, handler)
    try:
        os.kill(os.getpid(), signal.{name})
    except (KeyboardInterrupt, SystemExit):
        pass  # as click does

def test_never_runs():
    print("went on", file=sys.stderr)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("handler", ["None", "raise_exit"])
def test_suite__ends_after_the_test_that_swallows_a_signal(
    tmp_path: Path, name: str, handler: str
) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_swallow.py").write_text(
        SUITE.replace("{name}", name).replace("[None, raise_exit]", f"[{handler}]")
    )
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", "--rootdir", tmp_path]
        + ["-c", os.devnull, tmp_path],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == pytest.ExitCode.INTERRUPTED, ended.stdout + ended.stderr
    assert "went on" not in ended.stderr
    assert "by a signal" in ended.stdout
    (child,) = (int(line.split()[1]) for line in ended.stderr.splitlines() if "child" in line)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
