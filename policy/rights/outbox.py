"""Letters on their way: files in a folder, sent by a smarthost where there is one.

Laws: a letter goes out only if the step it tells of is committed, and then surely: it is written as a draft inside the
transaction, released after the commit, and what a crash left is released or destroyed by looking whether its step is
in SQL (`recover`). The name of a file says ticket, step and letter, never to whom.

    .R-ABC.2.done.draft    written, its step not known to be committed
    R-ABC.2.done.eml       to be sent: by us, or by the operator's own hand when no smarthost is set
    failed/                refused for good by the smarthost: the officer finds another way (P-15)

There is no mail path of the platform itself yet, campaigns leave by the engine for accounts only: hence a smarthost.

Known limits: a crash between the smarthost's 250 and the removal of the file sends a letter twice; its Message-ID is
the same. A letter is removed after `outbox_days` whether or not it was sent, because it holds an address.
"""

from __future__ import annotations

import contextlib
import email
import email.policy
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path
from typing import Final, Protocol

import aiosmtplib

from policy.instants import DAY_US

_NAME: Final = re.compile(r"\.?(R-[A-Z2-9]{4,20})\.([0-9]+)\.([a-z-]+)\.(?:eml|draft)")
_SEND_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Waiting:
    """A letter in the folder. at: when it was written, microseconds."""

    name: str
    ticket: str
    seq: int
    letter: str
    at: int
    failed: bool = False


class Refusal(Exception):
    """The smarthost will never take this letter."""


class Send(Protocol):
    async def __call__(self, message: EmailMessage, /) -> None:
        """Raises Refusal, or OSError: try again."""
        ...


class Smarthost:
    """Sends one letter a connection: there are few of them."""

    def __init__(
        self, where: str, security: str, sender: str, user: str = "", password_file: Path | None = None
    ) -> None:
        host, _, port = where.rpartition(":")
        self._host, self._port, self._security = host, int(port), security
        self._sender, self._user, self._password_file = sender, user, password_file

    async def __call__(self, message: EmailMessage, /) -> None:
        try:
            await aiosmtplib.send(
                message,
                sender=self._sender,
                hostname=self._host,
                port=self._port,
                username=self._user or None,
                password=_first_line(self._password_file) if self._user else None,
                use_tls=self._security == "tls",
                start_tls=self._security == "starttls",
                timeout=_SEND_SECONDS,
            )
        except aiosmtplib.SMTPRecipientsRefused as error:
            if all(one.code >= 500 for one in error.recipients):
                raise Refusal from None
            raise OSError("the smarthost put a letter off") from None
        except aiosmtplib.SMTPResponseException as error:
            if error.code >= 500 and not isinstance(error, aiosmtplib.SMTPAuthenticationError):
                raise Refusal from None
            raise OSError("the smarthost put a letter off") from None
        except aiosmtplib.SMTPException as error:
            raise OSError(f"the smarthost did not take a letter ({type(error).__name__})") from None


class Outbox:
    """The folder. prepare inside a transaction, release after it; send and recover from the round."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._preparing: set[str] = set()  # of this process: not yet for `recover`

    def prepare(self, ticket: str, seq: int, letter: str, message: EmailMessage) -> str:
        """Write a letter that nobody sends yet; its name for `release` or `discard`."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = f"{ticket}.{seq}.{letter}"
        self._preparing.add(name)
        path = self._draft(name)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(message.as_bytes())
            file.flush()
            os.fsync(file.fileno())
        return name

    def release(self, name: str) -> None:
        """Its step is committed."""
        self._draft(name).rename(self._folder / f"{name}.eml")
        self._preparing.discard(name)
        self._sync()

    def discard(self, name: str) -> None:
        self._draft(name).unlink(missing_ok=True)
        self._preparing.discard(name)

    def recover(self, is_told: Callable[[str, int], bool]) -> int:
        """What a crash left: released when its step was committed, else destroyed. How many were released."""
        released = 0
        for path in self._files(".*.draft"):
            parts = _NAME.fullmatch(path.name)
            name = path.name.removeprefix(".").removesuffix(".draft")
            if parts is None or name in self._preparing:
                continue
            if is_told(parts[1], int(parts[2])):
                self.release(name)
                released += 1
            else:
                path.unlink(missing_ok=True)
        return released

    @property
    def has_drafts(self) -> bool:
        return bool(self._files(".*.draft"))

    def waiting(self) -> list[Waiting]:
        """Letters that were not sent yet, and those that cannot be, the oldest first."""
        found: list[Waiting] = []
        for path in [*self._files("*.eml"), *self._files("failed/*.eml")]:
            parts = _NAME.fullmatch(path.name)
            with contextlib.suppress(FileNotFoundError):  # sent meanwhile
                if parts is not None:
                    at = path.stat().st_mtime_ns // 1000
                    failed = path.parent != self._folder
                    found.append(Waiting(path.name, parts[1], int(parts[2]), parts[3], at, failed))
        return sorted(found, key=lambda one: (one.at, one.name))

    def read(self, name: str) -> EmailMessage | None:
        """A letter as it will be sent."""
        for path in (self._folder / name, self._folder / "failed" / name):
            with contextlib.suppress(FileNotFoundError):
                return email.message_from_bytes(path.read_bytes(), EmailMessage, policy=email.policy.SMTP)
        return None

    async def send(self, send: Send) -> tuple[int, int]:
        """(sent, refused for good). Raises OSError when the smarthost does not take letters now."""
        sent = refused = 0
        for one in self.waiting():
            if one.failed or (message := self.read(one.name)) is None:
                continue
            try:
                await send(message)
            except Refusal:
                self._fail(one.name)
                refused += 1
            else:
                self.remove(one.name)
                sent += 1
        return sent, refused

    def remove(self, name: str) -> bool:
        """True: it was there."""
        for path in (self._folder / name, self._folder / "failed" / name):
            try:
                path.unlink()
            except FileNotFoundError:
                continue
            self._sync()
            return True
        return False

    def forget(self, now: int, days: int) -> int:
        """Remove what lies there too long."""
        old = [one.name for one in self.waiting() if one.at + days * DAY_US <= now]
        return sum(self.remove(name) for name in old)

    def _fail(self, name: str) -> None:
        (self._folder / "failed").mkdir(mode=0o700, exist_ok=True)
        (self._folder / name).rename(self._folder / "failed" / name)
        self._sync()

    def _files(self, pattern: str) -> list[Path]:
        return sorted(self._folder.glob(pattern)) if self._folder.is_dir() else []

    def _draft(self, name: str) -> Path:
        return self._folder / f".{name}.draft"

    def _sync(self) -> None:
        handle = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _first_line(path: Path | None) -> str | None:
    return path.read_text("utf-8").strip() if path is not None else None
