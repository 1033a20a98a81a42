"""Whether an exported audit chain is whole, asked by somebody who does not trust the system it came from.

    python -m policy.verifier CHAIN.jsonl CHECKPOINT… --key AUDIT.PUB      or this file alone: python verifier.py …

Stands alone: the standard library and ``cryptography``, nothing of ours; copy it to where the checkpoints are kept.
CHECKPOINT is a file of checkpoints, one a line, or a folder of such files; --key a file with the public key (64 hex
digits a line, `sales-push audit key`) or the digits themselves, several times after a change of keys.

What it finds, each with the number of the first bad entry (requirements 4.5, 8):

    form        bytes that are not the RFC 8785 form of an entry
    order       an entry that is not the one before and one more: taken out, put in, moved
    link        an entry that does not name the hash of the one before
    hash        an entry whose contents are not what its hash says
    beginning   entries before the first one are gone, and no checkpoint stands for them
    cut         a checkpoint knows entries that are not there: the tail was cut
    rewritten   a checkpoint knows another hash at that place: the chain was made anew
    signature   a checkpoint that no given key signed

Law: any single bit changed, in the chain or in a checkpoint, is found. Exit codes: 0 whole, 1 not, 2 wrong usage.

Known limits: what was written after the last checkpoint can be cut or rewritten unseen, so it is counted and told; no
checkpoint at all means all of it. A checkpoint left away is not missed: compare their count with the hours. Entries may
end after seven years, so a chain may begin right after any checkpoint: look at the first number it has.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

GENESIS: Final = "00" * 32
NAMES: Final = ("action", "actor_ref", "object_ref", "prev", "purpose", "result", "seq", "ts")
CHECKPOINT_NAMES: Final = ("hash", "key_id", "seq", "ts", "v")
SIGNED_AS: Final = b"sales-push audit checkpoint\n"  # a signature of this key can mean nothing else
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_SIGNATURE: Final = re.compile(r"[0-9a-f]{128}")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. seq: number of the entry (or of the one a checkpoint speaks of); line: in its file."""

    kind: str
    seq: int
    line: int = 0

    def __str__(self) -> str:
        return f"{self.kind}: entry {self.seq}" + (f", line {self.line}" if self.line else "")


@dataclass(slots=True)
class Report:
    """findings: the first bad entry of the chain, then what checkpoints say. uncovered: entries that no checkpoint
    covers yet."""

    findings: list[Finding] = field(default_factory=list)
    first: int = 0
    last: int = 0
    entries: int = 0
    checkpoints: int = 0
    uncovered: int = 0

    @property
    def is_whole(self) -> bool:
        return not self.findings


@dataclass(frozen=True, slots=True)
class Checkpoint:
    seq: int
    hash: str


def check(lines: Iterable[bytes], checkpoints: Iterable[bytes], keys: Sequence[bytes]) -> Report:
    """lines, checkpoints: with their line ends; keys: raw public keys of 32 bytes."""
    report = Report()
    known = _checkpoints(checkpoints, keys, report)
    told: dict[int, set[str]] = {}
    for one in known:
        told.setdefault(one.seq, set()).add(one.hash)
    bad: Finding | None = None
    seq, prev = 0, GENESIS
    for number, line in enumerate(lines, start=1):
        entry = _entry(line)
        if entry is None:
            bad = Finding("form", seq + 1, number)
            break
        if number == 1:
            report.first = int(entry["seq"])
            if entry["seq"] != 1 and entry["prev"] in told.get(entry["seq"] - 1, ()):
                seq, prev = entry["seq"] - 1, entry["prev"]  # older entries ended, a checkpoint stands for them
            elif entry["seq"] != 1:
                bad = Finding("beginning", int(entry["seq"]), number)
                break
        if (kind := _misfit(entry, seq, prev)) is not None:
            bad = Finding(kind, int(entry["seq"]), number)
            break
        seq, prev = entry["seq"], entry["hash"]
        report.entries += 1
        report.last = seq
        if any(other != prev for other in told.get(seq, ())):
            bad = Finding("rewritten", seq, number)
            break
    if bad is not None:
        report.findings.insert(0, bad)
        return report
    covered = max((one.seq for one in known), default=0)
    if covered > seq:
        report.findings.append(Finding("cut", seq + 1))
    report.uncovered = max(0, seq - max(covered, report.first - 1)) if report.entries else 0
    return report


def signed_bytes(checkpoint: dict[str, Any]) -> bytes:
    """What the signature of a checkpoint is of."""
    return SIGNED_AS + _canonical({name: checkpoint[name] for name in CHECKPOINT_NAMES})


def _misfit(entry: dict[str, Any], seq: int, prev: str) -> str | None:
    if entry["seq"] != seq + 1:
        return "order"
    if entry["prev"] != prev:
        return "link"
    body = {name: entry[name] for name in NAMES}
    return None if entry["hash"] == sha256(_canonical(body)).hexdigest() else "hash"


def _entry(line: bytes) -> dict[str, Any] | None:
    entry = _object(line, (*NAMES, "hash"))
    if entry is None or not all(isinstance(entry[name], str) for name in (*NAMES, "hash") if name != "seq"):
        return None
    return entry


def _checkpoints(lines: Iterable[bytes], keys: Sequence[bytes], report: Report) -> list[Checkpoint]:
    found: list[Checkpoint] = []
    for number, line in enumerate(lines, start=1):
        one = _object(line, (*CHECKPOINT_NAMES, "signature"))
        if one is None or not isinstance(one["hash"], str) or not _HASH.fullmatch(one["hash"]):
            report.findings.append(Finding("form", 0, number))
            continue
        report.checkpoints += 1
        if not _is_signed(one, keys):
            report.findings.append(Finding("signature", one["seq"], number))
            continue
        found.append(Checkpoint(one["seq"], one["hash"]))
    return found


def _is_signed(checkpoint: dict[str, Any], keys: Sequence[bytes]) -> bool:
    signature = checkpoint["signature"]
    if not isinstance(signature, str) or not _SIGNATURE.fullmatch(signature):
        return False
    for key in keys:
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(bytes.fromhex(signature), signed_bytes(checkpoint))
        except InvalidSignature:
            continue
        return True
    return False


def _object(line: bytes, names: Sequence[str]) -> dict[str, Any] | None:
    """A line that is the canonical form of an object with these names and a number `seq`, else None."""
    try:
        value = json.loads(line.decode("utf-8"))
        if not isinstance(value, dict) or value.keys() != set(names) or type(value["seq"]) is not int:
            return None
        return value if _canonical(value) + b"\n" == line and value["seq"] > 0 else None
    except (ValueError, RecursionError):
        return None


def _canonical(value: dict[str, Any]) -> bytes:
    """RFC 8785 of an object of text and whole numbers whose names are ASCII: the C encoder gives it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()


# --- from files -----------------------------------------------------------------------------------------------------


def lines_of(path: Path) -> Iterator[bytes]:
    """Lines with their ends, split at line feeds only."""
    with path.open("rb") as file:
        yield from file


def checkpoint_lines(paths: Iterable[Path]) -> Iterator[bytes]:
    for path in paths:
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        for file in files:
            yield from lines_of(file)


def public_keys(given: Iterable[str]) -> list[bytes]:
    """Of 64 hex digits, or of files that hold such lines. Raises ValueError, OSError."""
    keys: list[bytes] = []
    for text in given:
        lines = [text] if _HASH.fullmatch(text) else Path(text).read_text("ascii").split("\n")
        for line in filter(None, map(str.strip, lines)):
            digits = line.rpartition(" ")[2]  # "audit.1 <digits>", as `sales-push audit key` prints them
            if not _HASH.fullmatch(digits):
                raise ValueError("a public key is 64 hexadecimal digits, in lower case")
            keys.append(bytes.fromhex(digits))
    return keys


def told(report: Report) -> Iterator[str]:
    """The report as people read it."""
    for finding in report.findings:
        yield f"NOT WHOLE  {finding}"
    yield f"{report.entries} entries, {report.first} to {report.last}; {report.checkpoints} checkpoints"
    if report.is_whole and not report.checkpoints:
        yield "no checkpoint was given: a chain cut or made anew as a whole would not show"
    elif report.is_whole and report.uncovered:
        yield f"{report.uncovered} entries are younger than the last checkpoint: nothing covers them yet"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="verifier", description="Check an exported audit chain.")
    parser.add_argument("chain", type=Path, help="CHAIN.jsonl, of `sales-push audit export`")
    parser.add_argument("checkpoints", type=Path, nargs="*", help="files of checkpoints, or folders of them")
    parser.add_argument("--key", action="append", default=[], help="public key: 64 hex digits, or a file of them")
    given = parser.parse_args(arguments)
    try:
        keys = public_keys(given.key)
        if given.checkpoints and not keys:
            parser.error("checkpoints prove nothing without --key")
        report = check(lines_of(given.chain), checkpoint_lines(given.checkpoints), keys)
    except (OSError, ValueError) as error:
        print(f"verifier: {error}", file=sys.stderr)
        return 2
    for line in told(report):
        print(line)
    return 0 if report.is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
