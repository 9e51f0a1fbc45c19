"""The endpoint as `mimray serve` starts it, caching off: `python mimray_server.py BUNDLE PORT`."""

import os
import sys
from pathlib import Path

from systems import MAX_BATCH, WAIT_S

from mimray.serving.deploy.endpoint import serve_bundles

if __name__ == "__main__":
    serve_bundles(
        {"model": Path(sys.argv[1])},
        port=int(sys.argv[2]),
        device="cpu",
        num_cpus=2,
        max_batch_size=MAX_BATCH,
        batch_wait_ms=1000 * WAIT_S,
        cache_mib=0,
        compile=False if os.environ["COMPILE"] == "false" else "auto",
    ).wait()
