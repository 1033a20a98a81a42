"""Golden dialogues: a text file is a conversation with a server and what must come of it; anybody can write one.

    # one line saying what the file is about, with the RFC
    tls may                            (never, may, must; default never)   pipeline no   login name password
    message a@us -> x@them             each becomes one message, offered in order as soon as the dialogue wants one
    message a@us -> x@them : Hi        the same with this body (escapes \\r \\n \\x..); default is a short one
    S: 250 ok                          the server's line, CRLF added
    S= 250 ok\\r\\n250                   the server's bytes as they stand, with escapes
    C: MAIL FROM:<a@us>                the client's next line, exactly
    C: (body)                          the client's next message up to and with its final dot
    -- eof | timeout | abort | tls | tls failed | quit | void | renew | withdraw | unsent    no bytes, but it happens
    => x@them DEFERRED at RCPT 451 4.3.0            a verdict, in order; ``untried`` and a trouble may follow
    => closed GOODBYE                               how it ends; nothing may be left over

Law of the player: at every ``S`` line the client has said exactly what the ``C`` lines before it say, and nothing else:
so a flight is visible as C lines without an S between them.
``unsent`` keeps what the client wants to say inside (a socket that takes nothing) until the end of the file.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from engine.smtp.dialogue import Dialogue
from engine.smtp.words import Closed, Event, Outbound, Parked, Settled, Step, Tls, Trouble, Upgrade, Verdict

FOLDER = Path(__file__).parent.parent / "dialogues"
DATA = b"Subject: hello\r\n\r\nHow are you?\r\n"


class DialogueError(AssertionError):
    """The client did not say or conclude what the file says."""


@dataclass(slots=True)
class Golden:
    """A parsed file. moves: (what, text, line number); expected: lines behind ``=>``."""

    name: str
    about: str = ""
    tls: Tls = Tls.NEVER
    pipeline: bool = True
    login: tuple[str, str] | None = None
    messages: list[Outbound] = field(default_factory=list)
    moves: list[tuple[str, str, int]] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)

    @property
    def on_sockets(self) -> bool:
        """Whether a plain server on a socket can play it: no TLS, no tricks with our side."""
        return self.tls is Tls.NEVER and all(what != "--" or text in ("eof", "quit") for what, text, _ in self.moves)


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.txt"))


def read(name: str) -> Golden:
    golden = Golden(name)
    for number, line in enumerate((FOLDER / f"{name}.txt").read_text("utf-8").splitlines(), 1):
        word, _, rest = line.partition(" ")
        match word:
            case "":
                pass
            case "#":
                golden.about = golden.about or rest
            case "tls":
                golden.tls = Tls(rest)
            case "pipeline":
                golden.pipeline = rest != "no"
            case "login":
                login, _, password = rest.partition(" ")
                golden.login = (login, password)
            case "message":
                route, _, body = rest.partition(" : ")
                sender, _, recipient = route.partition(" -> ")
                data = unescape(body) if body else DATA
                golden.messages.append(Outbound(len(golden.messages), sender.strip(), recipient.strip(), data))
            case "S:" | "S=" | "C:" | "--":
                golden.moves.append((word, rest, number))
            case "=>":
                golden.expected.append(rest)
            case _:
                raise DialogueError(f"{name}.txt:{number}: what is {word!r}?")
    return golden


def unescape(text: str) -> bytes:
    return text.encode("latin-1").decode("unicode_escape").encode("latin-1")


def describe(event: Event) -> str | None:
    """An event as the ``=>`` line that expects it; None for events that are no outcome."""
    if isinstance(event, Closed):
        return f"closed {event.trouble.name}"
    if not isinstance(event, Settled):
        return None
    verdict = event.verdict
    parts = [event.message.recipient, verdict.fate.name, "at", verdict.step.name, *_source(verdict)]
    return " ".join(parts)


def _source(verdict: Verdict) -> list[str]:
    parts = []
    if verdict.reply is not None:
        parts.append(str(verdict.reply.code))
        parts += [verdict.reply.enhanced] if verdict.reply.enhanced else []
    if verdict.trouble is not None:
        parts.append(verdict.trouble.name)
    if not verdict.tried:
        parts.append("untried")
    return parts


class Player:
    """Plays one file against the pure dialogue; cut: how the server's bytes are split (0: not, n: pieces of n)."""

    def __init__(self, golden: Golden, *, cut: int = 0) -> None:
        self._golden = golden
        self._cut = cut
        self._queue = deque(golden.messages)
        self._void = False
        self._parked: Outbound | None = None
        self._unsent = False
        self._said = b""
        self.wire = b""
        self.committed: list[Outbound] = []
        self.outcomes: list[str] = []
        self.dialogue = Dialogue(
            "us.example",
            golden.tls,
            on_commit=self.committed.append,
            is_void=lambda _: self._void,
            pipeline=golden.pipeline,
            login=golden.login,
        )

    def play(self) -> None:
        for what, text, number in self._golden.moves:
            if what == "C:":
                self._expect(text, number)
                continue
            if self._said:
                raise DialogueError(f"{self._golden.name}.txt:{number}: the client also said {self._said!r}")
            if what == "--":
                self._happen(text, number)
            else:
                data = text.encode("utf-8") + b"\r\n" if what == "S:" else unescape(text)
                self._take([event for piece in self._pieces(data) for event in self.dialogue.receive(piece)])
        if self._said:
            raise DialogueError(f"{self._golden.name}.txt: at the end the client said {self._said!r}")
        if self.outcomes != self._golden.expected:
            raise DialogueError(f"{self._golden.name}.txt: {self.outcomes} instead of {self._golden.expected}")

    def _pieces(self, data: bytes) -> list[bytes]:
        return [data[at : at + self._cut] for at in range(0, len(data), self._cut)] if self._cut else [data]

    def _expect(self, text: str, number: int) -> None:
        if text == "(body)":
            end = self._said.find(b"\r\n.\r\n") + 5
            if end < 5:
                raise DialogueError(f"{self._golden.name}.txt:{number}: no body in {self._said!r}")
            self._said = self._said[end:]
            return
        line, _, self._said = self._said.partition(b"\r\n")
        if line != text.encode("utf-8"):
            raise DialogueError(f"{self._golden.name}.txt:{number}: expected {text!r}, the client said {line!r}")

    def _happen(self, what: str, number: int) -> None:
        dialogue = self.dialogue
        match what:
            case "eof":
                self._take(dialogue.lost(Trouble.LOST))
            case "timeout":
                self._take(dialogue.lost(Trouble.TIMEOUT))
            case "abort":
                self._take(dialogue.lost(Trouble.ABORTED))
            case "tls":
                self._take(dialogue.tls_started())
            case "tls failed":
                self._take(dialogue.lost(Trouble.TLS))
            case "quit":
                self._take(dialogue.quit())
            case "void":
                self._void = True
            case "renew" | "withdraw":
                if self._parked is None:
                    raise DialogueError(f"{self._golden.name}.txt:{number}: nothing is parked")
                self._void = False
                act = dialogue.renew if what == "renew" else dialogue.withdraw
                self._take(act(self._parked))
            case "unsent":
                self._unsent = True
            case _:
                raise DialogueError(f"{self._golden.name}.txt:{number}: what is {what!r}?")

    def _take(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Parked):
                self._parked = event.message
            elif isinstance(event, Upgrade):
                assert self.dialogue.waiting_for in (Step.TLS, Step.STARTTLS)
            elif (line := describe(event)) is not None:
                self.outcomes.append(line)
        if self._queue and self.dialogue.wants:
            self._take(self.dialogue.deliver(self._queue.popleft()))
            return
        if not self._unsent:
            data = b"".join(self.dialogue.outgoing())
            self._said += data
            self.wire += data
