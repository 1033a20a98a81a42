"""Proofs by others' means: signatures verified by dkimpy, files scanned byte by byte.

Law: nothing here uses the code it judges. DKIM keys are read from the key files as the DNS would publish them, messages
are those the sink stored, and the scan reads files, not tables.

Known limits: dkimpy takes one key from one name and accepts simple and relaxed alike; that the headers of one-click
are under the signature is looked at here (RFC 8058 4).
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import dkim  # type: ignore[import-untyped]  # dkimpy ships no types
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

ONE_CLICK: Final = frozenset({"list-unsubscribe", "list-unsubscribe-post"})
_KEY_FILE: Final = re.compile(r"(?P<domain>.+)\.(?P<selector>[a-z0-9-]+)\.(?:rsa|ed25519)\.pem")
_BLOCK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Signature:
    """One DKIM-Signature as a verifier judged it. covers: header names under it, lower case."""

    algorithm: str
    selector: str
    is_good: bool
    covers: frozenset[str]


def records(folder: Path) -> dict[bytes, bytes]:
    """The TXT records of every key in keys_dir/dkim: what a resolver would answer, by absolute name."""
    found: dict[bytes, bytes] = {}
    for path in sorted(folder.glob("*.pem")):
        named = _KEY_FILE.fullmatch(path.name)
        if named is None:
            continue
        public = serialization.load_pem_private_key(path.read_bytes(), password=None).public_key()
        if isinstance(public, ed25519.Ed25519PublicKey):
            kind, data = "ed25519", public.public_bytes_raw()
        else:
            kind = "rsa"
            data = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        value = f"v=DKIM1; k={kind}; p={base64.b64encode(data).decode('ascii')}"
        found[f"{named['selector']}._domainkey.{named['domain']}.".encode("ascii")] = value.encode("ascii")
    return found


def verify(wire: bytes, keys: Mapping[bytes, bytes]) -> list[Signature]:
    """Every signature of a message, judged by dkimpy with `keys` as its DNS."""

    def answer(name: bytes | str, timeout: float = 5.0) -> bytes | None:
        asked = name if isinstance(name, bytes) else name.encode("ascii")
        return keys.get(asked if asked.endswith(b".") else asked + b".")

    count = len(re.findall(rb"(?im)^dkim-signature:", wire.partition(b"\r\n\r\n")[0]))
    found: list[Signature] = []
    for index in range(count):
        judge = dkim.DKIM(wire)
        try:
            good = bool(judge.verify(idx=index, dnsfunc=answer))
        except dkim.DKIMException:
            good = False
        tags: Mapping[bytes, bytes] = judge.signature_fields or {}
        covers = tags.get(b"h", b"").decode("ascii", "replace").lower().split(":")
        found.append(
            Signature(
                tags.get(b"a", b"").decode("ascii", "replace"),
                tags.get(b"s", b"").decode("ascii", "replace"),
                good,
                frozenset(word.strip() for word in covers),
            )
        )
    return found


def is_proven(signatures: Sequence[Signature]) -> bool:
    """RSA and Ed25519 both verify and both cover the one-click headers."""
    kinds = {signature.algorithm for signature in signatures}
    return {"rsa-sha256", "ed25519-sha256"} <= kinds and all(
        signature.is_good and signature.covers >= ONE_CLICK for signature in signatures
    )


@dataclass(frozen=True, slots=True)
class Scan:
    """hits: files that hold one of the needles, with how many of them; size: bytes read in `files` files."""

    files: int
    size: int
    hits: dict[str, int]


def scan(folders: Iterable[Path], needles: Iterable[str]) -> Scan:
    """Look for texts in every file below some folders, in the spellings files have: plain, %40, UTF-16.

    Files that come and go meanwhile are passed over; sockets are no files.
    """
    spelled: list[tuple[bytes, ...]] = []
    for needle in needles:
        small = needle.lower()
        spelled.append((small.encode(), small.replace("@", "%40").encode(), small.encode("utf-16-le")))
    longest = max((len(one) for many in spelled for one in many), default=0)
    files = size = 0
    hits: dict[str, int] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if not path.is_file():
                continue
            try:
                found, read = _scan_file(path, spelled, longest)
            except OSError:
                continue
            files, size = files + 1, size + read
            if found:
                hits[str(path.relative_to(folder.parent))] = found
    return Scan(files, size, hits)


def scan_aside(folders: Iterable[Path], needles: Iterable[str]) -> Scan:
    """`scan` by a process of its own: closing a file that SQLite has open here would let go of its locks (fcntl(2)).

    Raises subprocess.CalledProcessError."""
    asked = json.dumps({"folders": [str(folder) for folder in folders], "needles": list(needles)})
    done = subprocess.run([sys.executable, "-m", __name__], input=asked.encode(), stdout=subprocess.PIPE, check=True)
    return Scan(**json.loads(done.stdout))


def _scan_file(path: Path, spelled: Sequence[tuple[bytes, ...]], longest: int) -> tuple[int, int]:
    found: set[int] = set()
    size = 0
    before = b""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            size += len(block)
            text = (before + block).lower()
            found |= {n for n, many in enumerate(spelled) if any(one in text for one in many)}
            before = block[-longest:] if longest else b""
    return len(found), size


if __name__ == "__main__":  # scan_aside's: the question on stdin, because a command line shows what stands on it
    _asked = json.load(sys.stdin)
    print(json.dumps(asdict(scan([Path(folder) for folder in _asked["folders"]], _asked["needles"]))))
