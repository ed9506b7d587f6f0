"""A run on Kubernetes: ``launch/k8s/trainjob.yaml`` or ``jobset.yaml``, filled in, and the config as a ConfigMap."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.launch.profile import Profile
from mmmoe_pretrain.urls import is_url

SECONDS = 120  # that kubectl may take
TEMPLATES = Path(__file__).parent / "k8s"
MOST_NAME = 40  # of 63, since names of pods add to it
CONFIG = "run.yaml"


def name_of(run: str) -> str:
    """The name of a run as Kubernetes takes it (RFC 1123). Raises ValueError where nothing of it is left."""
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if not name or len(name) > MOST_NAME or name[0].isdigit():
        raise ValueError(
            f"name {run} makes no name for Kubernetes, which takes up to {MOST_NAME} lower-case letters, digits and "
            f"-, beginning with a letter; give name="
        )
    return name


def check(profile: Profile, run: RunConfig) -> None:
    """Refuse a run without an image, and one whose folder is deleted with its pods."""
    if not profile.image:
        raise ValueError(
            "--on k8s runs a container: set image in the profile (docs/clusters.md says how to build it)"
        )
    places = list(profile.kubernetes.claims.values())
    if not is_url(run.runs_dir) and not any(Path(run.runs_dir).is_relative_to(place) for place in places):
        raise ValueError(
            f"runs_dir {run.runs_dir} lies in the container, and is deleted with it; set runs_dir= to a folder of a "
            f"claim, as kubernetes.claims of the profile mounts them: {', '.join(places) or 'none'}"
        )


def documents(profile: Profile, run: str, nodes: int, processes: int, config: str) -> list[dict[str, Any]]:
    """What ``kubectl create`` gets, of a run that passes ``check``. ``config``: the text of the resolved config."""
    own, name = profile.kubernetes, name_of(run)
    found = list(yaml.safe_load_all((TEMPLATES / f"{own.api}.yaml").read_text(encoding="utf-8")))
    arguments = ["launch/torchrun.sh", str(processes), "train", f"/run/mmmoe/{CONFIG}"]
    resources = {"nvidia.com/gpu": None, own.gpu_resource: own.gpus_per_node, "cpu": own.cpu, "memory": own.memory}
    limits = {key: str(value) for key, value in resources.items() if value is not None}
    variables = [{"name": key, "value": its.value} for key, its in profile.environment.items()]
    head = found[0]
    spec = head["spec"] if own.api == "jobset" else head["spec"]["template"]["spec"]
    spec["failurePolicy"]["maxRestarts"] = own.max_restarts
    job = spec["replicatedJobs"][0]["template"]["spec"]
    container = _fill_pod(job["template"]["spec"], profile, name)
    if own.api == "jobset":
        job |= {"parallelism": nodes, "completions": nodes}
        own_variables = [
            {"name": "NNODES", "value": str(nodes)},
            {"name": "MASTER_ADDR", "value": f"{name}-node-0-0.{name}"},
        ]
        container |= {"args": arguments, "env": own_variables + variables, "resources": {"limits": limits}}
    else:
        head["spec"]["mlPolicy"]["numNodes"] = nodes
        train = found[1]["spec"]
        train["runtimeRef"]["name"] = name
        train["trainer"] |= {"numNodes": nodes, "args": arguments, "env": variables,
                             "resourcesPerNode": {"limits": limits}}  # fmt: skip
    configmap = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {}, "data": {CONFIG: config}}
    for document in (configmap, *found):
        document["metadata"]["name"] = f"{name}-config" if document is configmap else name
        if own.namespace:
            document["metadata"]["namespace"] = own.namespace
    if own.queue:
        found[-1]["metadata"].setdefault("labels", {})["kueue.x-k8s.io/queue-name"] = own.queue
    return [configmap, *found]


def _fill_pod(pod: dict[str, Any], profile: Profile, name: str) -> dict[str, Any]:
    """Its container."""
    own, container = profile.kubernetes, pod["containers"][0]
    container["image"] = profile.image
    pod["terminationGracePeriodSeconds"] = own.grace_seconds
    if own.node_selector:
        pod["nodeSelector"] = dict(own.node_selector)
    config, shared = pod["volumes"][:2]
    config["configMap"]["name"] = f"{name}-config"
    shared["emptyDir"]["sizeLimit"] = own.shared_memory
    claims = [(f"claim-{number}", claim, place) for number, (claim, place) in enumerate(own.claims.items())]
    pod["volumes"] = [config, shared, *({"name": volume, "persistentVolumeClaim": {"claimName": claim}}
                                        for volume, claim, _ in claims)]  # fmt: skip
    container["volumeMounts"] = [*container["volumeMounts"][:2], *({"name": volume, "mountPath": place}
                                                                   for volume, _, place in claims)]  # fmt: skip
    return container


def text_of(found: list[dict[str, Any]]) -> str:
    return yaml.safe_dump_all(found, sort_keys=False)


def submit(found: list[dict[str, Any]]) -> str:
    """Creates what is not there. Raises ValueError with what kubectl said."""
    try:
        result = subprocess.run(["kubectl", "create", "-f", "-"], input=text_of(found), timeout=SECONDS,
                                capture_output=True, text=True, check=False)  # fmt: skip
    except FileNotFoundError:
        raise ValueError(
            "there is no kubectl on this machine; install it, or write what it would get to a file with --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"kubectl gave no answer within {SECONDS} s; is the cluster reachable? (kubectl get nodes)"
        ) from None
    if result.returncode:
        said = " ".join(result.stderr.split())
        hint = "; delete that run first, or give this one another name=" if "AlreadyExists" in said else ""
        hint = "; is Kubeflow Trainer (or JobSet) installed?" if "no matches for kind" in said else hint
        raise ValueError(f"kubectl refused the run: {said}{hint}")
    return result.stdout.strip()


def how_to_follow(profile: Profile, run: str) -> list[str]:
    name, where = name_of(run), f" -n {profile.kubernetes.namespace}" if profile.kubernetes.namespace else ""
    kinds = f"{profile.kubernetes.api}/{name}"
    runtime = f" trainingruntime/{name}" if profile.kubernetes.api == "trainjob" else ""
    return [
        f"  its log:  kubectl{where} logs -f -l jobset.sigs.k8s.io/jobset-name={name} --prefix --max-log-requests=64",
        f"  its state:  kubectl{where} get {kinds}",
        f"  end it:  kubectl{where} delete {kinds}{runtime} configmap/{name}-config",
    ]
