"""TLS for delivery: one context a policy, made once.

`Tls.MAY` and `Tls.MUST` check no certificate (RFC 7435: opportunistic security protects against listening, and most
MX certificates would not pass); `Tls.VERIFIED` checks chain and name, for smarthosts (RFC 8314). TLS 1.2 at least
(RFC 8996): a peer that has less is spoken to in clear under MAY and not at all otherwise.

Known limits: no DANE (RFC 7672) and no MTA-STS (RFC 8461) yet; sessions are not resumed (asyncio hides them).
"""

from __future__ import annotations

import asyncio
import functools
import ssl
from typing import Final

from engine.smtp.words import Tls

# Of TLS 1.2, forward secret only (RFC 9325 4.2); those of 1.3 all are. Said here, because the interpreter's own default
# is the system's in some distributions (Debian's python3) and Python's in others. The last ones are without AEAD: old
# Exchange and appliances have nothing else.
_CIPHERS: Final = (
    "@SECLEVEL=2:ECDHE+AESGCM:ECDHE+CHACHA20:DHE+AESGCM:ECDHE+AES:DHE+AES:!aNULL:!eNULL:!aDSS:!SHA1:!AESCCM"
)


@functools.cache
def context(policy: Tls) -> ssl.SSLContext:
    """The client context of a policy; raises ValueError for NEVER. Building one that verifies takes about 10 ms."""
    if policy is Tls.NEVER:
        raise ValueError("a connection without TLS needs no context")
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.set_ciphers(_CIPHERS)
    if policy is Tls.VERIFIED:
        made.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
    return made


def version(transport: asyncio.BaseTransport | None) -> int:
    """0 without TLS, 2 for TLS 1.2, 3 for TLS 1.3: the number the ledger keeps (policy.events.Event.tls)."""
    held = transport.get_extra_info("ssl_object") if transport is not None else None
    return {"TLSv1.2": 2, "TLSv1.3": 3}.get(held.version() or "", 0) if held is not None else 0
