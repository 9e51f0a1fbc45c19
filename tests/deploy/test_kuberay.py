"""The manifests for Kubernetes: schemas and rules of KubeRay, and what this project promises."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mimray import __version__
from tests.deploy.kuberay_schemas import load_schemas

ROOT = Path(__file__).parents[2]
TRAINING, SERVING = "rayjob", "rayservice"

# Names of the fields of each kind of object, as Kubernetes 1.34 and KubeRay 1.6 to 1.7 have them.
OBJECT = {"apiVersion", "kind", "metadata", "spec"}
JOB = {
    "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint",
    "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId", "managedBy",
    "metadata", "preRunningDeadlineSeconds", "rayClusterSpec", "runtimeEnvYAML",
    "shutdownAfterJobFinishes", "submissionMode", "submitterConfig", "submitterPodTemplate",
    "suspend", "ttlSecondsAfterFinished",
}  # fmt: skip
SERVICE = {
    "excludeHeadPodFromServeSvc", "managedBy", "rayClusterConfig",
    "rayClusterDeletionDelaySeconds", "serveConfigV2", "serveService", "suspend",
    "upgradeStrategy",
}  # fmt: skip
CLUSTER = {
    "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions",
    "headGroupSpec", "headServiceAnnotations", "managedBy", "rayVersion", "suspend",
    "workerGroupSpecs",
}  # fmt: skip
HEAD_GROUP = {"enableIngress", "headService", "rayStartParams", "serviceType", "template"}
WORKER_GROUP = {
    "groupName", "idleTimeoutSeconds", "maxReplicas", "minReplicas", "numOfHosts",
    "rayStartParams", "replicas", "scaleStrategy", "suspend", "template",
}  # fmt: skip
POD = {
    "affinity", "automountServiceAccountToken", "containers", "imagePullSecrets", "initContainers",
    "nodeSelector", "priorityClassName", "restartPolicy", "runtimeClassName", "schedulerName",
    "securityContext", "serviceAccountName", "terminationGracePeriodSeconds", "tolerations",
    "topologySpreadConstraints", "volumes",
}  # fmt: skip
CONTAINER = {
    "args", "command", "env", "envFrom", "image", "imagePullPolicy", "lifecycle", "livenessProbe",
    "name", "ports", "readinessProbe", "resources", "securityContext", "startupProbe",
    "volumeDevices", "volumeMounts", "workingDir",
}  # fmt: skip
PROBE = {
    "exec", "failureThreshold", "grpc", "httpGet", "initialDelaySeconds", "periodSeconds",
    "successThreshold", "tcpSocket", "terminationGracePeriodSeconds", "timeoutSeconds",
}  # fmt: skip
POLICY = {"egress", "ingress", "podSelector", "policyTypes"}
BUDGET = {"maxUnavailable", "minAvailable", "selector", "unhealthyPodEvictionPolicy"}


def documents(name: str) -> list[dict[str, Any]]:
    text = (ROOT / f"deploy/kuberay/{name}.yaml").read_text()
    # As Kubernetes gets it, where no two places share an object.
    return [json.loads(json.dumps(found)) for found in yaml.safe_load_all(text) if found]


def resource(name: str) -> dict[str, Any]:
    (found,) = documents(name)
    return found


def cluster_of(tree: dict[str, Any]) -> dict[str, Any]:
    spec = tree["spec"]
    return spec["rayClusterSpec"] if tree["kind"] == "RayJob" else spec["rayClusterConfig"]


def groups_of(tree: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = cluster_of(tree)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def containers_of(tree: dict[str, Any]) -> list[dict[str, Any]]:
    return [c for group in groups_of(tree) for c in group["template"]["spec"]["containers"]]


def named(kind: str, name: str) -> dict[str, Any]:
    (found,) = [d for d in documents("base") if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    return found


@pytest.fixture(params=[TRAINING, SERVING])
def tree(request: pytest.FixtureRequest) -> dict[str, Any]:
    return resource(request.param)


def unknown(tree: dict[str, Any]) -> Iterator[str]:
    """Fields that no object of their kind has."""
    spec, cluster = tree["spec"], cluster_of(tree)
    yield from tree.keys() - OBJECT
    yield from spec.keys() - (JOB if tree["kind"] == "RayJob" else SERVICE)
    yield from cluster.keys() - CLUSTER
    yield from cluster["headGroupSpec"].keys() - HEAD_GROUP
    for group in cluster["workerGroupSpecs"]:
        yield from group.keys() - WORKER_GROUP
    for group in groups_of(tree):
        yield from group["template"].keys() - {"metadata", "spec"}
        yield from group["template"]["spec"].keys() - POD
    for container in containers_of(tree):
        yield from container.keys() - CONTAINER
        for probe in ("livenessProbe", "readinessProbe"):
            yield from container.get(probe, {}).keys() - PROBE


def test_fields__are_known(tree: dict[str, Any]) -> None:
    assert list(unknown(tree)) == []

    containers_of(tree)[0]["enviroment"] = []
    assert list(unknown(tree)) == ["enviroment"]


def test_base__fields_are_known() -> None:
    versions = {"ConfigMap": "v1", "NetworkPolicy": "networking.k8s.io/v1",
                "PodDisruptionBudget": "policy/v1"}  # fmt: skip
    for found in documents("base"):
        assert found["apiVersion"] == versions[found["kind"]]
        if found["kind"] == "ConfigMap":
            assert found.keys() == {"apiVersion", "kind", "metadata", "data"}
            assert all(isinstance(value, str) for value in found["data"].values())
        else:
            known = POLICY if found["kind"] == "NetworkPolicy" else BUDGET
            assert found.keys() == OBJECT
            assert found["spec"].keys() <= known


def misfits(value: Any, schema: dict[str, Any], where: str) -> Iterator[str]:
    """Places at which a value is not what a structural schema of Kubernetes asks for."""
    if schema.get("x-kubernetes-int-or-string"):
        if not isinstance(value, int | str):
            yield f"{where}: {value!r} is neither a number nor a text"
        return
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}
    wanted = types.get(schema.get("type", ""))
    if wanted and (not isinstance(value, wanted) or (wanted is int and isinstance(value, bool))):
        yield f"{where}: {value!r} is no {schema['type']}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is none of {schema['enum']}"
    if "minimum" in schema and value < schema["minimum"]:
        yield f"{where}: {value!r} is below {schema['minimum']}"
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from misfits(item, schema["items"], f"{where}[{number}]")
    if isinstance(value, dict):
        known, rest = schema.get("properties", {}), schema.get("additionalProperties")
        yield from (
            f"{where}: {key} is missing" for key in schema.get("required", ()) if key not in value
        )
        if schema.get("x-kubernetes-preserve-unknown-fields") or (not known and rest is None):
            return
        for key, item in value.items():
            if key in known:
                yield from misfits(item, known[key], f"{where}.{key}")
            elif isinstance(rest, dict):
                yield from misfits(item, rest, f"{where}.{key}")
            else:
                yield f"{where}: unknown field {key}"


def test_schema__of_kuberay_holds(tree: dict[str, Any]) -> None:
    schema = load_schemas()[tree["kind"]]

    assert list(misfits(tree["spec"], schema, "spec")) == []

    groups_of(tree)[1]["template"]["spec"]["containers"][0]["livenessProbe"]["period"] = 3
    (misfit,) = misfits(tree["spec"], schema, "spec")
    assert misfit.endswith("livenessProbe: unknown field period")


# The rules of ray-operator/controllers/ray/utils/validation.go, KubeRay 1.7.0, that a schema
# does not state.


def test_rules__of_a_cluster(tree: dict[str, Any]) -> None:
    cluster = cluster_of(tree)
    longest = 47  # what KubeRay appends leaves so much of a name

    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", tree["metadata"]["name"])
    assert len(tree["metadata"]["name"]) <= longest
    assert "upgradeStrategy" not in cluster
    assert cluster["rayVersion"]  # token authentication asks for it
    assert not any("resources" in group or "labels" in group for group in groups_of(tree))
    assert not any("labels" in group["rayStartParams"] for group in groups_of(tree))
    for group in cluster["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    managed = {"RAY_REDIS_ADDRESS", "REDIS_USERNAME", "REDIS_PASSWORD", "RAY_enable_autoscaler_v2"}
    for container in containers_of(tree):
        assert not managed & {variable["name"] for variable in container.get("env", [])}


def test_rules__of_a_job() -> None:
    spec = resource(TRAINING)["spec"]

    assert spec["submissionMode"] == "SidecarMode"
    assert not spec.keys() & {"submitterPodTemplate", "submitterConfig", "clusterSelector"}
    assert "restartPolicy" not in spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    # Rules of deletion exclude the older way to say it.
    assert not spec.keys() & {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished"}
    assert spec["deletionStrategy"].keys() == {"deletionRules"}
    order = ["DeleteWorkers", "DeleteCluster", "DeleteSelf"]
    seen: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for rule in spec["deletionStrategy"]["deletionRules"]:
        condition = dict(rule["condition"])
        seconds = condition.pop("ttlSeconds")
        (status,) = condition.items()
        assert status in {
            ("jobStatus", "SUCCEEDED"), ("jobStatus", "FAILED"), ("jobDeploymentStatus", "Failed"),
        }  # fmt: skip
        seen.setdefault(status, []).append((order.index(rule["policy"]), seconds))
    for rules in seen.values():
        assert len({place for place, _ in rules}) == len(rules)
        assert [seconds for _, seconds in sorted(rules)] == sorted(seconds for _, seconds in rules)
    if spec["rayClusterSpec"].get("enableInTreeAutoscaling"):
        assert not any(place == 0 for rules in seen.values() for place, _ in rules)


def test_job__runs_the_command_that_there_is() -> None:
    from mimray.service.cli.main import cli

    spec = resource(TRAINING)["spec"]
    program, command, *arguments = shlex.split(spec["entrypoint"])

    assert program == "mimray"
    context = cli.commands[command].make_context(command, arguments)  # refuses what it has not
    assert context.params["storage"].startswith("s3://")
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert context.params["workers"] == group["replicas"]
    assert spec["backoffLimit"] > 0  # exit status 75 is an attempt


def test_service__names_applications_that_can_be_built() -> None:
    from ray.serve import Application
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load(resource(SERVING)["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    applications = config["applications"]

    for application in applications:
        module, _, name = application["import_path"].partition(":")
        builder = getattr(importlib.import_module(module), name)
        built = call_user_app_builder_with_args_if_necessary(builder, application["args"])
        assert isinstance(built, Application)
    models, root = applications[:-1], applications[-1]
    assert list(root["deployments"][0]["user_config"]) == [m["args"]["name"] for m in models]
    for model in models:
        assert model["route_prefix"] == f"/v2/models/{model['name']}"
        # Every node fetches it by itself.
        assert model["args"]["bundle"].startswith("s3://")


def test_service__keys_lie_where_replicas_look_for_them() -> None:
    service = resource(SERVING)
    applications = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    given = [a["args"].get("gateway", a["args"])["keys"] for a in applications]

    for group in groups_of(service):
        pod = group["template"]["spec"]
        (volume,) = [v for v in pod["volumes"] if "secret" in v]
        assert volume["secret"]["defaultMode"] & 0o022 == 0  # replicas refuse what others can write
        (container,) = pod["containers"]
        (mount,) = [m for m in container["volumeMounts"] if m["name"] == volume["name"]]
        assert "subPath" not in mount  # it would keep the keys of the pod's start
        assert set(given) == {f"{mount['mountPath']}/keys.json"}


def test_service__leaves_its_workers_readiness_to_kuberay() -> None:
    """Its probe asks the endpoint, too; one of ours would take that probe's place."""
    (worker,) = cluster_of(resource(SERVING))["workerGroupSpecs"]
    assert "readinessProbe" not in worker["template"]["spec"]["containers"][0]


def test_versions__are_those_of_this_project(tree: dict[str, Any]) -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)

    assert pinned is not None
    assert cluster_of(tree)["rayVersion"] == pinned[1]
    assert {c["image"] for c in containers_of(tree)} == {f"mimray:{__version__}"}
    assert f"--tag mimray:{__version__} ." in (ROOT / "Dockerfile").read_text()


def test_token__is_asked_for(tree: dict[str, Any]) -> None:
    assert cluster_of(tree)["authOptions"] == {"mode": "token"}


def test_pods__have_no_privilege(tree: dict[str, Any]) -> None:
    user = re.search(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert user is not None
    for group in groups_of(tree):
        pod = group["template"]["spec"]
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert (security["runAsUser"], security["runAsGroup"]) == (int(user[1]), int(user[2]))
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
            }  # fmt: skip


def test_pods__have_what_a_node_needs(tree: dict[str, Any]) -> None:
    for group in groups_of(tree):
        (container,) = group["template"]["spec"]["containers"]
        volumes = {v["name"]: v for v in group["template"]["spec"]["volumes"]}
        mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        assert set(mounts.values()) == set(volumes)
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        sizes = (volumes[mounts["/dev/shm"]]["emptyDir"]["sizeLimit"],
                 container["resources"]["limits"]["memory"])  # fmt: skip
        shared, memory = (int(size.removesuffix("Gi")) for size in sizes)
        assert 0.3 * memory <= shared < memory  # Ray's object store takes 30 %
        assert container["livenessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
        requests, limits = (container["resources"][key] for key in ("requests", "limits"))
        for key in ("cpu", "memory"):
            assert (
                requests[key] == limits[key]
            )  # Ray goes by the limit, the scheduler by the request


def test_workers__have_a_gpu_and_may_run_beside_one(tree: dict[str, Any]) -> None:
    for group in cluster_of(tree)["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        for part in ("requests", "limits"):
            assert pod["containers"][0]["resources"][part]["nvidia.com/gpu"] == "1"
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod[
            "tolerations"
        ]


def test_notice__ends_before_the_pod_is_killed(tree: dict[str, Any]) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    (folder,) = re.findall(r"^COPY .*leave\.py (\S+)$", dockerfile, re.MULTILINE)
    notices = 0
    for group in groups_of(tree):
        pod = group["template"]["spec"]
        if "lifecycle" not in pod["containers"][0]:
            continue
        program, script, seconds = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert (program, script) == ("python", f"{folder}leave.py")
        assert int(seconds) + 15 <= pod["terminationGracePeriodSeconds"]
        notices += 1
    assert notices == (2 if tree["kind"] == "RayJob" else 1)


def test_addresses__come_from_what_base_defines(tree: dict[str, Any]) -> None:
    data = named("ConfigMap", "mimray")["data"]
    header = (ROOT / "deploy/kuberay/base.yaml").read_text()

    assert {"MLFLOW_TRACKING_URI", "AWS_REGION", "NCCL_SOCKET_IFNAME"} <= data.keys()
    for container in containers_of(tree):
        config, secret = container["envFrom"]
        assert config == {"configMapRef": {"name": "mimray"}}
        assert f"secret generic {secret['secretRef']['name']} " in header


def test_network__closes_rays_ports_and_opens_the_endpoint(tree: dict[str, Any]) -> None:
    part = "training" if tree["kind"] == "RayJob" else "serving"
    policy = named("NetworkPolicy", f"mimray-{part}")["spec"]
    labels = policy["podSelector"]["matchLabels"]

    assert policy["policyTypes"] == ["Ingress"]
    for group in groups_of(tree):
        assert group["template"]["metadata"]["labels"] == labels
    own, *others = policy["ingress"]
    assert own == {
        "from": [{"podSelector": {"matchLabels": labels}}]
    }  # every port, among themselves
    opened = {port["port"]: "from" in rule for rule in others for port in rule["ports"]}
    # To named pods the dashboard and the metrics; to all the endpoint alone, which asks for keys.
    assert opened == ({8265: True, 8080: True} if part == "training"
                      else {8265: True, 8080: True, 8000: False})  # fmt: skip


def test_budget__is_of_the_pods_that_answer() -> None:
    selector = named("PodDisruptionBudget", "mimray-serving")["spec"]["selector"]["matchLabels"]
    (worker,) = cluster_of(resource(SERVING))["workerGroupSpecs"]

    # The last label is one that KubeRay adds.
    assert selector == {**worker["template"]["metadata"]["labels"], "ray.io/node-type": "worker"}


def test_service__is_not_built_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from mimray.serving.deploy.serve_schema import root
    from mimray.trainers.errors import ServingError

    monkeypatch.delenv("MIMRAY_API_KEY", raising=False)

    with pytest.raises(ServingError, match="MIMRAY_API_KEY is not set"):
        root({})
