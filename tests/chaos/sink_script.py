r"""The words of the sink's scripts: what a peer does wrong, read from a local part, a domain or a port (faults.md 3.1).

A script is words joined by ``+``; in a local part everything behind its first ``+``: ``p17+rcpt.450+first.1@a.test``.

At a step, STEP.WHAT[.WHAT…]: steps greet ehlo helo starttls mail rcpt data body dot rset idle quit; what:

    451              answer with this code; 421 closes behind it
    late.S           answer after S seconds (``2`` or ``150ms``)
    drip.S           answer one byte every S seconds                split     in two segments
    cut.N            the first N bytes of the answer, then RST      full.rst  all of it, then RST
    twice            two answers in one segment                     extra     and a line nobody asked for
    early            the answer to the next command with this one   hold      no answer, ever
    endless          continuation lines without end                 lines.N   N of them, then the answer
    long.N           N bytes without an end of line                 die       SIGKILL of the sink itself, unanswered
    window.S         read nothing for S seconds, then answer        stored    the message is kept whatever is said
    close, rst       end here: alone without an answer, behind a code with it
    codes four letter lf empty c199 c600 two nul ansi html latin binary: strange answers, see ODD

Alone: greylist.S (450 until S seconds after the first try) · tarpit.S (before every answer) · max.N (messages a
connection, then 421; max.N.close without a word) · no.EXTENSION · size.N · rcvbuf.N (bytes, of the socket) · tls.KIND
(good, expired, wrong, cipher, old, close, garbage, inject: with STARTTLS) · refuse (RST at connect) ·
v6 (listens on ::1 and not on 127.0.0.1)
When: first.N (only for the first N tries of a recipient, or connections of a port) · every.N (each N-th connection) ·
after.N (only once this connection has taken N messages).

Law: a word that is none raises ScriptError; a local part whose tail is no script is an address like any other.

Known limits: greet, ehlo, helo, starttls, tls, no, size, rcvbuf, refuse work by port only, because nobody is named yet.
mail works by recipient where RCPT came in the same segment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

STEPS: Final = frozenset("greet ehlo helo starttls mail rcpt data body dot rset idle quit".split())
TLS_KINDS: Final = frozenset("good expired wrong cipher old close garbage inject".split())

# name: (the bytes said instead of an answer)
ODD: Final[Mapping[str, bytes]] = MappingProxyType(
    {
        "codes": b"250-2.0.0 one\r\n451-4.3.0 two\r\n550 5.7.1 three\r\n",
        "four": b"2200 x\r\n",
        "letter": b"25O ok\r\n",
        "lf": b"250 2.0.0 ok\n",
        "empty": b"250\r\n",
        "c199": b"199 what\r\n",
        "c600": b"600 what\r\n",
        "two": b"550 5.7 two numbers only\r\n",
        "nul": b"550 5.7.1 no\0thing\0\r\n",
        "ansi": b"550 5.7.1 \x1b[2J\x1b[31mred\x1b]0;title\x07 \x9b1m\r\n",
        "html": b"550 5.7.1 <script>alert(1)</script>&amp;\r\n",
        "latin": b"550 5.7.1 Gr\xfc\xdfe \xff\xfe\r\n",
        "binary": bytes(range(128, 256)) + b"\r\n",
    }
)
_WORDS: Final[Mapping[tuple[str, int], str]] = MappingProxyType(
    {
        ("greet", 554): "5.7.1 No mail from your address",
        ("mail", 550): "5.7.1 Service unavailable, client host blocked using a block list",
        ("rcpt", 550): "5.1.1 The email account that you tried to reach does not exist",
        ("rcpt", 450): "4.2.0 Recipient address rejected: Greylisted, please try again later",
        ("rcpt", 451): "4.3.0 Temporary lookup failure",
        ("rcpt", 452): "4.5.3 Too many recipients",
        ("rcpt", 552): "5.2.2 Mailbox full",
        ("dot", 550): "5.7.1 Message content rejected",
        ("starttls", 454): "4.7.0 TLS not available now",
    }
)
GREYLISTED: Final = b"450 4.2.0 Recipient address rejected: Greylisted, please try again later\r\n"


class ScriptError(ValueError):
    """Not a script; the text says what is wrong."""


@dataclass(frozen=True, slots=True)
class Act:
    """What happens at one step. word: as it was written, for the record."""

    word: str
    code: int = 0
    raw: bytes = b""
    late: float = 0.0
    drip: float = 0.0
    split: bool = False
    cut: int = -1
    full: bool = False
    twice: bool = False
    extra: bool = False
    early: bool = False
    endless: bool = False
    lines: int = 0
    long: int = 0
    hold: bool = False
    die: bool = False
    window: float = 0.0
    close: bool = False
    rst: bool = False
    stored: bool = False

    def reply(self, step: str, usual: bytes) -> bytes:
        """The whole answer that is meant; b"" for none."""
        ends = (self.close or self.rst) and not self.full
        if self.hold or self.die or (ends and not self.code and not self.raw):
            return b""
        return self.raw or (canned(step, self.code) if self.code else usual)


@dataclass(frozen=True, slots=True)
class Script:
    """All words of one place."""

    acts: Mapping[str, Act] = field(default_factory=dict)
    greylist: float = -1.0
    tarpit: float = 0.0
    most: int = 0
    most_close: bool = False
    absent: frozenset[str] = frozenset()
    size: int = 0
    rcvbuf: int = 0
    tls: str = ""
    refuse: bool = False
    v6: bool = False
    first: int = 0
    every: int = 0
    after: int = 0


PLAIN: Final = Script()
_NUMBERS: Final = {"cut": "cut", "lines": "lines", "long": "long"}
_SECONDS: Final = frozenset({"late", "drip", "window"})
_FLAGS: Final = frozenset("split full twice extra early endless hold die close rst stored".split())
_DURATION: Final = re.compile(r"([0-9]{1,6})(ms)?")


def canned(step: str, code: int) -> bytes:
    """An answer with this code in the words of a large provider."""
    words = _WORDS.get((step, code))
    if words is None:
        words = "go ahead" if 300 <= code < 400 else f"{code // 100}.0.0 scripted for {step}"
    return f"{code} {words}\r\n".encode()


def parse(text: str) -> Script:
    """Read a script. Raises ScriptError."""
    script = PLAIN
    acts: dict[str, Act] = {}
    for word in filter(None, text.split("+")):
        name, *rest = word.split(".")
        if name in STEPS:
            if name in acts:
                raise ScriptError(f"two words for {name}")
            acts[name] = _act(word, rest)
        else:
            script = _alone(script, word, name, rest)
    return replace(script, acts=acts)


def of_local_part(local: str) -> Script:
    """The script behind the first ``+`` of a local part; an ordinary tag is no script."""
    _, plus, tail = local.partition("+")
    if not plus:
        return PLAIN
    try:
        return parse(tail)
    except ScriptError:
        return PLAIN


def _act(word: str, rest: list[str]) -> Act:
    act = Act(word)
    parts = iter(rest)
    for part in parts:
        if part in _FLAGS:
            act = replace(act, **{part: True})  # type: ignore[arg-type]  # the flags are the bool fields
        elif part in _SECONDS:
            act = replace(act, **{part: _seconds(word, next(parts, ""))})  # type: ignore[arg-type]  # float fields
        elif part in _NUMBERS:
            act = replace(act, **{_NUMBERS[part]: _number(word, next(parts, ""))})  # type: ignore[arg-type]  # int fields
        elif part in ODD:
            act = replace(act, raw=ODD[part])
        elif len(part) == 3 and part.isdecimal() and part.isascii():
            act = replace(act, code=int(part))
        else:
            raise ScriptError(f"{word}: {part!r} is nothing that can be done")
    if act.code == 421 and not act.rst:
        act = replace(act, close=True)
    return act


def _alone(script: Script, word: str, name: str, rest: list[str]) -> Script:
    one = rest[0] if rest else ""
    match name:
        case "greylist":
            return replace(script, greylist=_seconds(word, one))
        case "tarpit":
            return replace(script, tarpit=_seconds(word, one))
        case "max":
            return replace(script, most=_number(word, one), most_close=rest[1:] == ["close"])
        case "no" if one:
            return replace(script, absent=script.absent | {one.upper()})
        case "size":
            return replace(script, size=_number(word, one))
        case "rcvbuf":
            return replace(script, rcvbuf=_number(word, one))
        case "tls" if one in TLS_KINDS:
            return replace(script, tls=one)
        case "refuse" | "v6":
            return replace(script, **{name: True})  # type: ignore[arg-type]  # both are bool fields
        case "first":
            return replace(script, first=_number(word, one))
        case "every":
            return replace(script, every=_number(word, one))
        case "after":
            return replace(script, after=_number(word, one))
    raise ScriptError(f"{word!r} is no word of a script")


def _number(word: str, text: str) -> int:
    if not (text.isdecimal() and text.isascii() and len(text) < 10):
        raise ScriptError(f"{word}: a number is missing")
    return int(text)


def _seconds(word: str, text: str) -> float:
    found = _DURATION.fullmatch(text)
    if found is None:
        raise ScriptError(f"{word}: seconds (2 or 150ms) are missing")
    return int(found[1]) / (1000.0 if found[2] else 1.0)
