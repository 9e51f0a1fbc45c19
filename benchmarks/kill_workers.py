"""SIGKILL for the training workers of a driver: `python benchmarks/kill_workers.py PID`.

By itself and without torch, whose import would take longer than a short training.
"""

from __future__ import annotations

import sys

import psutil


def main() -> None:
    family = psutil.Process(int(sys.argv[1])).children(recursive=True)
    workers = [p for p in family if any("RayTrainWorker" in word for word in p.cmdline())]
    for worker in workers:
        worker.kill()
    if not workers:
        raise SystemExit("there is no worker to kill")


if __name__ == "__main__":
    main()
