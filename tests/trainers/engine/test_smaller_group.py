"""An elastic run whose batch cannot be shared by all workers there are: some leave the group."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WORKER = """
import sys
import torch
import torch.distributed as dist
from mimray.trainers.engine.deepspeed import smaller_group

place, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", f"file://{place}/meeting", rank=rank, world_size=3)
stays = smaller_group(2, timeout_s=60)
total = torch.tensor(float(rank + 1))
if stays:
    dist.all_reduce(total)
    assert (dist.get_rank(), dist.get_world_size()) == (rank, 2)
    dist.barrier()
print(rank, stays, dist.is_initialized(), float(total), flush=True)
import os
os._exit(0)  # gloo's threads now and then abort an orderly end
"""


def test_smaller_group__the_first_ranks_stay(tmp_path: Path):
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path), str(rank)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip

    said = [worker.communicate(timeout=300) for worker in workers]

    assert [worker.returncode for worker in workers] == [0, 0, 0], said
    assert [out.split() for out, _ in said] == [
        ["0", "True", "True", "3.0"],
        ["1", "True", "True", "3.0"],
        ["2", "False", "False", "3.0"],
    ]
