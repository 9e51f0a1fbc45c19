"""Claim: a sweep takes at most 1.2 times as long as its trials themselves.

    python benchmarks/sweep_overhead.py [--data PICTURES] [--trials 12] [--steps 300]

Runs a sweep of short trials (Ray Tune, DeepSpeed, kNN) on this machine and prints its wall time
over the trials' own time, the sum of training and scoring divided by the number that run at once.
Wall time is the whole command after imports: starting Ray, processes, engines, the study, MLflow,
the report. Without --data, photographs that come with the installation are cut into tiles.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from mimray.trainers.cluster import connected, set_environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=None)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--patch-size", type=int, default=8)
    arguments = parser.parse_args()
    set_environment()

    from mimray.trainers.data.sample_photos import write_photo_tiles
    from mimray.tuning.plan import load_sweep, make_plan
    from mimray.tuning.report import write_report
    from mimray.tuning.sweep import Launch, run_sweep

    with tempfile.TemporaryDirectory(prefix="mimray-") as scratch:
        data = arguments.data
        if data is None:
            data = f"{scratch}/tiles"
            write_photo_tiles(Path(data), size_px=64)
        ratios = [round(0.4 + 0.5 * i / arguments.trials, 3) for i in range(arguments.trials)]
        config = load_sweep(
            "mae-mask-depth",
            [
                f"space.method.mask_ratio={{grid: {ratios}}}",
                "space.method.decoder_depth=null",
                f"base.set.data.image_size={arguments.image_size}",
                f"base.set.encoder.patch_size={arguments.patch_size}",
                f"budget.steps={arguments.steps}",
                "scheduler={name: none, num_rungs: 2}",
                "score.limit=1000",
            ],
        )
        plan = make_plan(config, data=data, name="overhead", storage=scratch, command="benchmark")
        began = time.perf_counter()
        with connected():
            record = run_sweep(Launch(plan, scratch))
        write_report(record, plan.directory)
        wall_s = time.perf_counter() - began
    at_once = min(os.cpu_count() or 1, arguments.trials)
    own_s = sum(rung.train_s + rung.score_s for t in record.trials for rung in t.rungs)
    finished = sum(t.state == "finished" for t in record.trials)
    print(f"{finished} of {len(record.trials)} trials finished, {at_once} at once")
    print(f"wall {wall_s:.1f} s; trials' own {own_s:.1f} s / {at_once} = {own_s / at_once:.1f} s")
    print(f"overhead {wall_s / (own_s / at_once):.3f} x (claim: at most 1.2)")


if __name__ == "__main__":
    main()
