"""Proof that a mailbox is somebody's: a random token that only the mailbox was sent (P-15, GDPR 12(6)).

Laws: only the SHA-256 of a token is kept, so who reads the database cannot prove anything; a token works once, until
72 hours after it was made, for its request alone; when one is used, the request's others are void.

Looking changes nothing: that is left to `redeem`, which a page calls on POST only (mail scanners follow links).

Known limits: it proves control of the mailbox at that moment, no more. A shared mailbox proves for all who read it;
the officer may ask for more (`by-hand`).
"""

from __future__ import annotations

import base64
import binascii
import secrets
from hashlib import sha256

from sqlalchemy import Connection, delete, insert, select, update

from policy.rights.states import PROOF_US
from policy.schema import proof

TOKEN_BYTES = 32
TOKEN_CHARACTERS = 43  # base64url without padding


def issue(conn: Connection, request: int, now: int) -> str:
    """A new token for a request; it leaves this process in a letter and nowhere else."""
    token = secrets.token_bytes(TOKEN_BYTES)
    conn.execute(insert(proof).values(hash=sha256(token).digest(), request=request, expires=now + PROOF_US, used=None))
    return base64.urlsafe_b64encode(token).rstrip(b"=").decode("ascii")


def redeem(conn: Connection, text: str, now: int) -> int | None:
    """The request a token proves, once. None for what is unknown, used or too old."""
    digest = _digest(text)
    if digest is None:
        return None
    spent = (
        update(proof)
        .where(proof.c.hash == digest, proof.c.used.is_(None), proof.c.expires > now)
        .values(used=now)
    )  # fmt: skip
    if conn.execute(spent).rowcount != 1:
        return None
    number = int(conn.execute(select(proof.c.request).where(proof.c.hash == digest)).scalar_one())
    void(conn, number, now)
    return number


def void(conn: Connection, request: int, now: int) -> None:
    """No token of a request works any more (it is proved, or closed)."""
    conn.execute(update(proof).where(proof.c.request == request, proof.c.used.is_(None)).values(used=now))


def forget(conn: Connection, now: int) -> int:
    """Delete what has expired: a hash that nothing answers to any more proves nothing."""
    return conn.execute(delete(proof).where(proof.c.expires <= now)).rowcount


def _digest(text: str) -> bytes | None:
    if len(text) != TOKEN_CHARACTERS or not text.isascii():
        return None
    try:
        token = base64.b64decode(text + "=", altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return None
    return sha256(token).digest()
