"""A bundle of the real places here held against the oracle, and entered into an empty instance (P-42, P-56)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from redis.asyncio import Redis
from sqlalchemy import Connection, Engine, func, select, update

from policy import accounts, consent, negative, remarks, schema, suppression, vault
from policy.bundle import entering, gathering, reading, writing, zips
from policy.bundle.contents import ACCESS, PORTABILITY
from policy.bundle.entering import EnteringError
from policy.bundle.reading import Opened
from policy.enforcement import Effects
from policy.erasure import person_of
from policy.instants import DAY_US, week_of
from policy.keys import Keyring
from policy.personal import Person, Premises, Record
from policy.records import build
from policy.settings import Officer, PolicySettings
from policy.store import Store
from tests.policy.bundle.house import BOB, EVE, FACTS, NOW, facts, furnish
from tests.policy.bundle.people import about
from tests.policy.people import row_of
from tests.policy.stores import policy_store

LATER = NOW + DAY_US


def _premises(engine: Engine, keyring: Keyring, redis: Redis, folder: Path) -> Premises:
    settings = PolicySettings(officer=Officer(name="Officer", address="privacy@sender.example"), data_dir=folder)
    return Premises(settings, Store(engine), redis, lambda: keyring, lambda: NOW)


async def _told(premises: Premises, address: str, account: int | None = None) -> list[Record]:
    tag, _, _ = row_of(premises.keyring().pepper, address)
    found: Person = await premises.store.write(lambda conn: person_of(conn, premises.keyring(), account, tag))
    return (await gathering.gather(build(premises), found)).records


@pytest.fixture
async def here(tmp_path: Path, redis: Redis) -> Any:
    """The house she comes from, furnished."""
    folder = tmp_path / "here"
    folder.mkdir()
    with policy_store(folder) as engine:
        keyring = Keyring.create(folder / "keys", 2967)
        premises = _premises(engine, keyring, redis, folder)
        await premises.store.write(lambda conn: furnish(conn, keyring))
        yield premises
        await premises.store.close()


@pytest.fixture
async def bundle(here: Premises) -> Opened:
    return _bundle(await _told(here, EVE))


def _bundle(records: list[Record], right: str = ACCESS) -> Opened:
    return reading.open_bundle(zips.write(writing.assemble(records, about(right))))


@pytest.fixture
async def there(store: Engine, keyring: Keyring, redis: Redis, tmp_path: Path) -> Any:
    """The house she goes to: empty, on both stores."""
    premises = _premises(store, keyring, redis, tmp_path)
    yield premises
    await premises.store.close()


async def _enter(premises: Premises, opened: Opened, **options: Any) -> tuple[entering.Entered, Effects]:
    effects = Effects()
    done: entering.Entered = await premises.store.write(
        lambda conn: entering.enter(conn, effects, premises.keyring(), opened, LATER, **options)
    )
    return done, effects


def _rows(premises: Premises) -> dict[str, int]:
    with premises.store.engine.connect() as conn:
        return {
            table.name: int(conn.execute(select(func.count()).select_from(table)).scalar_one())
            for table in schema.metadata.tables.values()
        }


async def test_p42_the_real_places_tell_what_was_put_in_and_nothing_of_the_neighbour(here: Premises) -> None:
    told = await _told(here, EVE)
    assert facts(told) == FACTS
    assert not [record for record in told if BOB in str(record.values) or "Secret service" in str(record.values)]
    assert {record.kind for record in _bundle(told).records} == {record.kind for record in told} | {"use"}


def _meaning(records: list[Record]) -> Counter[tuple[str, str]]:
    """Without what is of one house only: its keyed references, when it entered consent, whom it took a visitor for."""
    told: Counter[tuple[str, str]] = Counter()
    for record in records:
        if record.kind in ("profile", "subscription", "consent", "suppression", "message", "event"):
            values = {
                name: value
                for name, value in record.values.items()
                if name not in ("reference", "recorded_at", "visitor")
                and not (name == "created_at" and str(record.values.get("reason")).startswith("visits: "))
            }
            told[record.kind, str(sorted(values.items(), key=repr))] += 1
    return told


@pytest.mark.parametrize("right", [ACCESS, PORTABILITY])
async def test_p56_entered_into_an_empty_instance_it_means_the_same(
    here: Premises, there: Premises, right: str
) -> None:
    told = await _told(here, EVE)
    done, _ = await _enter(there, _bundle(told, right), make_accounts=True)
    assert _meaning(await _told(there, EVE)) == _meaning(told)
    # the two of Eve that have no meaning in another house, and the account of use made of all
    assert done.left["consultation"] == done.left["disclosure"] == 1
    assert done.left["use"] > 0
    assert set(done.left) == {"consultation", "disclosure", "use"}
    assert done.rows == 8  # three messages, two steps, three hits


async def test_whose_name_is_known_here_since_yesterday_only_has_her_older_messages_found(
    here: Premises, there: Premises, bundle: Opened
) -> None:
    keyring = there.keyring()

    def known(conn: Connection) -> None:
        for name in ("acme", "globex"):
            number = accounts.add(conn, name, display_name=name, now=NOW).number
            vault.resolve(conn, keyring, number, [row_of(keyring.pepper, EVE)], week_of(NOW), NOW)

    await there.store.write(known)
    await _enter(there, bundle)
    assert _meaning(await _told(there, EVE)) == _meaning(await _told(here, EVE))


async def test_repeated_it_changes_nothing(there: Premises, bundle: Opened) -> None:
    first, _ = await _enter(there, bundle, make_accounts=True)
    before = _rows(there)
    again, _ = await _enter(there, bundle)
    after = _rows(there)
    assert {name: n for name, n in after.items() if n != before[name]} == {"audit": before["audit"] + 1}
    assert (again.taken, again.left, again.rows) == (first.taken, first.left, 0)


async def test_the_name_a_foreign_bundle_gives_itself_is_not_in_the_chain(there: Premises, bundle: Opened) -> None:
    manifest = msgspec.structs.replace(bundle.manifest, ticket="for ada@example.org")
    await _enter(there, replace(bundle, manifest=manifest), make_accounts=True)
    with there.store.engine.connect() as conn:
        [line] = conn.execute(select(schema.audit).where(schema.audit.c.action == "bundle-import")).all()
    assert line.object_ref == remarks.named(there.keyring(), "foreign-bundle", "for ada@example.org")
    assert "ada" not in line.object_ref


async def test_counters_agree_with_the_rows(there: Premises, bundle: Opened) -> None:
    """I6: rows submitted = the sum of the terminal states."""
    await _enter(there, bundle, make_accounts=True)
    await _enter(there, bundle)
    with there.store.engine.connect() as conn:
        for row in conn.execute(select(schema.job)):
            where = schema.counter.c.job == row.number, schema.counter.c.kind < 16
            assert conn.execute(select(func.sum(schema.counter.c.n)).where(*where)).scalar() == row.rows_submitted == 1
            assert (row.state, row.reason) == ("done", "imported")
        assert conn.execute(select(func.sum(schema.hit_counter.c.n))).scalar() == 3


async def test_what_was_withdrawn_is_in_force_at_gate_and_trackers(there: Premises, bundle: Opened) -> None:
    _, effects = await _enter(there, bundle, make_accounts=True)
    tag, partition, _ = row_of(there.keyring().pepper, EVE)
    assert effects.tags == {(tag, partition)}
    with there.store.engine.connect() as conn:
        acme, globex = (accounts.get(conn, name) for name in ("acme", "globex"))
        assert acme is not None
        assert globex is not None
        number = vault.number_of(conn, acme.number, tag)
        assert number is not None
        assert negative.standing(conn, number) == "withdrawn"
        assert [(subject, cause) for subject, cause, _ in effects.negative] == [(number, "withdrawn")]
        reasons = {(one.scope, one.scope_id, one.reason) for one in suppression.check(conn, tag)}
        news = accounts.list_number(conn, acme.number, "news")
        assert reasons == {
            (suppression.Scope.LIST, news, "opt-out"),
            (suppression.Scope.ACCOUNT, globex.number, "complaint"),
        }
        assert consent.standing(conn, [number], "mail_marketing", LATER) == {number}
        assert consent.standing(conn, [number], "open_tracking", LATER) == set()


def _changed(opened: Opened, **kinds: Any) -> Opened:
    """kinds: what becomes of each record's values, by kind."""
    return replace(
        opened,
        records=[
            Record(record.kind, {**record.values, **kinds[record.kind]}) if record.kind in kinds else record
            for record in opened.records
        ],
    )


async def test_mail_consent_taken_back_stops_mail_even_if_no_suppression_says_so(
    there: Premises, bundle: Opened
) -> None:
    kept = [record for record in bundle.records if record.kind != "suppression"]
    opened = _changed(replace(bundle, records=kept), consent={"purpose": "mail_marketing", "withdrawn": True})
    await _enter(there, opened, make_accounts=True)
    tag, _, _ = row_of(there.keyring().pepper, EVE)
    with there.store.engine.connect() as conn:
        assert {(one.scope, one.scope_id) for one in suppression.check(conn, tag)} == {
            (suppression.Scope.ACCOUNT, 1), (suppression.Scope.ACCOUNT, 2),
        }  # fmt: skip


async def test_who_was_erased_here_stays_erased(there: Premises, bundle: Opened) -> None:
    tag, partition, _ = row_of(there.keyring().pepper, EVE)
    entry = suppression.Entry(tag, partition, suppression.Scope.PLATFORM, 0, "erasure", NOW)
    await there.store.write(lambda conn: suppression.add(conn, [entry]))
    done, _ = await _enter(there, bundle, make_accounts=True)
    rows = _rows(there)
    assert rows["subject"] == rows["message"] == rows["consent"] == rows["hit"] == rows["job"] == 0
    assert rows["suppression"] == 3
    assert (done.left["profile"], done.left["message"], done.left["event"], done.rows) == (2, 3, 5, 0)


async def test_a_job_that_was_sent_from_here_takes_no_rows(there: Premises, here: Premises, bundle: Opened) -> None:
    await _enter(there, bundle, make_accounts=True)
    own = update(schema.job).where(schema.job.c.job_id == "job-0").values(reason=None)
    await there.store.write(lambda conn: conn.execute(own))
    before = _rows(there)
    done, _ = await _enter(there, bundle)
    assert (done.left["message"], done.left["event"]) == (1, 4)
    assert {name for name, n in _rows(there).items() if n != before[name]} == {"audit"}


async def test_what_is_no_evidence_is_none_here_either(there: Premises, bundle: Opened) -> None:
    """Decision 19: without a source it does not count; a withdrawal counts without one."""
    done, _ = await _enter(there, _changed(bundle, consent={"source": ""}), make_accounts=True)
    assert (done.taken["consent"], done.left["consent"]) == (1, 3)
    with there.store.engine.connect() as conn:
        assert conn.execute(select(schema.consent.c.withdrawn)).scalars().all() == [1]


async def test_expiry_is_kept(there: Premises, bundle: Opened) -> None:
    opened = _changed(bundle, consent={"expires_at": "2026-12-01T00:00:00.000000Z", "basis": "implied"})
    await _enter(there, opened, make_accounts=True)
    with there.store.engine.connect() as conn:
        [number] = conn.execute(select(schema.subject.c.number).where(schema.subject.c.account == 2)).scalars().all()
        end = 1_796_083_200_000_000
        assert consent.standing(conn, [number], "mail_marketing", end - 1) == {number}
        assert consent.standing(conn, [number], "mail_marketing", end) == set()


@pytest.mark.parametrize(
    ("kinds", "text"),
    [
        ({"profile": {"address": "nobody"}}, "no deliverable address"),
        ({"consent": {"given_at": "yesterday"}}, "given_at is not an instant"),
        ({"message": {"outcome": None, "at": None}}, "is not an instant|lacks a field"),
        ({"suppression": {"scope": "galaxy"}}, "a suppression lacks a field"),
    ],
)
async def test_what_cannot_be_entered_is_refused_whole_and_quotes_nothing(
    there: Premises, bundle: Opened, kinds: dict[str, Any], text: str
) -> None:
    before = _rows(there)
    with pytest.raises(EnteringError, match=text) as refused:
        await _enter(there, _changed(bundle, **kinds), make_accounts=True)
    assert "eve" not in str(refused.value).lower()
    assert _rows(there) == before


async def test_accounts_are_made_only_when_told_to(there: Premises, bundle: Opened) -> None:
    with pytest.raises(EnteringError, match="there is no account 'acme' here"):
        await _enter(there, bundle)


async def test_two_people_in_one_bundle_are_refused(there: Premises, here: Premises, bundle: Opened) -> None:
    other = [record for record in await _told(here, BOB) if record.kind == "profile"]
    with pytest.raises(EnteringError, match="exactly one person"):
        await _enter(there, replace(bundle, records=[*bundle.records, *other]), make_accounts=True)


@pytest.mark.parametrize(
    ("said", "stands"),
    [
        (["objected"], "objected"),
        (["objected", "lifted"], None),
        (["objected", "lifted", "restricted"], "restricted"),
        (["a word of the future"], "objected"),
    ],
)
async def test_the_last_word_on_visits_is_taken_over(
    there: Premises, bundle: Opened, said: list[str], stands: str | None
) -> None:
    records = [record for record in bundle.records if record.kind == "profile"]
    for day, cause in enumerate(said, 1):
        at = f"2026-01-{day:02}T00:00:00.000000Z"
        values = {"target": "address", "scope": "account", "account": "acme", "reason": f"visits: {cause}"}
        records.append(Record("suppression", {**values, "created_at": at}))
    for _ in range(2):
        await _enter(there, replace(bundle, records=records), make_accounts=True)
    with there.store.engine.connect() as conn:
        where = schema.subject.c.account == 1
        [number] = conn.execute(select(schema.subject.c.number).where(where)).scalars().all()
        assert negative.standing(conn, number) == stands
        assert conn.execute(select(func.count()).select_from(schema.negative)).scalar() == (stands is not None)
        assert conn.execute(select(func.count()).select_from(schema.suppression)).scalar() == 0
