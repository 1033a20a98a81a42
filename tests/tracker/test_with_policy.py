"""The tracker with the real policy floor behind it: writer, SQLite, Valkey (T10, T11; decisions 7, 12, 15)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from sqlalchemy import select

from policy import schema, suppression
from policy.gate import Mode
from policy.instants import week_of
from policy.keys import seal
from policy.keyspace import suppression as suppression_key
from policy.wire import ConsentRow, JobRecord, job_aad
from tests.tracker.twins import until
from tests.world.servers import PolicyWorld, policy_world
from tracker.app import Tracker, build
from tracker.links import Links
from tracker.settings import TrackerSettings

TAG, PARTITION, MREF = b"a-keyed-tag!", 9, 4242
BROWSER = {"User-Agent": "Mozilla/5.0 (Windows NT 10.0) Firefox/121.0", "Accept-Language": "en"}


@dataclass
class Street:
    """One account with one list, one job and one person, and the tracker's address."""

    world: PolicyWorld
    tracker: Tracker
    client: aiohttp.ClientSession
    links: Links
    base: str
    account: int
    list_number: int
    job: int
    subject: int
    statuses: list[int] = field(default_factory=list)

    async def ask(self, method: str, url: str, **options: Any) -> tuple[int, str]:
        path = url.removeprefix(self.links.public_url)
        options.setdefault("headers", BROWSER)
        async with self.client.request(method, self.base + path, allow_redirects=False, **options) as response:
            return response.status, await response.text(errors="replace")

    def pixel(self, mode: Mode = Mode.INDIVIDUAL) -> str:
        return self.links.pixel_url(self.job, MREF, self.subject, mode)

    def click(self, number: int, mode: Mode = Mode.INDIVIDUAL) -> str:
        return f"{self.links.click_base(self.job, MREF, self.subject, mode)}/{number}"

    def optout(self) -> str:
        return self.links.optout_url(self.list_number, PARTITION, TAG)

    def preferences(self) -> str:
        return self.links.preferences_url(self.list_number, PARTITION, TAG)

    async def rows(self, table: Any) -> list[Any]:
        """What is in a ledger table when everything recorded so far has arrived."""
        await until(self.tracker.withdrawn.is_fresh)
        assert await self.tracker.recorder.flush()
        await self.world.drain()
        engine = schema.open_store(self.world.settings.sql_address(), writer=False)
        try:
            with engine.connect() as connection:
                return list(connection.execute(select(table)))
        finally:
            engine.dispose()

    async def gate_cell(self) -> bytes | None:
        """What facts.lua and gate.lua find for the person."""
        return await self.world.redis.hget(suppression_key(PARTITION, TAG), TAG)  # type: ignore[return-value]  # redis types both its clients in one


@pytest.fixture
async def street() -> AsyncIterator[Street]:
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(policy_world())
        account = await world.ask.account_add(
            "acme", display_name="Acme & Sons", opens_mode=Mode.INDIVIDUAL, clicks_mode=Mode.INDIVIDUAL
        )
        service = world.keyring.service
        record = JobRecord(
            account="acme", job_id="spring", hash=b"h" * 32, kind="campaign", created_at=world.clock(),
            payload=seal(service, b"{}", job_aad("payload", "acme", "spring")),
            job_key=seal(service, b"k" * 32, job_aad("key", "acme", "spring")),
            legal_basis="consent", list="news", chunks_expected=1, view="<p>web version</p>",
            opens_mode=Mode.INDIVIDUAL, clicks_mode=Mode.AGGREGATE,
            links=("https://shop.example/a", "https://shop.example/b"),
        )  # fmt: skip
        accepted = await world.ask.accept_job(record)
        (person,) = await world.ask.resolve(account, week_of(world.clock()), [(TAG, PARTITION, "ada@one.example")])
        evidence = [
            ConsentRow(person.subject, purpose, "express", "v1", "form", world.clock() - 10**9)
            for purpose in ("open_tracking", "click_tracking")
        ]
        await world.ask.consents(account, evidence)
        tracker, engine = build(TrackerSettings(port=0, flush_seconds=0.01, writer_seconds=5.0), world.settings)
        stack.callback(engine.dispose)
        stack.push_async_callback(tracker.stop)
        port = await tracker.start()
        client = await stack.enter_async_context(aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()))
        await until(tracker.withdrawn.is_loaded)
        keyring = world.keyring
        links = Links(keyring.token, keyring.token_id, world.settings.public_url)
        yield Street(
            world, tracker, client, links, f"http://127.0.0.1:{port}", account, accepted.list, accepted.number,
            person.subject,
        )  # fmt: skip


async def test_hits_reach_the_ledger_as_their_mode_allows(street: Street) -> None:
    async with asyncio.timeout(60):
        assert [await street.ask("GET", url) for url in (street.pixel(), street.click(1))] == [
            (200, (await street.ask("GET", "/o/x.gif"))[1]),
            (302, ""),
        ]
        hits = await street.rows(schema.hit)
        assert [(hit.mref, hit.link) for hit in hits] == [(MREF, -1), (MREF, 1)]
        await street.ask("GET", street.pixel(Mode.DELIVERABILITY))
        (day,) = await street.rows(schema.last_open)
        assert day.mref == MREF
        for _ in range(3):
            await street.ask("GET", street.click(0, Mode.AGGREGATE))
        assert len(await street.rows(schema.hit)) == 2
        counted = {(row.link, row.kind): row.n for row in await street.rows(schema.hit_counter)}
        assert counted[0, 33] == 1


async def test_one_click_is_in_both_stores_when_it_is_answered(street: Street) -> None:
    async with asyncio.timeout(60):
        status, body = await street.ask("POST", street.optout(), data={"List-Unsubscribe": "One-Click"})
        assert (status, body) == (200, "Unsubscribed.\n")
        cell = await street.gate_cell()
        assert cell is not None
        assert cell[0] == suppression.Scope.LIST
        (entry,) = await street.rows(schema.suppression)
        assert (entry.tag, entry.scope, entry.scope_id) == (TAG, suppression.Scope.LIST, street.list_number)


async def test_the_page_names_account_and_list_and_the_choices_hold(street: Street) -> None:
    async with asyncio.timeout(60):
        status, page = await street.ask("GET", street.optout())
        assert status == 200
        assert "Acme &amp; Sons" in page
        assert "news" in page
        status, _ = await street.ask("POST", street.preferences(), data={"choice": "account"})
        assert status == 200
        entries = await street.rows(schema.suppression)
        assert [(entry.scope, entry.scope_id) for entry in entries] == [(suppression.Scope.ACCOUNT, street.account)]
        status, page = await street.ask("GET", street.links.notice_url(street.job))
        assert status == 200
        assert "in which hour" in page
        assert "anonymous count" in page
        assert (await street.ask("GET", street.links.view_url(street.job)))[1] == "<p>web version</p>"


async def test_withdrawal_of_tracking_silences_delivered_mail(street: Street) -> None:
    async with asyncio.timeout(60):
        await street.ask("GET", street.pixel())
        assert len(await street.rows(schema.hit)) == 1
        status, _ = await street.ask("POST", street.preferences(), data={"choice": "tracking"})
        assert status == 200
        await until(lambda: street.subject in street.tracker.withdrawn)
        assert (await street.ask("GET", street.pixel()))[0] == 200
        assert (await street.ask("GET", street.click(0)))[0] == 302
        assert len(await street.rows(schema.hit)) == 1


async def test_with_redis_away_links_work_and_opt_outs_are_not_claimed(street: Street) -> None:
    async with asyncio.timeout(90):
        await street.ask("GET", street.click(0))
        await street.world.server.stop()
        assert (await street.ask("GET", street.click(1)))[0] == 302
        assert (await street.ask("GET", street.pixel()))[0] == 200
        status, body = await street.ask("POST", street.optout(), data={"List-Unsubscribe": "One-Click"})
        assert status == 503
        assert "Unsubscribed" not in body
        await street.world.server.start()
        # a server that comes back is compared with SQL first (T12); until then the answer stays an honest 503
        while (answer := await street.ask("POST", street.optout(), data={"List-Unsubscribe": "One-Click"}))[0] == 503:
            assert "Unsubscribed" not in answer[1]
            await asyncio.sleep(0.05)
        assert answer[0] == 200
        assert await street.gate_cell() is not None


async def test_without_the_writer_an_opt_out_is_a_503_and_pages_work(street: Street) -> None:
    async with asyncio.timeout(60):
        await street.world.writer.stop()
        assert (await street.ask("POST", street.optout()))[0] == 503
        assert (await street.ask("GET", street.optout()))[0] == 200
        await street.world.restart_writer()
        assert (await street.ask("POST", street.optout()))[0] == 200
