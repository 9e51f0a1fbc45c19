"""`mimray demo`: ingest, pre-train, score, serve and call, on photographs that are installed."""

from __future__ import annotations

import shlex
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

from mimray.service.commands.data import run_ingest
from mimray.service.commands.evaluate import EvaluationRequest, run_evaluate
from mimray.service.commands.pretrain import run_pretrain
from mimray.service.terminal.console import say
from mimray.service.terminal.progress import duration
from mimray.trainers.cluster import connected
from mimray.trainers.errors import RunConflictError
from mimray.trainers.evaluation.uncertainty import Figure, described, difference

RECIPE = "mae-tiny"


def run_demo(out: Path, *, steps: int, fresh: bool, command: str) -> dict[str, Any]:
    """Ingest, pre-train, score, serve, call; reuse whatever an earlier demo finished.

    Args:
        out: the directory of everything made, which is also the run's.
        steps: the length of the pre-training, in updates.
        fresh: delete what an earlier demo made.
        command: the command line, for the record.

    Returns:
        What `--json` prints: scores, shapes and seconds.
    """
    began = time.monotonic()
    out = out.absolute()
    if fresh and out.exists():
        _start_over(out)
    data = out / "data"
    with connected():
        say("1/5 photographs from scikit-image and scikit-learn, cut into tiles", "bold")
        _make_datasets(data)
        say(f"2/5 pre-training {RECIPE} with Ray Train and DeepSpeed", "bold")
        trained = run_pretrain(
            RECIPE,
            data=str(data / "train"),
            name=out.name,
            storage=str(out.parent),
            steps=steps,
            overrides=(f"checkpoint.every_steps={max(1, steps // 4)}",),
            fresh=False,
            command=command,
        )
        say("3/5 what the encoder is worth: kNN on held-out tiles", "bold")
        scores = {
            who: run_evaluate(
                [bundle],
                EvaluationRequest(
                    task="knn",
                    data=str(data / "train"),
                    val=str(data / "val"),
                    command=shlex.join(
                        ["mimray", "evaluate", bundle]
                        + ["--data", f"{data}/train", "--val", f"{data}/val"]
                    ),
                ),
            )[0]
            for who, bundle in (("trained", str(out)), ("untrained", f"untrained:{out}"))
        }
        told = difference(Figure.of(scores["trained"]), Figure.of(scores["untrained"]))
        say(
            f"kNN accuracy {described(scores['trained'])}, untrained "
            f"{described(scores['untrained'])}: {told.text()}"
        )
        say("4/5 serving it with Ray Serve, and calling it over HTTP", "bold")
        answer = _serve_and_call(out)
    say("5/5 done", "bold")
    total_s = time.monotonic() - began
    name, mimray = _shown(out), _own_command()
    say(
        f"{duration(total_s)} in all. Look at:\n"
        f"  {name}/reconstruction.png   original | masked | reconstruction\n"
        f"  {name}/loss.png             how the loss fell\n"
        "Next:\n"
        f"  {mimray} data ingest YOUR_PICTURES dataset\n"
        f"  {mimray} pretrain mae-tiny --data dataset --steps 1000\n"
        f"  {mimray} serve {name}"
    )
    knn = {who: result["headline"] for who, result in scores.items()}
    return {"knn": knn, "loss": trained["loss"], "seconds": round(total_s, 1), **answer}


def _start_over(out: Path) -> None:
    """Remove what an earlier demo made, and refuse to remove anything else."""
    beside = {path.name for path in out.iterdir()} - {"data"}
    pictures = {path.name for path in (out / "data").glob("*")} - {"photos", "train", "val"}
    if pictures or (beside and not (out / "plan.json").is_file()):
        raise RunConflictError(
            f"{out} exists and is not a demo's, so --fresh will not delete it",
            hint="choose another --out",
        )
    shutil.rmtree(out)


def _make_datasets(data: Path) -> None:
    from mimray.trainers.data.sample_photos import write_photo_tiles

    if all((data / split / "dataset.json").is_file() for split in ("train", "val")):
        say(f"{data} is there already")
        return
    photos = data / "photos"
    shutil.rmtree(photos, ignore_errors=True)
    write_photo_tiles(photos, size_px=64)
    for split in ("train", "val"):
        run_ingest(str(photos / split), str(data / split), overwrite=True)


def _serve_and_call(out: Path) -> dict[str, Any]:
    import numpy as np

    from mimray.serving.client import FeatureClient
    from mimray.serving.deploy.endpoint import serve_bundles
    from mimray.trainers.data.sources import open_source

    source = open_source(str(out / "data" / "val"))
    pictures = [source[i].image for i in np.linspace(0, len(source) - 1, 8).astype(int)]
    with serve_bundles({"demo": out}, port=_free_port()) as endpoint:
        with FeatureClient(endpoint.url) as client:
            vectors = client.embed(pictures, model="demo")
            dense = client.features(pictures[0], model="demo")
        say(
            f"POST {endpoint.url}/v2/models/demo/infer with 8 pictures: "
            f"pooled {vectors.shape} {vectors.dtype}; one picture's tokens {dense.tokens.shape} "
            f"on a {dense.grid[0]}x{dense.grid[1]} grid"
        )
    return {"pooled_shape": list(vectors.shape), "tokens_shape": list(dense.tokens.shape)}


def _own_command() -> str:
    """The command that calls mimray the way this process was called."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return "python -m service"
    if shutil.which("mimray") == str(program.absolute()):
        return "mimray"
    return str(_shown(program.absolute()))


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
