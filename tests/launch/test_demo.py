"""The demo's script with fake commands: its steps and its output."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the scripts and configs, and commands that write down how they were called."""
    for name in ("launch", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "launch" / "torchrun.sh").write_text("#!/bin/bash\necho torchrun $@ >> calls\n")
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "mmmoe-data"
    command.write_text(
        "#!/bin/bash\necho mmmoe-data $@ >> calls\n"
        '[[ "$1 $2" == "corpus tuxpaint" && -e offline ]] && { echo no network >&2; exit 2; }\n'
        'while [[ $1 != --out ]]; do shift; done\nif [[ $2 == *.model ]]; then touch "$2"; else '
        'mkdir -p "$2"; touch "$2/manifest.jsonl"; fi\n'
    )
    (tmp_path / "bin" / "mmmoe").write_text("#!/bin/bash\necho mmmoe $@ >> calls\nmkdir -p $2; touch $2/report.md\n")
    for path in (tmp_path / "bin").iterdir():
        path.chmod(0o755)
    return tmp_path


def run(project: Path) -> tuple[list[str], str]:
    environment = {**os.environ, "PATH": f"{project / 'bin'}:{os.environ['PATH']}"}
    (project / "calls").unlink(missing_ok=True)
    command = ["bash", "launch/demo.sh"]
    result = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return (project / "calls").read_text().splitlines(), result.stdout


def test_the_demo_fetches_shards_trains_on_two_ranks_and_evaluates_and_keeps_what_is_there(project: Path) -> None:
    calls, said = run(project)
    last = ["torchrun 2 train configs/demo.yaml", "mmmoe evaluate runs/demo"]
    assert len(calls) > 2 and calls[-2:] == last
    assert "runs/demo/report.md" in said
    sharding = [line for line in said.splitlines() if line.startswith("   mmmoe-data shard data/corpora/mini/")]
    assert sharding and " --out data/demo/mini.tmp " in sharding[0]  # a command that can be typed
    assert "small corpus" not in said.splitlines()[-1]
    assert run(project)[0] == last


def test_without_a_network_the_small_corpus_stands_alone_and_the_demo_says_so(project: Path) -> None:
    (project / "offline").touch()
    calls, said = run(project)
    assert calls[-2:] == ["torchrun 2 train configs/demo_mini.yaml", "mmmoe evaluate runs/demo-mini"]
    assert not any("subset=spoken" in call for call in calls)
    assert "Tux Paint could not be fetched" in "\n".join(said.splitlines()[-3:])
