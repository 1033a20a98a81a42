"""What goes into a cell of the matrix: jobs of every kind, acknowledged writes, opt-outs, until it is told to end.

    traffic = Traffic(world, facts, seed); await traffic.begin(); ...; await traffic.end()

Known limits: opt-outs are aimed at the ends of the two big campaigns, who still wait when the fault comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from typing import Any

import redis.exceptions

from policy import keyspace
from policy.address import normalise, parse, tag_of
from policy.suppression import Scope
from policy.valkey import call, connect
from policy.wire import SuppressionRecord, WireError, WriterUnavailable
from tests.chaos.cell_laws import BEATS, Facts
from tests.chaos.load import Book, at, campaign, mail, people, submit
from tests.chaos.world import World

_AWAY = (redis.exceptions.RedisError, OSError, WriterUnavailable, WireError, TimeoutError)


class Traffic:
    """Everything that goes in. jobs: what was acknowledged, to be submitted again."""

    def __init__(self, world: World, facts: Facts, seed: int) -> None:
        self.world, self.facts = world, facts
        self.ledger, self.shot_log = world.folder / "jobs.jsonl", world.folder / "shots.jsonl"
        self.jobs: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
        self.shot: list[str] = []
        self._book, self._shots = Book(self.ledger), Book(self.shot_log)
        self._chance = random.Random(seed)
        self._far: list[str] = []
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._going = {"small", "beat", "shoot"}

    async def submit(self, job: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        """Until it is acknowledged."""
        await submit(self.world.server.url, self._book, job, rows)
        self.facts.acked.setdefault(job["job_id"], time.monotonic())
        self.jobs[job["job_id"]] = job, rows

    async def begin(self) -> None:
        """The big ones; then small ones, writes and opt-outs until `end`."""
        for turn in range(2):
            rows = at("a.fast.test", range(turn * 500, turn * 500 + 500)) + at(
                "a.slow.test", range(turn * 25, turn * 25 + 25)
            )
            self._far += rows[400:500]
            await self.submit(campaign(f"big-{turn}"), people(rows))
        await self.submit(mail("mail"), people(at("b.fast.test", range(300))))
        loops = {"small": self._small(), "beat": self._beat(), "shoot": self._shoot()}
        self._tasks = {name: asyncio.create_task(loop) for name, loop in loops.items()}

    async def end(self, beats: bool = False) -> None:
        """beats: only the writes that are counted. Told, not cancelled: a client may swallow a cancellation."""
        names = {"beat"} if beats else set(self._tasks)
        self._going -= names
        async with asyncio.timeout(60):
            await asyncio.gather(*(self._tasks[name] for name in names))

    def cancel(self) -> None:
        """When the cell has failed; afterwards nobody waits for them."""
        self._going.clear()
        for task in self._tasks.values():
            task.cancel()

    async def _small(self) -> None:
        turn = 0
        while "small" in self._going:
            turn += 1
            domain = self._chance.choice(("c.fast.test", "d.fast.test", "b.slow.test"))
            some = self._chance.sample(range(3000), 2 if "slow" in domain else 15)
            make = mail if turn % 3 == 0 else campaign
            await self.submit(make(f"small-{turn}"), people(at(domain, some)))
            await asyncio.sleep(0.15)

    async def _beat(self) -> None:
        client = connect(self.world.server.url, max_connections=2)
        number = 0
        try:
            while "beat" in self._going:
                number += 1
                try:
                    await call(client, "RPUSH", BEATS, number)
                    self.facts.beats.add(number)
                except (redis.exceptions.RedisError, OSError):
                    if self.facts.refused is None:
                        self.facts.refused = time.monotonic()
                await asyncio.sleep(0.004)
        finally:
            await client.aclose()

    async def _shoot(self) -> None:
        """Opt-outs of people who wait."""
        pepper = self.world.keyring.pepper
        while self._far and "shoot" in self._going:
            address = self._far.pop(self._chance.randrange(len(self._far)))
            mailbox = parse(address)
            tag = tag_of(pepper, normalise(mailbox.local, mailbox.domain))
            entry = SuppressionRecord(
                tag, keyspace.partition_of(mailbox.domain), int(Scope.PLATFORM), 0, "manual", "matrix"
            )  # fmt: skip
            t_call, t_ack = time.monotonic(), None
            with contextlib.suppress(*_AWAY):
                await self.world.ask.suppress([entry])
                t_ack = time.monotonic()
                self.shot.append(address)
            self._shots.say(
                k="shot", address=address, scope="platform", list="0", aimed=False, t_call=t_call, t_ack=t_ack
            )  # fmt: skip
            await asyncio.sleep(0.25)
