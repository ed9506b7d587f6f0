"""mmmoe-launch: what it would submit, what commands in the place of sbatch and kubectl get, and what is refused."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.launch import kubernetes, profile
from mmmoe_pretrain.launch.submit import app
from tests.launch.test_torchrun import ROOT, run_of

K8S = ROOT / "launch" / "k8s"
CLUSTER: dict[str, Any] = {
    "processes_per_node": 1,
    "image": "registry.example/mmmoe:1",
    "environment": {"NCCL_IB_HCA": {"value": "mlx5 0", "reason": "the adapters that reach the other racks"}},
    "slurm": {"partition": "gpu", "account": "a team", "time": "1-00:00:00", "gpus_per_node": 1,
              "options": ["--exclusive"]},
    "kubernetes": {
        "namespace": "ml", "gpus_per_node": 1, "queue": "team", "claims": {"runs": "/runs"},
        "pod": {"tolerations": [{"key": "gpu", "operator": "Exists"}], "securityContext": {"fsGroup": 10001},
                "volumes": [{"name": "more", "emptyDir": {}}]},
        "container": {"envFrom": [{"secretRef": {"name": "bucket"}}]},
    },
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a run, with a profile beside it, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    run_config.dump(run_of(tmp_path, tiny_data, steps=4), Path("run.yaml"))
    Path("cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    return Path("run.yaml")


def launch(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def refusal(*arguments: str) -> str:
    result = launch(*arguments)
    assert isinstance(result.exception, ValueError), result.output
    return str(result.exception)


def command(name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of that name on the path."""
    path = Path("bin") / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent.resolve()))  # the machine's own must not answer


def test_a_dry_run_on_slurm_prints_the_line_that_a_user_would_type(config: Path) -> None:
    result = launch(str(config), "--on", "slurm", "--nodes", "2", "--profile", "cluster.yaml", "--dry-run")
    assert result.exit_code == 0, result.output
    words = shlex.split(result.stdout)
    assert "NCCL_IB_HCA=mlx5 0" in words
    assert "CONTAINER_IMAGE=registry.example/mmmoe:1" in words
    here, run = Path.cwd(), Path.cwd() / "runs" / "tiny"
    assert f"CONTAINER_MOUNTS={here}:{here},{run}:{run}" in words
    sbatch = words[words.index("sbatch") :]
    assert {"--nodes=2", "--partition=gpu", "--account=a team", "--gpus-per-node=1", "--time=1-00:00:00",
            "--signal=B:USR1@180", "--exclusive"} <= set(sbatch)  # fmt: skip
    script, processes, train, run = sbatch[-4:]
    assert script.endswith("/code/mmmoe_pretrain/launch/slurm.sbatch")
    assert (processes, train, Path(run).name) == ("1", "train", "run.yaml")
    assert not list(Path("runs").glob("*")), "nothing is written"
    checked = launch(str(config), "--on", "slurm", "--nodes", "2", "--preflight", "--dry-run")
    assert shlex.split(checked.stdout)[-1] == "--preflight"


def test_a_submitted_job_has_a_copy_of_the_code_and_of_the_resolved_config(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("sbatch", 'printf "%s\\n" "$@" > arguments; echo "41;cluster"', monkeypatch)
    command("squeue", "[ -e ended ] || echo 'PENDING (PartitionNodeLimit)'", monkeypatch)
    command("git", "printf '\\377'", monkeypatch)  # of a changed file that is not UTF-8
    result = launch(str(config), "--on", "slurm", "--nodes", "2", "--profile", "cluster.yaml", "train.steps=3")
    assert result.exit_code == 0, result.output
    assert "submitted job 41: PENDING (PartitionNodeLimit)" in result.stdout
    assert "launch/slurm-41.log" in result.stdout
    *_, script, _, _, run = Path("arguments").read_text().splitlines()
    assert run_config.load(Path(run)).train.steps == 3
    launcher = Path(script).with_name("torchrun.sh")
    assert os.access(launcher, os.X_OK)
    assert launcher.read_text() == (ROOT / "launch" / "torchrun.sh").read_text()
    revision = (Path(run).parent / "revision.txt").read_text()
    assert "torch 2" in revision and "\ufffd" in revision
    assert refusal(str(config), "--on", "slurm", "--nodes", "2").endswith(
        "has job 41, which is PENDING (PartitionNodeLimit); end it (scancel 41), or give this run another name="
    )
    Path("ended").touch()
    (Path(run).parents[1] / "job.json").write_text("")  # as of a disk that was full
    assert "job.json does not name the run's last job" in refusal(str(config), "--on", "slurm", "--nodes", "2")
    assert launch(str(config), "--on", "slurm", "--nodes", "1", "name=again").exit_code == 0


SRUN = """
if [[ $1 == --help ]]; then
  echo --container-image
  /bin/sleep 0.3
  printf '%09999d' 1  # more help, which nobody reads
else
  printf '%s\\n' "$@" > arguments
fi
"""


def test_a_job_with_an_image_runs_it_by_pyxis_where_srun_has_it(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("srun", SRUN, monkeypatch)
    command("scontrol", "echo node0", monkeypatch)
    monkeypatch.setenv("PATH", os.pathsep.join([os.environ["PATH"], os.defpath]))
    variables = {"MMMOE_ROOT": "/code", "CONTAINER_IMAGE": "an image", "SLURM_JOB_NUM_NODES": "1",
                 "SLURM_JOB_NODELIST": "node0", "SLURM_JOB_ID": "41"}  # fmt: skip
    subprocess.run(["bash", ROOT / "launch" / "slurm.sbatch", "8", "train", "x"], check=True,
                   env={**os.environ, **variables})  # fmt: skip
    arguments = Path("arguments").read_text().splitlines()
    assert arguments[arguments.index("--container-image") + 1] == "an image"


@pytest.mark.parametrize(
    ("sbatch", "message"),
    [
        (None, "there is no sbatch on this machine; submit from a login node"),
        ('echo "sbatch: error: invalid partition specified: gpu" >&2; exit 1',
         "sbatch refused the job: sbatch: error: invalid partition specified: gpu; set slurm.partition"),
        ('echo "sbatch: error: too busy" >&2; exit 1', "sbatch refused the job: sbatch: error: too busy"),
        ("printf '\\377' >&2; exit 1", "sbatch refused the job: \ufffd"),
        ("echo queued", "sbatch named no job: 'queued'; is it queued?"),
    ],
)  # fmt: skip
def test_what_sbatch_refuses_is_one_line(
    config: Path, monkeypatch: pytest.MonkeyPatch, sbatch: str | None, message: str
) -> None:
    command("squeue", "", monkeypatch)
    if sbatch:
        command("sbatch", sbatch, monkeypatch)
    assert refusal(str(config), "--on", "slurm", "--profile", "cluster.yaml").startswith(message)
    assert not list(Path("runs/tiny/launch").glob("*")), "no copy of the code is left"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "2"], "--on local is this machine, and --nodes is 2"),
        (["--on", "slurm", "--nodes", "3"], "train.global_batch_size"),
        (["--on", "slurm", "name=trained"], "model.hidden_size was 32 and is 16; set it back"),
        (["--on", "k8s"], "--on k8s runs a container: set image in the profile"),
        (["--on", "k8s", "--profile", "cluster.yaml", "runs_dir=runs"], "runs_dir runs lies in the container"),
        (["--on", "k8s", "--profile", "cluster.yaml", "runs_dir=/runs/../tmp"], "lies in the container"),
        (["--on", "k8s", "--profile", "cluster.yaml", "runs_dir=/runs", "name=9-lives"],
         "name 9-lives makes no name for Kubernetes"),
        (["--on", "slurm", "--profile", "no.yaml"], "no profile at no.yaml"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_work_is_refused(config: Path, arguments: list[str], message: str) -> None:
    trained = run_config.load(config, ("name=trained", "model.hidden_size=32"))
    trained.run_dir.mkdir(parents=True)
    run_config.dump(trained, trained.run_dir / "config.yaml")
    assert message in refusal(str(config), *arguments)


def test_what_does_not_fit_the_gpus_of_the_profile_is_refused_unless_forced(config: Path) -> None:
    """A billion numbers of fp32 weights, gradients and two moments are 16 GB, and a rank of kind cpu has 4."""
    large = ["model.ffn_hidden_size=10000000"]
    arguments = [str(config), "--on", "slurm", "--profile", "gpu.yaml", "--dry-run"]
    Path("gpu.yaml").write_text(yaml.safe_dump({**CLUSTER, "gpu": "cpu"}))
    assert launch(*arguments).exit_code == 0
    message = refusal(*arguments, *large)
    assert "tiny on 1 GPUs: the GPUs of pipeline rank 0 would need " in message
    assert message.endswith("lists layouts that fit, and --force submits it anyway")
    forced = launch(*arguments, *large, "--force")
    assert forced.exit_code == 0 and "submitted all the same, by --force" in forced.stderr
    assert launch(*[a.replace("gpu.yaml", "cluster.yaml") for a in arguments], *large).exit_code == 0  # says no kind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slurm: {partitoin: gpu}", "unknown key 'slurm.partitoin'; did you mean partition?"),
        ("slurm: {gpus_per_node: 0}", "slurm.gpus_per_node: Input should be greater than or equal to 1 (got 0)"),
        ("environment: {NCCL_DEBUG: {value: INFO}}",
         "environment.NCCL_DEBUG has no reason; say why this cluster needs it"),
        ("environment: {'A B': {value: x}}", "environment.A B"),
        ('image: "a\\nb"', "it must be one line of printable characters"),
        ("- a", "holds list, not a mapping of keys"),
        ("slurm: {time: '4', warn_seconds: 180}", "slurm.time 4 leaves no time to train: the warning comes"),
        ("slurm: {time: 1h}", "slurm.time '1h' is not one of sbatch's; e.g. 1:30:00"),
        ("slurm: {time: 1:00:00}", "slurm.time: it must be text: put it in quotes"),
        ("environment: {MMMOE_ROOT: {value: /code}}", "environment.MMMOE_ROOT is set by mmmoe-launch"),
        ("gpu: h1000", "gpu 'h1000' is not a known GPU; use one of h100, "),
    ],
)  # fmt: skip
def test_a_wrong_profile_is_told_by_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        profile.load(tmp_path / "cluster.yaml")
    assert message in str(error.value)


def test_the_profile_of_the_docs_has_every_key_and_is_one() -> None:
    (text,) = re.findall(r"All keys:\n```yaml\n(.*?)```", (ROOT / "docs" / "clusters.md").read_text(), re.DOTALL)
    written = yaml.safe_load(text)
    told = profile.Profile.model_validate(written)
    assert written.keys() == set(profile.Profile.model_fields)
    assert written["slurm"].keys() == set(profile.Slurm.model_fields)
    assert written["kubernetes"].keys() == set(profile.Kubernetes.model_fields)
    assert (told.slurm.memory, told.kubernetes.cpu) == ("0", "96")


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("1:30:00", 5400),
        ("2-12", 216_000),
        ("1-0:10:05", 87_005),
        ("UNLIMITED", math.inf),
    ],
)
def test_times_are_read_as_sbatch_reads_them(time: str, seconds: float) -> None:
    assert profile.seconds_of(time) == seconds


def validated(documents: list[dict[str, Any]]) -> list[str]:
    """Their kinds, checked against the schemas of Kubernetes, JobSet and Kubeflow Trainer."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    validate = pytest.importorskip("kubernetes_validate").validate
    for document in documents:
        match document["kind"]:
            case "ConfigMap":
                validate(document, "1.31", strict=True)
                continue
            case "JobSet":
                model = models.JobsetV1alpha2JobSet
                job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"},
                       "spec": document["spec"]["replicatedJobs"][0]["template"]["spec"]}  # fmt: skip
                validate(job, "1.31", strict=True)
            case "TrainingRuntime":
                model = models.TrainerV1alpha1TrainingRuntime
            case "TrainJob":
                model = models.TrainerV1alpha1TrainJob
        kept = model.from_dict(document).to_dict()
        assert not missing(document, kept), "keys that the schema does not know"
    return [document["kind"] for document in documents]


def missing(document: Any, kept: Any, where: str = "") -> list[str]:
    if isinstance(document, dict):
        lost = [f"{where}.{key}" for key in document if not isinstance(kept, dict) or key not in kept]
        return lost or [each for key in document for each in missing(document[key], kept[key], f"{where}.{key}")]
    if isinstance(document, list):
        return [each for one, other in zip(document, kept, strict=True) for each in missing(one, other, where)]
    return []


@pytest.mark.parametrize(("api", "kinds"), [("trainjob", ["TrainingRuntime", "TrainJob"]), ("jobset", ["JobSet"])])
def test_manifests_have_the_published_schemas(config: Path, api: str, kinds: list[str]) -> None:
    assert validated(list(yaml.safe_load_all((K8S / f"{api}.yaml").read_text()))) == kinds
    Path("cluster.yaml").write_text(yaml.safe_dump({**CLUSTER, "kubernetes": {**CLUSTER["kubernetes"], "api": api}}))
    result = launch(str(config), "--on", "k8s", "--nodes", "2", "--profile", "cluster.yaml", "--dry-run",
                    "runs_dir=/runs", "name=Big.Run")  # fmt: skip
    assert result.exit_code == 0, result.output
    documents = list(yaml.safe_load_all(result.stdout))
    assert validated(documents) == ["ConfigMap", *kinds]
    assert {document["metadata"]["namespace"] for document in documents} == {"ml"}
    text = json.dumps(documents[1:])
    assert documents[-1]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    for part in ('"fsGroup": 10001', '"key": "gpu"', '"name": "more"', '"name": "bucket"', '"claim-0"', '"big-run"',
                 '"mlx5 0"', '"registry.example/mmmoe:1"', '"/runs"', '"nvidia.com/gpu": "1"'):  # fmt: skip
        assert part in text, part
    assert "demo" not in text, "every name of the template is replaced"
    assert result.stderr.count("is in no claim of the profile: the image must have it") == 2, "data and tokenizer"
    assert "  run.yaml: |\n    name: Big.Run\n" in result.stdout, "a reader sees the config line by line"
    run = yaml.safe_load(documents[0]["data"]["run.yaml"])
    assert (run["name"], run["runs_dir"]) == ("Big.Run", "/runs")


@pytest.mark.parametrize(
    ("kubectl", "message"),
    [
        (None, "there is no kubectl on this machine"),
        ('echo "Error from server (AlreadyExists): jobsets demo" >&2; exit 1', "give this one another name="),
        ('echo "dial tcp: connection refused" >&2; exit 1', "which cluster? (kubectl config current-context)"),
        ('echo "no matches for kind TrainJob" >&2; exit 1', "is Kubeflow Trainer (or JobSet) installed?"),
    ],
)  # fmt: skip
def test_what_kubectl_refuses_is_one_line(
    config: Path, monkeypatch: pytest.MonkeyPatch, kubectl: str | None, message: str
) -> None:
    command("other", "", monkeypatch)
    if kubectl:
        command("kubectl", kubectl, monkeypatch)
    assert message in refusal(str(config), "--on", "k8s", "--profile", "cluster.yaml", "runs_dir=/runs")
    command("kubectl", "/bin/cat > got; echo created", monkeypatch)
    result = launch(str(config), "--on", "k8s", "--profile", "cluster.yaml", "runs_dir=/runs")
    assert "created" in result.stdout and "kubectl -n ml logs" in result.stdout
    assert len(list(yaml.safe_load_all(Path("got").read_text()))) == 3


def test_the_exit_codes_of_manifests_are_those_of_training() -> None:
    """2 ends the run, 75 starts it again without counting."""
    for name in ("jobset", "trainjob"):
        head = next(yaml.safe_load_all((K8S / f"{name}.yaml").read_text()))
        spec = head["spec"] if name == "jobset" else head["spec"]["template"]["spec"]
        rules = {rule["onJobFailureMessagePatterns"][0]: rule["action"] for rule in spec["failurePolicy"]["rules"]}
        assert rules == {"exit code 2 ": "FailJobSet", "exit code 75 ": "RestartJobSetAndIgnoreMaxRestarts"}
        job = spec["replicatedJobs"][0]["template"]["spec"]
        assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 75]


def test_names_for_kubernetes() -> None:
    assert kubernetes.name_of("Demo_v1.2") == "demo-v1-2"
