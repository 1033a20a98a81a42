"""The suppressor: opt-outs and suppressions aimed at people who are leased or connecting right now (I4, T4, T11).

    python -m tests.chaos.suppressor sales-push.toml jobs.jsonl shots.jsonl --seed 1 --shots 100 --pause 0.2

It has the keys of the installation, so it reads the leases in Redis, opens slices and picks somebody who has no outcome
yet; three shots of four are aimed so, the others meet anybody. How: the writer's socket (platform, account or list) or
the recipient's one click at the tracker (RFC 8058). t_call and t_ack are time.monotonic() around the call.

A call that fails promised nothing: it goes on record with t_ack null. SIGTERM ends it after the shot at hand.

Known limits: between the look at the lease and the call lie one or two milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import redis.exceptions

from engine.queue.slices import Lost, open_slice
from policy import keyspace
from policy.address import normalise, parse, tag_of
from policy.keys import Keyring
from policy.settings import PolicySettings, load
from policy.suppression import Scope
from policy.valkey import Client, call, connect
from policy.wire import SuppressionRecord, WireError, WriterClient, WriterUnavailable
from tests.chaos.load import Book
from tracker.links import Links

AIMED = 0.75
_LOOKED_AT = 6  # slices opened for one shot
_AWAY = (redis.exceptions.RedisError, OSError, WriterUnavailable, WireError, aiohttp.ClientError, TimeoutError)


@dataclass(frozen=True, slots=True)
class Target:
    """A person of a job, leased when looked at or not."""

    address: str
    account: int
    list_number: int
    aimed: bool


class Suppressor:
    def __init__(self, settings: PolicySettings, ledger: Path, seed: int) -> None:
        self._settings = settings
        self._keyring = Keyring.load(settings.keys_dir)
        self._links = Links(self._keyring.token, self._keyring.token_id, settings.public_url)
        self._ledger = ledger
        self._chance = random.Random(seed)
        self._met: set[str] = set()
        self.redis: Client = connect(settings.redis_address())
        self.ask = WriterClient(settings.writer_socket, timeout=5.0)

    # --- whom -----------------------------------------------------------------------------------------------------

    async def leased(self) -> Target | None:
        """Somebody on a leased slice who has no outcome yet. Raises redis errors."""
        partitions = range(keyspace.PARTITIONS)
        async with self.redis.pipeline(transaction=False) as pipe:
            for partition in partitions:
                pipe.execute_command("HKEYS", keyspace.leases(partition))
            told: list[list[bytes]] = await pipe.execute()
        slices = [(p, name.decode()) for p, names in zip(partitions, told, strict=True) for name in names]
        self._chance.shuffle(slices)
        for partition, name in slices[:_LOOKED_AT]:
            data: bytes | None = await call(self.redis, "GET", keyspace.slice_key(partition, name))
            opened = open_slice(self._keyring.queue, partition, data) if data else Lost("gone")
            if isinstance(opened, Lost):
                continue
            header, contents = opened
            waiting = [f"{contents.rows[index].local}@{contents.domain}" for index in header.pending()]
            fresh = [address for address in waiting if address not in self._met]
            state: list[bytes | None] = await call(self.redis, "HMGET", keyspace.job(partition, header.job), "ac", "li")
            if fresh and state[0] and state[1]:
                return Target(self._chance.choice(fresh), int(state[0]), int(state[1]), True)
        return None

    def anybody(self) -> Target | None:
        """A row of the newest jobs; everybody may have been written to already."""
        try:
            lines = self._ledger.read_bytes().splitlines()[-8:]
        except FileNotFoundError:
            return None
        rows = [row for line in lines for row in json.loads(line).get("rows", ()) if "@" in row["address"]]
        if not rows:
            return None
        return Target(self._chance.choice(rows)["address"], 1, 0, False)

    # --- how ------------------------------------------------------------------------------------------------------

    async def shoot(self, target: Target, session: aiohttp.ClientSession, say: Callable[..., None]) -> bool:
        """One shot, whatever comes of it."""
        self._met.add(target.address)
        mailbox = parse(target.address)
        tag = tag_of(self._keyring.pepper, normalise(mailbox.local, mailbox.domain))
        partition = keyspace.partition_of(mailbox.domain)
        ways = ["platform", "account"] + ["list", "click"] * bool(target.list_number)
        how = self._chance.choice(ways)
        scope = "list" if how == "click" else how
        t_call, t_ack = time.monotonic(), None
        with contextlib.suppress(*_AWAY):
            if how == "click":
                url = self._links.optout_url(target.list_number, partition, tag)
                async with session.post(url, data={"List-Unsubscribe": "One-Click"}) as answer:
                    if answer.status == 200:
                        t_ack = time.monotonic()
            elif how == "list":
                await self.ask.opt_out(target.list_number, partition, tag, "chaos")
                t_ack = time.monotonic()
            else:
                which, number = (Scope.PLATFORM, 0) if how == "platform" else (Scope.ACCOUNT, target.account)
                entry = SuppressionRecord(tag, partition, int(which), number, "manual", "chaos")
                await self.ask.suppress([entry])
                t_ack = time.monotonic()
        say(
            k="shot", address=target.address, scope=scope, how=how, list=str(target.list_number), aimed=target.aimed,
            t_call=t_call, t_ack=t_ack,
        )  # fmt: skip
        return t_ack is not None

    async def run(self, shots: int, pause: float, say: Callable[..., None], stopped: asyncio.Event) -> int:
        """How many were acknowledged."""
        acknowledged = 0
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=8)) as session:
            while acknowledged < shots and not stopped.is_set():
                target: Target | None = None
                with contextlib.suppress(*_AWAY):
                    aims = self._chance.random() < AIMED
                    target = await self.leased() if aims else self.anybody()
                if target is not None:
                    acknowledged += await self.shoot(target, session, say)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stopped.wait(), pause * self._chance.uniform(0.2, 1.8))
        await self.ask.close()
        await self.redis.aclose()
        return acknowledged


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.suppressor", description="opt-outs under fire")
    parser.add_argument("config", type=Path)
    parser.add_argument("ledger", type=Path)
    parser.add_argument("log", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shots", type=int, default=100)
    parser.add_argument("--pause", type=float, default=0.3, help="seconds between two shots, on average")
    options = parser.parse_args()
    settings = load(PolicySettings, options.config)

    async def run() -> Any:
        stopped = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
        book = Book(options.log)
        return await Suppressor(settings, options.ledger, options.seed).run(
            options.shots, options.pause, book.say, stopped
        )

    asyncio.run(run())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
