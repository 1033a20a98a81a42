"""Corpus: distinct messages of a real campaign, unsigned, concatenated in one file that every peer reads.

Made by our own composer from the rehearsal's newsletter and audience, so that peers send byte for byte what ours
sends, without our signature. Lines end with CRLF, none begins with a dot, so nothing need be stuffed.

    folder/corpus.mail     the messages
    folder/corpus.json     sender, recipients and offsets (one more than there are messages)
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from engine.message import Campaign, Problem, compile_campaign, compose, person
from engine.rehearsal import newsletter
from engine.rehearsal.audience import people
from engine.rehearsal.bench import provider
from engine.rehearsal.setting import ACCOUNT, DOMAIN, POSTAL, SENDER
from policy.address import AddressError, parse
from policy.gate import Mode, Permit
from tracker.links import Links

_AT_US: Final = 1_790_000_000_000_000  # any instant; one corpus has one Date
_JOB: Final = 5
_NUMBER: Final = re.compile(rb"^Message-ID: <%x\.([0-9a-f]{16})@" % _JOB, re.MULTILINE | re.IGNORECASE)
_FIELDS: Final = frozenset({"name", "city", "member", "since", "points", "offers"})


class CorpusError(Exception):
    """The newsletter does not compile, or a message is none of this corpus."""


class Corpus:
    """Messages by number. Use: ``Corpus(folder)`` after ``make(folder, count)``; close() lets go of the file."""

    def __init__(self, folder: Path) -> None:
        known: dict[str, Any] = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        self.sender: str = known["sender"]
        self.recipients: list[str] = known["recipients"]
        self._offsets: list[int] = known["offsets"]
        with (folder / "corpus.mail").open("rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self.recipients)

    def message(self, number: int) -> bytes:
        return self._data[self._offsets[number] : self._offsets[number + 1]]

    @property
    def mean_bytes(self) -> int:
        return self._offsets[-1] // max(1, len(self))

    def close(self) -> None:
        self._data.close()

    def is_ours(self, wire: bytes) -> bool:
        """Is this a message of the corpus, its body untouched? Fields may have been added."""
        head, _, body = wire.partition(b"\r\n\r\n")
        found = _NUMBER.search(head)
        number = int(found[1], 16) - 1 if found else -1
        if not 0 <= number < len(self):
            return False
        return body.rstrip(b"\r\n") == self.message(number).partition(b"\r\n\r\n")[2].rstrip(b"\r\n")


def make(folder: Path, count: int) -> Corpus:
    """Write a corpus of `count` messages. Raises CorpusError when the newsletter does not compile."""
    offsets, recipients = [0], []
    with (folder / "corpus.mail").open("wb") as file:
        for address, wire in _messages(count):
            recipients.append(address)
            file.write(wire)
            offsets.append(offsets[-1] + len(wire))
    known = {"sender": f"bounce@bounce.{DOMAIN}", "recipients": recipients, "offsets": offsets}
    (folder / "corpus.json").write_text(json.dumps(known), encoding="utf-8")
    return Corpus(folder)


def _messages(count: int) -> Iterator[tuple[str, bytes]]:
    links = Links({1: bytes(range(32))}, 1, f"https://track.{DOMAIN}")
    program = compile_campaign(
        Campaign(
            subject=newsletter.SUBJECT,
            from_address=f"letter@{DOMAIN}",
            from_name=SENDER,
            reply_to=f"editors@{DOMAIN}",
            html=newsletter.html(),
            fields=_FIELDS,
            list_id=f"weekly.{DOMAIN}",
            list_label="weekly",
            feedback_id=("bench", ACCOUNT, "campaign", "sales-push"),
            account_name=SENDER,
            postal_address=POSTAL,
            view_url=links.view_url(_JOB),
            notice_url=links.notice_url(_JOB),
        )
    )
    if isinstance(program, list):
        raise CorpusError("; ".join(_said(problem) for problem in program))
    made = 0
    for row in people(2 * count + 100, providers=(provider(),)):  # some rows name nobody, on purpose
        if made == count:
            return
        try:
            address = parse(str(row["address"])).wire
        except AddressError:
            continue
        mode = Mode.INDIVIDUAL if "open_tracking" in row["consent"] else Mode.OFF
        made += 1
        who = person(
            links, program, job=_JOB, mref=made, subject=made, address=address, fields=row["fields"], list_number=3,
            partition=made % 64, tag=made.to_bytes(12, "big"), optout_domain=f"bounce.{DOMAIN}", name=row["name"],
            mode_opens=mode, mode_clicks=mode,
        )  # fmt: skip
        unsigned = compose(Permit(_JOB, made, 0.0), program, who, _AT_US)
        wire = unsigned.head + b"\r\n" + unsigned.body
        yield address, wire if wire.endswith(b"\r\n") else wire + b"\r\n"


def _said(problem: Problem) -> str:
    return f"{problem.path}: {problem.message}"
