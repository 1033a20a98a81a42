"""How many SMTP connections this process may hold, out of the descriptors the system gives it (faults 3.4).

Law: what the system refuses us is not the fault of the site we wanted to reach; so we stop asking before it refuses,
and what it refuses all the same (`OURS`) says nothing about the site.

A connection that is idle at one site makes room for a site that has work and none.

Known limits: counted are connections to sites; Redis, DNS, files and the loop itself live in `RESERVE`.
"""

from __future__ import annotations

import errno
import resource

RESERVE = 128  # 64 for the pool to Redis (policy.valkey), the rest for look-ups, journal, SQLite, vitals and the loop
FEWEST, MOST = 16, 60_000  # a process with fewer would not work at all; one address has 28,000 ports to one peer's port
OURS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})


def of_this_process() -> int:
    """Take what descriptors there are to have, and say how many connections that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST + RESERVE if hard == resource.RLIM_INFINITY else min(hard, MOST + RESERVE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return MOST if soft == resource.RLIM_INFINITY else max(FEWEST, min(MOST, soft - RESERVE))


class Sockets:
    """One per worker. open: how many there are, those being opened included."""

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self.open = 0

    def __repr__(self) -> str:
        return f"<Sockets {self.open} of {self.most}>"

    def take(self) -> bool:
        """Room for one more, or not."""
        if self.open >= self.most:
            return False
        self.open += 1
        return True

    def give(self) -> None:
        self.open -= 1
