"""The way out of quarantine: what a restored backup must catch up with before anybody is served (P-11, P-17).

A backup is older than the erasures, opt-outs and withdrawals that came after it. So a restored system (it has the mark
of `policy.restoring`) starts with this, before its socket opens and before any worker is let in:

    1 `finish`        a swap that a crash cut short
    2 the ledger      tombstones whole, and continuing those the backup knew; else it stays quarantined
    3 the fence       META of Redis loses run and lease: no worker is let in (`policy.fence`), nothing is leased
    4 `Enforcement.mend`  Redis takes what SQL has; without tombstones what only Redis knows is taken into SQL first
    5 replay          every line since the backup, in order; erasures begin again with cause "replay", at every account
                      and for every subject number they name; then every erasure is shredded
    6 `close_lost`    people whose wrapping key was destroyed since: see below
    7 sweep           what is past its class goes
    8 the line `restored` in the audit chain, then the mark goes: the writer starts as always

While the mark is there, trackers answer and store nothing (`policy.restoring.is_quarantined`), and readiness says so.

Whose key is gone. A backup's subjects are wrapped under that week's key, which is destroyed 14 to 21 days later: of
an older backup nobody can be opened any more. That is what the keys are for: a copy that somebody kept is worth
nothing. For the living it means: number and tag stay (so do consent, suppressions and the negative list, which go by
them), address and key go for good, and whoever imports the person again brings both back under the same number
(`policy.vault.resolve`). Messages from before cannot be attributed to them any more. A key that is missing before its
time was not destroyed but forgotten: then it stays quarantined until the keys are restored.

Laws: every step may be repeated, a crash in between begins again at 1; nothing is served in between; tombstones are
read and never written here (they have it all). The queue is the matter of T12 (`policy.restore`), which runs right
after.

Known limits: a ledger as old as the backup with both its files cannot be told from a whole one: keep it elsewhere. The
bytes of people erased again leave by the loop of `policy.erasing`, seconds after the writer has started. Whoever lost
the key and is never imported again keeps number and tag: `policy.silence` leaves alone whom it cannot open. Asked for
access to such a person's data we refuse until an import brought the address back (`VaultError`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import structlog
from sqlalchemy import Connection, func, select, update

from policy import audit, erasure, keyspace, remembering, suppression
from policy.backup import fingerprint
from policy.dockets import keep_held
from policy.enforcement import Effects, Enforcement
from policy.events import Reason
from policy.fence import RUN
from policy.instants import DAY_US, WEEK_US, rfc3339
from policy.keys import QUEUE_KEY_LIFE_US, Keyring, KeyringError
from policy.peppers import check as check_peppers
from policy.personal import Premises
from policy.restoring import STANDING, Mark, Reached, RestoreError, finish, read_mark, take_mark
from policy.schema import erasure as erasure_table
from policy.schema import open_store, upgrade
from policy.schema import subject as subject_table
from policy.settings import PolicySettings
from policy.store import Store
from policy.sweeping import Sweeping
from policy.tombstones import NAME, Line, Tombstones
from policy.valkey import Client, connect
from policy.vault import LOST

log = structlog.get_logger()

_LEASE: Final = "lease"  # of META: policy.evidence
_MARGIN_US: Final = DAY_US  # a line bears the instant its act began, the commit came after: a day is more than enough
_PORTION: Final = 500  # lines a transaction, subjects a transaction
_CELL: Final = struct.Struct(">BIB")  # policy.suppression: scope, its number, what the gate answers
_REASONS: Final = {int(Reason.RESTRICTED): "restriction", int(Reason.ERASED): "erasure"}
_SHOWN: Final = 3  # problems of the ledger in an error text


class QuarantineError(Exception):
    """It stays quarantined. The text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Left:
    """What was caught up with. lines: of the tombstones; erased: erasures shredded; lost: people whose key is gone."""

    lines: int
    erased: int
    lost: int
    swept: int


async def leave(
    settings: PolicySettings,
    keyring: Keyring,
    clock: Callable[[], int],
    *,
    reached: Reached = lambda _point: None,
) -> Left | None:
    """None: this installation is not quarantined. The caller holds the writer's lock and has nothing open yet.

    Raises QuarantineError, RedisError, the store's error: then nothing may be served."""
    try:
        await asyncio.to_thread(finish, settings)
        mark = read_mark(settings.data_dir)
    except RestoreError as error:
        raise QuarantineError(str(error)) from None
    if mark is None:
        return None
    assert mark.state == STANDING
    log.warning("quarantined: a backup was restored", at=rfc3339(mark.at))
    if mark.keys != fingerprint(keyring):
        raise QuarantineError("quarantined: these are not the keys of that backup: `sales-push restore --keys`")
    lines = [] if mark.forgiven else await asyncio.to_thread(_lines, settings, mark)
    reached("read")
    async with contextlib.AsyncExitStack() as undo:
        engine = open_store(settings.sql_address(), writer=True)
        store = Store(engine)
        undo.push_async_callback(store.close)
        await asyncio.to_thread(upgrade, engine)
        try:
            await store.write(lambda conn: check_peppers(conn, keyring))
            await store.write(lambda conn: _check_keys(conn, keyring, clock()))
        except KeyringError as error:
            raise QuarantineError(f"quarantined: {error}") from None
        bare = connect(settings.redis_address(), max_connections=4)
        undo.push_async_callback(bare.aclose)
        left = await _catch_up(settings, keyring, clock, mark, lines, store, bare, reached)
        reached("told")
    take_mark(settings.data_dir)
    log.warning("out of quarantine", lines=left.lines, erased=left.erased, lost=left.lost)
    return left


async def _catch_up(
    settings: PolicySettings,
    keyring: Keyring,
    clock: Callable[[], int],
    mark: Mark,
    lines: Sequence[Line],
    store: Store,
    bare: Client,
    reached: Reached,
) -> Left:
    await bare.hdel(keyspace.META, RUN, _LEASE)
    if mark.forgiven:  # nothing else tells who opted out since
        kept = await keep_what_redis_knows(store, bare, clock())
        log.warning("suppressions that only redis knew are kept", entries=kept)
    enforcement = Enforcement(store, bare, clock, lambda: open_store(settings.sql_address(), writer=False))
    await enforcement.mend()
    reached("fenced")
    for start in range(0, len(lines), _PORTION):
        some = lines[start : start + _PORTION]
        await enforcement.apply(partial(_replay, some=some, keyring=keyring, clock=clock))
    await enforcement.close()
    reached("replayed")
    erased = 0
    for number in await store.write(_unshredded):
        await store.write(partial(erasure.shred, keyring=keyring, number=number, now=clock(), keep=keep_held))
        erased += 1
    reached("shredded")
    lost = 0
    while closed := await store.write(partial(close_lost, keyring=keyring)):
        lost += closed
    reached("closed")
    premises = Premises(settings, store, bare, lambda: keyring, clock)
    swept = sum(done.rows for done in await Sweeping(premises, settings.retention).sweep())
    reached("swept")
    told = "an officer went on without tombstones" if mark.forgiven else f"{len(lines)} tombstones"
    result = f"{told}, {erased} erasures, {lost} keys gone"

    def tell(conn: Connection) -> None:
        actor = "officer" if mark.forgiven else "policy"
        audit.append(conn, clock(), actor, "restored", f"backup/{mark.digest[:16]}", "restore", result)

    await store.write(tell)
    return Left(len(lines), erased, lost, swept)


# --- the ledger -----------------------------------------------------------------------------------------------------


def _lines(settings: PolicySettings, mark: Mark) -> list[Line]:
    """What happened since the backup. Raises QuarantineError."""
    path = settings.tombstones_dir / NAME
    help_ = "put the erasure ledger back, or let an officer go on: `sales-push restore --without-tombstones`"
    if not path.exists():
        raise QuarantineError(f"quarantined: the erasure ledger {path} is missing: {help_}")
    told = Tombstones(path).replay(mark.at - _MARGIN_US)
    if told.problems:
        shown = "; ".join(f"line {one.line} {one.text}" for one in told.problems[:_SHOWN])
        more = f" and {len(told.problems) - _SHOWN} more" if len(told.problems) > _SHOWN else ""
        raise QuarantineError(f"quarantined: the erasure ledger {path} is not whole ({shown}{more}): {help_}")
    if mark.tombstones and _hash_of(path.open("rb"), mark.tombstones) != mark.tombstones_hash:
        raise QuarantineError(
            f"quarantined: the erasure ledger {path} is older than the backup or another one: line {mark.tombstones} is"
            f" not the one it had then: {help_}"
        )
    return told.lines


def _hash_of(raw: Any, number: int) -> str:
    """Of the line with that number; "": there is none."""
    with raw:
        for line in raw:
            written = json.loads(line)  # `replay` has read every line before
            if written["n"] == number:
                return str(written["hash"])
    return ""


# --- in transactions ------------------------------------------------------------------------------------------------


def _replay(conn: Connection, effects: Effects, *, some: Sequence[Line], keyring: Keyring, clock: Any) -> None:
    now = clock()
    for line in some:
        remembering.carry_out(conn, effects, line, now)
        if line.what == "erasure":
            _erase_by_number(conn, effects, line, now)
        elif line.what == "standing":
            for tag in _brought_forward(keyring, bytes.fromhex(line.values["tag"])):
                moved = Line(line.what, line.at, {**line.values, "tag": tag.hex()})
                remembering.carry_out(conn, effects, moved, now)


def _erase_by_number(conn: Connection, effects: Effects, line: Line, now: int) -> None:
    """Subjects whose tag became another since (pepper rotation) are the same people."""
    numbers = [int(number) for number in line.values["subjects"]]
    wanted = select(subject_table.c.account, subject_table.c.tag, subject_table.c.partition)
    for row in conn.execute(wanted.where(subject_table.c.number.in_(numbers))).all():
        if row.tag.hex() != line.values["tag"]:
            erasure.begin(
                conn, effects, account=row.account, tag=row.tag, partition=row.partition, lane=line.values["lane"],
                cause="replay", request=None, now=now, ledger=None,
            )  # fmt: skip


def _brought_forward(keyring: Keyring, tag: bytes) -> Iterable[bytes]:
    """Today's tag, if this one was made with an older pepper: lines do not say with which, and what matches nobody does
    no harm."""
    return [keyring.forward(tag, number) for number in keyring.pepper_ids[:-1]]


async def keep_what_redis_knows(store: Store, bare: Client, now: int) -> int:
    """Suppressions that the restored store does not have, into it; how many. By what the gate answers for them: the
    reason itself is not in Redis."""
    kept = 0
    for partition in range(keyspace.PARTITIONS):
        async with bare.pipeline(transaction=False) as pipe:
            for bucket in range(keyspace.SUPPRESSION_BUCKETS):
                pipe.hgetall(keyspace.suppression(partition, (bucket << 6).to_bytes(2, "big")))
            held: list[dict[bytes, bytes]] = await pipe.execute()
        cells = {tag: value for bucket_ in held for tag, value in bucket_.items()}
        if cells:
            kept += await store.write(partial(_take_in, partition=partition, cells=cells, now=now))
    return kept


def _take_in(conn: Connection, *, partition: int, cells: Mapping[bytes, bytes], now: int) -> int:
    fresh = []
    for tag, value in cells.items():
        stands = {(int(entry.scope), entry.scope_id) for entry in suppression.check(conn, tag)}
        for scope, scope_id, answer in _CELL.iter_unpack(value):
            if (scope, scope_id) not in stands:
                reason = _REASONS.get(answer, "manual")
                where = suppression.Scope(scope)
                fresh.append(suppression.Entry(tag, partition, where, scope_id, reason, now, remembering.SOURCE))
    return suppression.add(conn, fresh)


def _unshredded(conn: Connection) -> list[int]:
    wanted = select(erasure_table.c.number).where(erasure_table.c.state == erasure.SUPPRESSED)
    return list(conn.scalars(wanted.order_by(erasure_table.c.number)))


def _check_keys(conn: Connection, keyring: Keyring, now: int) -> None:
    """Raises KeyringError: a wrapping key is missing whose time is not over."""
    used = conn.scalars(select(subject_table.c.kek_id).where(subject_table.c.kek_id != LOST).distinct())
    for week in sorted(set(used) - keyring.kek.keys()):
        if now < (week + 1) * WEEK_US + QUEUE_KEY_LIFE_US:
            raise KeyringError(f"key file kek.{week} is missing before its time: `sales-push restore --keys` first")


def close_lost(conn: Connection, *, keyring: Keyring, rows: int = _PORTION) -> int:
    """People whom no key opens any more: number and tag stay, the rest goes. So many a call; 0: all are done."""
    unknown = subject_table.c.kek_id.not_in([*keyring.kek, LOST])
    some = select(subject_table.c.number).where(unknown).order_by(subject_table.c.number).limit(rows)
    numbers = list(conn.scalars(some))
    if numbers:
        gone = update(subject_table).where(subject_table.c.number.in_(numbers))
        conn.execute(gone.values(address=b"", key=b"", kek_id=LOST))
    return len(numbers)


def lost(conn: Connection) -> int:
    """How many people wait to be brought back by an import."""
    count = select(func.count()).select_from(subject_table).where(subject_table.c.kek_id == LOST)
    return int(conn.execute(count).scalar_one())
