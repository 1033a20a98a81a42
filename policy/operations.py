"""What the writer does when asked over its socket: one method an operation, each one transaction (design decision 15).

Law: an operation that returns is committed; where the gate or the trackers must know, they do (`policy.enforcement`).
Every operation may be repeated: acceptance is idempotent by job id and hash, chunks by number and hash, the rest by
what it says (suppressed is suppressed).

The methods are found by their names, their arguments decoded by their annotations (`policy.doorway`). A job without a
list gets the account's list "default": its opt-out links have to name one.

What operators write by hand stays with the job or the halt; the audit chain has its reference (`policy.remarks`).

Known limits: `withdraw` and `restrict` know a person by (account, tag); who is not in the vault cannot withdraw there,
and needs not: nothing is remembered of them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Final, cast

from sqlalchemy import Connection, select

from policy import (
    accounts,
    audit,
    consent,
    erasure,
    halts,
    jobs,
    keyspace,
    lapsing,
    negative,
    remarks,
    statements,
    suppression,
    vault,
)
from policy.address import parse_domain
from policy.enforcement import Effects, Enforcement, commit_number
from policy.jobs import Refused
from policy.keys import Keyring
from policy.losses import Losses
from policy.schema import subject as subject_table
from policy.store import Store
from policy.wire import Accepted, ConsentRow, Halted, JobRecord, Resolved, SuppressionRecord

_EVERYWHERE: Final = range(keyspace.PARTITIONS)
_GONE: Final = Resolved(0, 0)  # erased between the gate's answer and this question: nobody new is made of them


class Operations:
    """sizes: told when the sizes (number, rows) of jobs are known; expires(at): a job's time ends then. keyring and
    statistics are asked at each use."""

    def __init__(
        self,
        store: Store,
        enforcement: Enforcement,
        clock: Callable[[], int],
        *,
        keyring: Callable[[], Keyring],
        sizes: Callable[[Sequence[tuple[int, int]]], Awaitable[None]],
        expires: Callable[[int], None],
        statistics: Callable[[], dict[str, Any]],
        losses: Losses,
    ) -> None:
        self.store = store
        self.enforcement = enforcement
        self._clock = clock
        self._keyring = keyring
        self._sizes = sizes
        self._expires = expires
        self._statistics = statistics
        self._losses = losses

    async def op_ping(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "commit": await self.store.write(commit_number)}

    async def op_statistics(self) -> dict[str, Any]:
        return self._statistics()

    async def op_accept_job(self, record: JobRecord) -> Accepted:
        accepted = await self.store.write(lambda conn: jobs.accept(conn, record, self._clock()))
        self._losses.touch(accepted.number)
        if accepted.status == jobs.LOST:
            accepted = await self._losses.take_up(record)
            self._expires(0)
        elif accepted.status == "new" and record.expires_at:
            self._expires(record.expires_at)
        return accepted

    async def op_chunk(self, job: int, number: int, hash: bytes, rows: int) -> str:
        self._losses.touch(job)
        status = await self.store.write(lambda conn: jobs.chunk(conn, job, number, hash, rows))
        if status == "conflict":
            with contextlib.suppress(Refused):  # it had ended already
                await self.op_job_state(job, "cancelled", f"chunk {number} came twice with different content")
        return status

    async def op_expanded(self, job: int, rows_submitted: int) -> None:
        [refused] = await self.op_expanded_all([(job, rows_submitted)])
        if refused:
            raise Refused(*refused.split(": ", 1))

    async def op_expanded_all(self, jobs: list[tuple[int, int]]) -> list[str]:
        def work(conn: Connection) -> list[str]:
            now = self._clock()
            return [_expanded(conn, number, rows, now) for number, rows in jobs]

        told = await self.store.write(work)
        await self._sizes([one for one, refused in zip(jobs, told, strict=True) if not refused])
        return told

    async def op_reject_note(self, account: str, job_id: str, reason: str) -> None:
        """reason: kept nowhere here, the stream of rejected entries is the record."""
        ref = remarks.named(self._keyring(), "refused-job", account, job_id)
        await self.store.write(
            lambda conn: audit.append(conn, self._clock(), "intake", "job-rejected", ref, "operation", "rejected")
        )

    async def op_job_state(self, job: int | str, state: str, reason: str = "") -> str:
        def change(conn: Connection, effects: Effects) -> jobs.Moved:
            moved = jobs.move(conn, job, state, reason, self._clock(), remark=self._remark(reason))
            effects.jobs[moved.number] = (state, moved.waits)
            return moved

        moved: jobs.Moved = await self.enforcement.apply(change)
        self._expires(0)  # it may go on after its time
        if moved.rows is not None:  # cancelled before its last chunk came
            await self._sizes([(moved.number, moved.rows)])
        return moved.state

    async def op_halt_account(self, name: str, act: str, reason: str = "") -> Halted:
        """act: pause | resume | cancel."""
        now, remark = self._clock(), self._remark(reason)
        ended: list[jobs.Moved] = []

        def change(conn: Connection, effects: Effects) -> Halted:
            holder = accounts.get(conn, name)
            if holder is None:
                raise Refused("not-found", "no such account")
            ended.clear()
            if act == "pause":
                changed = halts.pause_account(conn, holder.number, reason, now)
            elif act == "resume":
                changed = halts.resume_account(conn, holder.number)
            elif act == "cancel":
                for number in jobs.unended(conn, holder.number):
                    moved = jobs.move(conn, number, "cancelled", reason, now, remark=remark)
                    effects.jobs[number] = ("cancelled", moved.waits)
                    ended.append(moved)
                changed = bool(ended)
            else:
                raise Refused("refused", "an account can be paused, resumed and cancelled")
            halted = halts.is_account_halted(conn, holder.number)
            effects.words[f"a{holder.number}", _EVERYWHERE] = halted
            if changed:
                audit.append(conn, now, "operator", f"account-{act}", f"account/{holder.number}", remark, "done")
            state = "frozen" if holder.is_frozen else "paused" if halted else "active"
            return Halted(state, changed, tuple(moved.number for moved in ended))

        told: Halted = await self.enforcement.apply(change)
        for moved in ended:
            if moved.rows is not None:
                await self._sizes([(moved.number, moved.rows)])
        return told

    async def op_halt_domain(self, domain: str, act: str, reason: str = "") -> Halted:
        """act: pause | resume | cancel."""
        name, now, remark = parse_domain(domain), self._clock(), self._remark(reason)
        lane = keyspace.lane_ref(name, self._keyring().lane)
        state = {"pause": halts.PAUSED, "cancel": halts.CANCELLED, "resume": None}.get(act, "")
        if state == "":
            raise Refused("refused", "a domain can be paused, resumed and cancelled")

        def change(conn: Connection, effects: Effects) -> Halted:
            if state is None:
                changed = halts.resume_domain(conn, name)
            else:
                changed = halts.halt_domain(conn, name, lane, state, reason, now)
            where = (keyspace.partition_of(name),)
            for word, stands in halts.words_of_domain(lane, state).items():
                effects.words[word, where] = stands
            if changed:  # by its reference: a domain can name a person, and this line is kept for long
                audit.append(conn, now, "operator", f"domain-{act}", f"domain/{lane}", remark, "done")
            return Halted(state or "active", changed)

        return cast(Halted, await self.enforcement.apply(change))

    async def op_resolve(self, account: int, week: int, rows: list[tuple[bytes, int, str]]) -> list[Resolved]:
        def work(conn: Connection) -> list[Resolved]:
            gone = erasure.erased_among(conn, account, [tag for tag, _, _ in rows])
            asked = [row for row in rows if row[0] not in gone] if gone else rows
            found = iter(vault.resolve(conn, self._keyring(), account, asked, week, self._clock()))
            return [_GONE if tag in gone else Resolved(*next(found)) for tag, _, _ in rows]

        return await self.store.write(work)

    async def op_consents(self, account: int, rows: list[ConsentRow]) -> int:
        tracked = {row.subject for row in rows if row.purpose in consent.TRACKING}
        now = self._clock()

        def enter(conn: Connection) -> tuple[int, bool]:
            return consent.record(conn, rows, now), bool(_listed(conn, tracked))

        entered, listed = await self.store.write(enter)
        if listed:  # rare: somebody on the negative list agreed anew
            await self.enforcement.apply(lambda conn, effects: _lift(conn, effects, tracked, now))
        return entered

    async def op_suppress(self, entries: list[SuppressionRecord]) -> int:
        now = self._clock()
        wanted = [
            suppression.Entry(
                entry.tag, entry.partition, suppression.Scope(entry.scope), entry.scope_id, entry.reason,
                entry.created or now, entry.source, entry.expires or None,
            )
            for entry in entries
        ]  # fmt: skip
        return int(await self.enforcement.apply(lambda conn, effects: self._suppress(conn, effects, wanted)))

    async def op_unsuppress(self, tag: bytes, partition: int, scope: int, scope_id: int) -> int:
        def change(conn: Connection, effects: Effects) -> int:
            removed = suppression.remove(conn, tag, suppression.Scope(scope), scope_id)
            effects.tags.add((tag, partition))
            if removed:
                effects.lifted.add(tag)
                ref = f"suppression/{suppression.Scope(scope).name.lower()}/{scope_id}"
                audit.append(conn, self._clock(), "operator", "unsuppress", ref, "operation", "done")
            return removed

        return int(await self.enforcement.apply(change))

    async def op_opt_out(self, list: int, partition: int, tag: bytes, source: str) -> None:
        entry = suppression.Entry(tag, partition, suppression.Scope.LIST, list, "opt-out", self._clock(), source[:64])
        await self.enforcement.apply(lambda conn, effects: self._suppress(conn, effects, [entry]))

    async def op_withdraw(self, account: int, tag: bytes, purpose: str, source: str = "preferences") -> bool:
        now = self._clock()

        def change(conn: Connection, effects: Effects) -> bool:
            person = conn.execute(
                select(subject_table.c.number, subject_table.c.partition).where(
                    subject_table.c.account == account, subject_table.c.tag == tag
                )
            ).one_or_none()
            if person is None:
                return False
            seq = consent.withdraw(conn, person.number, purpose, source[:64], now)
            if seq is not None:
                effects.negative.append((person.number, "withdrawn", seq))
            if purpose == "mail_marketing":  # the gate asks suppressions, not consent: put it where it looks (T4)
                scope = suppression.Scope.ACCOUNT
                entry = suppression.Entry(tag, person.partition, scope, account, "opt-out", now, source[:64])
                self._suppress(conn, effects, [entry])
            return True

        return bool(await self.enforcement.apply(change))

    async def op_restrict(self, account: int, partition: int, tag: bytes, source: str) -> None:
        now = self._clock()
        entry = suppression.Entry(tag, partition, suppression.Scope.ACCOUNT, account, "restriction", now, source[:64])

        def change(conn: Connection, effects: Effects) -> None:
            _suppress(conn, effects, [entry])
            number = vault.number_of(conn, account, tag)
            if number is not None:
                effects.negative.append((number, "restricted", negative.add(conn, number, "restricted", now)))

        await self.enforcement.apply(change)

    def _remark(self, reason: str) -> str:
        """What the audit chain says of words somebody wrote by hand."""
        return remarks.reference(self._keyring(), reason)

    def _suppress(self, conn: Connection, effects: Effects, entries: list[suppression.Entry]) -> int:
        """An opt-out or complaint holds for the mailbox too, in whatever spelling its provider takes (policy.address).
        How many entries changed: of those given."""
        filed = [
            replace(entry, tag=tag)
            for entry in entries
            if entry.reason in ("opt-out", "complaint")
            and (tag := vault.canonical_tag(conn, self._keyring(), entry.tag, entry.partition)) is not None
        ]
        if filed:
            _suppress(conn, effects, filed)
        return _suppress(conn, effects, entries)

    async def op_account_add(
        self,
        name: str,
        display_name: str = "",
        postal_address: str = "",
        website: str = "",
        privacy_url: str = "",
        opens_mode: int = 3,
        clicks_mode: int = 3,
    ) -> int:
        def work(conn: Connection) -> int:
            made = accounts.add(
                conn, name, display_name=display_name or name, now=self._clock(), postal_address=postal_address,
                website=website, privacy_url=privacy_url, opens_mode=opens_mode, clicks_mode=clicks_mode,
            )  # fmt: skip
            audit.append(conn, self._clock(), "operator", "account-add", f"account/{made.number}", "operation", "done")
            return made.number

        return await self.store.write(work)

    async def op_account_freeze(self, name: str, frozen: bool) -> bool:
        def change(conn: Connection, effects: Effects) -> bool:
            holder = accounts.get(conn, name)
            if holder is None:
                return False
            (accounts.freeze if frozen else accounts.thaw)(conn, name)
            effects.words[f"a{holder.number}", _EVERYWHERE] = halts.is_account_halted(conn, holder.number)
            act = "account-freeze" if frozen else "account-thaw"
            audit.append(conn, self._clock(), "operator", act, f"account/{holder.number}", "operation", "done")
            return True

        return bool(await self.enforcement.apply(change))

    async def op_list_add(self, account: int, name: str) -> int:
        return await self.store.write(lambda conn: accounts.list_number(conn, account, name))

    async def op_topic_add(self, account: int, name: str) -> int:
        return await self.store.write(lambda conn: accounts.topic_number(conn, account, name))


def _expanded(conn: Connection, number: int, rows: int, now: int) -> str:
    """ "": done; else why not (nothing was written)."""
    try:
        jobs.expanded(conn, number, rows, now)
    except Refused as error:
        return f"{error.kind}: {error}"
    return ""


def _suppress(conn: Connection, effects: Effects, entries: list[suppression.Entry]) -> int:
    effects.tags.update((entry.tag, entry.partition) for entry in entries)
    return suppression.add(conn, entries)


def _listed(conn: Connection, subjects: set[int]) -> set[int]:
    """Those of the subjects who ever were on the negative list."""
    found: set[int] = set()
    ordered, dialect = sorted(subjects), conn.dialect.name
    for start in range(0, len(ordered), 500):
        some = tuple(ordered[start : start + 500])
        sql = f"SELECT DISTINCT subject FROM negative WHERE subject IN ({statements.marks(dialect, len(some))})"
        found.update(subject for (subject,) in conn.exec_driver_sql(sql, some))
    return found


def _lift(conn: Connection, effects: Effects, subjects: set[int], now: int) -> None:
    """Off the negative list, for those whose consent was withdrawn or ended, and who agree to all of it again."""
    for number in sorted(_listed(conn, subjects)):
        if negative.standing(conn, number) not in lapsing.CAUSES:
            continue
        if consent.is_whole(conn, number, now):
            effects.negative.append((number, negative.LIFTED, negative.lift(conn, number, now)))
