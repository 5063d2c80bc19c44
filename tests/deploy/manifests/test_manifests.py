"""The files for Kubernetes, clusters and Grafana against those who read them: Ray, our options, our metrics."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from eagleray.deploy.cli import main as cli
from eagleray.deploy.cli.arguments import Parser
from eagleray.deploy.serve.app import build
from eagleray.deploy.serve.config import ServeArgs
from eagleray.deploy.serve.environment import FASTER_STREAMS, HAPROXY
from eagleray.deploy.serve.haproxy import COMMAND
from eagleray.deploy.serve.metrics import Metrics

MANIFESTS_FOLDER = Path(__file__).parents[3] / "deploy" / "manifests"
MANIFESTS = {"ray-service.yaml": "RayService", "ray-job.yaml": "RayJob"}


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((MANIFESTS_FOLDER / name).read_text())
    return content


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    found: dict[str, Any] = spec.get("rayClusterConfig") or spec["rayClusterSpec"]
    return found


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]


def num_gpus(cluster: dict[str, Any]) -> list[tuple[int, int]]:
    """Least number of workers and GPUs of each, by group."""
    return [
        (group["minReplicas"], int(container["resources"]["limits"]["nvidia.com/gpu"]))
        for group in cluster["workerGroupSpecs"]
        for container in group["template"]["spec"]["containers"]
    ]


def served() -> ServeArgs:
    application = served_application()
    assert application.import_path == "eagleray.deploy.serve.app:build"
    return ServeArgs.model_validate(application.args)


def served_application() -> ServeApplicationSchema:
    config = ServeDeploySchema.model_validate(yaml.safe_load(load("ray-service.yaml")["spec"]["serveConfigV2"]))
    (application,) = config.applications
    return application


def test_serves_configuration_is_one_that_serve_and_the_server_accept() -> None:
    args = served()
    application = build(args)
    assert args.engine.device == "cuda"
    assert [each.name for each in served_application().deployments] == [application._bound_deployment.name]


def test_the_file_for_one_machine_is_one_that_serve_and_the_server_accept() -> None:
    config = ServeDeploySchema.model_validate(load("one-machine.yaml"))
    (application,) = config.applications
    assert application.import_path == "eagleray.deploy.serve.app:build"
    assert config.http_options.host == "127.0.0.1"
    build(ServeArgs.model_validate(application.args))


def test_a_worker_has_room_for_a_whole_replica_and_the_cluster_for_all() -> None:
    args = served()
    ((workers, gpus),) = num_gpus(cluster_of(load("ray-service.yaml")))
    assert gpus % args.engine.tensor_parallel_size == 0
    (deployment,) = served_application().deployments
    assert isinstance(deployment.num_replicas, int)
    assert workers * gpus >= deployment.num_replicas * args.engine.tensor_parallel_size
    worker = pods(cluster_of(load("ray-service.yaml")))[1]
    assert worker["terminationGracePeriodSeconds"] > args.drain_timeout_s


def test_the_jobs_command_is_one() -> None:
    job = load("ray-job.yaml")
    program, name, *words = shlex.split(job["spec"]["entrypoint"])
    assert (program, name) == ("eagleray", "batch")
    if name not in cli.COMMANDS:
        pytest.skip("there is no `eagleray batch` yet")
    parser = Parser()
    cli._named(cli.COMMANDS[name].add_arguments)(parser)
    arguments = parser.parse_args(words)
    ((workers, gpus),) = num_gpus(cluster_of(job))
    assert workers * gpus >= arguments.replicas * arguments.tensor_parallel_size


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_whole(name: str) -> None:
    manifest = load(name)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", MANIFESTS[name])
    cluster = cluster_of(manifest)
    assert cluster["authOptions"] == {"mode": "token"}
    for pod in pods(cluster):
        volumes = {volume["name"] for volume in pod["volumes"]}
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        assert container["resources"]["limits"] == container["resources"]["requests"]
    mounted = {mount["mountPath"] for pod in pods(cluster) for mount in pod["containers"][0]["volumeMounts"]}
    paths = re.findall(r"(?<![\w./])/(?:models|etc|batch)\b[\w./-]*", (MANIFESTS_FOLDER / name).read_text())
    assert paths
    assert all(any(path.startswith(root) for root in mounted) for path in paths)


def test_rays_version_is_the_same_everywhere() -> None:
    (in_image,) = re.findall(r"ARG RAY_VERSION=(\S+)", (MANIFESTS_FOLDER / "Dockerfile").read_text())
    (on_machines,) = re.findall(r"ray\[default\]==([\d.]+)", (MANIFESTS_FOLDER / "cluster.yaml").read_text())
    in_manifests = [cluster_of(load(name))["rayVersion"] for name in MANIFESTS]
    assert [on_machines, *in_manifests] == [in_image] * 3


def test_ray_up_accepts_the_cluster() -> None:
    config = prepare_config(load("cluster.yaml"))
    validate_config(config)
    assert config["available_node_types"]["local.cluster.node"]["min_workers"] == 1
    assert all("RAY_AUTH_MODE=token" in config[f"{kind}_start_ray_commands"][1] for kind in ("head", "worker"))


def test_every_node_of_the_service_has_serves_settings_for_streams() -> None:
    binary = "RAY_SERVE_HAPROXY_BINARY_PATH"
    (in_image,) = re.findall(r"ENV PATH=([^:]+):", (MANIFESTS_FOLDER / "Dockerfile").read_text())
    for pod in pods(cluster_of(load("ray-service.yaml"))):
        environment = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
        assert environment == FASTER_STREAMS | HAPROXY | {binary: f"{in_image}/{COMMAND}"}
    commands = load("cluster.yaml")
    (on_machines,) = re.findall(r"python3 -m venv ~/(\S+)", commands["setup_commands"][0])
    for kind in ("head", "worker"):
        assert all(
            f" {name}={value}" in commands[f"{kind}_start_ray_commands"][1]
            for name, value in (FASTER_STREAMS | HAPROXY | {binary: f"$HOME/{on_machines}/bin/{COMMAND}"}).items()
        )


def test_grafana_shows_every_metric_that_there_is_and_no_other(ray_cluster: None) -> None:
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)$", Metrics().text().decode(), re.MULTILINE))
    board = json.loads((MANIFESTS_FOLDER / "grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    names = {name for query in queries for name in re.findall(r"\bray_(\w+)", query)}
    sums = {f"{name}_{what}" for name, kind in kinds.items() if kind == "histogram" for what in ("sum", "count")}
    of_histograms = {f"{name}_bucket" for name, kind in kinds.items() if kind == "histogram"}
    assert names - sums == of_histograms | {name for name, kind in kinds.items() if kind != "histogram"}
    for query in queries:
        counters = [name for name, kind in kinds.items() if kind == "counter" and f"ray_{name}" in query]
        assert all(f"rate(ray_{name}[" in query for name in counters)


def test_panels_do_not_overlap_and_name_their_source() -> None:
    panels = json.loads((MANIFESTS_FOLDER / "grafana-dashboard.json").read_text())["panels"]
    corners = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(corners) == len(panels) == len({panel["id"] for panel in panels})
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels)


def test_the_guide_names_every_file_and_no_other() -> None:
    guide = (MANIFESTS_FOLDER / "README.md").read_text()
    named = set(re.findall(r"`([\w-]+\.(?:yaml|json|sh)|Dockerfile)`", guide))
    there = {
        path.name
        for path in MANIFESTS_FOLDER.iterdir()
        if path.suffix in (".yaml", ".json", ".sh") or path.stem == "Dockerfile"
    }
    assert named - {"submit.sh"} == there - {"submit.sh"}
