"""The transactions every right is made of: opened, asked, begun, proved, finished, refused, each with its letter.

Laws: a step, its effects on suppressions and the negative list, and its letter are one transaction; the letter leaves
when that is committed, and only then (`_apply`). A refusal or a withdrawal takes back the restriction that the same
request brought, unless another one needs it.

Known limits: a call that is cancelled between its commit and the release of its letters leaves drafts, which the next
start of the process finds (`outbox.recover`); the writer cancels none.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, select

from policy.enforcement import Effects, Enforcement, RedisBehind
from policy.jobs import Refused
from policy.personal import Premises
from policy.rights import proof, protections, requests
from policy.rights.carrying import Carrying, Result, Seams
from policy.rights.letters import Letterhead, Letters
from policy.rights.outbox import Outbox, Send, Smarthost
from policy.rights.requests import Asked
from policy.rights.settings import RightsSettings
from policy.rights.states import (
    RESTRICTED_AT_ONCE,
    Act,
    Identity,
    Kind,
    Role,
    State,
    needs_proof,
)
from policy.schema import request_step

Change = Callable[[Connection, Effects, list[str]], Any]


class Casework:
    """What `rounds` and `operations` stand on. send: how letters leave, by default the smarthost of the settings; None:
    they wait."""

    def __init__(
        self,
        premises: Premises,
        enforcement: Enforcement,
        settings: RightsSettings,
        seams: Seams,
        send: Send | None = None,
    ) -> None:
        self._premises = premises
        self._enforcement = enforcement
        self._settings = settings
        self._calendar = settings.calendar()
        officer = premises.settings.officer
        self._letters = Letters(
            Letterhead(
                officer.name, officer.address, premises.settings.public_url, settings.appeal, self._calendar.zone
            )
        )
        self.outbox = Outbox(settings.outbox_dir or premises.settings.data_dir / "outbox")
        if send is None and settings.smarthost:
            send = Smarthost(
                settings.smarthost, settings.smarthost_security, officer.address, settings.smarthost_user,
                settings.smarthost_password_file,
            )  # fmt: skip
        self._send = send
        self._carrying = Carrying(seams, premises.store, enforcement, premises.keyring)
        self._tried: dict[int, int] = {}
        self._stuck: dict[int, str] = {}
        self._turn = asyncio.Lock()
        self._numbers: dict[str, float] = {}
        self._due = 0.0
        self.wake = asyncio.Event()

    def _opened(self, conn: Connection, effects: Effects, names: list[str], asked: Asked, now: int) -> Asked:
        """First effects, in the transaction of the receipt."""
        proves = needs_proof(asked.kind, asked.role)
        restricted = False
        trusted = asked.channel in ("cli", "api")  # a stranger's word does not pause an account
        if asked.kind in RESTRICTED_AT_ONCE and (asked.role is Role.CONTACT or trusted):
            asked, restricted = self._restrict(conn, effects, asked, now)
        if proves or asked.kind is Kind.MINOR:
            self._write(names, "acknowledged", asked, 1, now, restricted=restricted, proof=proves)
        if proves:
            return self._ask(conn, names, asked, now)
        return self._begin(conn, effects, names, asked, now)

    def _restrict(self, conn: Connection, effects: Effects, asked: Asked, now: int) -> tuple[Asked, bool]:
        if protections.restrict(conn, effects, asked, now):  # else somebody else brought it, and keeps it
            asked, _ = self._advance(conn, asked, Act.RESTRICT, now, "engine")
        return asked, True

    def _ask(self, conn: Connection, names: list[str], asked: Asked, now: int) -> Asked:
        link = f"{self._premises.settings.public_url}/r/{proof.issue(conn, asked.number, now)}"
        asked, seq = self._advance(conn, asked, Act.ASK, now, "engine", identity=Identity.ASKED)
        self._write(names, "proof", asked, seq, now, link=link)
        return asked

    def _begin(self, conn: Connection, effects: Effects, names: list[str], asked: Asked, now: int) -> Asked:
        """No proof needed: what protects is in force with the commit, and all but a child's report is done."""
        asked, _ = self._advance(conn, asked, Act.BEGIN, now, "engine")
        if asked.kind is Kind.MINOR:
            return asked
        self._protect(conn, effects, asked, now)
        return self._finish(conn, effects, names, asked, now, Result("in force"), "engine")

    def _protect(self, conn: Connection, effects: Effects, asked: Asked, now: int) -> None:
        if asked.kind is Kind.RESTRICTION:
            protections.restrict(conn, effects, asked, now)
        elif asked.kind is Kind.OBJECTION:
            protections.object_to_marketing(conn, effects, asked, now)
        elif asked.kind is Kind.WITHDRAWAL:
            protections.withdraw(conn, effects, asked, now)

    def _prove(
        self, conn: Connection, effects: Effects, asked: Asked, now: int, actor: str, how: Identity, note: str
    ) -> Asked:
        after, _ = self._advance(conn, asked, Act.PROVE, now, actor, note, identity=how)
        proof.void(conn, asked.number, now)
        if after.role is Role.HOLDER:
            if after.kind in RESTRICTED_AT_ONCE:
                after, _ = self._restrict(conn, effects, after, now)
            self._protect(conn, effects, after, now)
        return after

    async def _apply(self, change: Change) -> Any:
        """A change whose letters leave when it is committed, and only then."""
        names: list[str] = []
        try:
            result = await self._enforcement.apply(lambda conn, effects: change(conn, effects, names))
        except RedisBehind:  # committed: the letters are true as soon as Redis is mended, which needs nobody
            self._release(names)
            raise
        except Exception:
            for name in names:
                self.outbox.discard(name)
            raise
        self._release(names)
        return result

    def _release(self, names: list[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                self.outbox.release(name)

    def _finish(
        self, conn: Connection, effects: Effects, names: list[str], asked: Asked, now: int, result: Result, actor: str
    ) -> Asked:
        after, seq = self._advance(conn, asked, Act.FINISH, now, actor, outcome=result.outcome, ground=result.ground)
        values = {"handed": "", "kept": "", "contested": False, "officer_note": "", **result.values}
        self._write(names, "done", after, seq, now, **values)
        proof.void(conn, asked.number, now)
        if asked.kind in (Kind.ERASURE, Kind.MINOR):  # what erasure leaves in force is its own suppression
            self._give_back(conn, effects, after, now)
        if result.forget:
            requests.forget_address(conn, after)
        return after

    def _refuse(
        self,
        conn: Connection,
        effects: Effects,
        names: list[str],
        asked: Asked,
        now: int,
        actor: str,
        ground: str,
        *,
        unidentified: bool,
    ) -> Asked:
        outcome = "not identified" if unidentified else "refused"
        after, seq = self._advance(conn, asked, Act.REFUSE, now, actor, outcome=outcome, ground=ground)
        proof.void(conn, asked.number, now)
        self._give_back(conn, effects, after, now)
        self._write(names, "refused", after, seq, now, ground=ground, unidentified=unidentified)
        return after

    def _give_back(self, conn: Connection, effects: Effects, asked: Asked, now: int) -> None:
        """The restriction that this very request brought."""
        brought = select(request_step.c.seq).where(
            request_step.c.request == asked.number, request_step.c.act == Act.RESTRICT.value
        )
        if conn.execute(brought).first() is not None:
            protections.lift(conn, effects, asked, now)

    def _advance(
        self,
        conn: Connection,
        asked: Asked,
        act: Act,
        now: int,
        actor: str,
        note: str = "",
        *,
        identity: Identity | None = None,
        due: int | None = None,
        outcome: str = "",
        ground: str = "",
    ) -> tuple[Asked, int]:
        return requests.advance(
            conn, self._keyring(), asked, act, actor=actor, now=now, note=note, identity=identity, due=due,
            outcome=outcome, ground=ground,
        )  # fmt: skip

    def _write(self, names: list[str], letter: str, asked: Asked, seq: int, now: int, **values: Any) -> None:
        if asked.address:
            message = self._letters.compose(letter, asked, now, **values)
            names.append(self.outbox.prepare(asked.ticket, seq, letter, message))

    def _get(self, conn: Connection, ticket: str) -> Asked:
        asked = requests.by_ticket(conn, self._keyring(), ticket.strip().upper())
        if asked is None:
            raise Refused("not-found", "no request has that ticket")
        return asked

    def _needs(self, asked: Asked) -> str:
        """What only the officer can do."""
        return self._stuck.get(asked.number, "") if asked.state is State.IN_PROGRESS else ""

    def _keyring(self) -> Any:
        return self._premises.keyring()

    def _now(self) -> int:
        return self._premises.clock()
