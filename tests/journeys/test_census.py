"""The census: nothing is stored that the inventory does not know (design decision 14).

While a campaign runs with everything on, and after it, every Redis key is of an entry of `policy.keyspace.CATALOGUE`,
every SQL column is in `policy.schema.inventory`, and every file under the data folder is of a family of
`policy.files.CATALOGUE`. What is unknown is named. What should be gone is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import email
import email.policy
import re
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from policy import keyspace
from policy.address import normalise, parse, tag_of
from policy.files import family_of
from policy.instants import rfc3339
from policy.schema import inventory
from policy.suppression import Scope
from policy.wire import SuppressionRecord
from tests.world.mail import MailWorld, job, mail_world, rows
from tracker.app import build
from tracker.settings import TrackerSettings

# What only the world of the tests puts into the folder.
OURS = re.compile(r"sales-push\.toml|worker-\d+\.log|kept/.*")
# SQL that is not ours to describe: the migrations' mark and SQLite's counters of AUTOINCREMENT.
NOT_OURS = {"schema_version.version_num", "sqlite_sequence.name", "sqlite_sequence.seq"}
# Not on this journey: a dead entry needs an intake that fails five times (test_intake.py has it).
ELSEWHERE = {"dead"}
BRIEF = {"site back-off"}  # gone by itself when the back-off ends, on a slow machine before we look
# Must be gone when no job is under way (CATALOGUE: "with its last slice", "with the job", "settle", …).
PASSING = {
    "slice", "lane", "lane sites", "due index", "due sites", "leases", "holders", "job state", "chunks put",
    "duplicates", "halts", "hosts",
}  # fmt: skip


@dataclass
class Census:
    """Everything ever seen, by name: keys, files."""

    mail: MailWorld
    keys: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)

    async def look(self) -> set[str]:
        """One round; the keys there are now."""
        now = {key.decode() async for key in self.mail.policy.redis.scan_iter(count=10_000)}
        self.keys |= now
        self.files |= await asyncio.to_thread(_files, self.mail.folder)
        return now

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        enough = asyncio.Event()

        async def watch() -> None:
            while not enough.is_set():
                await self.look()
                await asyncio.sleep(0.005)

        async with asyncio.TaskGroup() as group:
            group.create_task(watch())
            try:
                yield
            finally:
                enough.set()

    def unknown(self) -> list[str]:
        return sorted(
            [f"Redis key {key}" for key in self.keys if keyspace.entry_of(key) is None]
            + [f"file {name}" for name in self.files if not OURS.fullmatch(name) and family_of(name) is None]
        )


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def _columns(path: Path) -> set[str]:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as conn:
        kinds = {kind for (kind,) in conn.execute("select distinct type from sqlite_master")}
        assert kinds == {"table", "index"}, "no views, no triggers: they would be an inventory of their own"
        found = conn.execute(
            "select m.name || '.' || c.name from sqlite_master m, pragma_table_xinfo(m.name) c where m.type = 'table'"
        )
        return {name for (name,) in found}


async def test_nothing_is_stored_that_the_inventory_does_not_know() -> None:
    async with mail_world(
        "slow:0:name=slow,delay=0.05",
        "limit:0:name=strict,connections=1,messages=3,rate=20",
        "greylist:0:name=grey,seconds=0.5",
        "unknown:0:name=nobody,share=0.5",
    ) as mail:
        limited = mail.config.read_text().replace("[engine.limits]\n", "[engine.limits]\nrate = 200.0\n")
        mail.config.write_text(limited)
        census = Census(mail)
        async with census.watching():
            await _campaign(mail)
        worker = mail.workers[0]
        assert await mail.drain(worker) == 0
        await mail.policy.drain()
        left = await census.look()

        assert census.unknown() == []
        seen = {entry.name for key in census.keys if (entry := keyspace.entry_of(key)) is not None}
        missing = {entry.name for entry in keyspace.CATALOGUE} - seen
        assert ELSEWHERE <= missing <= ELSEWHERE | BRIEF, "the journey shows all there is"
        lasting = {key: entry.name for key in left if (entry := keyspace.entry_of(key)) is not None}
        assert {key: name for key, name in lasting.items() if name in PASSING} == {}
        there, listed = _columns(mail.folder / "policy.db"), {item.column for item in inventory()}
        assert there - listed - NOT_OURS == set(), "columns that are not in the inventory"
        assert listed - there == set(), "columns that are only in the inventory"
        families = {family.name for name in census.files if (family := family_of(name)) is not None}
        assert families >= {"ledger", "queue", "journal", "vitals", "keys", "weekly keys", "signing keys"}
        open_to_others = [path for path in mail.folder.rglob("keys/**/*") if path.stat().st_mode & 0o077]
        assert open_to_others == []


def test_the_census_names_what_it_does_not_know(tmp_path: Path) -> None:
    """The net itself: a stray key, file or column does not slip through."""
    census = Census(mail=None)  # type: ignore[arg-type]  # nothing is looked at here
    census.keys = {"sp:{p01}:ada@example.org", "sp:{p01}:s:1a", "sp:{p1}:ev", "celery", keyspace.INTAKE + ":2"}
    census.keys |= {"salespush:{in}:status:ada-lovelace", keyspace.job_status("shop", "main")}
    census.files = {"policy.db", "policy.db.bak", "keys/pepper.1", "keys/pepper.1.old", "journal/0/x", "core"}
    assert census.unknown() == [
        "Redis key celery", "Redis key salespush:{in}:jobs:2", "Redis key salespush:{in}:status:ada-lovelace",
        "Redis key sp:{p01}:ada@example.org", "Redis key sp:{p1}:ev",
        "file core", "file journal/0/x", "file keys/pepper.1.old", "file policy.db.bak",
    ]  # fmt: skip
    with contextlib.closing(sqlite3.connect(tmp_path / "stray.db")) as conn:
        conn.execute("create table diary (dear text)")
        conn.execute("create index by_dear on diary (dear)")
    assert _columns(tmp_path / "stray.db") - {item.column for item in inventory()} == {"diary.dear"}


async def until(condition: Callable[[], bool]) -> None:
    """What another process does is polled for; the caller has the deadline."""
    while not condition():
        await asyncio.sleep(0.02)


async def _campaign(mail: MailWorld) -> None:
    """Everything on: tracking, suppression, retries, back-off, rate, a paused, a held, a cancelled, a rejected job."""
    agreed = {"source": "form", "time": "2026-01-01T10:00:00Z"}
    consent = dict.fromkeys(("mail_marketing", "open_tracking", "click_tracking"), agreed)
    people = [row for name in ("slow", "strict", "grey", "nobody") for row in rows(30, f"a.{name}.test")]
    await mail.policy.ask.suppress([_suppression(mail, person["address"]) for person in people[:3]])
    await mail.start_worker()
    tracking = {"opens": "individual", "clicks": "individual"}
    await mail.submit(job("main", tracking=tracking, consent=consent, topic="offers"), [*people, people[40]])
    later = rfc3339(time.time_ns() // 1000 + 7_200_000_000)
    await mail.submit(job("held", send_at=later), rows(5, "b.slow.test"))
    await mail.submit(job("rejected", subject="{{ name"), rows(5, "b.slow.test"))
    await mail.submit(job("paused"), rows(300, "c.slow.test"))
    async with asyncio.timeout(60):
        await until(lambda: (status := _status(mail, "paused")) is not None and status.terminal > 5)
        await mail.policy.ask.job_state("paused", "paused")
        await until(lambda: len(mail.kept()) > 20)
        await _read(mail)
        while not await mail.rejected():
            await asyncio.sleep(0.02)
    status = await mail.finished("main")
    assert status.opens > 0
    assert status.clicks > 0
    await mail.policy.ask.job_state("paused", "cancelled")
    assert (await mail.finished("paused")).counts["cancelled"] > 0
    held = _status(mail, "held")
    assert held is not None
    assert held.terminal == 0


async def _read(mail: MailWorld) -> None:
    """Some of those who got it open it, follow a link, leave the list, or take back their consent to tracking."""
    tracker, engine = build(TrackerSettings(port=0, flush_seconds=0.01), mail.policy.settings)
    try:
        base = f"http://127.0.0.1:{await tracker.start()}"
        async with aiohttp.ClientSession() as client:
            tracked = [page for wire in mail.kept() if "/o/" in (page := _page(wire))]
            assert len(tracked) >= 6
            for number, page in enumerate(tracked[:6]):
                paths = {path[0]: f"/{path}" for path in re.findall(r"http://[^/\"]+:8999/([a-z]/[^\"]+)", page)}
                for kind in ("o", "c"):
                    async with client.get(base + paths[kind], allow_redirects=False) as answer:
                        assert answer.status == {"o": 200, "c": 302}[kind]
                if number == 0:
                    async with client.post(base + paths["u"], data={"List-Unsubscribe": "One-Click"}) as answer:
                        assert answer.status == 200
                if number == 1:
                    choice = paths["u"].replace("/u/", "/p/")
                    async with client.post(base + choice, data={"choice": "tracking"}) as answer:
                        assert answer.status == 200
        await until(tracker.withdrawn.is_fresh)
        assert await tracker.recorder.flush()
    finally:
        await tracker.stop()
        engine.dispose()


def _page(wire: bytes) -> str:
    message = email.message_from_bytes(wire, policy=email.policy.default)
    assert isinstance(message, email.message.EmailMessage)
    html = message.get_body(("html",))
    assert html is not None
    return str(html.get_content())


def _status(mail: MailWorld, job_id: str) -> Any:
    return mail.policy.reader.job_status(job_id, mail.policy.clock())


def _suppression(mail: MailWorld, address: str) -> SuppressionRecord:
    mailbox = parse(address)
    tag = tag_of(mail.policy.keyring.pepper, normalise(mailbox.local, mailbox.domain))
    return SuppressionRecord(tag, keyspace.partition_of(mailbox.domain), int(Scope.PLATFORM), 0, "manual", "test")
