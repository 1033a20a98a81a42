"""One person in every place of a running installation, a neighbour beside them, and by hand what there then is.

    async with scene() as site:         a worker, a tracker, a writer with all its loops, Valkey and SQLite on disk
        await lay(site)                 GONE and STAYS wherever the inventory says that somebody can be
        personal() - await laid(site)   what of the inventory is still empty; `NOT_LAID` says why it may be
        facts(await site.export(GONE)) == ORACLE

Both are in the same jobs and slices. Alone the first has what concerns one person: requests, letters, a hold, a
rejected entry (that goes whole), an entry nobody has taken yet.

Law: `ORACLE` is written down from what `lay` does, not from what the places say.

Known limits: of tables and files it is seen whether they are empty; whose the rows are is what the oracle says.
"""

from __future__ import annotations

import asyncio
import email
import email.policy
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from email.message import EmailMessage
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
import msgspec
from sqlalchemy import Table, select

from engine.client import AsyncProducer
from engine.stores import build as build_engine
from policy import erasure, keyspace, schema
from policy.address import normalise, parse, tag_of
from policy.files import CATALOGUE as FILES
from policy.files import family_of
from policy.instants import HOUR_US, rfc3339
from policy.keys import Keyring, seal
from policy.keyspace import CATALOGUE as KEYS
from policy.keyspace import entry_of, partition_of
from policy.personal import Person, Premises, Record, every
from tests.world.mail import MailWorld, job, mail_world
from tests.world.servers import PolicyWorld
from tests.world.traces import open_values
from tracker.app import build as build_tracker
from tracker.settings import TrackerSettings

DOMAIN: Final = "a.grey.test"
GONE, STAYS = f"Quillonzwx.Vexbyrd@{DOMAIN}", f"Ostromgly.Habbwick@{DOMAIN}"
NAMES: Final = {GONE: "Quilliana Vexbyrdson", STAYS: "Ostromund Habbwickson"}
CORRECTED: Final = "Quillianora Vexbyrdottir"
BROWSER: Final = {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"}


async def told(world: PolicyWorld, table: Table) -> list[Any]:
    return await world.writer.store.write(lambda conn: list(conn.execute(select(table))))


def who(keyring: Keyring, address: str) -> tuple[bytes, int]:
    mailbox = parse(address)
    return tag_of(keyring.pepper, normalise(mailbox.local, mailbox.domain)), partition_of(mailbox.domain)


def row(address: str) -> dict[str, Any]:
    when = "2026-03-01T10:00:00Z"
    evidence = {"source": "sign-up form", "time": when, "wording": "letter-v2"}
    purposes = ("mail_marketing", "open_tracking", "click_tracking")
    fields = {"name": NAMES.get(address, "Somebody")}
    return {"address": address, "fields": fields, "consent": dict.fromkeys(purposes, evidence)}


async def until(is_so: Callable[[], Awaitable[Any]], seconds: float = 60.0) -> Any:
    async with asyncio.timeout(seconds):
        while not (found := await is_so()):
            await asyncio.sleep(0.02)  # another process's work, or a loop's
        return found


@dataclass
class Scene:
    """links: of each person's own mails, by what they are."""

    mail: MailWorld
    links: dict[str, dict[str, str]] = field(default_factory=dict)
    base: str = ""

    @property
    def world(self) -> PolicyWorld:
        return self.mail.policy

    @property
    def premises(self) -> Premises:
        writer, world = self.world.writer, self.world
        return Premises(world.settings, writer.store, writer.redis, lambda: writer.keyring, world.clock)

    def tag(self, address: str) -> tuple[bytes, int]:
        return who(self.world.keyring, address)

    async def person(self, address: str) -> Person:
        tag, _ = self.tag(address)
        keyring = self.world.keyring
        return await self.world.writer.store.write(lambda conn: erasure.person_of(conn, keyring, None, tag, address))

    async def export(self, address: str) -> list[Record]:
        person = await self.person(address)
        return [record for place in every(self.premises) for record in await place.export(person)]

    async def subject(self, address: str) -> Any:
        [found] = [one for one in await told(self.world, schema.subject) if one.tag == self.tag(address)[0]]
        return found

    async def status(self, job_id: str) -> Any:
        return self.world.reader.job_status(job_id, self.world.clock())

    async def over(self, job_id: str) -> Any:
        async def ended() -> Any:
            status = await self.status(job_id)
            return status if status is not None and status.state == "done" else None

        return await until(ended)

    async def is_off_the_lanes(self, address: str) -> bool:
        """Asked as an erasure asks, by what is left of the person."""
        numbers = [one.number for one in await told(self.world, schema.erasure) if one.tag == self.tag(address)[0]]
        [queue] = build_engine(self.premises)
        store = self.world.writer.store
        people = [await store.write(lambda conn, n=n: erasure.erased_person(conn, n)) for n in numbers]  # type: ignore[misc]
        return bool(numbers) and not sum([await queue.find(one) for one in people])

    async def drain_worker(self) -> None:
        for worker in self.mail.workers:
            if worker.returncode is None:
                await self.mail.drain(worker)

    async def receipts(self) -> None:
        async def all_given() -> bool:
            self.world.writer.erasing._waits.clear()  # no pauses between two walks
            return {one.state for one in await told(self.world, schema.erasure)} == {"purged"}

        await until(all_given)

    async def visit(self, address: str, *kinds: str) -> None:
        async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), headers=BROWSER) as client:
            for kind in kinds:
                path = urlsplit(self.links[address][kind]).path
                async with client.get(self.base + path, allow_redirects=False) as answer:
                    assert answer.status in (200, 302)

    async def unsubscribe(self, url: str) -> None:
        path = urlsplit(url).path
        async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as client:
            async with client.post(self.base + path, data={"List-Unsubscribe": "One-Click"}) as answer:
                assert (answer.status, await answer.text()) == (200, "Unsubscribed.\n")


@asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    """A worker, a tracker, a writer with all its loops."""
    async with AsyncExitStack() as stack:
        mail = await stack.enter_async_context(mail_world("greylist:0:name=grey,seconds=0.2"))
        await open_values(mail.policy.redis)
        tracker, engine = build_tracker(
            TrackerSettings(port=0, flush_seconds=0.01, writer_seconds=5.0), mail.policy.settings
        )
        stack.callback(engine.dispose)
        stack.push_async_callback(tracker.stop)
        made = Scene(mail, base=f"http://127.0.0.1:{await tracker.start()}")
        await until(lambda: _true(tracker.withdrawn.is_fresh()))
        yield made


async def _true(answer: bool) -> bool:
    return answer


def links_of(raw: bytes) -> dict[str, str]:
    """The tokens of one delivered mail, by kind: what nobody else ever had."""
    message = email.message_from_bytes(raw, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    found = {"opt-out": re.findall(r"<(http[^>]*)>", message["List-Unsubscribe"])[0]}
    part = message.get_body(("html",))
    assert part is not None
    html = part.get_content()
    for url in re.findall(r'(?:href|src)="(http://127\.0\.0\.1:8999/[^"]*)"', html):
        found.setdefault({"o": "open", "c": "click"}.get(url.split("/")[3], url.split("/")[3]), url)
    return found


async def lay(site: Scene) -> None:
    """Two people everywhere, the first with what concerns one person alone: requests, a hold, a rejected job."""
    mail, world, gone, people = site.mail, site.world, GONE, (GONE, STAYS)
    tag, partition = site.tag(gone)
    both = [row(one) for one in people]
    tracked = {"legal_basis": {"basis": "consent"}, "tracking": {"opens": "individual", "clicks": "individual"}}
    await mail.start_worker()
    await mail.submit(job("sent", **tracked), both)
    status = await mail.finished("sent")
    assert status.counts == {"delivered": len(people), "deferred": len(people)}, status
    daily = {**tracked, "tracking": {"opens": "deliverability", "clicks": "off"}}
    await mail.submit(job("daily", **daily), both)
    await mail.finished("daily")
    kept = {one: [raw for raw in mail.kept() if one.lower().encode() in raw.lower()] for one in people}
    for one, mails in kept.items():
        pages = [links_of(raw) for raw in mails]
        [full] = [page for page in pages if "click" in page and "open" in page]
        [other] = [page for page in pages if page is not full]
        site.links[one] = {**full, "daily": other["open"]}
        await site.visit(one, "open", "click", "daily")

    async def seen() -> bool:
        await world.drain()
        return len(await told(world, schema.hit)) == 2 * len(people) and len(await told(world, schema.last_open)) == 2

    await until(seen)
    shop = 1
    offers = await world.ask.list_add(shop, "offers")
    await world.ask.opt_out(offers, partition, tag, "page")
    await world.ask.withdraw(shop, tag, "open_tracking")
    await world.ask.call("read_log", actor="support", purpose="support", what="why", tag=tag, account=shop)
    why = {"actor": "officer", "recipient": "Police", "purpose": "authority", "what": "profile"}
    await world.ask.call("disclose", **why, basis="PIPEDA 7(3)(c): order 26-118", tag=tag)
    await world.ask.call("hold_place", account="shop", tag=tag, reason="claim 7", authority="court")

    # what waits: on a lane, until its hour, put away
    await world.ask.halt_domain(DOMAIN, "pause")
    await mail.submit(job("waits", **tracked), both)
    await mail.submit(job("later", send_at=rfc3339(world.clock() + 5 * HOUR_US), **tracked), both)
    async with AsyncProducer(world.server.url) as producer:
        await producer.submit({**job("broken", **tracked), "subject": "{{ name", "recipients": [row(gone)]}, None)
    dead = {"at": 1, "account": "shop", "job_id": "dead", "problems": [], "payload": gone.encode()}
    sealed = seal(world.keyring.service, msgspec.msgpack.encode(dead), b"dead")
    await world.redis.xadd(keyspace.DEAD, {"sealed": sealed})

    async def resting() -> bool:
        waits, later = await site.status("waits"), await site.status("later")
        queued = waits is not None and waits.rows_submitted == len(people)
        return queued and later is not None and bool(await mail.rejected()) and bool(await world.redis.keys("*:held:*"))

    await until(resting)
    await site.drain_worker()

    # their rights: a correction, a bundle that was handed over, a mail nobody understood
    details = {"field": "name", "value": CORRECTED}
    for kind, named in (("rectification", details), ("access", {})):
        asked = await world.ask.call("rights_open", kind=kind, address=gone, details=named)
        await world.ask.call("rights_prove", ticket=asked["ticket"], note=f"{NAMES[gone]} came in person")

        async def done(ticket: str = asked["ticket"]) -> bool:
            listed = await world.ask.call("rights_list", open_only=False)
            return ticket in {one["ticket"] for one in listed if one["state"] == "done"}

        await until(done)
    await world.ask.call("rights_open", kind="portability", address=gone, details={"text": NAMES[gone]})
    strange = f"From: {NAMES[gone]} <{gone}>\r\nTo: privacy@example.org\r\nSubject: hm\r\n\r\nhm, says {gone}\r\n"
    assert await world.writer.rights_mail.take(strange.encode(), world.clock()) == "unsorted"

    # and an entry that nobody has taken yet, as any producer may write it: in clear
    fresh = json.dumps({**job("fresh", **tracked), "audience": {"chunks": 1}})
    await world.redis.xadd(keyspace.INTAKE, {"job": fresh})
    data = json.dumps(row(gone))
    await world.redis.xadd(keyspace.INTAKE, {"audience": "fresh", "account": "shop", "n": 0, "data": data})
    await world.drain()


# --- the census: what was laid --------------------------------------------------------------------------------------

NOT_LAID: Final = {
    "table:account": "account holders, whose right is another",
    "table:job": "of a job, no recipient in it",
    "table:audit": "keyed references",
    "table:erasure": "the erasure itself makes it",
    "table:purge": "the erasure itself makes it",
    "table:held": "the erasure itself makes it, where a hold stands",
    "table:proof": "a hash of a random token",
    "key:hits": "in the ledger within a second, `until` waits for it",
    "key:events": "in the ledger within a second",
    "key:lane sites": "goes with the last slice that was looked up",
    "file:ledger, being converted": "of an upgrade",
    "file:backup, being made": "while it lasts; it ends sealed, elsewhere",
    "file:restore, being made ready": "while it lasts",
    "file:queue, being rewritten": "while it lasts",
    "file:journal": "of a worker that runs",
    "file:journal, carried out": "of a worker that runs",
}


async def laid(site: Scene) -> set[str]:
    """Names of the inventory that hold something now."""
    found = set()
    for table in schema.metadata.tables.values():
        if await told(site.world, table):
            found.add(f"table:{table.name}")
    async for key in site.world.redis.scan_iter(count=1000):
        entry = entry_of(key.decode())
        if entry is not None:
            found.add(f"key:{entry.name}")
    for path in site.mail.folder.rglob("*"):
        family = family_of(path.relative_to(site.mail.folder).as_posix())
        if path.is_file() and family is not None:
            found.add(f"file:{family.name}")
    return found


def personal() -> set[str]:
    """Names of the inventory that can hold somebody."""
    tables = {item.column.split(".")[0] for item in schema.inventory() if item.personal != "none"}
    return {
        *(f"table:{name}" for name in tables),
        *(f"key:{entry.name}" for entry in KEYS if entry.personal != "none"),
        *(f"file:{family.name}" for family in FILES if family.personal != "none"),
    }


def facts(records: list[Record]) -> Counter[tuple[Any, ...]]:
    shown = {
        "profile": ("account", "address"), "consent": ("purpose", "withdrawn", "wording"),
        "message": ("job", "outcome", "domain", "attempts"), "event": ("job", "event", "link"),
        "inferred": ("job", "what"), "subscription": ("list", "state"), "suppression": ("scope", "name", "reason"),
        "queued": ("job", "state", "fields.name"), "consultation": ("purpose", "what"), "disclosure": ("recipient",),
        "request": ("kind", "state"), "rectification": ("field", "value"), "hold": ("reason", "records"),
        "letter": ("letter",), "mail": (),
    }  # fmt: skip
    return Counter((one.kind, *(one.values.get(name) for name in shown[one.kind])) for one in records)


ORACLE: Final = {
    ("profile", "shop", GONE): 1,
    ("consent", "mail_marketing", False, "letter-v2"): 1,
    ("consent", "open_tracking", False, "letter-v2"): 1,
    ("consent", "click_tracking", False, "letter-v2"): 1,
    ("consent", "open_tracking", True, ""): 1,
    ("message", "sent", "delivered", DOMAIN, 2): 1,
    ("message", "daily", "delivered", DOMAIN, 1): 1,
    ("event", "sent", "deferred", None): 1,
    ("event", "sent", "opened", ""): 1,
    ("event", "sent", "clicked", "https://shop.example/a"): 1,
    ("inferred", "daily", "the mailbox is read"): 1,
    ("subscription", "letter", "subscribed"): 1,
    ("suppression", "list", "offers", "opt-out"): 1,
    ("suppression", "account", "", "visits: withdrawn"): 1,
    ("queued", "waits", "queued", CORRECTED): 1,
    ("queued", "later", "held", CORRECTED): 1,
    ("queued", "broken", "rejected", NAMES[GONE]): 1,
    ("queued", "dead", "dead", None): 1,
    ("queued", "fresh", "submitted", NAMES[GONE]): 1,
    ("consultation", "support", "why"): 1,
    ("disclosure", "Police"): 1,
    ("request", "rectification", "done"): 1,
    ("request", "access", "done"): 1,
    ("request", "portability", "identifying"): 1,
    ("rectification", "name", CORRECTED): 1,
    ("hold", "claim 7", 0): 1,
    ("letter", "done"): 2,
    ("letter", "acknowledged"): 3,
    ("letter", "proof"): 3,
    ("mail",): 1,
}
"""Written down by hand from `lay`: everything about the first of its people, and nothing else."""


async def sealed_octets(site: Scene, address: str) -> set[bytes]:
    """What of a person lies sealed in SQL, as it lies there."""
    one, mrefs = await site.subject(address), {mref for _, mref in (await site.person(address)).references}
    mine = [row for table in (schema.message, schema.history) for row in await told(site.world, table)]
    found = {one.address, one.key}
    for entry in mine:
        if entry.mref in mrefs:
            found |= {octets for octets in (entry.note, getattr(entry, "tag_sealed", None)) if octets}
    return found | {row.value for row in await told(site.world, schema.rectification) if row.subject == one.number}


def tokens(links: dict[str, str]) -> set[str]:
    """Of a person's own links; the one of the privacy notice is the same for all."""
    return {urlsplit(url).path.split("/")[2].removesuffix(".gif") for kind, url in links.items() if kind != "n"}
