"""A cluster on one machine: `make cluster`. What is simulated: hosts are network namespaces that share the files, the
clock and the processor; gloo stands for NCCL.

python -m tests.cluster.run [--only WORD...] [--keep FOLDER] [--base FOLDER]

Prints a line for each case, and as its last line "N passed, 0 failed". Needs root and some packages of Debian, which
it names; with CLUSTER_INSTALL=1 it installs them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from tests.cluster import doctor, image, slurm, training
from tests.cluster.hosts import NEEDED, hosts, missing

CASES = {**training.CASES, **slurm.CASES, **doctor.CASES, **image.CASES}


def prepared() -> bool:
    """Whether this machine can run the cases; says what is missing."""
    if os.geteuid() != 0:
        print("make cluster makes network namespaces, for which it must run as root", file=sys.stderr)
        return False
    if not (packages := missing(NEEDED | slurm.NEEDED | doctor.NEEDED | image.NEEDED)):
        return True
    command = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    if os.environ.get("CLUSTER_INSTALL") != "1":
        print(
            f"make cluster needs: {' '.join(command)}\nRun that, or CLUSTER_INSTALL=1 make cluster", file=sys.stderr
        )
        return False
    subprocess.run(["apt-get", "update", "-q"], check=True)
    subprocess.run(command, check=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="words of the names of cases")
    parser.add_argument("--keep", help="a folder for the runs and logs, which are deleted otherwise")
    parser.add_argument("--base", type=Path, help="a folder that keeps the image's base for later, made in a minute")
    args = parser.parse_args()
    if not prepared():
        return 2
    cases = {name: case for name, case in CASES.items() if any(word in name for word in args.only)}
    passed = failed = 0
    with nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory() as folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        work = training.Work(Path(folder).resolve(), (args.base or Path(folder) / "base").resolve())
        work.make()
        for name, case in cases.items():
            began, problem = time.monotonic(), ""
            with hosts(3 if name in doctor.CASES else 2) as made:
                try:
                    case(work, made)
                except Exception as error:  # noqa: BLE001 - one case must not end the others
                    problem = f"{type(error).__name__}: {error}"
            passed, failed = passed + (not problem), failed + bool(problem)
            print(
                f"{name:<60} {time.monotonic() - began:4.0f} s  {f'FAILED {problem}' if problem else 'ok'}",
                flush=True,
            )
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
