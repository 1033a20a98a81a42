"""What the writer does about rights when asked: one method an operation.

Laws: what an operation says is committed, in force at gate and trackers, and told to the person by a letter that goes
out exactly then; nothing leads out of a closed request (`states`). Lists show nobody, so they are no reading; `show`
is one and is written down first (P-38).

Known limits: who may reach the writer's socket may ask; telling officers apart is the matter of accounts and the desk.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from sqlalchemy import Connection

from policy import accounts, consent, purposes, readings
from policy.address import AddressError, normalise, parse_leniently, tag_of
from policy.enforcement import Effects
from policy.instants import HOUR_US, rfc3339
from policy.jobs import Refused
from policy.keyspace import partition_of
from policy.rights import due as dates
from policy.rights import proof, protections, requests
from policy.rights.carrying import Result
from policy.rights.letters import last_day_of
from policy.rights.requests import Asked
from policy.rights.rounds import Rounds, is_late
from policy.rights.states import (
    LIFT_NOTICE_US,
    MINOR_DUE_US,
    Act,
    Identity,
    Kind,
    NotPossible,
    Role,
    State,
)

CHANNELS: Final = ("api", "cli", "mail", "letter", "page")
STRANGERS: Final = ("mail", "page")  # anybody can open one there, in anybody's name
_TEXT: Final = 4000
_DETAILS: Final = frozenset({"field", "value", "contested", "purpose", "text"})


class RightsOperations(Rounds):
    """One a writer: RightsOperations(premises, enforcement, settings, seams)."""

    async def op_rights_open(
        self,
        kind: str,
        address: str,
        role: str = "contact",
        account: str = "",
        channel: str = "cli",
        jurisdiction: str = "",
        received: int = 0,
        details: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """Ticket and due date. What protects is in force when this returns. Who asks the same again gets his ticket."""
        now = self._now()
        received = received or now
        law = jurisdiction or self._settings.jurisdiction
        if kind not in list(Kind) or role not in list(Role) or channel not in CHANNELS or law not in dates.RULES:
            raise Refused("refused", "unknown kind, role, channel or jurisdiction")
        if received > now:
            raise Refused("refused", "a request cannot come from the future")
        if role == Role.HOLDER and not account:
            raise Refused("refused", "the request of an account holder names the account")
        wanted = _details(details or {})
        if wanted.get("purpose") and wanted["purpose"] not in consent.PURPOSES:
            raise Refused("refused", f"unknown purpose, one of {', '.join(sorted(consent.PURPOSES))}")
        mailbox = parse_leniently(address)
        end = dates.due(law, received, self._calendar)
        if kind == Kind.MINOR and role == Role.CONTACT:
            end = min(end, received + MINOR_DUE_US)

        def change(conn: Connection, effects: Effects, names: list[str]) -> tuple[Asked, bool]:
            if channel in STRANGERS:
                lately = requests.opened_since(conn, STRANGERS, now - HOUR_US)
                if lately >= self._settings.strangers_per_hour:
                    raise Refused("busy", "too many requests in this hour: ask again later")
            asked, fresh = requests.open_(
                conn, self._keyring(), kind=Kind(kind), role=Role(role), account=_account(conn, account),
                address=mailbox.wire, tag=tag_of(self._keyring().pepper, normalise(mailbox.local, mailbox.domain)),
                partition=partition_of(mailbox.domain), channel=channel, jurisdiction=law, details=wanted,
                received=received, due=end, actor="person" if channel in STRANGERS else "operator", now=now,
            )  # fmt: skip
            return (self._opened(conn, effects, names, asked, now) if fresh else asked), fresh

        asked, fresh = await self._apply(change)
        self.wake.set()
        return {**_told(asked), "new": fresh}

    async def op_rights_confirm(self, token: str) -> None:
        """The button of the page. The same answer whatever the token: who guesses learns nothing."""
        now = self._now()

        def change(conn: Connection, effects: Effects, names: list[str]) -> None:
            number = proof.redeem(conn, token, now)
            asked = None if number is None else requests.by_number(conn, self._keyring(), number)
            if asked is not None and asked.state in (State.RECEIVED, State.IDENTIFYING):
                self._prove(conn, effects, asked, now, "person", Identity.PROVED, "")

        await self._apply(change)
        self.wake.set()

    async def op_rights_ask(self, ticket: str) -> dict[str, Any]:
        """Another proof letter, because the person lost the first one. It has its own 72 hours."""
        now = self._now()
        return _told(
            await self._apply(lambda conn, effects, names: self._ask(conn, names, self._get(conn, ticket), now))
        )

    async def op_rights_prove(self, ticket: str, note: str = "") -> dict[str, Any]:
        """Identity by hand: the officer has seen something better than a mailbox, and says what in the note."""
        now = self._now()

        def change(conn: Connection, effects: Effects, names: list[str]) -> Asked:
            asked = self._get(conn, ticket)
            if asked.kind is Kind.MINOR and asked.state is State.IN_PROGRESS:  # the officer looked: no day of grace
                after, _ = self._advance(conn, asked, Act.NOTE, now, "officer", note, identity=Identity.BY_HAND)
                return after
            return self._prove(conn, effects, asked, now, "officer", Identity.BY_HAND, note)

        asked = await self._apply(change)
        self.wake.set()
        return _told(asked)

    async def op_rights_extend(self, ticket: str, reason: str) -> dict[str, Any]:
        """Once, before the due date, with a letter that says why (GDPR 12(3))."""
        now = self._now()
        if not reason.strip():
            raise Refused("refused", "an extension has a reason, which the letter tells")

        def change(conn: Connection, effects: Effects, names: list[str]) -> Asked:
            asked = self._get(conn, ticket)
            if asked.extended:
                raise Refused("refused", "it is extended already: the law allows it once")
            if now >= asked.due:
                raise Refused("refused", "the due date is over: it cannot be extended any more")
            if asked.kind is Kind.MINOR:
                raise Refused("refused", "a child's report is not extended")
            end = dates.due(asked.jurisdiction, asked.received, self._calendar, extended=True)
            after, seq = self._advance(conn, asked, Act.EXTEND, now, "officer", reason[:_TEXT], due=end)
            self._write(names, "extended", after, seq, now, reason=reason[:_TEXT])
            return after

        return _told(await self._apply(change))

    async def op_rights_refuse(self, ticket: str, ground: str) -> dict[str, Any]:
        """ground: told to the person with where to complain, and kept on record: it holds no personal data."""
        if not ground.strip():
            raise Refused("refused", "a refusal has a ground (GDPR 12(4))")
        now = self._now()

        def change(conn: Connection, effects: Effects, names: list[str]) -> Asked:
            asked = self._get(conn, ticket)
            return self._refuse(conn, effects, names, asked, now, "officer", ground[:_TEXT], unidentified=False)

        return _told(await self._apply(change))

    async def op_rights_withdraw(self, ticket: str) -> dict[str, Any]:
        """The person took the request back."""
        now = self._now()

        def change(conn: Connection, effects: Effects, names: list[str]) -> Asked:
            asked = self._get(conn, ticket)
            after, seq = self._advance(conn, asked, Act.WITHDRAW, now, "officer")
            self._give_back(conn, effects, after, now)
            self._write(names, "withdrawn", after, seq, now)
            return after

        return _told(await self._apply(change))

    async def op_rights_close(self, ticket: str, note: str = "") -> dict[str, Any]:
        """Done by hand; note: what the letter says about it."""
        now = self._now()

        def change(conn: Connection, effects: Effects, names: list[str]) -> Asked:
            asked = self._get(conn, ticket)
            values = {"handed": note[:_TEXT], "kept": "", "contested": False, "officer_note": ""}
            if asked.kind not in (Kind.ACCESS, Kind.PORTABILITY):
                values["officer_note"] = note[:_TEXT]
            forget = asked.kind in (Kind.ERASURE, Kind.MINOR)
            result = Result("done by hand", "", values, forget)
            return self._finish(conn, effects, names, asked, now, result, "officer")

        return _told(await self._apply(change))

    async def op_rights_details(self, ticket: str, details: dict[str, str]) -> dict[str, Any]:
        """What exactly is asked for (field and value of a rectification), read out of a letter."""
        now = self._now()

        def change(conn: Connection, effects: Effects, names: list[str]) -> Asked:
            asked = self._get(conn, ticket)
            if asked.is_closed:
                raise NotPossible(f"a request that is {asked.state.value} is not changed")
            asked = requests.change_details(conn, self._keyring(), asked, _details(details))
            after, _ = self._advance(conn, asked, Act.NOTE, now, "officer")
            return after

        asked = await self._apply(change)
        self._tried.pop(asked.number, None)
        self.wake.set()
        return _told(asked)

    async def op_rights_note(self, ticket: str, note: str) -> None:
        now = self._now()
        await self._apply(
            lambda conn, effects, names: self._advance(
                conn, self._get(conn, ticket), Act.NOTE, now, "officer", note[:_TEXT]
            )
        )

    async def op_rights_lift(self, ticket: str, reason: str) -> dict[str, Any]:
        """Announce the end of a restriction: it ends three days after this letter (P-55, GDPR 18(3))."""
        now = self._now()
        if not reason.strip():
            raise Refused("refused", "the letter tells why the restriction ends")

        def change(conn: Connection, effects: Effects, names: list[str]) -> Asked:
            asked = self._get(conn, ticket)
            if asked.kind is not Kind.RESTRICTION or asked.outcome == protections.LIFTED:
                raise Refused("refused", "that request restricts nothing")
            after, seq = self._advance(conn, asked, Act.LIFT, now, "officer", reason[:_TEXT])
            ends = last_day_of(now + LIFT_NOTICE_US + 1, self._calendar.zone)
            self._write(names, "lifting", after, seq, now, reason=reason[:_TEXT], ends=ends)
            return after

        return {**_told(await self._apply(change)), "ends": now + LIFT_NOTICE_US}

    async def op_rights_list(self, open_only: bool = True, account: str = "", limit: int = 200) -> list[dict[str, Any]]:
        """Without anybody's address, by due date."""
        found = await self._premises.store.write(
            lambda conn: requests.listed(
                conn, self._keyring(), open_only=open_only, account=_account(conn, account), limit=min(limit, 10_000)
            )
        )
        now = self._now()
        return [{**_told(asked), "needs": self._needs(asked), "overdue": is_late(asked, now)} for asked in found]

    async def op_rights_show(self, ticket: str, actor: str = "officer", purpose: str = "rights") -> dict[str, Any]:
        """One request whole, with the address and every step. The reading is written down first (P-38)."""
        keyring, now = self._keyring(), self._now()

        def look(conn: Connection) -> tuple[Asked, list[requests.Step], str]:
            asked = self._get(conn, ticket)
            query = readings.query_hash(keyring, "rights show", asked.ticket)
            read = readings.Asked(actor, purpose, "rights show", "C2", asked.tag, 0, asked.account, 1, query, "")
            answer = readings.enter(conn, read, self._premises.settings.reading_limits, purposes.registry(), now)
            return asked, requests.steps(conn, keyring, asked), answer.denied

        asked, steps, denied = await self._premises.store.write(look)
        if denied:
            raise readings.ReadDenied(denied)
        told = [
            {"seq": one.seq, "at": one.at, "actor": one.actor, "act": one.act, "state": one.state, "note": one.note}
            for one in steps
        ]
        return {
            **_told(asked), "address": asked.address, "details": asked.details, "needs": self._needs(asked),
            "overdue": is_late(asked, self._now()), "steps": told,
        }  # fmt: skip

    async def is_of(self, ticket: str, address: str) -> bool:
        """Whether a request is about a mailbox: what a reply with its ticket is measured against."""
        try:
            mailbox = parse_leniently(address)
        except AddressError:
            return False
        tag = tag_of(self._keyring().pepper, normalise(mailbox.local, mailbox.domain))
        asked = await self._premises.store.write(lambda conn: requests.by_ticket(conn, self._keyring(), ticket))
        return asked is not None and asked.tag == tag

    async def op_rights_letters(self) -> list[dict[str, Any]]:
        """Letters that did not leave yet, by name of file."""
        waiting = await asyncio.to_thread(self.outbox.waiting)
        return [
            {"name": one.name, "ticket": one.ticket, "letter": one.letter, "at": one.at, "failed": one.failed}
            for one in waiting
        ]

    async def op_rights_letter_sent(self, name: str) -> bool:
        """The operator has sent it by his own hand: it is removed."""
        known = {one.name for one in await asyncio.to_thread(self.outbox.waiting)}
        return name in known and await asyncio.to_thread(self.outbox.remove, name)


def _details(given: dict[str, str]) -> dict[str, str]:
    """Raises Refused for what no right asks for."""
    if not given.keys() <= _DETAILS:
        raise Refused("refused", f"unknown details, of {', '.join(sorted(_DETAILS))}")
    return {key: text[:_TEXT] for key, text in given.items() if text}


def _account(conn: Connection, name: str) -> int:
    """0 for no name. Raises Refused."""
    if not name:
        return 0
    found = accounts.get(conn, name)
    if found is None:
        raise Refused("not-found", "no such account")
    return found.number


def _told(asked: Asked) -> dict[str, Any]:
    """What may be listed: nothing about whom."""
    return {
        "ticket": asked.ticket,
        "kind": asked.kind.value,
        "role": asked.role.value,
        "account": asked.account,
        "channel": asked.channel,
        "jurisdiction": asked.jurisdiction,
        "state": asked.state.value,
        "identity": asked.identity.value,
        "received": asked.received,
        "due": asked.due,
        "due_text": rfc3339(asked.due),
        "extended": asked.extended,
        "closed": asked.closed,
        "outcome": asked.outcome,
        "ground": asked.ground,
    }
