"""``make policy-table``: every promise with its tests, run as they are and again with their enforcement switched off.

A promise is *held* when all its tests pass, *guarded* when each of them fails (not merely breaks in its set-up) once
what it names is switched off. The last line is JSON. Exit code 0 when nothing fails and all that is held is guarded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.promises.table import GAPS, LATER, NOT_SOFTWARE, PROMISES

Ends = Mapping[str, Sequence[Mapping[str, str]]]
_FOLDER = Path(__file__).parent


def _run(unguarded: bool, extra: Sequence[str]) -> Ends:
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "promises.json"
        words = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(_FOLDER)]
        words += ["--promises", str(told), *(["--unguarded", "--tb=no"] if unguarded else []), *extra]
        run = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if not told.exists() or run.returncode not in (0, 1):
            raise SystemExit(f"the tests did not run:\n{run.stdout}")
        if not unguarded and run.returncode:
            print(run.stdout, file=sys.stderr)
        ends: Ends = json.loads(told.read_text("utf-8"))
        return ends


def judge(plain: Ends, off: Ends) -> dict[str, list[str]]:
    """Promises by state: held, guarded, failing, unguarded, later, not_software, missing. Pure."""
    states: dict[str, list[str]] = {
        name: [] for name in ("held", "guarded", "failing", "unguarded", "later", "not_software", "missing")
    }
    for number in PROMISES:
        tests = plain.get(number, ())
        if not tests:
            kind = "later" if number in LATER else "not_software" if number in NOT_SOFTWARE else "missing"
            states[kind].append(number)
            continue
        if any(test["end"] != "passed" for test in tests):
            states["failing"].append(number)
            continue
        states["held"].append(number)
        ended = {test["test"]: test["end"] for test in off.get(number, ())}
        if all(ended.get(test["test"]) == "failed" for test in tests):
            states["guarded"].append(number)
        else:
            states["unguarded"].append(number)
    return states


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make policy-table", description=__doc__)
    parser.add_argument("--only", metavar="EXPRESSION", default="", help="pytest's -k: only these tests")
    options = parser.parse_args(arguments)
    extra = ["-k", options.only] if options.only else []
    plain = _run(False, extra)
    off = _run(True, extra)
    states = judge(plain, off)
    ended = {test["test"]: test["end"] for tests in off.values() for test in tests}
    table = Table("promise", "test", "result", "without its enforcement")
    for number in PROMISES:
        for test in plain.get(number, ()):
            name = test["test"].rpartition("::")[2]
            without = ended.get(test["test"], "not run")
            verdict = {"failed": "fails: guarded", "passed": "PASSES: guards nothing", "error": "BREAKS"}.get(
                without, without
            )
            table.add_row(number, name, test["end"], verdict)
        for kind, reasons in (("later", LATER), ("not software", NOT_SOFTWARE), ("gap", GAPS)):
            if number in reasons:
                table.add_row(number, reasons[number], kind, "")
        if number in states["missing"]:
            table.add_row(number, "", "MISSING", "")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    figures: dict[str, object] = {
        "held": len(states["held"]),
        "guarded": len(states["guarded"]),
        "failing": states["failing"],
        "unguarded": states["unguarded"],
        "later": states["later"],
        "not_software": states["not_software"],
        "missing": states["missing"],
        "gaps": sorted(GAPS),
    }
    print(json.dumps(figures))
    return 1 if states["failing"] or states["unguarded"] else 0


if __name__ == "__main__":
    sys.exit(main())
