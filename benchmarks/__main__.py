"""``make bench``: the micro-benchmarks of this folder, then the journey (`sales-push bench`); last, one line of JSON.

    python -m benchmarks [-k EXPRESSION] [--micro] [OPTION …]

``--micro`` leaves the journey out, ``--journey`` the micro-benchmarks; what else is given goes to `sales-push bench`,
such as ``make bench BENCH="--journey --recipients 10k,100k --no-fast --chart bench.svg"``.

Figures: ``micro`` is the median in microseconds by benchmark, ``journey`` the last line of `sales-push bench`.
Timings on shared machines drift (design section 6): compare figures of one run with each other.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def micro(expression: str) -> tuple[int, dict[str, float]]:
    """pytest's exit code and the median of each benchmark in µs."""
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "figures.json"
        arguments = [
            str(HERE),
            "-p",
            "no:xdist",
            f"--benchmark-json={written}",
            "--benchmark-columns=median,iqr,rounds",
        ]
        code = int(pytest.main([*arguments, *(["-k", expression] if expression else [])]))
        text = written.read_text(encoding="utf-8") if written.exists() else ""
    found: dict[str, Any] = json.loads(text) if text else {}
    return code, {one["name"]: round(one["stats"]["median"] * 1e6, 2) for one in found.get("benchmarks", [])}


def journey(options: Sequence[str] = ()) -> tuple[int, dict[str, Any]]:
    """Exit code and figures of `sales-push bench`; its own output goes through as it comes."""
    command = [sys.executable, "-c", "from engine.cli import main; main()", "bench", *options]
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            last = line.strip() or last
    return process.returncode, json.loads(last) if last.startswith("{") else {}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    parser.add_argument("-k", dest="expression", default="", help="only benchmarks whose names match")
    parser.add_argument("--micro", action="store_true", help="leave the journey out")
    parser.add_argument("--journey", action="store_true", help="leave the micro-benchmarks out")
    asked, options = parser.parse_known_args()
    if asked.micro and (asked.journey or options):
        parser.error(f"--micro leaves the journey out: it has no use for {' '.join(options) or '--journey'}")
    code, whole = 0, dict[str, Any]()
    if not asked.journey:
        code, whole["micro"] = micro(asked.expression)
    if not asked.micro:
        journey_code, whole["journey"] = journey(options)
        code = code or journey_code
    print(json.dumps(whole, sort_keys=True))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
