"""Decode processes must not outlive the process they serve."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import psutil


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
    _, alive = psutil.wait_procs(family, timeout=10)
    for process in alive:
        process.kill()
    assert not alive
