"""Where a role stands: on SIGUSR1 it writes every thread's stack and every task's to its log.

    arm()               in the role, before it begins
    asked(world)        in the harness: everybody that lives writes, and has had the time to

A harness that says "it did not drain" and not where it stood has found nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import gc
import signal
import sys
import typing

if typing.TYPE_CHECKING:
    from tests.chaos.world import World

_ARMED = ("policy", "engine")


def arm() -> None:
    """Call it in the main thread."""
    signal.signal(signal.SIGUSR1, _tell)


def _tell(number: int, frame: object) -> None:
    faulthandler.dump_traceback(all_threads=True)
    for task in [one for one in gc.get_objects() if isinstance(one, asyncio.Task) and not one.done()]:
        where: typing.Any = task.get_coro()
        names = []
        while where is not None:
            place = getattr(where, "cr_frame", None) or getattr(where, "gi_frame", None)
            if place is not None:
                names.append(f"{place.f_code.co_qualname}:{place.f_lineno}")
            where = getattr(where, "cr_await", None) or getattr(where, "gi_yieldfrom", None)
        print(f"task {task.get_name()}: {' > '.join(names)}", file=sys.stderr)
    sys.stderr.flush()


async def asked(world: World) -> None:
    """A role that is stopped or hangs in C writes nothing."""
    for name, role in world.roles.items():
        if name.startswith(_ARMED) and not role.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                world.signal(name, signal.SIGUSR1)
    await asyncio.sleep(1.0)
