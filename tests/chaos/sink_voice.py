"""How a session of the sink speaks: records first, then answers, with waits, cuts and ends in between, in one order.

Law: what was noted before an answer was queued is in the record (os.write) before the first byte of it is written; the
mark behind an answer to a dot is noted once the kernel has it whole. While something is waited for (`is_waiting`)
nothing is to be taken from the input.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import signal
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from tests.chaos.sink_script import Act

LINGER_SECONDS: Final = 2.0
SEGMENT_SECONDS: Final = 0.02  # between two segments that are to stay two
_FOREVER: Final = 1e9
_BABBLE: Final = b"250-2.0.0 there is more to come, much more\r\n" * 500


class End(enum.Enum):
    """How a connection is ended by us."""

    CLOSE = "close"  # our direction ends, the other is read to nowhere for a while: no RST eats what was said
    RST = "rst"
    DIE = "die"  # of the whole sink


class Mark:
    """Behind an answer to a dot: transaction n was answered."""

    __slots__ = ("n",)

    def __init__(self, n: int) -> None:
        self.n = n


class Voice:
    """record: appends bytes to the record; said(n): the line of a mark; go_on: takes up the input again after a wait;
    ended: called when we end the connection."""

    def __init__(
        self,
        record: Callable[[bytes], None],
        said: Callable[[int], bytes],
        go_on: Callable[[], None],
        ended: Callable[[], None],
    ) -> None:
        self.transport: asyncio.Transport
        self.is_waiting = False  # an act is being played
        self.is_over = False  # nothing more is said, what comes is dropped
        self._record = record
        self._said = said
        self._go_on = go_on
        self._ended = ended
        self._out: deque[Any] = deque()
        self._notes: list[bytes] = []
        self._timer: asyncio.TimerHandle | None = None

    def note(self, line: bytes) -> None:
        """To the record, before anything that is said from now on."""
        self._notes.append(line)

    def say(self, answer: bytes) -> None:
        self._out.append(answer)

    def mark(self, n: int) -> None:
        self._out.append(Mark(n))

    def wait(self, seconds: float) -> None:
        self._queue(seconds)

    def hold(self) -> None:
        """Say nothing, ever."""
        self._queue(_FOREVER)

    def end(self, how: End) -> None:
        self._queue(how)

    def call(self, what: Callable[[], None]) -> None:
        """When everything before it was said."""
        self._queue(what)

    def play(self, act: Act, answer: bytes, n: int = 0) -> None:
        """An act with the whole answer it is about (`Act.reply`). n: mark its end so."""
        self.is_waiting = True
        if act.die:
            self.end(End.DIE)
        if act.window:
            self.transport.pause_reading()
            self.wait(act.window)
            self.call(self.transport.resume_reading)
        if act.late:
            self.wait(act.late)
        if act.endless:
            self.call(self._babble)
        if act.long:
            self.say(b"250-" + b"x" * act.long)
        if act.lines:
            self.say(b"250-2.0.0 and another line of this answer\r\n" * act.lines)
        if act.extra:
            answer += b"250 2.0.0 nobody asked for this\r\n"
        if act.twice:
            answer += answer
        if act.early:
            answer += b"250 2.0.0 Ok, whatever comes\r\n"
        if act.hold:
            self.hold()
        elif act.cut >= 0:
            self.say(answer[: act.cut])
            self.wait(SEGMENT_SECONDS)
            self.end(End.RST)
            return
        elif act.drip:
            for index in range(len(answer)):
                self.say(answer[index : index + 1])
                self.wait(act.drip)
        elif act.split and len(answer) > 3:
            self.say(answer[:2])
            self.wait(SEGMENT_SECONDS)
            self.say(answer[2:])
        elif answer:
            self.say(answer)
        if n and not act.hold:
            self.mark(n)
        if act.rst:
            self.end(End.RST)
        elif act.close:
            self.end(End.CLOSE)

    def _queue(self, item: object) -> None:
        self.is_waiting = True
        self._out.append(item)

    def flush(self) -> None:
        """Records, then what is said, up to the next wait or end."""
        if self._timer is not None or self.is_over:
            return
        out = self._out
        while True:
            if self._notes:
                self._record(b"".join(self._notes))
                self._notes.clear()
            ready: list[bytes] = []
            marks: list[bytes] = []
            numbers: list[int] = []
            while out and isinstance(out[0], bytes | Mark):
                item = out.popleft()
                if isinstance(item, Mark):
                    numbers.append(item.n)
                else:
                    ready.append(item)
            if ready and not self.transport.is_closing():
                self.transport.write(b"".join(ready))
            if numbers:
                marks = [self._said(n) for n in numbers]
                self._record(b"".join(marks))
            if not out:
                self.is_waiting = False
                return
            item = out.popleft()
            if isinstance(item, float):
                self._timer = asyncio.get_running_loop().call_later(item, self._ring)
                return
            if isinstance(item, End):
                self._end(item)
                return
            item()
            if self._timer is not None:
                return

    def silence(self) -> None:
        """The connection is gone: no timers are left, and what was noted is still recorded."""
        self.is_over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._notes:
            self._record(b"".join(self._notes))
            self._notes.clear()

    def begin_again(self) -> None:
        """Inside TLS: nothing is waited for any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._out.clear()
        self.is_waiting = False

    def _ring(self) -> None:
        self._timer = None
        if not self.is_over:
            self.flush()
            if not self.is_waiting:
                self._go_on()

    def _babble(self) -> None:
        """Continuation lines for as long as the peer takes them."""
        if self.is_over or self.transport.is_closing():
            return
        for _ in range(50):
            if self.transport.get_write_buffer_size() < 1 << 20:
                self.transport.write(_BABBLE)
        self._timer = asyncio.get_running_loop().call_later(0.005, self._babble)

    def _end(self, how: End) -> None:
        self.is_over = True
        if how is End.DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        self._ended()
        transport = self.transport
        if transport.is_closing():
            return
        if how is End.RST:
            reset(transport)
        elif transport.can_write_eof():
            transport.write_eof()
            asyncio.get_running_loop().call_later(LINGER_SECONDS, transport.abort)
        else:
            transport.close()


def reset(transport: asyncio.Transport) -> None:
    """End a connection by RST, not FIN."""
    raw = transport.get_extra_info("socket")
    if raw.family != socket.AF_UNIX:  # there an end with unread input is as near as it gets
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(raw.fileno())) as handle:
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
