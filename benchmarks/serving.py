"""Speed of the endpoint beside the bare model, LitServe and BentoML, in one run.

    python benchmarks/serving.py [--peers FOLDER] [--models ti,b] [--plain] [--quick] [--json FILE]

On 2 cores, ViT-Ti/16 and ViT-B/16 at 224, untrained; photographs as JPEG in, tokens out as
float16; 16 connections in a closed loop; caching off. The systems take turns in rounds; printed are
medians over the rounds of ratios within a round, with the least and the most. The bare model is the
forward pass alone at its best batch size; it may use both cores as two threads of one pass (`bare`)
or as two passes of one thread (`bare, two passes`).

--peers names a folder for the virtual environments of LitServe and BentoML, which are made there
if they are missing; without it they are left out. --plain has the endpoint compute with torch's own
kernels (`compile: false`), as all others do.
"""

from __future__ import annotations

import argparse
import io
import json
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "serving_peers")]

from load import Connection, requests_of  # noqa: E402
from systems import Bare, System, started  # noqa: E402

MODELS = {"ti": (192, 3), "b": (768, 12)}
CONNECTIONS = 16
PEERS = ("litserve", "bentoml")
PICTURES = 64
IDLE_S = 3
LAYERS = (2, 5, 8, 11)
# Simultaneous passes, which share the two threads.
BARE = {"bare": 1, "bare, two passes": 2}
# Required ratios to the bare model and to each peer.
TARGETS = {"ti": (0.90, 1.2), "b": (0.95, 1.0)}


@dataclass
class Settings:
    """Sizes and durations of a benchmark's parts.

    Attributes:
        rounds: rounds in which the systems take turns.
        seconds: duration of a measurement.
        warm_up_s: seconds of load before it.
        batches: batch sizes to try for the bare model.
        pairs: requests of the measurement with one connection.
        large_pairs: requests of the measurement with large answers.
    """

    rounds: int
    seconds: float
    warm_up_s: float
    batches: tuple[int, ...]
    pairs: int
    large_pairs: int


@dataclass
class Findings:
    """Figures of one model.

    Attributes:
        model: a key of `MODELS`.
        loads: results under load, by system and round.
        figures: all other figures, by name.
    """

    model: str
    loads: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    def ratios(self, one: str, other: str) -> list[float]:
        """Ratios of two systems' speeds, round by round."""
        pairs = zip(self.loads[one], self.loads[other], strict=True)
        return [a["pictures_per_s"] / b["pictures_per_s"] for a, b in pairs]


def photographs(count: int) -> list[bytes]:
    """JPEGs of 500 x 375 pixels cut from the photographs that come with the installation."""
    from mimray.trainers.data.sample_photos import PHOTOGRAPHS, photograph

    rng = np.random.default_rng(0)
    names = sorted(PHOTOGRAPHS)
    pictures = []
    for number in range(count):
        image = photograph(names[number % len(names)])
        width, height = image.size
        w = round(min(width, height / 0.75) * rng.uniform(0.6, 1))
        h = round(w * 0.75)
        left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
        file = io.BytesIO()
        crop = image.resize((500, 375), box=(left, top, left + w, top + h))
        crop.save(file, "JPEG", quality=90)
        pictures.append(file.getvalue())
    return pictures


def write_bundle(folder: Path, width: int, heads: int) -> Path:
    """Write a bundle with an untrained ViT of 12 blocks."""
    import torch

    from mimray.trainers.bundles import BundleCard, save_bundle
    from mimray.trainers.config.model import ViTConfig
    from mimray.trainers.models import build_encoder

    torch.manual_seed(0)
    config = ViTConfig(name="vit", width=width, depth=12, num_heads=heads, patch_size=16)
    card = BundleCard(
        name=folder.name,
        encoder=config,
        image_size=(224, 224),
        channels=3,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        layers=LAYERS,
    )
    save_bundle(folder, card, build_encoder(config, (224, 224), 3).state_dict())
    return folder


def our_request(
    picture: bytes, outputs: tuple[str, ...], **parameters: str
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request of the Open Inference Protocol."""
    from mimray.serving.wire.oip_messages import build_request

    request = build_request({"image": [picture]}, outputs, {"dtype": "FP16", **parameters})
    return request.content, request.headers


def write_bodies(folder: Path, bodies: list[tuple[bytes, dict[str, str]]]) -> Path:
    """Write requests as `serving_peers/load.py` reads them."""
    folder.mkdir()
    listed = []
    for number, (body, headers) in enumerate(bodies):
        (folder / f"{number}").write_bytes(body)
        listed.append([f"{number}", headers])
    (folder / "bodies.json").write_text(json.dumps(listed))
    return folder


def measure(
    model: str,
    scratch: Path,
    pictures: list[bytes],
    settings: Settings,
    peers: Path | None,
    compile: str,
) -> Findings:
    """Measure all figures of one model.

    Args:
        model: a key of `MODELS`.
        scratch: a temporary folder.
        pictures: JPEG files.
        settings: sizes and durations.
        peers: the folder of the peers' virtual environments; None to leave them out.
        compile: the endpoint's option `compile`, `auto` or `false`.
    """
    import bare as reference

    findings = Findings(model)
    bundle = write_bundle(scratch / model, *MODELS[model])
    requests = [our_request(picture, ("tokens",)) for picture in pictures]
    own_bodies = write_bodies(scratch / f"{model}-oip", requests)
    plain = write_bodies(
        scratch / f"{model}-jpeg", [(p, {"Content-Type": "image/jpeg"}) for p in pictures]
    )
    large, headers = our_request(pictures[0], tuple(f"layer_{i}" for i in LAYERS), size="1024,1024")
    large_body = write_bodies(scratch / f"{model}-large", [(large, headers)])

    expected = reference.Bare(str(bundle))
    wanted = expected.tokens([expected.prepare(pictures[0])])[0].astype(np.float32)
    del expected
    with ExitStack() as stack:
        bare = Bare(bundle)
        stack.callback(bare.close)
        systems = [
            stack.enter_context(started("mimray", bundle, own_bodies, scratch, compile=compile))
        ]
        for name in PEERS if peers else ():
            systems.append(stack.enter_context(started(name, bundle, plain, scratch, peers)))
        for system in systems:
            answer = np.frombuffer(system.ask(), np.float16).astype(np.float32)
            assert np.allclose(answer, wanted.ravel(), atol=2e-2), f"{system.name} answers wrong"
        idle = {system.name: system.cpu_seconds() for system in systems}
        time.sleep(IDLE_S)
        findings.figures["idle_cores"] = {
            system.name: (system.cpu_seconds() - idle[system.name]) / IDLE_S for system in systems
        }
        for system in systems:
            system.tell(signal.SIGSTOP)
        best = findings.figures["best_batch"] = {
            name: max(
                settings.batches,
                key=lambda batch: bare.rate(batch, passes, settings.seconds / 3)["pictures_per_s"],
            )
            for name, passes in BARE.items()
        }
        for _ in range(settings.rounds):
            for name, passes in BARE.items():
                rate = bare.rate(best[name], passes, settings.seconds)
                findings.loads.setdefault(name, []).append(rate)
            for system in systems:
                with system.awake():
                    load = system.load(CONNECTIONS, settings.seconds, settings.warm_up_s)
                findings.loads.setdefault(system.name, []).append(load)
        findings.figures["one"] = {
            system.name: one_connection(system, bare, plain, settings.pairs) for system in systems
        }
        with systems[0].awake():
            findings.figures["large"] = large_answer(
                systems[0], large_body, bare, plain / "0", settings.large_pairs
            )
    return findings


def one_connection(system: System, bare: Bare, bodies: Path, pairs: int) -> dict[str, float]:
    """Latency of one picture at a time, and its excess over decoding and the model alone."""
    requests = requests_of(system.port, system.path, system.bodies)
    latencies, base = [], []
    with system.awake():
        connection = Connection(system.port)
        for number in range(-2, pairs):
            alone = sum(bare.once(bodies / str(number % PICTURES), 224, ()).values())
            began = time.perf_counter()
            connection.ask(requests[number % PICTURES])
            latency = time.perf_counter() - began
            if number >= 0:
                latencies.append(1000 * latency)
                base.append(1000 * alone)
    median_ms = statistics.median(latencies)
    return {"median_ms": median_ms, "over_ms": median_ms - statistics.median(base)}


def large_answer(
    system: System, body: Path, bare: Bare, picture: Path, pairs: int
) -> dict[str, Any]:
    """Overhead of a large answer, four layers at 1024 x 1024, over decoding and the model."""
    (request,) = requests_of(system.port, system.path, body)
    shares, size = [], 0
    for _ in range(pairs + 1):
        alone = bare.once(picture, 1024, LAYERS)
        connection = Connection(system.port)  # a new one, since an idle one would be closed
        began = time.perf_counter()
        size = len(connection.ask(request))
        over = time.perf_counter() - began - sum(alone.values())
        shares.append(over / alone["model_s"])
    return {"answer_mb": size / 1e6, "shares": shares[1:]}


def spread(values: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def report(findings: Findings) -> None:
    """Print one model's figures."""
    figures = findings.figures
    of_bare, of_peers = TARGETS[findings.model]
    print(f"\n## ViT-{findings.model.capitalize()}/16, {CONNECTIONS} connections")
    for name, loads in findings.loads.items():
        middle = {key: statistics.median(load[key] for load in loads) for key in loads[0]}
        line = (
            f"{name}: {middle['pictures_per_s']:.2f} pictures/s, "
            f"{middle['cpu_ms_per_picture']:.1f} ms of CPU each"
        )
        if name in BARE:
            line += f", batches of {figures['best_batch'][name]}"
        else:
            line += (
                f" ({figures['idle_cores'][name]:.1%} of a core idle), median latency "
                f"{middle['median_ms']:.0f} ms; the client took {middle['client_cpu_share']:.1%}"
            )
        print(f"{line}; others {middle['strangers_cpu_share']:.1%} of both cores")
    for name in findings.loads:
        if name != "mimray":
            target = of_bare if name in BARE else of_peers
            print(f"mimray / {name}: {spread(findings.ratios('mimray', name))} (target {target})")
    for name, row in figures["one"].items():
        print(
            f"one connection, {name}: median {row['median_ms']:.1f} ms, {row['over_ms']:+.1f} ms "
            "over decoding and model (target 5)"
        )
    large = figures["large"]
    print(
        f"four layers at 1024 x 1024, {large['answer_mb']:.1f} MB: transfer and encoding take "
        f"{spread(large['shares'])} of the model's time (target 0.1)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, help="where peers' environments are, or are made")
    parser.add_argument("--models", default="ti,b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="of a measurement; ViT-B's thrice")
    parser.add_argument("--plain", action="store_true", help="torch's own kernels in the endpoint")
    parser.add_argument("--quick", action="store_true", help="whether it runs at all, in a minute")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    everything = []
    with tempfile.TemporaryDirectory(prefix="mimray-") as scratch:
        pictures = photographs(PICTURES)
        for model in arguments.models.split(","):
            # A batch of 16 takes ViT-B nearly four seconds here.
            slow = model == "b"
            if arguments.quick:
                settings = Settings(1, 8 if slow else 3, 1, (2, 8), 3, 1)
            else:
                settings = Settings(
                    rounds=max(1, arguments.rounds - 2) if slow else arguments.rounds,
                    seconds=arguments.seconds * (3 if slow else 1),
                    warm_up_s=9 if slow else 2,
                    batches=(1, 2, 4, 8, 16),
                    pairs=12 if slow else 40,
                    large_pairs=2 if slow else 4,
                )
            compile = "false" if arguments.plain else "auto"
            findings = measure(model, Path(scratch), pictures, settings, arguments.peers, compile)
            report(findings)
            everything.append(asdict(findings))
    if arguments.json:
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
