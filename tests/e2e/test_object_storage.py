"""Data and runs in an object store: SeaweedFS, which speaks S3, on the loopback interface."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from pyarrow import fs as pafs

from mimray.trainers.storage import RunDir

STEPS = 8
IDENTITY = {"accessKey": "somebody", "secretKey": "a-secret"}

pytestmark = pytest.mark.slow


class Store:
    """A SeaweedFS that can be killed, and started again with what it held.

    Attributes:
        uri: URI of a bucket, with a place for a path.
    """

    def __init__(self, bench: Any, command: tuple[str, ...], options: str) -> None:
        self._bench, self._command = bench, command
        self.uri = f"s3://photos/{{}}?{options}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._process = self._bench.start(*self._command)
        filesystem, _ = pafs.FileSystem.from_uri(self.uri.format(""))

        def answers() -> bool:
            try:
                filesystem.create_dir("photos")
            except OSError:
                return False
            return True

        self._bench.wait_until(answers)

    def kill(self) -> None:
        """SIGKILL."""
        self._bench.kill(self._process)


@pytest.fixture(scope="module")
def store(bench: Any) -> Iterator[Store]:
    """An object store that opens to this process, too."""
    names = ("master", "volume", "filer", "s3")
    ports = dict(zip(names, bench.free_ports(4), strict=True))
    grpc = dict(zip(names, bench.free_ports(4), strict=True))
    identity = {"name": "somebody", "credentials": [IDENTITY], "actions": ["Admin"]}
    config = bench.folder / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    bench.environment["AWS_ACCESS_KEY_ID"] = IDENTITY["accessKey"]
    bench.environment["AWS_SECRET_ACCESS_KEY"] = IDENTITY["secretKey"]
    (bench.folder / "weed").mkdir()
    command = (
        "weed", "server", "-dir=weed", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        "-s3", f"-s3.config={config}", "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
        "-master.volumeSizeLimitMB=64", "-volume.max=0",
        *(f"-{name}.port={port}" for name, port in ports.items()),
        *(f"-{name}.port.grpc={port}" for name, port in grpc.items()),
    )  # fmt: skip
    options = f"endpoint_override=127.0.0.1:{ports['s3']}&scheme=http&allow_bucket_creation=true"
    with pytest.MonkeyPatch.context() as patch:
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(key, bench.environment[key])
        started = Store(bench, command, options)
        started.start()
        yield started


@pytest.fixture(scope="module")
def bucket(store: Store) -> str:
    """URI of a bucket to append paths to, before the `?`."""
    return store.uri


@pytest.fixture(scope="module")
def cluster(bench: Any, bucket: str) -> Any:
    bench.start_head(num_cpus=1)
    return bench


@pytest.fixture(scope="module")
def dataset(cluster: Any, bucket: str, photos: Path) -> str:
    uri = bucket.format("data")
    cluster.finish(cluster.mimray("data", "ingest", str(photos), uri))
    return uri


@pytest.fixture(scope="module")
def run(cluster: Any, bucket: str, dataset: str) -> str:
    """A run whose driver was killed half-way and started again."""
    storage, directory = bucket.format("runs"), RunDir(bucket.format("runs/first"))

    def has_step_5() -> bool:
        assert driver.poll() is None, cluster.output(driver)
        return directory.exists("metrics.jsonl") and len(losses(cluster, directory)) >= 5

    driver = cluster.pretrain(dataset, storage, "first", STEPS)
    cluster.wait_until(has_step_5)
    driver.kill()
    driver.wait()
    cluster.finish(cluster.pretrain(dataset, storage, "first", STEPS))
    return directory.uri


def losses(cluster: Any, run: RunDir) -> dict[int, float]:
    found: dict[int, float] = cluster.losses(run.read("metrics.jsonl"))
    return found


def test_ingest__is_whole_and_not_overwritten(cluster: Any, dataset: str, photos: Path) -> None:
    printed = cluster.finish(cluster.mimray("data", "inspect", dataset, "--json"))
    found = json.loads(printed.splitlines()[-1])
    assert found["facts"]["num_samples"] == 48
    assert list(found["facts"]["class_names"]) == ["a", "b"]
    again = cluster.mimray("data", "ingest", str(photos), dataset)
    again.wait(100)
    assert again.returncode == 2
    assert "holds a dataset already" in cluster.output(again)


def test_inspect__takes_the_address_from_the_environment(
    cluster: Any, dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = dataset.partition("endpoint_override=")[2].partition("&")[0]
    monkeypatch.setitem(cluster.environment, "AWS_ENDPOINT_URL", f"http://{address}")
    printed = cluster.finish(cluster.mimray("data", "inspect", "s3://photos/data"))
    assert "s3://photos/data: 48 pictures (parquet)" in printed


def test_killed_driver__continued_run_equals_one_on_a_local_disk(
    cluster: Any, dataset: str, run: str
) -> None:
    local = cluster.folder / "runs"
    cluster.finish(cluster.pretrain(dataset, local, "first", STEPS))
    assert losses(cluster, RunDir(run)) == losses(cluster, RunDir(str(local / "first")))
    for name in ("plan.json", "loss.png", "reconstruction.png", "bundle/bundle.json"):
        assert RunDir(run).exists(name), name
    # Objects, since the server takes its time to drop empty folders.
    below = pafs.FileSelector(f"{RunDir(run).root}/.ray", recursive=True, allow_not_found=True)
    assert RunDir(run).filesystem.get_file_info(below) == []


def test_finished_run__is_known_and_exported(cluster: Any, dataset: str, run: str) -> None:
    storage = run.replace("/first?", "?")
    assert "finished already" in cluster.finish(cluster.pretrain(dataset, storage, "first", STEPS))
    cluster.finish(cluster.mimray("export", run, "copy"))
    assert (cluster.folder / "copy/encoder.safetensors").is_file()


def test_evaluate__puts_the_score_beside_the_bundle(cluster: Any, dataset: str, run: str) -> None:
    cluster.finish(cluster.mimray("evaluate", run, "--data", dataset, "--val", dataset))
    score = json.loads(RunDir(run).read("evaluation/knn.json"))
    assert score["num_val"] == 48


def test_sweep__lies_in_the_bucket_and_goes_on_from_there(
    cluster: Any, bucket: str, dataset: str
) -> None:
    storage, sweep = bucket.format("sweeps"), RunDir(bucket.format("sweeps/ratios"))
    sets = [
        "base.set.encoder.depth=1", "base.set.data.image_size=32", "base.set.optim.batch_size=16",
        "base.set.logging.num_pictures=2", "base.set.checkpoint.every_steps=2",
        "base.set.logging.every_steps=1", f"budget.steps={STEPS}",
        "space.method.mask_ratio={grid: [0.5, 0.75]}", "space.method.decoder_depth={grid: [1]}",
        "scheduler={name: none, num_rungs: 2}", f"score.val={dataset}",
    ]  # fmt: skip
    given = [argument for item in sets for argument in ("--set", item)]
    asked = ["mae-mask-depth", "--data", dataset, "--storage", storage, "--name", "ratios", *given]

    def second_has_begun() -> bool:
        assert driver.poll() is None, cluster.output(driver)
        return sweep.exists("trials/0001/metrics.jsonl")

    driver = cluster.mimray("tune", *asked)
    cluster.wait_until(second_has_begun)
    driver.kill()
    driver.wait()
    first = losses(cluster, sweep / "trials/0000")
    cluster.finish(
        cluster.mimray("tune", "--resume", "ratios", "--storage", storage), timeout_s=800
    )
    record = json.loads(sweep.read("sweep.json"))
    assert record["ended"]
    for number in range(2):
        place = sweep / f"trials/000{number}"
        assert json.loads(place.read("trial.json"))["state"] == "finished"
        assert list(losses(cluster, place)) == list(range(1, STEPS + 1))
        assert place.exists("bundle/bundle.json")
    assert losses(cluster, sweep / "trials/0000") == first
    assert len(json.loads(sweep.read("report.json"))["ranked"]) == 2


def test_store_that_goes_away__is_waited_for_and_nothing_changes(
    cluster: Any, store: Store, photos: Path
) -> None:
    steps, directory = 300, RunDir(store.uri.format("runs/away"))

    def began() -> bool:
        assert driver.poll() is None, cluster.output(driver)
        return len(directory.folders()) > 0 and bool((directory / "checkpoints").folders())

    driver = cluster.pretrain(photos, store.uri.format("runs"), "away", steps)
    cluster.wait_until(began)
    store.kill()
    time.sleep(20)  # the outage; Arrow's own client gives up after six seconds
    assert driver.poll() is None, cluster.output(driver)
    store.start()
    said = cluster.finish(driver)
    assert "trying again for 300 s" in said
    assert "start 2" not in said  # it waited, and was not started again

    local = cluster.folder / "runs"
    cluster.finish(cluster.pretrain(photos, local, "away", steps))
    assert losses(cluster, directory) == losses(cluster, RunDir(str(local / "away")))


def test_serve__fetches_the_bundle(cluster: Any, run: str) -> None:
    [port] = cluster.free_ports(1)
    server = cluster.mimray("serve", run, "--port", str(port))

    def ready() -> bool:
        assert server.poll() is None, cluster.output(server)
        try:
            return bool(httpx2.get(f"http://127.0.0.1:{port}/v2/models/first/ready").is_success)
        except httpx2.TransportError:
            return False

    cluster.wait_until(lambda: "Ctrl-C ends it" in cluster.output(server))
    assert ready()
    server.terminate()
    cluster.finish(server, timeout_s=300)
