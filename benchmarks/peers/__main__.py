"""``make bench-peers``: see the plate (`benchmarks/peers/__init__.py`). Progress goes to stderr, the table and the last
line, JSON, to stdout.

Exit codes: 0 done (peers that are not installed were named), 1 ours or a peer failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.peers import chart, figures, machine
from benchmarks.peers.clients import Aiosmtplib, Nodemailer
from benchmarks.peers.contest import Contest, Plan
from benchmarks.peers.peer import Peer
from benchmarks.peers.postfix import Postfix
from benchmarks.peers.processes import RunError

_CACHE = Path(".benchmarks") / "peers"
_MEMORY = Path("/dev/shm")


def peers_of(asked: argparse.Namespace) -> list[Peer]:
    """In the order of figures.NAMES."""
    found: list[Peer] = [Postfix(asked.folder), Postfix(asked.folder, drain=True)]
    if machine.file_system(_MEMORY) == "tmpfs" and os.access(_MEMORY, os.W_OK):
        found += [Postfix(_MEMORY, storage="tmpfs"), Postfix(_MEMORY, drain=True, storage="tmpfs")]
    found.append(Nodemailer(asked.processes, _CACHE / "node", asked.install))
    found += [Aiosmtplib("dkimpy", asked.processes), Aiosmtplib("cryptography", asked.processes)]
    return [peer for peer in found if not asked.only or peer.name in asked.only]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--recipients", type=int, default=20_000, help="of ours, and at most of a peer")
    parser.add_argument("--rounds", type=int, default=3, help="pairs a peer; 0: check and probe only, without ours")
    parser.add_argument("--only", action="append", choices=figures.NAMES, default=[], help="this peer; may be repeated")
    parser.add_argument("--seconds", type=float, default=15.0, help="a timed run of a peer lasts about so long")
    parser.add_argument("--probe-seconds", type=float, default=5.0, help="each of its settings is tried about so long")
    parser.add_argument("--settings", type=int, default=0, help="try only the first N settings of a peer; 0: all")
    parser.add_argument("--patience", type=float, default=180.0, help="seconds until a run is given up")
    parser.add_argument("--processes", type=int, default=2, help="of nodemailer and aiosmtplib")
    parser.add_argument("--ours", default="", metavar="WORDS", help='more words for sales-push bench: --ours="--fast"')
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where all that is disk lies")
    parser.add_argument("--install", action="store_true", help="fetch nodemailer by npm into .benchmarks/peers/node")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="SVG; default: chart.svg in the results")
    parser.add_argument("--results", type=Path, help="default: .benchmarks/peers/<time>")
    asked = parser.parse_args()
    if (
        not 10 <= asked.recipients <= 1_000_000
        or not 0 <= asked.rounds <= 100
        or not 1 <= asked.processes <= 64
        or asked.settings < 0
    ):
        parser.error("recipients 10 to 1,000,000, rounds 0 to 100, processes 1 to 64")
    if asked.rounds and asked.recipients < 100:
        parser.error("ours takes at least 100 recipients")
    return asked


def draw(contest: Contest) -> str:
    """The chart of what was timed."""
    mine = figures.spread([float(run["messages_per_second"]) for run in contest.runs])
    bars = [chart.Bar("sales-push, everything on", *mine, "", True)] if mine else []
    for entry in contest.entries:
        if rates := figures.spread([pair.peer.rate for pair in entry.pairs]):
            times = figures.spread([pair.ratio for pair in entry.pairs], 2) or (0.0, 0.0, 0.0)
            bars.append(chart.Bar(entry.title, *rates, f"ours {times[1]:g} x"))
    cores, rsa = os.cpu_count() or 1, figures.spread(contest.rsa) or (0.0, 0.0, 0.0)
    caption = (
        f"{contest.plan.recipients:,} messages of {contest.mean_bytes / 1000:.0f} kB, RSA-2048 DKIM, one sink, all on "
        f"{cores} cores; one core signs {rsa[1]:,.0f} a second; median of {contest.plan.rounds}, line: least to most"
    )
    return chart.svg("Messages a second, signed and delivered", caption, bars)


def play(asked: argparse.Namespace) -> int:
    results: Path = asked.results or _CACHE / time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    results.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        asked.recipients,
        asked.rounds,
        asked.seconds,
        asked.probe_seconds,
        asked.patience,
        tuple(asked.ours.split()),
        asked.settings,
    )
    folder = Path(tempfile.mkdtemp(prefix="sp-peers-", dir=asked.folder))
    folder.chmod(0o711)  # OpenDKIM and Postfix run as another user
    code = 0
    try:
        contest = Contest(plan, folder, lambda line: print(line, file=sys.stderr, flush=True))
        contest.prepare(peers_of(asked), results)
        try:
            contest.run()
        except RunError as error:
            contest.say(f"ours failed: {error}")
            code = 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    about: dict[str, Any] = {
        "recipients": plan.recipients,
        "rounds": plan.rounds,
        "cores": os.cpu_count() or 1,
        "processes": asked.processes,
        "message_bytes": contest.mean_bytes,
        "disk": machine.file_system(asked.folder),
    }
    whole = figures.summary(contest.entries, contest.runs, contest.rsa, contest.skipped, about)
    whole["ok"] = whole["ok"] and code == 0
    line = json.dumps(whole, sort_keys=True)
    (results / "figures.json").write_text(line + "\n", encoding="utf-8")
    (asked.chart or results / "chart.svg").write_text(draw(contest), encoding="utf-8")
    print(figures.table(contest.entries, contest.runs))
    contest.say(f"configurations, figures and chart: {results}")
    print(line, flush=True)
    return 0 if whole["ok"] else 1


def main() -> int:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    try:
        return play(arguments())
    except KeyboardInterrupt:
        print("interrupted; everything that was started is stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
