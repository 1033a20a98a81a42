"""The record of the sink: what arrived, written before it is answered, and how it is read (promises.md 3).

A record is a file of JSON lines, appended with os.write: what stands there survives a SIGKILL of the sink. All instants
are time.monotonic() of this machine, in seconds, so they compare with those of every other process of the run.
Fields that hold nothing (0, "", false) are left out. ``k`` says what a line is:

    start   t, pid: a sink began; everything below it is its own (numbers begin again)
    open    t, c, port, live: connection c was accepted, live connections of that port with it
    hello   t, c, port, word: the name said in EHLO
    close   t, c, port, live, how: "quit", "peer" (end or reset), "script", "421", "stop"
    rcpt    t, c, n, port, sender, rcpt, job, mref, reply: RCPT of transaction n. t: when its bytes arrived, also while
            the sink was busy with something else. reply: the code it is answered with, 0 for none
    mail    t, c, n, port, rcpts, mid, job, mref, reply, stored, size, sha, plain, bare: the final dot of transaction n
            arrived at t and its fate is decided; written before the reply leaves. reply: the whole reply that is meant
            to be sent, "" for none; stored: the peer keeps a copy
    said    t, c, n: the reply to that dot was handed to the kernel, whole
    fault   t, c, n, port, step, word, rcpt: a word of a script was played
    bad     t, c, port, word: a command that is none or in the wrong place: a sender out of step

job and mref come from the return path (VERP), else from the Message-ID; 0 and 0 when neither is ours. sha: SHA-256 of
the message with its dots taken out, as hex; plain: the same without its DKIM-Signature fields, folded lines included.
bare: how many CR or LF stood alone.

Law: `read_record` gives one `Entry` for each RCPT a sink heard, in order of arrival; what a killed sink left unsaid is
None there. A torn line is passed over where the record ends or a new sink begins.

Known limits: a kernel that reports bytes late makes t late, never early; live counts a connection until its end was
read, so one that was replaced at once may overlap its follower by a turn of the loop (`close` has its t).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

import msgspec

_DKIM: Final = re.compile(rb"(?im)^DKIM-Signature:[^\r\n]*\r\n(?:[ \t][^\r\n]*\r\n)*")
_BARE: Final = re.compile(rb"(?<!\r)\n|\r(?!\n)")
_OURS: Final = re.compile(r"([0-9a-f]{1,10})\.([0-9a-f]{16})@")
_DIGITS: Final = str.maketrans("abcdefghijklmnopqrstuvwxyz234567", "0123456789abcdefghijklmnopqrstuv")


class Line(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One line of a record; the module's docstring says which fields each kind has."""

    k: str
    t: float
    c: int = 0
    n: int = 0
    port: str = ""
    pid: int = 0
    live: int = 0
    how: str = ""
    sender: str = ""
    rcpt: str = ""
    rcpts: list[str] = []
    job: int = 0
    mref: int = 0
    mid: str = ""
    reply: str = ""
    stored: bool = False
    size: int = 0
    sha: str = ""
    plain: str = ""
    bare: int = 0
    step: str = ""
    word: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One recipient of one transaction. run: which sink of this file, from 0; connection and transaction count in it.

    token: of the return path, "" when it is not ours. rcpt_reply: "250" and its like, "" for none. t_dot: None when the
    message never came to its end. reply: to the dot, as scripted. t_reply_written: None when it was not, or not whole.
    """

    run: int
    port: str
    connection: int
    transaction: int
    sender: str
    rcpt: str
    token: str
    job: int
    mref: int
    message_id: str
    t_rcpt: float
    rcpt_reply: str
    t_dot: float | None
    reply: str
    stored: bool
    t_reply_written: float | None
    size: int
    sha: str
    plain: str
    bare: int

    @property
    def accepted(self) -> bool:
        """The peer has it and meant to say so."""
        return self.stored and self.reply.rpartition("\n")[2][:1] == "2"


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Line).decode


def encode(line: Line) -> bytes:
    return _encode(line) + b"\n"


def read_lines(path: Path) -> list[Line]:
    """Every whole line of a record; [] when there is none yet."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    pieces = data[: data.rfind(b"\n") + 1].splitlines()
    lines: list[Line] = []
    for at, piece in enumerate(pieces):
        try:
            lines.append(_decode(piece))
        except msgspec.DecodeError:
            if _decode(pieces[at + 1]).k != "start":  # torn by a power cut: only what a new sink follows may be
                raise
    return lines


def read_record(path: Path) -> list[Entry]:
    """What arrived, by recipient, in order of arrival."""
    return list(entries(read_lines(path)))


def entries(lines: list[Line]) -> Iterator[Entry]:
    """The same from lines that were read already."""
    run = -1
    heard: list[tuple[int, Line]] = []
    dots: dict[tuple[int, int], Line] = {}
    said: dict[tuple[int, int], float] = {}
    for line in lines:
        if line.k == "start":
            run += 1
        elif line.k == "rcpt":
            heard.append((max(run, 0), line))
        elif line.k == "mail":
            dots[max(run, 0), line.n] = line
        elif line.k == "said":
            said[max(run, 0), line.n] = line.t
    for at, line in heard:
        dot = dots.get((at, line.n))
        if dot is not None and line.rcpt not in dot.rcpts:
            dot = None  # this one was refused, another of the transaction was not
        yield Entry(
            run=at,
            port=line.port,
            connection=line.c,
            transaction=line.n,
            sender=line.sender,
            rcpt=line.rcpt,
            token=token_of(line.sender),
            job=line.job or (dot.job if dot else 0),
            mref=line.mref or (dot.mref if dot else 0),
            message_id=dot.mid if dot else "",
            t_rcpt=line.t,
            rcpt_reply=line.reply,
            t_dot=dot.t if dot else None,
            reply=dot.reply if dot else "",
            stored=dot.stored if dot else False,
            t_reply_written=said.get((at, line.n)) if dot else None,
            size=dot.size if dot else 0,
            sha=dot.sha if dot else "",
            plain=dot.plain if dot else "",
            bare=dot.bare if dot else 0,
        )


def token_of(sender: str) -> str:
    """The token of a return path of ours (engine.bounce.verp), or ""."""
    local = sender.partition("@")[0].lower()
    return local[2:] if local.startswith("b+") and len(local) == 42 else ""


def reference_of(sender: str, message_id: str = "") -> tuple[int, int]:
    """(job, mref) of a return path, else of a Message-ID, else (0, 0). The seal is not checked: no keys here."""
    token = token_of(sender)
    if token:
        try:
            data = int(token.translate(_DIGITS), 32).to_bytes(25, "big")
        except ValueError:
            return 0, 0
        return int.from_bytes(data[2:7], "big"), int.from_bytes(data[7:15], "big", signed=True)
    found = _OURS.match(message_id)
    if found is None:
        return 0, 0
    mref = int(found[2], 16)
    return int(found[1], 16), mref - (1 << 64) if mref >> 63 else mref


def digests(message: bytes) -> tuple[str, str]:
    """SHA-256 of a message as it was meant (dots taken out), and of it without its signatures."""
    whole = sha256(message).hexdigest()
    end = message.find(b"\r\n\r\n")
    head = message[: end + 2] if end >= 0 else message
    plain = _DKIM.sub(b"", head)
    if len(plain) == len(head):
        return whole, whole
    rest = sha256(plain)
    rest.update(message[len(head) :])
    return whole, rest.hexdigest()


def bare_line_ends(wire: bytes) -> int:
    """How many CR or LF stand alone: the mark of SMTP smuggling."""
    if wire.count(b"\r\n") == wire.count(b"\n") == wire.count(b"\r"):
        return 0
    return len(_BARE.findall(wire))
