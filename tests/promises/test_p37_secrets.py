"""P-37: TLS 1.2 at least, and secrets are never logged, at DEBUG neither, nor said over a line anybody can hear."""

from __future__ import annotations

import io
import logging
import ssl
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import structlog

from engine.delivery import tls
from engine.smtp.dialogue import Dialogue
from engine.smtp.opening import Opening
from engine.smtp.words import Tls
from policy import logs
from policy.keys import Keyring
from tests.promises.marks import promise

CANARY = b"canary-of-thirty-two-bytes-long!"
PASSWORD = "canary-password"


def _older(policy: Tls) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    return made


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """Everything that is logged, at DEBUG, as a process of ours writes it."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    out = io.StringIO()
    logs.configure("test", level="debug", stream=out)
    yield out
    root.handlers[:] = before
    root.setLevel(level)
    structlog.reset_defaults()


@promise("P-37", off={"engine.delivery.tls.context": _older})
@pytest.mark.parametrize("policy", [Tls.MAY, Tls.MUST, Tls.VERIFIED])
def test_p37_nothing_older_than_tls_1_2_is_spoken(policy: Tls) -> None:
    assert tls.context(policy).minimum_version is ssl.TLSVersion.TLSv1_2


@promise("P-37", off={"policy.logs.drop_addresses": lambda logger, name, event: event})
def test_p37_no_key_is_logged_at_debug(keyring: Keyring, lines: io.StringIO) -> None:
    """Whoever passes one to a log line by mistake: as a field, nested, or as an argument of the standard library."""
    ring = replace(keyring, service=CANARY, lane=CANARY)
    log = structlog.get_logger()
    log.debug("signing", key=ring.service, nested={"keys": [ring.lane]}, ring=ring)
    logging.getLogger("engine.message.dkim").debug("with %s", ring)
    try:
        raise ValueError("signing failed")
    except ValueError:
        log.exception("failed", key=ring.service)
    text = lines.getvalue()
    assert "signing" in text
    assert CANARY.decode() not in text
    assert CANARY.hex() not in text


def _aloud(self: Opening, name: str, password: str) -> Any:
    self._say(f"AUTH PLAIN {name} {password}")
    yield from ()


@promise("P-37", off={"engine.smtp.opening.Opening._authenticate": _aloud})
def test_p37_no_password_is_said_in_clear_or_logged(lines: io.StringIO) -> None:
    """A smarthost that lost its STARTTLS, or somebody in between who took it away."""
    dialogue = Dialogue("us.example", Tls.MAY, login=("user", PASSWORD))
    said = b""
    for reply in (b"220 mx\r\n", b"250-mx\r\n250 AUTH PLAIN\r\n", b"235 ok\r\n"):
        dialogue.receive(reply)
        said += b"".join(dialogue.outgoing())
    assert said.startswith(b"EHLO")
    assert PASSWORD.encode() not in said
    assert b"AUTH" not in said
    assert PASSWORD not in lines.getvalue()
