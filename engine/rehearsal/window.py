"""The window of the rehearsal's sink: one buffer that the kernel writes every session's input into.

Law: it holds one segment of one session, from `get_buffer` to the end of `buffer_updated`, both called without a
pause by the loop; nothing refers to it afterwards. In front of it is room for what the last cut left over.

The end of a body is found by the C library's memmem: 6 us for 34 kB of quoted-printable, where bytes.find needs 17 us
(CPython 3.11, pattern of five octets); without memmem, and for input that lies elsewhere, bytes.find does it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final, cast

HEADROOM: Final = 8192  # octets; more than session.MAX_LINE, which is the most a cut leaves over
WINDOW_BYTES: Final = 524_288  # what one call of read may bring: some fifteen messages of a newsletter
_END: Final = b"\r\n.\r\n"


class Window:
    """octets: HEADROOM, then what was read; view: the part that is read into."""

    def __init__(self) -> None:
        self.octets = bytearray(HEADROOM + WINDOW_BYTES)
        self.view = memoryview(self.octets)[HEADROOM:]
        self._first = ctypes.c_char.from_buffer(self.octets)  # holds the buffer where it is
        self._base = ctypes.addressof(self._first)
        self._memmem = _memmem()

    def end_of_data(self, data: bytes | bytearray, at: int, stop: int) -> int:
        """Where CRLF "." CRLF begins in data[at:stop], -1 when it is not there."""
        if data is not self.octets or self._memmem is None:
            return data.find(_END, at, stop)
        found = self._memmem(self._base + at, stop - at, _END, len(_END))
        return found - self._base if found else -1


def _memmem() -> Callable[[int, int, bytes, int], int | None] | None:
    try:
        found = ctypes.PyDLL(None).memmem  # PyDLL: a call this short does not let go of the interpreter's lock
    except (AttributeError, OSError):
        return None
    found.restype = ctypes.c_void_p
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    return cast("Callable[[int, int, bytes, int], int | None]", found)
