"""The parts of `benchmarks/gpu.sh` that are more than one command.

    python benchmarks/gpu.py step [--compiled]      training steps on tensors of the device
    python benchmarks/gpu.py data FOLDER            `mimray pretrain` from JPEG in Parquet
    python benchmarks/gpu.py routes FOLDER          each route of the endpoint, once
    python benchmarks/gpu.py load FOLDER            the endpoint under load beside the bare model
    python benchmarks/gpu.py same RUN RUN           two runs' losses are equal

Without a GPU the sizes are tiny, so that the same code can be tried on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "serving_peers"), str(HERE.parent)]

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
PEAK_FLOPS = 989e12
"""Dense bf16 products of an H100 or H200 SXM, FLOP/s, by the data sheet."""

Step = Callable[[], None]


# --- training steps ------------------------------------------------------------------------------


def our_step(recipe_name: str, batch: int, compiled: bool) -> tuple[Step, float]:
    """A training step of a recipe on tensors of the device, and its FLOPs a picture."""
    from mimray.trainers.config.recipes import load_recipe
    from mimray.trainers.cost.step import shape_of, trace
    from mimray.trainers.engine.compiled import compile_blocks
    from mimray.trainers.methods.catalogue import build_method, inputs_of
    from mimray.trainers.methods.inputs import placeholders

    recipe = load_recipe(recipe_name)
    flops = trace(
        shape_of(recipe, torch.float32, {}),
        2,
        checkpointing=False,
        on_gpu=True,
        autocast=torch.bfloat16,
    ).training_flops
    arguments = {
        name: torch.randn(value.shape, device=DEVICE) if value.is_meta else value.to(DEVICE)
        for name, value in placeholders(inputs_of(recipe), recipe, batch, torch.float32).items()
    }
    method = build_method(recipe).to(DEVICE)
    if compiled:
        compile_blocks(method, DEVICE)
    return training_step(method, lambda: method(**arguments).loss), flops


def their_step(batch: int, compiled: bool) -> Step:
    """A training step of transformers' ViTMAE with the sizes of `mae-vit-b`."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    model = ViTMAEForPreTraining(ViTMAEConfig(norm_pix_loss=True, attn_implementation="sdpa")).to(
        DEVICE
    )
    forward = torch.compile(model) if compiled else model
    images = torch.randn(batch, 3, 224, 224, device=DEVICE)
    return training_step(model, lambda: forward(pixel_values=images).loss)


def training_step(model: torch.nn.Module, loss_of: Callable[[], torch.Tensor]) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            loss = loss_of()
        loss.backward()
        optimizer.step()

    return step


def timed(step: Step, steps: int) -> float:
    """Seconds of a step."""
    if GPU:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    if GPU:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


def steps(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure steps one after the other, each in several rounds."""
    rows: list[dict[str, Any]] = []
    cases = {"mae-tiny": 4}
    if GPU:
        cases = {"mae-vit-b": 512, "mae-vit-l": 256}
        cases |= dict.fromkeys(("simmim-swin-b", "simmim-vit-b", "maskfeat-vit-b"), 128)
    if arguments.compiled:
        for name in ("mae-vit-b", "simmim-swin-b") if GPU else ("mae-tiny",):
            rows.append(step_row("mimray", name, cases[name], compiled=True))
    else:
        for name, batch in cases.items():
            rows.append(step_row("mimray", name, batch, compiled=False))
    batch = cases["mae-vit-b"] if GPU else 2
    rows.append(step_row("transformers", "mae-vit-b", batch, arguments.compiled))
    return rows


def step_row(who: str, name: str, batch: int, compiled: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"who": who, "recipe": name, "batch": batch, "compiled": compiled}
    try:
        torch.manual_seed(0)
        if GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        if who == "mimray":
            step, flops = our_step(name, batch, compiled)
        else:
            (step, flops) = their_step(batch, compiled), 0.0
        for _ in range(3 if GPU else 1):
            step()
        row["ready_s"] = round(time.perf_counter() - began, 1)
        rounds = [timed(step, 10 if GPU else 1) for _ in range(5 if GPU else 2)]
        row["images_per_s"] = round(batch / statistics.median(rounds), 1)
        row["least"], row["most"] = (round(batch / s, 1) for s in (max(rounds), min(rounds)))
        if flops:
            row["model_flops_utilisation"] = round(row["images_per_s"] * flops / PEAK_FLOPS, 4)
        if GPU:
            row["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    except Exception as error:  # the other rows are wanted too
        row["error"] = f"{type(error).__name__}: {str(error)[:500]}"
    print(json.dumps(row), flush=True)
    return row


# --- pre-training from Parquet -------------------------------------------------------------------


def data(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Pre-train from JPEG through Ray Train and DeepSpeed; figures of the later rows."""
    from serving import photographs

    folder = arguments.folder
    (folder / "jpegs").mkdir(parents=True, exist_ok=True)
    pictures = photographs(64)
    for number in range(4096 if GPU else 16):
        (folder / "jpegs" / f"{number:05d}.jpg").write_bytes(pictures[number % 64])
    ingest = ["data", "ingest", str(folder / "jpegs"), str(folder / "shards"), "--overwrite"]
    mimray(*ingest)
    recipe, micro, count = ("mae-vit-b", 512, 60) if GPU else ("mae-tiny", 4, 6)
    rows = []
    for workers in (15,) if GPU else (1,):
        name = f"data-{workers}"
        mimray(
            "pretrain", recipe, "--data", str(folder / "shards"), "--storage", str(folder),
            "--name", name, "--steps", str(count), "--set", f"optim.batch_size={micro}",
            "--set", f"engine.micro_batch_size={micro}", "--set", f"data.num_workers={workers}",
            "--set", "logging.every_steps=5", "--set", "logging.pictures_every_steps=0",
        )  # fmt: skip
        metrics = (folder / name / "metrics.jsonl").read_text().splitlines()
        later = [json.loads(line) for line in metrics][-6:]
        planned = json.loads((folder / name / "plan.json").read_text())
        row = {
            "recipe": recipe,
            "batch": micro,
            "num_workers": workers,
            **{k: statistics.median(r[k] for r in later) for k in ("images_per_s", "data_wait")},
            "memory_mib": later[-1]["memory_mib"],
            "loss": later[-1]["loss"],
            "zero_stage": planned["recipe"]["engine"]["zero_stage"],
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    forecast = json.loads(
        mimray(
            "plan", recipe, "--set", f"optim.batch_size={micro}",
            "--set", f"engine.micro_batch_size={micro}", "--json",
        )
    )  # fmt: skip
    rows.append({"forecast": next(m for m in forecast["memory"] if m["chosen"])})
    print(json.dumps(rows[-1]), flush=True)
    return rows


def mimray(*arguments: str) -> str:
    command = [sys.executable, "-m", "service", *arguments]
    done = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit {done.returncode}\n{done.stdout}")
    return done.stdout


# --- the endpoint --------------------------------------------------------------------------------


@contextmanager
def endpoint(bundle: Path, device: str) -> Iterator[str]:
    """The address of `mimray serve` with one model, `photos`."""
    command = [sys.executable, "-m", "service", "serve", f"photos={bundle}", "--port", "8317"]
    url, began = "http://127.0.0.1:8317", time.perf_counter()
    server = subprocess.Popen([*command, "--device", device], cwd=HERE.parent)
    try:
        while True:
            if server.poll() is not None or time.perf_counter() - began > 240:
                raise SystemExit("the endpoint did not start")
            try:
                urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        print(f"ready after {time.perf_counter() - began:.1f} s", flush=True)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=90)


def routes(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Ask every route once, of a model trained here, and compare with the model on the CPU."""
    import base64

    import numpy as np

    from mimray.serving.client import FeatureClient
    from serving import our_request, photographs

    folder = arguments.folder
    picture = photographs(1)[0]
    mimray("data", "sample", str(folder / "served"), "--size", "64")
    mimray(
        "pretrain", "mae-tiny", "--data", str(folder / "served"), "--storage", str(folder),
        "--name", "photos", "--steps", "5", "--set", "data.num_workers=0",
    )  # fmt: skip
    answers: dict[str, dict[str, Any]] = {}
    for device in dict.fromkeys([arguments.device, "cpu"]):
        found = answers[device] = {}
        with endpoint(folder / "photos", device) as url:
            with FeatureClient(url) as client:
                features = client.features(
                    picture, "photos", layers=(0, 2), size="keep:64", dtype="float32"
                )
                found |= {f"layer {i}": np.asarray(v) for i, v in features.layers.items()}
                found["pooled"] = np.asarray(client.embed([picture], "photos"))
                print("models:", client.models(), client.metadata("photos"))
                client.reconstruct(picture, "photos")
            for accept in ("application/json", "application/x-npy", "application/x-npz",
                           "application/vnd.apache.arrow.stream",
                           "application/vnd.safetensors"):  # fmt: skip
                _, body = ask(f"{url}/v1/features?model=photos", picture, accept)
                print(f"POST /v1/features as {accept}: {len(body)} bytes")
            uri = "data:image/jpeg;base64," + base64.b64encode(picture).decode()
            embeddings = json.dumps({"model": "photos", "input": uri}).encode()
            _, body = ask(f"{url}/v1/embeddings", embeddings, "application/json",
                          "application/json")  # fmt: skip
            print("POST /v1/embeddings:", len(json.loads(body)["data"][0]["embedding"]))
            body, headers = our_request(picture, ("tokens",))
            request = urllib.request.Request(f"{url}/v2/models/photos/infer", body, headers)
            with urllib.request.urlopen(request, timeout=60) as answer:
                print("POST /v2/models/photos/infer:", len(answer.read()), "bytes")
            for path in ("/", "/v1/models", "/metrics", "/openapi.json"):
                with urllib.request.urlopen(url + path, timeout=30) as answer:
                    print(f"GET {path}: {answer.status}, {len(answer.read())} bytes")
    rows = []
    for name, value in answers[arguments.device].items():
        reference = answers["cpu"][name]
        error = float(np.abs(value - reference).max() / np.abs(reference).max())
        rows.append({"output": name, "shape": list(value.shape), "relative_to_cpu": error})
        print(json.dumps(rows[-1]), flush=True)
        assert error < 2e-2, name
    return rows


def ask(
    url: str, body: bytes, accept: str, content_type: str = "image/jpeg"
) -> tuple[dict[str, str], bytes]:
    headers = {"Content-Type": content_type, "Accept": accept}
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as answer:
        return dict(answer.headers), answer.read()


def load(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Pictures per second of the endpoint, pooled and dense answers, and of the bare model."""
    from load import measure, requests_of

    from serving import our_request, photographs, write_bodies, write_bundle

    folder = arguments.folder
    width, heads = (768, 12) if GPU else (192, 3)
    bundle = write_bundle(folder / "b", width, heads)
    rows = [bare_rate(bundle, batch, compiled)
            for batch in ((16, 128) if GPU else (2,))
            for compiled in ((False, True) if GPU else (False,))]  # fmt: skip
    pictures = photographs(64)
    with endpoint(bundle, DEVICE.type):
        for output in ("pooled", "tokens"):
            bodies = [our_request(picture, (output,)) for picture in pictures]
            body = write_bodies(folder / f"{output}-bodies", bodies)
            requests = requests_of(8317, "/v2/models/photos/infer", body)
            for connections in (1, 16, 128) if GPU else (2,):
                found = measure(8317, requests, connections, 3.0, 2.0)
                row = {"output": output, "connections": connections, **found}
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def bare_rate(bundle: Path, batch: int, compiled: bool) -> dict[str, Any]:
    from mimray.serving.inference.devices import compile_encoder
    from mimray.trainers.bundles import load_bundle

    encoder = load_bundle(bundle).to(DEVICE)
    made = compile_encoder(encoder) if compiled else False
    images = torch.randn(batch, 3, 224, 224, device=DEVICE)
    inner = encoder.encoder

    def step() -> None:
        with torch.inference_mode():
            inner.forward_intermediates(images, (), True)

    for _ in range(3):
        step()
    rounds = [timed(step, 20 if GPU else 1) for _ in range(3)]
    row = {
        "bare": True,
        "batch": batch,
        "compiled": made,
        "pictures_per_s": round(batch / statistics.median(rounds), 1),
    }
    print(json.dumps(row), flush=True)
    return row


# --- two runs ------------------------------------------------------------------------------------


def same(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare two runs' losses; they must be those of the same training."""
    one, other = (
        {row["step"]: row["loss"] for row in map(json.loads, text.splitlines())}
        for text in [(run / "metrics.jsonl").read_text() for run in arguments.runs]
    )
    assert one.keys() == other.keys(), (len(one), len(other))
    apart = max(abs(one[step] - other[step]) / abs(one[step]) for step in one)
    print(f"{len(one)} losses, at most {apart:.2e} apart, relative; last {one[max(one)]:.5f}")
    assert apart < 1e-3, apart
    return [{"apart": apart}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(required=True)
    for name, part in {
        "step": steps, "data": data, "routes": routes, "load": load, "same": same
    }.items():  # fmt: skip
        sub = parts.add_parser(name, help=part.__doc__)
        sub.set_defaults(part=part)
        sub.add_argument("--json", type=Path, help="write all figures here")
        if name == "step":
            sub.add_argument("--compiled", action="store_true", help="compiled steps instead")
        if name == "same":
            sub.add_argument("runs", nargs=2, type=Path)
        elif name != "step":
            sub.add_argument("folder", type=Path)
        if name == "routes":
            sub.add_argument("--device", default=DEVICE.type)
    arguments = parser.parse_args()
    rows = arguments.part(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
