"""Carrying out erasures: the answer within a second, the rest by a loop that does not give up (P-54, P-17).

Promise: when `op_erase` answers, nobody writes to the person any more and nothing that is kept leads to them. The bytes
follow: every place (`policy.personal`) until none has anything left, then Redis's append-only file is rewritten and
SQLite's log cut, then the receipt.

    ask     1 `erasure.begin` through Enforcement: in SQL, at the gate, at the trackers, in the tombstones
            2 `erasure.enlist`, `erasure.shred`: messages listed in portions, key and identity gone   -> the answer
    loop    3 every place, as often as something is left  4 BGREWRITEAOF, followed to its end  5 the log of SQLite
            6 `erasure.finish`: state purged, the receipt

Laws:
- killed anywhere, the next round goes on from the state in SQL; every step may be repeated;
- nothing is shredded while Redis does not know of the suppression (P-17: stop first, then shred);
- one erasure that fails does not hold up another; it is tried again, ever more rarely, and counted.

What is told too late joins the list of its erasure (`policy.latecomers`) and is taken out in the next round, also when
the receipt was given: for a day.

Known limits: a server that refuses BGREWRITEAOF is noted in the receipt; what the allocators and disks keep of freed
bytes is theirs. Over PostgreSQL a row deleted for itself keeps its bytes in the page until that is written again or its
day's partition goes, and the archive of its log is the operator's; what leads to the person there is closed once the
weekly wrapping keys are destroyed. A reader that stays in one snapshot for long keeps the log of SQLite from being cut:
asked again each round.
"""

from __future__ import annotations

import asyncio
import functools
import sqlite3
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import redis.exceptions
import structlog
from sqlalchemy import Connection, Engine, select, update

from policy import erasure, keyspace, vault
from policy.address import normalise, parse, tag_of
from policy.crashpoints import reach
from policy.dockets import keep_held
from policy.enforcement import Effects, Enforcement
from policy.latecomers import Guard
from policy.personal import Erased, PersonalStore, Premises
from policy.schema import erasure as table
from policy.tombstones import Tombstones

log = structlog.get_logger()

_BUSY_SECONDS: Final = 1.0
_IDLE_SECONDS: Final = 1.0  # an idle round asks nobody
_REFRESH_SECONDS: Final = 300.0  # the guard forgets who was erased a day ago; closed requests lose their address
_PATIENCE: Final = (1.0, 300.0)  # between two walks of the places for one erasure: doubled from the first to the second
_PORTION: Final = 50_000  # messages of one person handed to the places at once
_LISTED: Final = 20_000  # messages of one person listed a transaction: an opt-out waits for at most one of them
_CHECKPOINT_MS: Final = 250  # the writer stands still for so long at most


class Erasing:
    """One a writer. guard: that of its `drains.EventBook`; places: every place of every floor, asked at each walk."""

    def __init__(
        self,
        premises: Premises,
        enforcement: Enforcement,
        tombstones: Tombstones,
        guard: Guard,
        places: Callable[[], Sequence[PersonalStore]],
    ) -> None:
        self._premises = premises
        self._store = premises.store
        self._enforcement = enforcement
        self._tombstones = tombstones
        self._guard = guard
        self._places = places
        self._open: dict[int, str] = {}  # states of what is not purged
        self._waits: dict[int, tuple[float, float]] = {}  # (not before, next pause), monotonic seconds
        self._ready: set[int] = set()  # empty everywhere, but not rewritten yet
        self._covered: set[int] = set()  # what the rewrite that is under way was asked for
        self._refreshed = float("-inf")
        self._oldest: int | None = None
        self._started = False
        self.begun = self.purged = self.failures = 0

    def __repr__(self) -> str:
        return f"<Erasing open={len(self._open)}>"

    async def load(self) -> None:
        """Before the first drain: who was erased of late, what is not finished."""
        now = self._premises.clock()

        def work(conn: Connection) -> dict[int, str]:
            self._guard.load(conn, now)
            wanted = select(table.c.number, table.c.state, table.c.begun).where(table.c.state != erasure.PURGED)
            rows = conn.execute(wanted).all()
            self._oldest = min((row.begun for row in rows), default=None)
            return {row.number: row.state for row in rows}

        self._open = await self._store.write(work)
        self._refreshed = time.monotonic()
        if not self._started:  # what came late before a restart is listed, but perhaps not taken out
            self._started = True
            self._guard.fresh.update(number for places in self._guard.tags.values() for _, number in places)

    # --- the answer -----------------------------------------------------------------------------------------------

    async def erase(
        self, account: int, tag: bytes, partition: int, address: str, cause: str, request: int | None
    ) -> dict[str, Any]:
        """Steps 1 and 2. account 0: everywhere. address "": it is taken from the vault, if it is there.

        Raises ValueError, enforcement.RedisBehind (it is kept and goes on by itself), TombstoneError."""
        keyring, now = self._premises.keyring(), self._premises.clock()
        if address:
            mailbox = parse(address)
            spelled, domain = normalise(mailbox.local, mailbox.domain), mailbox.domain
            if tag_of(keyring.pepper, spelled) != tag or keyspace.partition_of(domain) != partition:
                raise ValueError("the tag is not that of the address")
            lane = keyspace.lane_ref(domain, keyring.lane)
        else:
            lane = await self._store.write(lambda conn: self._lane(conn, tag))

        def change(conn: Connection, effects: Effects) -> erasure.Begun:
            return erasure.begin(
                conn, effects, account=account, tag=tag, partition=partition, lane=lane, cause=cause, request=request,
                now=now, ledger=self._tombstones,
            )  # fmt: skip

        try:
            begun: erasure.Begun = await self._enforcement.apply(change)
        except BaseException:
            self._refreshed = float("-inf")  # perhaps SQL has it: the loop looks
            raise
        if begun.is_new:
            self.begun += 1
        listed, held = 0, 0
        for number in begun.erasures:
            told = await self._shred(number)
            listed, held = listed + told.listed, held + len(told.held)
        return {"erasures": list(begun.erasures), "new": begun.is_new, "messages": listed, "held": held}

    def _lane(self, conn: Connection, tag: bytes) -> str:
        keyring = self._premises.keyring()
        try:
            found = vault.find(conn, keyring, tag)
        except vault.VaultError:
            return ""  # its key is lost: suppressed and erased all the same
        return keyspace.lane_ref(parse(found[0].address).domain, keyring.lane) if found else ""

    async def _shred(self, number: int) -> erasure.Shredded:
        keyring, now = self._premises.keyring(), self._premises.clock()

        def work(conn: Connection, since: int) -> int | tuple[erasure.Shredded, str]:
            # on the drains' own thread, and before the first portion: no event slips between list and key
            self._guard.expect(conn, number)
            further = erasure.enlist(conn, keyring, number, since, _LISTED)
            if further is not None:
                return further
            told = erasure.shred(conn, keyring, number, now, keep_held, is_listed=True)
            self._guard.watch(conn, number)
            state = conn.execute(select(table.c.state).where(table.c.number == number)).scalar_one()
            return told, str(state)

        since = 0
        while True:
            reach("before-shred")
            answer = await self._store.write(functools.partial(work, since=since))
            reach("after-shred")
            if not isinstance(answer, int):
                told, state = answer
                break
            since = answer
        if self._oldest is None:
            self._oldest = now
        if state == erasure.PURGED:
            self._open.pop(number, None)
        else:
            self._open[number] = state
        return told

    # --- the loop -------------------------------------------------------------------------------------------------

    async def round(self) -> float:
        """One look at everything that is not finished; seconds until the next. Raises RedisError, Redis being away."""
        now = time.monotonic()
        if now - self._refreshed >= _REFRESH_SECONDS:
            await self.load()
            await self._store.write(erasure.forget_addresses)
        for number in sorted(self._guard.fresh - self._open.keys()):
            self._guard.fresh.discard(number)
            await self._guarded(number, self._walk)  # purged, and something came too late
        if not self._open:
            return _IDLE_SECONDS
        for number, state in sorted(self._open.items()):
            if state == erasure.SUPPRESSED and not self._enforcement.behind:
                await self._guarded(number, self._shred)
        for number, state in sorted(self._open.items()):
            due, pause = self._waits.get(number, (0.0, _PATIENCE[0]))
            if state != erasure.SHREDDED or number in self._ready | self._covered or due > now:
                continue
            self._guard.fresh.discard(number)
            told = await self._guarded(number, self._walk)
            if told is not None and not told.left:
                self._ready.add(number)
            else:
                self._waits[number] = (now + pause, min(2 * pause, _PATIENCE[1]))
        await self._rewrite()
        return _BUSY_SECONDS

    async def _guarded(self, number: int, step: Callable[[int], Any]) -> Any:
        """One erasure that cannot go on must not hold up the others."""
        try:
            return await step(number)
        except (redis.exceptions.RedisError, OSError):
            raise
        except Exception as error:
            self.failures += 1
            log.exception("an erasure cannot go on, it is tried again", erasure=number, error=type(error).__name__)
            return None

    async def _walk(self, number: int) -> Erased:
        """Every place, for so many messages at once; what was taken out and what is left."""
        done, after = Erased(), None
        while True:
            person = await self._store.write(
                lambda conn, after=after: erasure.erased_person(conn, number, after, _PORTION)  # type: ignore[misc]
            )
            for place in self._places():
                reach("before-purge")
                done += await place.erase(person)
                reach("after-purge")
            if len(person.references) < _PORTION:
                break
            after = person.references[-1]
        if done.records:
            more = update(table).where(table.c.number == number).values(records=table.c.records + done.records)
            await self._store.write(lambda conn: conn.execute(more))
        return done

    async def _rewrite(self) -> None:
        """The append-only file still tells how the queue came to be: it is written anew, then the erasures end."""
        if not self._ready and not self._covered:
            return
        told = await self._premises.redis.info("persistence")
        if told.get("aof_rewrite_in_progress") or told.get("aof_rewrite_scheduled"):
            return  # ours, or one that began before the bytes were gone: then ask again when it is over
        if self._covered:
            covered, self._covered = self._covered, set()
            if told.get("aof_last_bgrewrite_status") == "ok":
                await self._finish(covered, "")
            else:
                log.error("rewriting the append-only file failed, trying again")
                self.failures += 1
                self._ready |= covered
            return
        ready, self._ready = self._ready, set()
        if not told.get("aof_enabled"):
            await self._finish(ready, "no append-only file")
            return
        try:
            await self._premises.redis.bgrewriteaof()
        except redis.exceptions.ResponseError:
            self.failures += 1
            await self._finish(ready, "the server refuses to rewrite its append-only file")
        except BaseException:
            self._ready |= ready
            raise
        else:
            self._covered = ready

    async def _finish(self, numbers: set[int], note: str) -> None:
        if not await asyncio.to_thread(cut_log, self._store.engine):
            self._ready |= numbers  # a reader is in the way: all of it again, the rewrite costs little
            return
        now = self._premises.clock()
        for number in sorted(numbers):
            reach("before-receipt")
            await self._store.write(lambda conn, number=number: erasure.finish(conn, number, now, note))  # type: ignore[misc]
            reach("after-receipt")
            self._open.pop(number, None)
            self._waits.pop(number, None)
            self.purged += 1
        await self.load()

    def statistics(self) -> dict[str, float]:
        """Numbers for /metrics. The oldest is as of the last look at SQL: after each receipt, every five minutes."""
        waited = self._premises.clock() - self._oldest if self._open and self._oldest is not None else 0
        return {
            "erasures_open": float(len(self._open)),
            "erasure_oldest_seconds": max(0.0, waited / 1e6),
            "erasures_begun": float(self.begun),
            "erasures_purged": float(self.purged),
            "erasure_failures": float(self.failures),
            "events_of_erased": float(self._guard.dropped),
        }


def cut_log(engine: Engine) -> bool:
    """Move everything out of SQLite's write-ahead log and cut it to nothing; False: a reader is in the way, ask again.

    Pages with what was deleted lie in the log until then; in the database itself secure_delete has wiped them. Call it
    off the loop: it waits for the writer's turn, then at most a quarter of a second for readers."""
    if engine.dialect.name != "sqlite" or engine.url.database in (None, "", ":memory:"):
        return True
    raw = engine.raw_connection()  # outside of any transaction: a checkpoint within one is refused
    try:
        cursor = raw.cursor()
        [(before,)] = cursor.execute("PRAGMA busy_timeout").fetchall()
        try:
            cursor.execute(f"PRAGMA busy_timeout={_CHECKPOINT_MS}")
            [(busy, _, _)] = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.OperationalError:
            return False
        finally:
            cursor.execute(f"PRAGMA busy_timeout={int(before)}")
            cursor.close()
        return not busy
    finally:
        raw.close()


class ErasureOperations:
    """What the writer does when asked (`policy.doorway`)."""

    def __init__(self, erasing: Erasing, premises: Premises) -> None:
        self._erasing = erasing
        self._premises = premises

    async def op_erase(
        self, account: int, tag: bytes, partition: int, address: str = "", cause: str = "request", request: int = 0
    ) -> dict[str, Any]:
        """account 0: everywhere; request 0: none. erasures: numbers of the receipts to come; new: false for a
        repetition; messages: how many are being taken out; held: holds that keep copies (17(3))."""
        return await self._erasing.erase(account, tag, partition, address, cause, request or None)

    async def op_erasures(self, limit: int = 50, open_only: bool = False) -> list[dict[str, Any]]:
        """The newest first: how far each is. Nobody is named."""
        wanted = select(table).order_by(table.c.number.desc()).limit(limit)
        if open_only:
            wanted = wanted.where(table.c.state != erasure.PURGED)
        columns = ("number", "account", "cause", "state", "request", "begun", "shredded", "purged", "records")
        rows = await self._premises.store.write(lambda conn: conn.execute(wanted).mappings().all())
        return [{name: row[name] for name in columns} for row in rows]
