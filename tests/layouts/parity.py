"""All layouts against one process, and against the losses on record: what `make parity` runs.

python -m tests.layouts.parity                                the last line is "N passed, N failed"
python -m tests.layouts.parity --write docs/parallelism.md    put the table there, between its marks
python -m tests.layouts.parity --only TP2 deepspeed           cases whose name contains one of these
python -m tests.layouts.parity --record                       record the losses of one process again
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tests.layouts import golden, matrix
from tests.layouts.cases import Case, all_cases


def commit() -> str:
    """The commit that is checked out, with a mark where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="a Markdown file with the marks of the table")
    parser.add_argument("--only", nargs="+", default=[""])
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()

    def wanted(cases: list[Case]) -> list[Case]:
        return [case for case in cases if any(part in case.name for part in args.only)]

    if args.record:
        golden.record()
        return 0
    comparisons = matrix.run(wanted(all_cases()))
    text = f"{matrix.table(comparisons)}\n\n{len(comparisons)} cases at commit {commit()}."
    print(text, flush=True)
    if args.write:
        matrix.write(args.write, text)
    passed = [comparison.passed for comparison in comparisons]
    for case in wanted(golden.golden_cases()):
        difference = golden.run(case)
        passed.append(difference <= golden.BOUND)
        print(f"{case.name:<40} from the record: {difference:.1e} over {golden.STEPS} steps", flush=True)
    print(f"{sum(passed)} passed, {len(passed) - sum(passed)} failed")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
