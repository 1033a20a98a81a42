"""How a conversation begins: greeting, EHLO or HELO, STARTTLS and EHLO again, AUTH for a smarthost.

Laws: HELO only after a 5yz to EHLO (S-08); everything learnt in clear is forgotten after STARTTLS (RFC 3207 4.2); no
password is said in clear; where TLS is required nothing is said without it but EHLO and STARTTLS.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Generator

from engine.smtp.lines import extensions_of
from engine.smtp.reply import Reply
from engine.smtp.words import Closed, Step, Tls, Trouble

Script = Generator[Step, Reply | None, None]


class End(Exception):
    """Thrown through a script: the conversation is over."""

    def __init__(self, trouble: Trouble, step: Step, reply: Reply | None = None, detail: str = "") -> None:
        self.closed = Closed(trouble, step, reply, detail)


def hear(step: Step) -> Generator[Step, Reply | None, Reply]:
    """Wait for one reply of class 2, 4 or 5; anything else is no answer to a command."""
    reply = yield step
    if reply is None or 300 <= reply.code <= 399:
        raise End(Trouble.MALFORMED, step, reply)
    return reply


class Opening:
    """The script of the beginning; extensions and encrypted are what came of it. say: writes one command line."""

    def __init__(
        self, hello: str, tls: Tls, say: Callable[[str], None], *, encrypted: bool, login: tuple[str, str] | None
    ) -> None:
        self.extensions: dict[str, str] = {}
        self.encrypted = encrypted
        self._hello = hello
        self._tls = tls
        self._say = say
        self._login = login

    def run(self) -> Script:
        """Greeting, EHLO (or HELO), and TLS as far as wanted and offered."""
        reply = yield from hear(Step.GREETING)
        if not reply.accepted:
            raise End(Trouble.REFUSED, Step.GREETING, reply)
        yield from self._greet()
        if self._tls is not Tls.NEVER and not self.encrypted:
            if "STARTTLS" in self.extensions:
                yield from self._encrypt()
            if not self.encrypted and self._tls is not Tls.MAY:
                raise End(Trouble.TLS, Step.STARTTLS, None, "required, and not offered or refused")
        if self._login is not None:
            yield from self._authenticate(*self._login)

    def _greet(self) -> Script:
        self._say(f"EHLO {self._hello}")
        reply = yield from hear(Step.EHLO)
        if reply.accepted:
            self.extensions = extensions_of(reply)
            return
        if reply.code < 500 or self.encrypted:  # S-08: HELO only after 5yz; whoever spoke TLS knows EHLO
            raise End(Trouble.REFUSED, Step.EHLO, reply)
        self._say(f"HELO {self._hello}")
        reply = yield from hear(Step.HELO)
        if not reply.accepted:
            raise End(Trouble.REFUSED, Step.HELO, reply)

    def _encrypt(self) -> Script:
        self._say("STARTTLS")
        reply = yield from hear(Step.STARTTLS)
        if not reply.accepted:  # 454 4.7.0, 502: go on in clear or not at all, as run decides
            return
        yield Step.TLS  # the dialogue tells its driver, and forgets what was read in clear
        self.encrypted = True
        self.extensions = {}
        yield from self._greet()

    def _authenticate(self, name: str, password: str) -> Script:
        """AUTH PLAIN with its initial response (RFC 4954, 4616), for smarthosts."""
        if not self.encrypted:
            raise End(Trouble.TLS, Step.AUTH, None, "no password is said in clear")
        if "PLAIN" not in self.extensions.get("AUTH", "").upper().split():
            raise End(Trouble.REFUSED, Step.AUTH, None, "AUTH PLAIN is not offered")
        secret = base64.b64encode(f"\0{name}\0{password}".encode()).decode("ascii")
        self._say(f"AUTH PLAIN {secret}")
        reply = yield from hear(Step.AUTH)
        if not reply.accepted:
            raise End(Trouble.REFUSED, Step.AUTH, reply)
