"""P-14, P-15, P-21: who asks to be deleted is left alone from receipt on; a button proves it, looking does not."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from typing import Any

from sqlalchemy import Connection, insert, select

from policy import audit, halts, keyspace, negative, schema, suppression
from policy.instants import DAY_US, HOUR_US, rfc3339
from policy.rights import due
from policy.rights.letters import Letters
from policy.rights.proof import _digest
from policy.rights.states import Identity
from policy.suppression import Scope
from policy.wire import WireError
from tests.policy.rights.conftest import ADA, NOW, House, house
from tests.promises.marks import promise
from tests.tracker.test_rights import Desk, Office, an_office
from tracker.rights import Rights

__all__ = ["house"]


class Line(Desk):
    """The tracker's way to the real rights engine, without a socket between."""

    def __init__(self, opened: House) -> None:
        super().__init__()
        self._opened = opened

    async def call(self, op: str, **kwargs: Any) -> Any:
        self.calls.append((op, kwargs))
        try:
            return await getattr(self._opened.desk, f"op_{op}")(**kwargs)
        except ValueError as error:
            raise WireError("refused", str(error)) from error


@contextlib.asynccontextmanager
async def _office(opened: House) -> AsyncIterator[Office]:
    async with an_office(Line(opened)) as office:
        yield office


def _leaves_it(*_: object) -> bool:
    return True


async def _scopes(opened: House) -> set[tuple[str, Scope]]:
    tag, _, _ = opened.row(ADA)
    entries = await opened.store.write(lambda conn: suppression.check(conn, tag))
    return {(one.reason, one.scope) for one in entries}


@promise("P-14", off={"policy.rights.protections.restrict": _leaves_it})
async def test_p14_receipt_stops_sending_and_tracking_tells_the_due_date_and_is_audited(house: House) -> None:
    """By the page that everybody can reach: no account, no login."""
    subject = await house.knows(ADA)
    async with _office(house) as office:
        response, body = await office.ask("POST", "/r", data={"kind": "erasure", "address": ADA})
    assert response.status == 200
    assert b"We have your request" in body
    tag, partition, _ = house.row(ADA)
    assert await _scopes(house) == {("restriction", Scope.PLATFORM)}
    assert await house.redis.hget(keyspace.suppression(partition, tag), tag), "the gate refuses now"
    assert await house.store.write(lambda conn: negative.standing(conn, subject)) == "restricted"
    [told] = await house.desk.op_rights_list()
    assert (told["state"], rfc3339(told["due"])) == ("identifying", "2026-12-23T00:00:00.000000Z")
    assert "by 2026-12-22 at the latest" in house.letters("acknowledged")[0]
    lines = await house.store.write(lambda conn: conn.scalars(select(schema.audit.c.action)).all())
    assert any("open" in line for line in lines)
    assert await house.store.write(audit.verify) is None


@promise("P-14", off={"policy.rights.protections.restrict": _leaves_it})
async def test_p14_a_holders_request_pauses_the_account(house: House) -> None:
    told = await house.desk.op_rights_open("erasure", ADA, role="holder", account="acme")
    assert told["due"] > NOW
    assert await house.store.write(lambda conn: halts.is_account_halted(conn, 1))
    assert b"a1" in await house.redis.smembers(keyspace.halts(0))
    assert not await house.store.write(lambda conn: halts.is_account_halted(conn, 2))


REAL_DUE = due.due


def _from_the_entry_on(jurisdiction: str, received: int, calendar: due.Calendar, *, extended: bool = False) -> int:
    return REAL_DUE(jurisdiction, max(received, NOW), calendar, extended=extended)


@promise("P-14", off={"policy.rights.due.due": _from_the_entry_on})
async def test_p14_the_clock_starts_at_receipt(house: House) -> None:
    """A letter that came ten days ago and is entered today; proved nine days later, it is due as it was."""
    received = NOW - 10 * DAY_US
    told = await house.desk.op_rights_open("erasure", ADA, channel="letter", received=received)
    assert rfc3339(told["due"]) == "2026-12-15T00:00:00.000000Z", "12 December is a Saturday: the Monday after it"
    house.now += 2 * DAY_US
    await house.desk.op_rights_confirm(house.token())
    assert (await house.desk.op_rights_show(told["ticket"]))["due"] == told["due"]


# --- P-15 -----------------------------------------------------------------------------------------------------------


@promise("P-15", off={"tracker.rights.Rights.show": Rights.confirm})
async def test_p15_looking_at_the_link_does_nothing_and_the_button_confirms_once(house: House) -> None:
    told = await house.desk.op_rights_open("erasure", ADA)
    path = f"/r/{house.token()}"
    async with _office(house) as office:
        for method in ("GET", "HEAD", "GET"):
            response, _ = await office.ask(method, path)
            assert response.status == 200
        await house.desk.round()
        shown = await house.desk.op_rights_show(told["ticket"])
        assert (shown["state"], house.erased) == ("identifying", [])
        await office.ask("POST", path)
        assert (await house.desk.op_rights_show(told["ticket"]))["identity"] == Identity.PROVED
        await house.desk.round()
        assert len(house.erased) == 1
        for method in ("POST", "GET"):
            await office.ask(method, path)
        await house.desk.round()
        assert len(house.erased) == 1


def _for_ever(conn: Connection, text: str, now: int) -> int | None:
    wanted = select(schema.proof.c.request).where(schema.proof.c.hash == _digest(text))
    return conn.execute(wanted).scalar()


@promise("P-15", off={"policy.rights.proof.redeem": _for_ever})
async def test_p15_a_link_lives_72_hours(house: House) -> None:
    told = await house.desk.op_rights_open("access", ADA)
    token = house.token()
    house.now += 72 * HOUR_US
    await house.desk.op_rights_confirm(token)
    assert (await house.desk.op_rights_show(told["ticket"]))["state"] == "identifying"


def _believes_anybody(conn: Connection, text: str, now: int) -> int | None:
    return conn.execute(select(schema.request.c.number).order_by(schema.request.c.number)).scalar()


def _blank(letter: str, address: str) -> str:
    """A letter without what is of this request alone."""
    return re.sub(r"R-[A-Z2-9]{10}|/r/\S{43}", "", letter).replace(address, "")


@promise("P-15", off={"policy.rights.proof.redeem": _believes_anybody})
async def test_p15_only_the_mailbox_has_the_token_and_every_answer_is_the_same(house: House) -> None:
    """Who reads the database proves nothing; who guesses learns nothing, not even of whom we know."""
    await house.knows(ADA)
    told = await house.desk.op_rights_open("erasure", ADA)
    await house.desk.op_rights_open("erasure", "nobody@one.example")
    first, other = house.letters("proof")
    assert first.split("\n")[0] == f"To: {ADA}"
    assert _blank(first, ADA) == _blank(other, "nobody@one.example"), "neutral: nobody learns whom we know"
    token = first.split("https://mail.example/r/", 1)[1].split()[0]
    wrong = ("A" if token[0] != "A" else "B") + token[1:]
    rows = await house.store.write(lambda conn: conn.execute(select(schema.proof)).all())
    assert token.encode() not in repr(rows).encode()
    async with _office(house) as office:
        answers = [(await office.ask("POST", f"/r/{name}"))[1] for name in (wrong, "x")]
        assert (await house.desk.op_rights_show(told["ticket"]))["state"] == "identifying"
        answers.append((await office.ask("POST", f"/r/{token}"))[1])
    assert answers == [answers[0]] * 3
    assert (await house.desk.op_rights_show(told["ticket"]))["identity"] == Identity.PROVED


@promise("P-15", off={"policy.rights.requests.opened_since": lambda *_: 0})
async def test_p15_proof_letters_to_strangers_are_limited(house: House) -> None:
    house.make(strangers_per_hour=3)
    answers = []
    async with _office(house) as office:
        for number in range(5):
            form = {"kind": "access", "address": f"person{number}@one.example"}
            answers.append((await office.ask("POST", "/r", data=form))[0].status)
    assert answers == [200, 200, 200, 503, 503]
    assert len(house.letters("proof")) == 3


@promise("P-21", off={"policy.rights.carrying._holds": lambda conn, asked: []})
async def test_p21_who_asks_is_told_which_exception_keeps_what_is_kept(house: House) -> None:
    subject = await house.knows(ADA)
    held = {"subject": subject, "reason": "claim", "authority": "Civil Code 195", "actor": "officer"}
    await house.store.write(
        lambda conn: conn.execute(insert(schema.hold).values(**held, placed=NOW, review=NOW + DAY_US))
    )
    told = await house.desk.op_rights_open("erasure", ADA)
    await house.desk.op_rights_confirm(house.token())
    await house.desk.round()
    after = await house.desk.op_rights_show(told["ticket"])
    assert (after["outcome"], after["ground"]) == ("erased except what is held", "Civil Code 195")
    [letter] = house.letters("done")
    assert "17(3)" in letter
    assert "Civil Code 195" in letter
    assert len(house.erased) == 1, "everything else goes"


# --- P-27 -----------------------------------------------------------------------------------------------------------


REAL_COMPOSE = Letters.compose


def _with_a_beacon(room: Any, letter: str, asked: Any, now: int, **values: Any) -> Any:
    message = REAL_COMPOSE(room, letter, asked, now, **values)
    page = '<p>Hello</p><img src="https://mail.example/o/x.gif" width="1" height="1">'
    message.add_alternative(page, subtype="html")
    return message


@promise("P-27", off={"policy.rights.letters.Letters.compose": _with_a_beacon})
async def test_p27_mail_of_the_platform_itself_has_no_beacon_and_no_tracked_link(house: House) -> None:
    """Acknowledgement, proof, notice of deletion and refusal: plain text, and no link but the button's page."""
    await house.knows(ADA)
    await house.desk.op_rights_open("erasure", ADA)
    looked = _no_beacons(house)
    await house.desk.op_rights_confirm(house.token())
    await house.desk.round()
    other = await house.desk.op_rights_open("access", ADA)
    await house.desk.op_rights_refuse(other["ticket"], "GDPR 12(5)")
    assert looked | _no_beacons(house) >= {"acknowledged", "proof", "done", "refused"}


def _no_beacons(opened: House) -> set[str]:
    """Looks at every letter that waits; their kinds."""
    waiting = opened.desk.outbox.waiting()
    for one in waiting:
        message = opened.desk.outbox.read(one.name)
        assert message is not None
        assert [part.get_content_type() for part in message.walk()] == ["text/plain"], one.letter
        text = message.get_content()
        assert [trace for trace in ("<img", "/o/", "/c/", "src=") if trace in text] == [], one.letter
    return {one.letter for one in waiting}
