"""The files that start the project on clusters: linted, valid, with one set of ports, no open door and no secret."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts import scripts

from experiments import composition

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
SCRIPTS = sorted(DOCKER.glob("*.sh"))
IMAGES = [DOCKER / "Dockerfile", DOCKER / "Dockerfile.cuda"]
START_OPTIONS = {option for parameter in scripts.start.params for option in parameter.opts}
SERVICE_KEYS = {
    *("image", "build", "command", "environment", "healthcheck", "depends_on", "restart", "stop_grace_period", "ports"),
    *("shm_size", "cap_drop", "security_opt", "secrets", "volumes"),
}
# of KubeRay 1.6
JOB_KEYS = {
    *("entrypoint", "submissionMode", "backoffLimit", "submitterConfig", "submitterPodTemplate", "rayClusterSpec"),
    *("shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds"),
}
CLUSTER_KEYS = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"}
GROUP_KEYS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert found, f"pip install 'diloco[test]' brings {name}"
    return found


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DOCKER / name).read_text()))


@pytest.fixture
def compose() -> dict[str, Any]:
    return documents("compose.yaml")[0]


@pytest.fixture
def job() -> dict[str, Any]:
    return documents("kuberay.yaml")[0]


def node_options(command: str) -> dict[str, str]:
    """The options of a `ray start` in a shell command, of which all must be some that Ray has."""
    found = dict(re.findall(r"(--[\w-]+)(?:=(\S+))?", command.partition("ray start ")[2]))
    assert set(found) <= START_OPTIONS, set(found) - START_OPTIONS
    return found


# --- all of them ---


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    subprocess.run([tool("shellcheck"), script], check=True)
    assert script.stat().st_mode & 0o111, "not executable"
    lines = script.read_text().splitlines()
    assert script not in SCRIPTS or all(line.isascii() and len(line) <= 120 for line in lines)


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_images_are_sound(image: Path) -> None:
    subprocess.run([tool("hadolint"), "--failure-threshold", "info", image], check=True)
    last = image.read_text().split("\nFROM ")[-1]
    assert re.findall(r"^USER (.*)$", last, flags=re.MULTILINE) == ["${UID}"], "not as root"
    assert not re.search(r"\b(gcc|build-essential|git|curl|vim)\b", last), "no tools of developers"


def test_images_copy_what_the_context_lets_in() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for image in IMAGES:
        copied = re.findall(r"^COPY (?!--from)(.*) \S+$", image.read_text(), flags=re.MULTILINE)
        for name in " ".join(copied).split():
            assert (ROOT / name).exists(), name
            assert name in allowed or (name.startswith("docker/") and "docker/*.sh" in allowed), name


def test_the_images_differ_in_what_a_gpu_needs_only() -> None:
    lines = [set(image.read_text().splitlines()) for image in IMAGES]
    differing = [line for line in lines[0] ^ lines[1] if not line.startswith("#")]
    assert all(re.search(r"TORCH_INDEX=|NVIDIA_|RAY_USAGE_STATS_ENABLED", line) for line in differing), differing


def texts() -> Iterator[tuple[str, int, str]]:
    for path in sorted(path for path in DOCKER.iterdir() if path.is_file() and path.name != "ray_token"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            yield path.name, number, line


def test_dashboards_listen_on_loopback() -> None:
    found = [(name, line) for name, _, line in texts() if re.search(r"dashboard-host[=:]", line)]
    assert {name for name, _ in found} >= {"node.sh", "cluster.yaml", "compose.yaml", "kuberay.yaml"}
    open_ones = [(name, line) for name, line in found if not re.search(r"dashboard-host=127\.0\.0\.1", line)]
    # In compose.yaml a comment says how; in a pod the operator must reach it: see test_kuberay_lets_nobody_in.
    assert [name for name, line in open_ones if "# DASHBOARD: add" not in line] == ["kuberay.yaml"], open_ones


def test_no_file_has_a_secret() -> None:
    for name, number, line in texts():
        assert not re.search(r"\b[0-9a-f]{32,}\b|PRIVATE KEY-----|AKIA[0-9A-Z]{16}", line), f"{name}:{number}"
        given = re.search(r"RAY_AUTH_TOKEN[=:] *(\S+)", line)
        assert not given, f"{name}:{number}: a token belongs into a file or a Secret"
    assert "docker/ray_token" in (ROOT / ".gitignore").read_text()


# --- node.sh and the launcher ---


def test_node_and_launcher_have_the_same_ports() -> None:
    text = (DOCKER / "node.sh").read_text()
    first = int(re.search(r'NODE_PORTS:=(\d+)\}"', text)[1])  # type: ignore[index]
    found = re.findall(r'--([\w-]+port)="(?:\$NODE_PORTS|\$\(\(NODE_PORTS \+ (\d+)\)\))"', text)
    ports = {f"--{name}": str(first + int(more or 0)) for name, more in found}
    assert len(ports) == 8 and set(ports) <= START_OPTIONS
    drain = {option for parameter in scripts.drain_node.params for option in parameter.opts}
    assert set(re.findall(r"(?<=[ (])--[a-z-]+(?==)", text)) <= START_OPTIONS | drain
    config = documents("cluster.yaml")[0]
    for part in ("head_start_ray_commands", "worker_start_ray_commands"):
        options = node_options(config[part][1])
        assert {name: options[name] for name in ports} == ports, part
        assert options["--object-store-memory"]
    assert node_options(config["head_start_ray_commands"][1])["--dashboard-host"] == "127.0.0.1"


def test_the_launcher_takes_its_file() -> None:
    config = documents("cluster.yaml")[0]
    validate_config(prepare_config(config))
    (setup,) = config["setup_commands"]
    assert "RAY_AUTH_MODE=token" in setup and "chmod 600 ~/.ray/auth_token" in setup
    assert "RAY_UP_enable_autoscaler_v2=0" in (DOCKER / "cluster.yaml").read_text()
    subprocess.run(["bash", "-n", "-c", setup], check=True)


# --- compose ---


def test_compose_has_keys_that_compose_knows(compose: dict[str, Any]) -> None:
    assert {key for key in compose if not key.startswith("x-")} == {"name", "services", "secrets", "volumes"}
    assert set(compose["services"]) == {"head", "node"}
    for service in compose["services"].values():
        assert set(service) <= SERVICE_KEYS
        assert {volume.split(":")[0] for volume in service["volumes"]} <= set(compose["volumes"])
        assert set(service["secrets"]) <= set(compose["secrets"])
        assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        role, *options = service["command"]
        assert role in ("head", "worker") and node_options(f"ray start {' '.join(options)}")
        grace_s = int(service["stop_grace_period"].removesuffix("s"))
        assert grace_s > int(service["environment"]["NODE_DRAIN_S"])
    assert compose["services"]["node"]["depends_on"] == {"head": {"condition": "service_healthy"}}
    assert all(re.fullmatch(r"\$\{\w+:-[^}]+\}", given) for given in re.findall(r"\$\{[^}]*\}?", str(compose)))


def test_compose_opens_nothing(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
        assert "ports" not in service and service["shm_size"]
    published = re.findall(r'# ports: \["([^"]*)"\]', (DOCKER / "compose.yaml").read_text())
    assert published == ["127.0.0.1:8265:8265"]


# --- KubeRay ---


def test_kuberay_has_what_a_job_needs(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob") and job["metadata"]["name"]
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert set(spec) <= JOB_KEYS and set(cluster) <= CLUSTER_KEYS
    assert spec["backoffLimit"] > 0 and spec["submissionMode"] == "K8sJobMode"
    ray_version = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert ray_version and cluster["rayVersion"] == ray_version[1]
    (group,) = cluster["workerGroupSpecs"]
    assert set(group) <= GROUP_KEYS and group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for part in (cluster["headGroupSpec"], group):
        parameters = part["rayStartParams"]
        assert {f"--{name}" for name in parameters} <= START_OPTIONS
        assert all(isinstance(value, str) for value in parameters.values())
        pod = part["template"]["spec"]
        claimed = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]}
        assert claimed == {"runs": documents("kuberay.yaml")[1]["metadata"]["name"]}
        (container,) = pod["containers"]
        drain_s = {entry["name"]: entry["value"] for entry in container["env"]}["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
        assert pod["terminationGracePeriodSeconds"] > int(drain_s)


def test_kuberay_runs_what_the_command_line_takes(job: dict[str, Any]) -> None:
    words = job["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "-m", "experiments.train"] and "resume=auto" in words
    config = composition.single(composition.Request(overrides=tuple(words[3:]), imports=(), config_dir="")).config
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert config.max_islands == group["maxReplicas"] and config.min_islands == group["minReplicas"]


def test_kuberay_lets_nobody_in(job: dict[str, Any]) -> None:
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    head, (group,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "diloco-token"}
    assert head["serviceType"] == "ClusterIP" and head["enableIngress"] is False
    templates = [spec["submitterPodTemplate"], head["template"], group["template"]]
    policy = documents("kuberay.yaml")[2]
    assert policy["kind"] == "NetworkPolicy" and policy["spec"]["policyTypes"] == ["Ingress"]
    chosen = policy["spec"]["podSelector"]["matchLabels"]
    inside, operator = policy["spec"]["ingress"]
    assert inside == {"from": [{"podSelector": {"matchLabels": chosen}}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    for template in templates:
        assert chosen.items() <= template["metadata"]["labels"].items()
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    submitter = {entry["name"]: entry for entry in templates[0]["spec"]["containers"][0]["env"]}
    secret = submitter["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert secret == {"name": "diloco-token", "key": "auth_token"}
    assert f"secret generic {secret['name']} --from-literal={secret['key']}=" in (DOCKER / "kuberay.yaml").read_text()
