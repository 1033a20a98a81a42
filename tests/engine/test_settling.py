"""What settling writes is what the ledger reads: encoded once, for the journal and for Redis alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from engine.delivery.campaigns import Loaded
from engine.delivery.hand import Hand
from engine.delivery.settling import Settling
from engine.queue import journal
from engine.queue.journal import Journal, Outcome
from engine.queue.lanes import Lanes, Lease, Settled, SettleRequest
from engine.queue.slices import Contents, Header, Row
from policy.events import Batch, Event, Kind, Reason, encode_batch
from policy.keys import Keyring


class _Lanes:
    def __init__(self) -> None:
        self.asked: list[SettleRequest] = []

    async def settle_many(self, requests: list[SettleRequest]) -> list[Settled]:
        self.asked += requests
        return [Settled.KEPT] * len(requests)


class _Keys:
    def __init__(self) -> None:
        self.queue = {1: bytes(32)}
        self.queue_id = 1


def _hand() -> Hand:
    header = Header(7, 1, 3, 2, 0, 0, 0, 1, 5, 2, "L" * 11)
    contents = Contents("them.example", [], [Row(f"x{number}", 0, 0, 0, 0, []) for number in range(3)])
    return Hand(Lease(3, "c1", "S" * 11, "L" * 11, 5, b""), header, contents, cast(Loaded, None), bytes(32))


async def _settled(folder: Path, tell: Callable[[Settling, Hand], None]) -> tuple[list[SettleRequest], list[Any]]:
    lanes, hand = _Lanes(), _hand()
    book = Journal.open(folder, "host/worker-0", "boot-1")
    settling = Settling(cast(Lanes, lanes), book, lambda: cast(Keyring, _Keys()), lambda _: None)
    tell(settling, hand)
    await settling.flush()
    await asyncio.wait_for(book.close(), 5)
    (log,) = journal.read_folder(folder)
    return lanes.asked, list(log.records)


@pytest.mark.doubles
async def test_the_journal_and_the_store_are_told_the_ledgers_own_batches(tmp_path: Path) -> None:
    events = [
        Event(int(Kind.DELIVERED), -5, 3, 1_700_000_000_000_000, 2**62, b"t" * 12, 0, 250, "2.0.0", 3),
        Event(int(Kind.BOUNCED), 2**63 - 1, 3, 1, 0, b"", int(Reason.USER_UNKNOWN), 550, "5.1.1", 0, b"note"),
    ]

    def tell(settling: Settling, hand: Hand) -> None:
        for index, event in enumerate(events):
            settling.terminal(hand, index, event)

    [request], records = await _settled(tmp_path, tell)

    assert request.events == encode_batch(Batch(7, "them.example", events))
    assert request.done == [0, 1]
    assert records == [
        Outcome(3, "c1", 5, index, event.kind, encode_batch(Batch(7, "them.example", [event])))
        for index, event in enumerate(events)
    ]


@pytest.mark.doubles
async def test_whose_copy_may_be_out_has_no_outcome_in_the_journal(tmp_path: Path) -> None:
    event = Event(int(Kind.DEFERRED), -5, 3, 1_700_000_000_000_000)

    def tell(settling: Settling, hand: Hand) -> None:
        settling.retry(hand, 0, 60.0, event, in_doubt=True)
        settling.terminal(hand, 1, event)
        settling.known(hand, [2])
        hand.retries.clear()  # sealing them anew is the slices' business

    [request], records = await _settled(tmp_path, tell)

    assert request.events == encode_batch(Batch(7, "them.example", [event, event]))
    assert request.done == [1, 2]
    assert [record.index for record in records] == [1], "its intent stays open"
