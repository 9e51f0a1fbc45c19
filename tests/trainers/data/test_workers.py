"""Decode processes must not outlive the process they serve."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from mimray.trainers.data.workers import decode_workers


def test_decode_workers__end_when_their_owner_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(
        textwrap.dedent(
            """
            import time
            from torch.utils.data import DataLoader
            from mimray.trainers.data.workers import decode_workers

            if __name__ == "__main__":
                batches = iter(DataLoader(range(8), batch_size=2, **decode_workers(2)))
                next(batches)
                print("ready", flush=True)
                time.sleep(60)
            """
        )
    )
    owner = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    family = psutil.Process(owner.pid).children(recursive=True)
    assert len(family) >= 3  # the fork server and two decode processes
    owner.kill()
    owner.wait()
    _, alive = psutil.wait_procs(family, timeout=120)
    for process in alive:
        process.kill()
    assert not alive


def test_decode_workers__where_processes_cannot_share_a_lock_there_are_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_lock() -> None:
        raise FileNotFoundError(2, "No such file or directory")  # as without /dev/shm

    monkeypatch.setattr(multiprocessing.get_context("forkserver"), "Lock", no_lock, raising=False)
    assert decode_workers(2, 4) == {"num_workers": 0}
    assert "decoded in the process that uses them" in caplog.text


def test_decode_workers__start_where_tmpdir_is_too_long_for_their_sockets(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    script = (
        "from torch.utils.data import DataLoader\n"
        "from mimray.trainers.data.workers import decode_workers\n"
        "if __name__ == '__main__':\n"
        "    print(sum(map(len, DataLoader(range(8), batch_size=2, **decode_workers(2)))))\n"
    )
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"],
        env={**os.environ, "TMPDIR": str(long)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout == "8\n", done.stderr
