"""Asks Perl's Mail::DKIM (Debian: libmail-dkim-perl, libcryptx-perl) what it thinks of signatures; no network.

    for opinion in opinions([message.wire], {"s1._domainkey.shop.example": "v=DKIM1; ..."})[0]:
        assert opinion.result == "pass", opinion

Fails, never skips, when Perl or a module of it is missing.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

SCRIPT = Path(__file__).with_name("verify_dkim.pl")


class Opinion(NamedTuple):
    """Of one signature. result: "pass", "fail" or "invalid"; detail: the same with its reason."""

    algorithm: str
    domain: str
    selector: str
    result: str
    detail: str


def opinions(messages: Sequence[bytes], records: Mapping[str, str]) -> list[list[Opinion]]:
    """A list of opinions for each message, in the order of its signatures."""
    assert messages, "nothing to verify"
    with tempfile.TemporaryDirectory(prefix="sp-dkim-") as name:
        folder = Path(name)
        (folder / "records.json").write_text(json.dumps(dict(records)))
        paths = [folder / f"{number}.eml" for number in range(len(messages))]
        for path, message in zip(paths, messages, strict=True):
            path.write_bytes(message)
        command = ["perl", str(SCRIPT), str(folder / "records.json"), *map(str, paths)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"install Debian's libmail-dkim-perl and libcryptx-perl: {done.stderr[-2000:]}"
    found = [[Opinion(*row) for row in json.loads(line)] for line in done.stdout.splitlines()]
    assert len(found) == len(messages), done.stderr
    return found


def all_pass(messages: Sequence[bytes], records: Mapping[str, str], algorithms: Sequence[str]) -> None:
    """Every message carries a signature of each algorithm, and every signature verifies."""
    for each in opinions(messages, records):
        assert sorted(one.algorithm for one in each) == sorted(algorithms)
        assert [one for one in each if one.result != "pass"] == []
