"""Delegation: one of our judges answers for a Postfix that asks it about every recipient (SMTPD_POLICY_README).

So a whole Postfix plays a scene that it cannot play by itself: its own tables know no "put off once", and its `sleep`
no fraction of a second.

    request    lines ``name=value``, then an empty line; ``recipient`` is looked at, nothing else
    answer     ``action=550 5.1.1 words`` or, after the judge's delay, ``action=DUNNO`` (nothing against it)

Law: every request is answered once, in the order of its connection; a connection says nothing that its peer did not ask
for. Who talks nonsense (a line without "=", more than `MOST` octets in one request, no recipient) is hung up on:
Postfix then answers 451 by itself.

Known limits: it runs in the benchmark's own process; its CPU (some 50 us a recipient) is in nobody's figure.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from engine.rehearsal.providers import Judge

MOST: Final = 16 * 1024  # octets of one request; Postfix's have about 500
_ENHANCED: Final = re.compile(r"[245]\.[0-9]{1,3}\.[0-9]{1,3} ?")


def action_of(reply: bytes | None) -> str:
    """What Postfix is told for a judge's reply. Several lines become one, which is all an action has; without an
    enhanced code it gets X.0.0, because Postfix would write 5.7.1, and that means something else."""
    if reply is None:
        return "DUNNO"
    lines = reply.decode("ascii", "replace").splitlines()
    code = lines[-1][:3]
    found = _ENHANCED.match(lines[-1][4:])
    enhanced = found[0].strip() if found else f"{code[0]}.0.0"
    words = " ".join(_ENHANCED.sub("", line[4:], count=1) if found else line[4:] for line in lines)
    return f"{code} {enhanced} {words}"


class Delegate:
    """``await Delegate(judge, path).start()``; path: of the Unix socket, readable by every user of the machine."""

    def __init__(self, judge: Judge, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._judge = judge
        self._clock = clock
        self._server: asyncio.Server | None = None
        self._talks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Raises OSError."""
        # one request a connection at a time, and a connection from each of Postfix's processes
        self._server = await asyncio.start_unix_server(self._serve, self.path, limit=MOST, backlog=1200)
        os.chmod(self.path, 0o666)

    async def stop(self) -> None:
        """Safe to call twice."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        talks = list(self._talks)
        for talk in talks:
            talk.cancel()
        await asyncio.gather(*talks, return_exceptions=True)
        self.path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talk = asyncio.current_task()
        assert talk is not None
        self._talks.add(talk)
        try:
            while True:
                # the reader's limit is that of a request: a longer one raises LimitOverrunError
                request = await reader.readuntil(b"\n\n")
                recipient = _recipient(request)
                if not recipient:
                    return
                reply = self._judge.recipient(recipient, self._clock())
                if reply is None and self._judge.delay > 0.0:
                    await asyncio.sleep(self._judge.delay)
                writer.write(f"action={action_of(reply)}\n\n".encode("ascii", "replace"))
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
            return  # it went away, or is not Postfix
        finally:
            self._talks.discard(talk)
            writer.close()


def _recipient(request: bytes) -> bytes:
    """The recipient of a request, b"" when it is none."""
    recipient = b""
    for line in request[:-2].split(b"\n"):
        name, is_attribute, value = line.partition(b"=")
        if not is_attribute:
            return b""
        if name == b"recipient":
            recipient = value
    return recipient
