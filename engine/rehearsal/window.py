"""The window of the rehearsal's sink: one buffer that the kernel writes every session's input into.

Law: it holds one segment of one session, from `get_buffer` to the end of `buffer_updated`, both called without a
pause by the loop; nothing refers to it afterwards. In front of it is room for what the last cut left over.

The end of a body is found by the C library's strstr: 1.5 us for 35 kB, where memmem needs 6 and bytes.find 4 to 17
(CPython 3.11, pattern of five octets). What it finds before a NUL is the first; if it stopped at one, without strstr,
and for input that lies elsewhere, bytes.find does it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final, cast

HEADROOM: Final = 8192  # octets; more than session.MAX_LINE, which is the most a cut leaves over
WINDOW_BYTES: Final = 524_288  # what one call of read may bring: some fifteen messages of a newsletter
_END: Final = b"\r\n.\r\n"


class Window:
    """octets: HEADROOM, then what was read, then one for a NUL; view: the part that is read into."""

    def __init__(self) -> None:
        self.octets = bytearray(HEADROOM + WINDOW_BYTES + 1)
        self.view = memoryview(self.octets)[HEADROOM:-1]
        self._first = ctypes.c_char.from_buffer(self.octets)  # holds the buffer where it is
        self._base = ctypes.addressof(self._first)
        self._strstr = _strstr()

    def end_of_data(self, data: bytes | bytearray, at: int, stop: int) -> int:
        """Where CRLF "." CRLF begins in data[at:stop], -1 when it is not there. What was read ends at stop."""
        octets = self.octets
        if data is not octets or self._strstr is None:
            return data.find(_END, at, stop)
        octets[stop] = 0  # nobody's: behind what was read
        found = self._strstr(self._base + at, _END)
        if found:
            return found - self._base
        return -1 if octets.find(0, at, stop) < 0 else octets.find(_END, at, stop)


def _strstr() -> Callable[[int, bytes], int | None] | None:
    try:
        found = ctypes.PyDLL(None).strstr  # PyDLL: a call this short does not let go of the interpreter's lock
    except (AttributeError, OSError):
        return None
    found.restype = ctypes.c_void_p
    found.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    return cast("Callable[[int, bytes], int | None]", found)
