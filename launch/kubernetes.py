"""A run on Kubernetes: ``launch/k8s/trainjob.yaml`` or ``jobset.yaml``, filled in, and the config as a ConfigMap."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
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
    if not _is_mounted(profile, run.runs_dir):
        raise ValueError(
            f"runs_dir {run.runs_dir} lies in the container, and is deleted with it; set runs_dir= to a folder of a "
            f"claim, as kubernetes.claims of the profile mounts them: "
            f"{', '.join(profile.kubernetes.claims.values()) or 'none'}"
        )


def not_mounted(profile: Profile, run: RunConfig) -> list[str]:
    """What a run reads that no claim has, by key."""
    places = {f"data.train[{number}].path": source.path for number, source in enumerate(run.data.train)}
    if run.data.tokenizer:
        places["data.tokenizer"] = run.data.tokenizer
    return [
        f"{key} {path}" for key, path in places.items() if not all(_is_there(profile, p) for p in path.split("::"))
    ]


def _is_there(profile: Profile, path: str) -> bool:
    return is_url(path) or path.startswith("pipe:") or _is_mounted(profile, path)


def _is_mounted(profile: Profile, path: str) -> bool:
    folder = Path(os.path.normpath(path))
    return any(folder.is_relative_to(place) for place in profile.kubernetes.claims.values())


def documents(
    profile: Profile, run: str, nodes: int, processes: int, config: str, options: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """What ``kubectl create`` gets, of a run that passes ``check``. ``config``: the text of the resolved config.
    ``options``: of ``mmmoe train``."""
    own, name = profile.kubernetes, name_of(run)
    found = list(yaml.safe_load_all((TEMPLATES / f"{own.api}.yaml").read_text(encoding="utf-8")))
    arguments = ["launch/torchrun.sh", str(processes), "train", f"/run/mmmoe/{CONFIG}", *options]
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
    config, shared = pod["volumes"][:2]
    config["configMap"]["name"] = f"{name}-config"
    shared["emptyDir"]["sizeLimit"] = own.shared_memory
    claims = [(f"claim-{number}", claim, place) for number, (claim, place) in enumerate(own.claims.items())]
    pod["volumes"] = [config, shared, *({"name": volume, "persistentVolumeClaim": {"claimName": claim}}
                                        for volume, claim, _ in claims)]  # fmt: skip
    container["volumeMounts"] = [*container["volumeMounts"][:2], *({"name": volume, "mountPath": place}
                                                                   for volume, _, place in claims)]  # fmt: skip
    _add(container, own.container)
    _add(pod, own.pod)
    return container


def _add(target: dict[str, Any], more: dict[str, Any]) -> None:
    """``more`` over ``target``: mappings are merged, lists are extended."""
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _add(target[key], value)
        elif isinstance(value, list) and isinstance(target.get(key), list):
            target[key] = [*target[key], *value]
        else:
            target[key] = value


class _Dumper(yaml.SafeDumper):
    """Writes a text of several lines as lines, and equal lists in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _Dumper.represent_text)


def text_of(found: list[dict[str, Any]]) -> str:
    return yaml.dump_all(found, Dumper=_Dumper, sort_keys=False)


def submit(found: list[dict[str, Any]], profile: Profile, run: str) -> str:
    """Creates what is not there. Raises ValueError with what kubectl said."""
    try:
        result = subprocess.run(["kubectl", "create", "-f", "-"], input=text_of(found), timeout=SECONDS,
                                capture_output=True, text=True, errors="replace", check=False)  # fmt: skip
    except FileNotFoundError:
        raise ValueError(
            "there is no kubectl on this machine; install it, or write what it would get to a file with --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"kubectl gave no answer within {SECONDS} s; is the cluster reachable? (kubectl get nodes)"
        ) from None
    if result.returncode:
        said = " ".join(result.stderr.split()) or f"it ended with {result.returncode}"
        hint = ""
        if "AlreadyExists" in said:
            hint = f"; delete that run first ({delete_command(profile, run)}), or give this one another name="
        hint = "; is Kubeflow Trainer (or JobSet) installed?" if "no matches for kind" in said else hint
        if "refused" in said or "no such host" in said:
            said, hint = said.partition("; if you choose")[0], "; which cluster? (kubectl config current-context)"
        raise ValueError(f"kubectl refused the run: {said}{hint}")
    return result.stdout.strip()


def how_to_follow(profile: Profile, run: str) -> list[str]:
    name, where = name_of(run), _namespace(profile)
    return [
        f"  its log:  kubectl{where} logs -f -l jobset.sigs.k8s.io/jobset-name={name} --prefix --max-log-requests=64",
        f"  its state:  kubectl{where} get {profile.kubernetes.api}/{name}",
        f"  end it:  {delete_command(profile, run)}",
    ]


def delete_command(profile: Profile, run: str) -> str:
    name, kinds = (
        name_of(run),
        ["trainjob", "trainingruntime"] if profile.kubernetes.api == "trainjob" else ["jobset"],
    )
    made = " ".join([*(f"{kind}/{name}" for kind in kinds), f"configmap/{name}-config"])
    return f"kubectl{_namespace(profile)} delete --ignore-not-found {made}"


def _namespace(profile: Profile) -> str:
    return f" -n {profile.kubernetes.namespace}" if profile.kubernetes.namespace else ""
