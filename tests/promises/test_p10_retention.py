"""P-10, P-12, P-21: each class goes at its end, with proof; what is held is copied first; payloads end with jobs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import ValidationError
from redis.asyncio import Redis
from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError

from engine.delivery.campaigns import Loaded
from engine.delivery.conclusions import Conclusions
from engine.delivery.hand import Hand, Letter
from engine.delivery.outcome import Outcome
from engine.delivery.settling import Settling
from engine.queue import schedule
from policy import audit, holds, schema
from policy.classes import Period, RetentionSettings
from policy.events import Event, Kind, Reason
from policy.holds import HoldOperations
from policy.instants import DAY_US
from policy.jobs import Refused
from policy.keys import Keyring, open_note
from tests.engine.test_conclusions import _lease
from tests.policy.people import row_of
from tests.policy.sweepers import D, Sweeper, sweeper
from tests.promises.marks import promise
from tests.world.octets import octets

REPLY = "550 5.1.1 <ada@one.example> unknown"


@pytest.fixture
async def place(tmp_path: Path, keyring: Keyring, redis: Redis) -> AsyncIterator[Sweeper]:
    async with sweeper(tmp_path, keyring, redis) as made:
        yield made


def _never(today: int, kept: Period) -> int:
    return 0


def _at_once(today: int, kept: Period) -> int:
    return today


async def _a_message(place: Sweeper, *, done: int = D) -> bytes:
    """One job with one bounced message of day D; the bytes of its sealed note."""
    account = await place.account()
    await place.job(account, 1, done)
    await place.message(1, 5, D, note=REPLY)
    [row] = await place.rows("message")
    note: bytes = row["note"]
    return note


def _files_with(folder: Path, needle: bytes) -> list[str]:
    return sorted(path.name for path in folder.glob("policy.db*") if needle in octets(path))


@promise("P-10", off={"policy.retention.last_gone": _never})
async def test_p10_on_day_91_it_is_gone_and_the_chain_proves_it(place: Sweeper) -> None:
    """R3 is 90 days: there on day 89, and gone on day 91, row and proof."""
    await _a_message(place)
    place.now = (D + 89) * DAY_US
    await place.sweep()
    assert await place.count("message") == 1
    place.now = (D + 91) * DAY_US
    await place.sweep()
    assert await place.count("message") == 0
    [manifest] = [row for row in await place.rows("sweep") if row["place"] == "message"]
    assert (manifest["retention"], manifest["day"], manifest["rows"]) == ("R3", D, 1)
    proofs = [row["result"] for row in await place.rows("audit") if row["object_ref"] == f"sweep/R3/message/{D}/0"]
    assert proofs == [f"1 {manifest['digest'].hex()}"]
    assert await place.premises.store.write(audit.verify) is None


@promise("P-10", off={"policy.retention.last_gone": _at_once})
async def test_p10_nothing_goes_before_its_end(place: Sweeper) -> None:
    """The end is exclusive and in UTC: one microsecond earlier it is all there."""
    await _a_message(place)
    place.now = (D + 90) * DAY_US - 1
    await place.sweep()
    assert await place.count("message") == 1
    place.now += 1
    await place.sweep()
    assert await place.count("message") == 0


@promise("P-10", off={"policy.sweeping.tidy": lambda engine: True})
async def test_p10_its_bytes_are_gone_from_the_disk(place: Sweeper) -> None:
    note = await _a_message(place)
    folder = place.premises.settings.data_dir
    assert _files_with(folder, note)
    place.now = (D + 91) * DAY_US
    await place.sweep()
    assert _files_with(folder, note) == []


@promise("P-10", off={"policy.classes.Period.is_within": lambda mine, other: True})
def test_p10_no_class_may_be_kept_longer_than_its_default() -> None:
    assert RetentionSettings.model_validate({"r3": "89 days"}).periods()["R3"] == Period(89, "day")
    for name, wanted in (("r3", "91 days"), ("r2", "14 months"), ("r2", "2 years"), ("r0", "2 days")):
        with pytest.raises(ValidationError, match="never lengthened"):
            RetentionSettings.model_validate({name: wanted})


@promise("P-10", off={"policy.sweeping.shorten": lambda *asked: asked[-2]})
async def test_p10_an_account_may_shorten_and_not_lengthen(place: Sweeper) -> None:
    await place.account()
    sweeping = place.sweeping()
    assert await sweeping.op_shorten("acme", "R3", 30) == 30
    with pytest.raises(Refused, match="never lengthened"):
        await sweeping.op_shorten("acme", "R3", 31)
    await place.message(1, 5, D)
    await place.job(1, 1, D)
    place.now = (D + 30) * DAY_US
    await place.sweep()
    assert await place.count("message") == 0
    with pytest.raises(IntegrityError):  # and the store itself refuses what is no period
        await place.premises.store.write(
            lambda conn: conn.execute(insert(schema.shortening).values(account=1, retention="R9", days=-1, since=0))
        )


# --- P-12 -----------------------------------------------------------------------------------------------------------


@promise("P-12", off={"policy.retention.last_gone": _never})
async def test_p12_72_hours_after_delivery_no_body_is_left_and_the_send_log_is(place: Sweeper) -> None:
    """The job's payload (template and inline recipients, sealed) ends within 24 h of the job, the log stays R3."""
    account = await place.account()
    body = b"sealed template and recipients, as they came"
    await place.job(account, 1, D, payload=body)
    await place.message(1, 5, D)
    folder = place.premises.settings.data_dir
    assert _files_with(folder, body)
    place.now = (D + 1) * DAY_US + 72 * 3600 * 1_000_000
    await place.sweep()
    [job] = await place.rows("job")
    assert job["payload"] is None
    assert _files_with(folder, body) == []
    assert await place.count("message", kind=int(Kind.DELIVERED)) == 1


class _Settled:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def terminal(self, hand: Hand, index: int, event: Event) -> None:
        self.events.append(event)


@promise("P-12", off={"engine.delivery.conclusions.seal_note": lambda keyring, text: text.encode()})
def test_p12_a_reply_that_quotes_the_address_is_sealed_before_it_is_recorded(keyring: Keyring) -> None:
    settled = _Settled()
    nothing = Loaded(0, b"", 0, None, (), None, None)
    made = Conclusions(
        cast(Settling, cast(Any, settled)), lambda: keyring, schedule.Retry(), nothing, lambda: D * DAY_US
    )
    hand = made._nameless(*_lease())
    bounced = Outcome(kind=Kind.BOUNCED, reason=Reason.USER_UNKNOWN, code=550, enhanced="5.1.1", text=REPLY)
    made.conclude(Letter(hand, 0, hand.reference(0)[0]), bounced, 0)
    [event] = settled.events
    assert event.note
    assert b"ada" not in event.note
    assert b"ada" not in repr(event).encode()
    assert open_note(keyring, event.note) == REPLY


# --- P-21 -----------------------------------------------------------------------------------------------------------


@promise("P-21", off={"policy.holds.Protected.copy": lambda *_: 0})
async def test_p21_what_is_held_is_copied_before_its_day_goes_and_nobody_elses(place: Sweeper) -> None:
    account = await place.account()
    held, other = await place.person(account, "held@one.example"), await place.person(account, "other@one.example")
    await place.job(account, 1, D)
    for mref, person in ((5, held), (6, other)):
        await place.message(1, mref, D, person, REPLY)
    tag = row_of(place.keyring.pepper, held.address)[0]
    [number] = await HoldOperations(place.premises).op_hold_place("acme", tag, "claim 12", "Court of Berlin")
    place.now = (D + 91) * DAY_US
    assert (await place.sweep())["message"] == 2, "a hold moves no boundary"
    copies = await place.premises.store.write(lambda conn: holds.copies(conn, place.keyring, number))
    assert [(copy.place, copy.row["mref"]) for copy in copies] == [("message", 5)]
    [one] = await HoldOperations(place.premises).op_hold_list()
    assert (one["reason"], one["authority"], one["released"]) == ("claim 12", "Court of Berlin", None)
    assert one["review"] > one["placed"]
