"""``python -m tests.fuzz.run --cases 20000 --seed 7``: a long run over all targets.

Prints what was found, a table, and one last line of JSON. Exits 1 where a case crashed, hung, took too much
memory or ran code.
"""

from __future__ import annotations

import argparse
import json
import sys

from tests.fuzz.runner import FAULTS, OUTCOMES, Case, count, run_cases, table
from tests.fuzz.targets import TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="over all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=sorted(TARGETS), action="append", help="only this one; may be repeated")
    parser.add_argument("--only", type=int, help="the number of one case, run again")
    parser.add_argument("--show", action="store_true", help="print what became of every case")
    args = parser.parse_args()
    names = args.target or list(TARGETS)
    each = -(-args.cases // len(names))
    found: list[Case] = []
    for name in names:
        for case in run_cases(TARGETS[name], args.seed, range(each) if args.only is None else [args.only]):
            found.append(case)
            if args.show or args.only is not None or case.outcome in FAULTS:
                print(f"{case.target} {case.number} {case}", flush=True)
    widths = [max(len(str(row[i])) for row in table(found)) for i in range(len(OUTCOMES) + 2)]
    for row in [["target", "cases", *OUTCOMES], *table(found)]:
        print("  ".join(str(cell).rjust(max(width, 8)) for cell, width in zip(row, widths, strict=True)))
    totals = count(found)
    print(json.dumps(totals))
    sys.exit(1 if any(totals[fault] for fault in FAULTS) else 0)


if __name__ == "__main__":
    main()
