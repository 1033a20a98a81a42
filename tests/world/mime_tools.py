"""Asks Perl's MIME::Parser (Debian: libmime-tools-perl) what it reads in messages.

    read = parsed([message.wire])[0]
    assert read.parts[0].body == b"Dear Ada"

Fails, never skips, when Perl or the module is missing.
"""

from __future__ import annotations

import base64
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SCRIPT = Path(__file__).with_name("parse_mime.pl")


class Part(NamedTuple):
    """A leaf. name, disposition, cid: "" when it has none; body: out of its transfer encoding, line ends as sent."""

    type: str
    encoding: str
    charset: str
    name: str
    disposition: str
    cid: str
    body: bytes


class Read(NamedTuple):
    """tree: the types of the multiparts, outermost first; faults: what the parser found wrong."""

    subject: str
    tree: list[str]
    parts: list[Part]
    faults: list[str]


def parsed(messages: Sequence[bytes]) -> list[Read]:
    assert messages, "nothing to read"
    with tempfile.TemporaryDirectory(prefix="sp-mime-") as name:
        paths = [Path(name) / f"{number}.eml" for number in range(len(messages))]
        for path, message in zip(paths, messages, strict=True):
            path.write_bytes(message)
        command = ["perl", str(SCRIPT), *map(str, paths)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"install Debian's libmime-tools-perl: {done.stderr[-2000:]}"
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(messages), done.stderr
    return [
        Read(
            row["subject"],
            row["tree"],
            [Part(**{**part, "body": base64.b64decode(part["body"])}) for part in row["parts"]],
            row["faults"],
        )
        for row in rows
    ]
