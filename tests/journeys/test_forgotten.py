"""Must show (issue 5): one person is in every place of a running installation, and after the erasure in none.

What is laid where, and the list of it made by hand: `tests.world.laid`; how it is searched for: `tests.world.traces`.
Killed at each step (P-17) with the places of all floors; `tests.journeys.test_erasure` does the same with SQL alone.
Time of the answer over two million messages: benchmarks/erasure.py.

Known limits: whoever is taken out of a slice leaves an empty row (job, mref) in the ledger until that job is over, so
receipts come after it; the journeys end the job.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # its stubs are a package of their own
from sqlalchemy import func, select
from typer.testing import CliRunner

import policy.enforcement
from policy import accounts, audit, chores, erasing, erasure, keyspace, schema, suppression, vault
from policy.bundle.reading import open_bundle
from policy.dockets import keep_held
from policy.enforcement import Effects
from policy.files import family_of
from policy.instants import DAY_US, HOUR_US, rfc3339
from policy.keys import Keyring
from policy.personal import Premises, every
from policy.schema import open_store, upgrade
from policy.store import Store
from policy.suppression import Scope
from policy.writer import Writer
from tests.journeys.test_erasure import APP, STEPS
from tests.journeys.test_nothing_in_clear import _rewritten
from tests.policy.bundle.test_entering import _meaning
from tests.policy.test_rewrapping import WEEK, House
from tests.world.laid import (
    CORRECTED,
    DOMAIN,
    GONE,
    NAMES,
    NOT_LAID,
    ORACLE,
    STAYS,
    Scene,
    facts,
    laid,
    lay,
    personal,
    row,
    scene,
    sealed_octets,
    tokens,
    told,
    until,
    who,
)
from tests.world.mail import ROOT, job
from tests.world.octets import octets
from tests.world.servers import policy_world, settings_for
from tests.world.traces import Traces, forms


async def erase_by_command(site: Scene, address: str) -> Any:
    words = ["erase", address, "--yes", "--json", "--config", str(site.mail.config)]
    result = await asyncio.to_thread(CliRunner().invoke, APP, words)
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SALES_PUSH_")]:
        monkeypatch.delenv(name)


# --- the search -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [GONE, NAMES[GONE], "Zoë Vexbyrd"])
def test_each_form_of_a_text_is_found_and_of_another_none(tmp_path: Path, text: str) -> None:
    lost, other = Traces.of(GONE, text), Traces.of("nobody-at-all@else.example", "Nobody Atall")
    for place, (name, needle) in enumerate(forms(text)):
        path = tmp_path / f"{place}"
        path.write_bytes(b"before " + needle + b" behind")
        assert lost.in_files(tmp_path).keys() == {path.name}, name
        assert other.in_files(tmp_path) == {}
        path.unlink()
    for before in range(4):
        held = b"x" * before + text.encode() + b"yz"
        for coded in (base64.b64encode(held), base64.urlsafe_b64encode(held), held.hex().encode()):
            assert lost.within(coded), (before, coded)


# --- everything, once -----------------------------------------------------------------------------------------------


async def test_erased_from_every_place_and_the_neighbour_keeps_everything(
    record_property: Callable[[str, object], None], capfd: pytest.CaptureFixture[str]
) -> None:
    """P-54, P-17, P-22 and P-42 in one life: asked about, handed over, erased, imported again, unsubscribed."""
    async with scene() as site:
        mail, world = site.mail, site.world
        await lay(site)
        found = await laid(site)
        assert personal() - found - NOT_LAID.keys() == set(), "nothing was laid there"

        # P-42: what is told is what was laid, in a bundle that is whole, and means the same elsewhere
        assert facts(await site.export(GONE)) == ORACLE
        await bundle_means_the_same(site)

        tag, _ = site.tag(GONE)
        gone, octets = await site.subject(GONE), await sealed_octets(site, GONE)
        own = tokens(site.links[GONE])
        assert len(own) == 4, "two that tell of reading, one that tells of a click, one to leave with"
        assert len(octets) >= 6
        lost = Traces.of(GONE, NAMES[GONE], CORRECTED, tokens=own, raw=octets)
        before = await site.export(STAYS)
        there = lost.in_files(mail.folder)
        families = {known.name for name in there if (known := family_of(name))}
        assert families >= {"ledger", "queue", "letters", "unsorted mail"}, "the search finds what is there"
        assert list(await lost.in_redis(world.redis)) == [keyspace.INTAKE]

        answer = await erase_by_command(site, GONE)
        assert (answer["new"], answer["messages"], answer["held"]) == (True, 2, 1)
        assert [one.number for one in await told(world, schema.subject)] == [(await site.subject(STAYS)).number]
        await is_suppressed(site, GONE)
        # what only somebody else can end: letters go by the operator's hand, the entry is taken by a worker
        for letter in await world.ask.call("rights_letters"):
            assert await world.ask.call("rights_letter_sent", name=letter["name"])
        for bundle in (mail.folder / "exports").iterdir():
            bundle.unlink()  # it was handed over
        assert {one.state for one in await told(world, schema.erasure)} == {"shredded"}, "the intake has not let go yet"
        await mail.start_worker()
        assert (await site.over("fresh")).reasons["refused"] == {"erased": 1}
        # the waiting job goes on: until it is over, an empty row keeps its counters exact, and the receipt waits
        await until(lambda: site.is_off_the_lanes(GONE))
        assert await site.export(STAYS) == before
        await world.ask.halt_domain(DOMAIN, "resume")
        assert (await site.over("waits")).reasons["refused"] == {"erased": 1}
        await site.receipts()
        await until(lambda: _rewritten(mail))
        wires = [wire.lower() for wire in mail.kept()]
        assert [sum(one.lower().encode() in wire for wire in wires) for one in (GONE, STAYS)] == [2, 3]

        assert lost.in_files(mail.folder) == {}
        assert await lost.in_redis(world.redis) == {}
        kinds = Counter(one.kind for one in await site.export(GONE))
        assert kinds == {"suppression": 2, "request": 3, "erasure": 2}, "what P-22 and 17(3) leave, by keyed tag alone"
        assert await left_in_sql(site, gone.number) == {"negative", "reading", "disclosure", "hold", "erasure"}
        assert [one.address for one in await told(world, schema.request) if one.closed] == [None, None]

        # imported again, by whoever it is: refused, and nothing is made of it
        await mail.submit(job("again"), [row(GONE), row(STAYS)])
        assert (await site.over("again")).reasons["refused"] == {"erased": 1}
        assert [one.tag for one in await told(world, schema.subject)] == [site.tag(STAYS)[0]]

        # the links in the mails that they have: reading is not remembered, leaving works, also without a send log
        hits = len(await told(world, schema.hit))
        await site.visit(GONE, "open", "click", "daily")
        await site.unsubscribe(site.links[GONE]["opt-out"])
        await world.drain()
        assert len(await told(world, schema.hit)) == hits
        for table in (schema.message, schema.history, schema.counter):
            await world.writer.store.write(lambda conn, table=table: conn.execute(table.delete()))  # type: ignore[misc]
        for one in (GONE, STAYS):
            await site.unsubscribe(site.links[one]["opt-out"])
        reasons = {(one.tag, one.reason) for one in await told(world, schema.suppression)}
        assert reasons == {(tag, "erasure"), (tag, "opt-out"), (site.tag(STAYS)[0], "opt-out")}
        await is_suppressed(site, GONE)

        assert lost.in_files(mail.folder) == {}
        assert await lost.in_redis(world.redis) == {}
        assert await world.writer.store.write(audit.verify) is None
    said = capfd.readouterr()
    assert lost.within((said.out + said.err).encode()) == [], "what the writer logged"
    record_property("needles", len(lost.needles))


async def is_suppressed(site: Scene, address: str) -> None:
    tag, partition = site.tag(address)
    entries = await site.world.writer.store.write(lambda conn: suppression.check(conn, tag))
    assert ("erasure", Scope.PLATFORM) in {(one.reason, one.scope) for one in entries}
    assert await site.world.redis.hget(keyspace.suppression(partition, tag), tag), "the gate knows it"


async def left_in_sql(site: Scene, subject: int) -> set[str]:
    """Tables with rows of a subject number."""
    tables = [table for table in schema.metadata.tables.values() if "subject" in table.columns]
    return {table.name for table in tables if subject in {one.subject for one in await told(site.world, table)}}


async def bundle_means_the_same(site: Scene) -> None:
    """P-42, P-56: the bundle is the oracle's list, valid by the schemas in it, and entered elsewhere it is the same."""
    world, person = site.world, await site.person(GONE)
    asked = {one.kind: one.ticket for one in await told(world, schema.request)}
    written = await world.writer.bundles.write(person, asked["access"], "access")
    opened = open_bundle(written.path.read_bytes(), written.passphrase)
    assert facts([one for one in opened.records if one.kind != "use"]) == ORACLE
    assert written.notes == ()
    lines = 0
    for name in [name for name in opened.files if name.startswith("data/")]:
        validator = Draft202012Validator(json.loads(opened.files[f"schema/{name[5:-6]}.schema.json"]))
        for line in opened.files[name].splitlines():
            validator.validate(json.loads(line))
            lines += 1
    assert lines == len(opened.records) > sum(ORACLE.values())
    async with policy_world() as empty:
        answer = await empty.ask.call(
            "bundle_import", file=str(written.path), passphrase=written.passphrase, make_accounts=True
        )
        assert answer["rows"] == 2 + 1 + 2, "messages, a deferral, an open and a click"
        tag, _ = who(empty.keyring, GONE)
        ring, store = empty.keyring, empty.writer.store
        there = await store.write(lambda conn: erasure.person_of(conn, ring, None, tag, GONE))
        premises = Premises(empty.settings, store, empty.writer.redis, lambda: ring, empty.clock)
        records = [record for place in every(premises) for record in await place.export(there)]
        assert _meaning(records) == _meaning(opened.records)


# --- killed at each step --------------------------------------------------------------------------------------------


async def erase_and_die(folder: Path, step: str, address: str) -> None:
    """A whole writer, places of every floor, that is gone at a step of this erasure (SIGKILL)."""

    def reached(point: str) -> None:
        if point == step:
            os.kill(os.getpid(), signal.SIGKILL)

    settings = settings_for(folder)
    writer = Writer(settings, Keyring.load(settings.keys_dir))
    await writer.start()
    append = writer.tombstones.append

    def appended(lines: Any) -> None:
        append(lines)
        reached("in-tombstone")

    for room in (policy.enforcement, erasing):
        vars(room)["reach"] = reached
    vars(writer.tombstones)["append"] = appended
    tag, partition = who(writer.keyring, address)
    await writer.erasing.erase(0, tag, partition, address, "request", None)
    while writer.erasing.statistics()["erasures_open"]:
        await asyncio.sleep(0.02)
    print("never came there")


@pytest.mark.parametrize("steps", [STEPS[place::4] for place in range(4)], ids=",".join)
async def test_killed_at_each_step_in_a_whole_world_it_converges(steps: tuple[str, ...]) -> None:
    """P-17, P-54: one after another, a person a step; what is suppressed is seen before anything is mended."""
    people = {step: f"{step}.quillonzwx@{DOMAIN}" for step in steps}
    async with scene() as site:
        mail, world = site.mail, site.world
        await mail.start_worker()
        everybody = [row(one) for one in (*people.values(), STAYS)]
        await mail.submit(job("sent"), everybody)
        await mail.finished("sent")
        await world.ask.halt_domain(DOMAIN, "pause")
        # a receipt waits for the jobs that somebody was taken out of: who is to get one at once waits in none
        lasting = [one for one in everybody if "receipt" not in one["address"]]
        await mail.submit(job("waits"), lasting)
        await mail.submit(job("later", send_at=rfc3339(world.clock() + 5 * HOUR_US)), everybody)

        async def resting() -> bool:
            waits = await site.status("waits")
            expanded = waits is not None and waits.rows_submitted == len(lasting)
            return expanded and bool(await world.redis.keys("*:held:*")) and not await world.redis.xlen(keyspace.INTAKE)

        await until(resting)
        await site.drain_worker()
        await world.drain()
        before = await site.export(STAYS)
        assert Counter(one.kind for one in before)["queued"] == 2
        lost = {one: Traces.of(one, raw=await sealed_octets(site, one)) for one in people.values()}
        for step, address in people.items():
            assert lost[address].in_files(mail.folder), "the search finds what is there"
            await world.writer.stop()
            code = (
                "import asyncio, sys; from pathlib import Path; "
                "from tests.journeys.test_forgotten import erase_and_die as do; "
                "asyncio.run(do(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))"
            )
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", code, str(mail.folder), step, address, cwd=ROOT, stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            out, errors = await child.communicate()
            assert child.returncode == -signal.SIGKILL, (step, out, errors.decode()[-2000:])
            engine = open_store(world.settings.sql_address(), writer=False)
            tag, partition = site.tag(address)
            with engine.connect() as conn:
                there = select(func.count()).select_from(schema.subject).where(schema.subject.c.tag == tag)
                is_known = bool(conn.execute(there).scalar())
                assert is_known or suppression.check(conn, tag), "erased, and not suppressed"
            engine.dispose()
            world.writer = Writer(world.settings, world.keyring, clock=world.clock)
            await world.writer.start()
            if step in ("before-suppress", "in-tombstone"):  # nobody was told that it is done: asked again
                assert is_known
                await world.ask.call("erase", account=0, tag=tag, partition=partition, address=address)
            await until(lambda address=address: site.is_off_the_lanes(address))  # type: ignore[misc]
            await is_suppressed(site, address)
            assert tag not in {one.tag for one in await told(world, schema.subject)}
        assert await site.export(STAYS) == before
        for job_id in ("waits", "later"):
            await world.ask.job_state(job_id, "cancelled")
        await mail.start_worker()
        await site.receipts()
        await until(lambda: _rewritten(mail))
        for address in people.values():
            assert lost[address].in_files(mail.folder) == {}
            assert await lost[address].in_redis(world.redis) == {}
            assert {one.kind for one in await site.export(address)} == {"suppression", "erasure"}
        status = await site.status("waits")
        assert status.reasons["refused"] == {"erased": len(lasting) - 1}, "each once (I6)"
        assert [one.tag for one in await told(world, schema.subject)] == [site.tag(STAYS)[0]]
        assert await world.writer.store.write(audit.verify) is None


# --- copies ---------------------------------------------------------------------------------------------------------


async def test_a_copy_of_twenty_days_opens_nobody(tmp_path: Path) -> None:
    """Decision 13: keys of subjects are wrapped anew each week, and the wrapping keys of old copies are destroyed."""
    engine = open_store(f"sqlite:///{tmp_path / 'policy.db'}", writer=True)
    upgrade(engine)
    store, keys = Store(engine), tmp_path / "keys"
    house = House(store, keys, Keyring.create(keys, WEEK))
    await house.week(WEEK)
    await store.write(lambda conn: accounts.add(conn, "acme", display_name="Acme", now=house.now))
    tag, partition = who(house.keyring, GONE)
    neighbour = (*who(house.keyring, STAYS), STAYS)
    rows = [(tag, partition, GONE), neighbour]
    [(gone, _), (stays, _)] = await store.write(
        lambda conn: vault.resolve(conn, house.keyring, 1, rows, WEEK, house.now)
    )
    assert erasing.cut_log(engine), "all of it is in the one file"
    (tmp_path / "old.db").write_bytes(octets(tmp_path / "policy.db"))
    old = open_store(f"sqlite:///{tmp_path / 'old.db'}", writer=False)
    with old.connect() as conn:
        assert [vault.get(conn, house.keyring, number).address for number in (gone, stays)] == [GONE, STAYS]  # type: ignore[union-attr]

    def erased(conn: Any) -> None:
        begun = erasure.begin(
            conn, Effects(), account=0, tag=tag, partition=partition, lane="", cause="request", request=None,
            now=house.now, ledger=None,
        )  # fmt: skip
        for number in begun.erasures:
            erasure.shred(conn, house.keyring, number, house.now, keep_held)

    await store.write(erased)
    made = house.now
    for week in range(WEEK + 1, WEEK + 4):
        await house.week(week)
        house.now += 2 * DAY_US  # a successor must have been there for a day
        await house.finish()
        await chores.turn_keys(store, keys, house.now)
    assert house.now - made >= 20 * DAY_US
    assert f"kek.{WEEK}" not in house.files()
    whatever = Keyring.load(keys)
    with old.connect() as conn:
        for number in (gone, stays):
            with pytest.raises(vault.VaultError):
                vault.get(conn, whatever, number)
    assert await house.addresses() == [STAYS], "who lives is opened by today's keys"
    old.dispose()
    await store.close()
