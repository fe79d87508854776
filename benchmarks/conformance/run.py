"""Ask every adapter every case and write benchmarks/results/conformance.json; then the table of docs/evidence.md.

    make conformance                                          # all columns, each in its environment
    python benchmarks/conformance/run.py                      # the columns of this environment
    python benchmarks/conformance/run.py --adapters gkd --cases "beta: both ends and between"

A failing cell names the line of the installed source that it comes from.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests" / "support")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from conformance import adapters, run_cases, spelling_cases  # noqa: E402
from conformance.cases import CASES  # noqa: E402
from conformance.result import FAIL, Case, Result  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "conformance.json"


def cell(adapter: Any, case: Case) -> dict[str, str]:
    """The verdict of one case as it stands in the file."""
    try:
        found = case.verdict(adapter)
    except Exception as error:  # noqa: BLE001  (whatever a peer raises is what it does)
        traceback.print_exc()
        found = Result(FAIL, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160])
    entry = {"group": case.group, "verdict": found.verdict, "detail": found.detail}
    source = adapter.sources.get(case.name)
    if found.verdict == FAIL and source is not None:
        entry |= {"source": source.where(adapter.package), "why": source.why}
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", nargs="+", choices=adapters.NAMES, default=adapters.NAMES)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--rank-of", choices=adapters.NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--into", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.rank_of:
        run_cases.rank(adapters.adapter(args.rank_of), args.share, args.into)
        return
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    for name in args.adapters:
        try:
            adapter = adapters.adapter(name)
        except ModuleNotFoundError as missing:
            print(f"{name}: not in this environment ({missing.name})")
            continue
        column = results.setdefault(name, {"cells": {}})
        if args.cases is None:
            column["cells"] = {}
        column |= {"name": adapter.name, "package": adapter.package, "version": adapter.version()}
        for case in CASES:
            if args.cases is None or case.name in args.cases:
                taken = adapter.otherwise_as is not None and case.group != spelling_cases.GROUP
                other = results.get(adapter.otherwise_as, {"cells": {}})["cells"] if taken else {}
                column["cells"][case.name] = entry = other.get(case.name) or cell(adapter, case)
                where = f" [{entry['source']}]" if "source" in entry else ""
                print(
                    f"{adapter.name:22s} {case.name:58s} {entry['verdict']:15s} {entry['detail']}{where}", flush=True
                )
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
