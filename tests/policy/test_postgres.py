"""PostgreSQL beside SQLite (decision 15): the same tables, divided by day; the same folding; what a day's end leaves.

The other tests of this folder run on both stores as they are. Here is what only PostgreSQL has, and one law over both:
whatever is told in whatever order, both ledgers hold the same rows and counters.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, Engine, func, insert, inspect, make_url, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, InternalError, OperationalError

from policy import drains, partitions, schema, statements
from policy.drains import EventBook
from policy.events import Batch, Event, Hit, Kind, Reason
from policy.gate import Mode
from policy.instants import DAY_US
from tests.policy.stores import only_postgresql, only_sqlite, policy_store, url_of
from tests.world.postgres import PostgresServer

TODAY = 20_780
NOON = TODAY * DAY_US + DAY_US // 2
ACCOUNT = {
    "number": 1, "name": "acme", "display_name": "", "postal_address": "", "website": "", "privacy_url": "",
    "state": "active", "opens_mode": 3, "clicks_mode": 3, "created": 1,
}  # fmt: skip


def event(mref: int, at: int = NOON, kind: Kind = Kind.DELIVERED, attempt: int = 1, **more: Any) -> Event:
    return Event(kind, mref, attempt, at, 77, b"t" * 12, more.get("reason", Reason.NONE), 250, "2.0.0", 3)


def told(conn: Connection, *events: Event, job: int = 1, chunk: int = -1) -> drains.Recorded:
    book = EventBook(conn.dialect.name, bytes(32))
    return book.record(conn, [("s", "1-1", Batch(job, "one.example", list(events), chunk))])


def tables_of(conn: Connection) -> set[str]:
    return set(conn.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")))


# --- the same tables -----------------------------------------------------------------------------------------------


@only_postgresql
def test_the_store_has_exactly_the_tables_of_the_inventory(store: Engine) -> None:
    """Census: no column that the inventory does not know, and no table but partitions beside the declared ones."""
    sql = """
        SELECT c.relname || '.' || a.attname FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition
          AND a.attnum > 0 AND NOT a.attisdropped
    """
    with store.connect() as conn:
        found = set(conn.scalars(text(sql)))
    assert found - {item.column for item in schema.inventory()} == {"schema_version.version_num"}
    assert {item.column for item in schema.inventory()} <= found


@only_postgresql
def test_the_migrations_end_where_the_declarations_are(store: Engine) -> None:
    """Columns, types, indexes and references as declared; keys too, with `day` where a table is divided by it."""
    with store.connect() as conn:
        partitions.prepare(conn, TODAY)
        divided = {"message", "history", "hit"}
        parts = {name for name in tables_of(conn) if name.partition("_d")[0] in divided and name not in divided}
        assert len(parts) == 3 * (1 + 1 + partitions.AHEAD + 1)

        def ours(thing: Any, name: str | None, kind: str, *_: Any) -> bool:
            return not (kind == "table" and name in parts)

        context = MigrationContext.configure(
            conn, opts={"version_table": "schema_version", "include_object": ours, "compare_type": True}
        )
        assert compare_metadata(context, schema.metadata) == []
        look = inspect(conn)
        for table in schema.metadata.tables.values():
            declared = [column.name for column in table.primary_key]
            key = look.get_pk_constraint(table.name)["constrained_columns"]
            assert key == ([*declared, "day"] if table.name in divided else declared), table.name
        conn.rollback()


@only_postgresql
def test_an_older_store_keeps_its_rows_and_numbers_go_on(postgres_server: PostgresServer) -> None:
    """Up to 0004 nothing was divided: rows move over, and from the default partition to their days."""
    config = Config()
    config.set_main_option("script_location", str(Path(schema.__file__).with_name("migrations")))
    config.set_main_option("path_separator", "os")
    url = postgres_server.database()
    engine = schema.open_store(url, writer=True)
    row = {"job": 1, "kind": 1, "day": TODAY, "mref": 5, "link": 0, "hour": 0, "visitor": 0, "mode": 3}
    with engine.begin() as conn:
        config.attributes["connection"] = conn
        command.upgrade(config, "0004")
        conn.execute(insert(schema.hit), [row, row | {"day": TODAY - 40}])
    schema.upgrade(engine)
    with engine.begin() as conn:
        conn.execute(insert(schema.hit).values(row))
        assert sorted(conn.scalars(select(schema.hit.c.id))) == [1, 2, 3]
        done = partitions.prepare(conn, TODAY)
        assert done.adopted == 3
        assert conn.scalar(text(f"SELECT count(*) FROM hit_d{TODAY}")) == 2
        assert conn.scalar(text(f"SELECT count(*) FROM hit_d{TODAY - 40}")) == 1
        assert conn.scalar(text("SELECT count(*) FROM hit_default")) == 0
    engine.dispose()
    postgres_server.drop(url)


@only_postgresql
def test_types_and_references_are_held_by_the_database(store: Engine) -> None:
    with pytest.raises(DBAPIError), store.begin() as conn:
        conn.exec_driver_sql("insert into cursor values ('ev', null)")
    with pytest.raises(IntegrityError), store.begin() as conn:
        conn.exec_driver_sql("insert into list (account, name, display_name) values (99, 'n', 'n')")


@only_postgresql
def test_what_is_asked_of_large_tables_is_found_by_an_index(store: Engine) -> None:
    """As asked of SQLite (test_schema.py), and the writer's own question before each insert; no statistics yet."""
    lists = "ARRAY[1,1]::bigint[], ARRAY[2,3]::bigint[]"
    known = statements.known("message", "job, mref").replace("%s::bigint[], %s::bigint[]", lists).replace("%s", "0")
    questions = [
        "select number from subject where account = 1 and tag in ('a'::bytea, 'b'::bytea)",
        f"select mref from message where day = {TODAY} and pseudonym in (1, 2)",
        "select kind from message where job = 1 and mref = 2",
        known,
    ]
    with store.begin() as conn:
        partitions.prepare(conn, TODAY)
        conn.execute(insert(schema.account).values(ACCOUNT))
        conn.exec_driver_sql(
            "INSERT INTO subject SELECT n, 1, decode(lpad(to_hex(n), 24, '0'), 'hex'), 1, '', '', 1, 1"
            " FROM generate_series(1, 20000) n"
        )
        conn.exec_driver_sql(
            f"INSERT INTO message SELECT 1, n, 1, 0, 1, 250, '', 1, 1, {TODAY}, n, NULL, 3, NULL"
            " FROM generate_series(1, 20000) n"
        )
        for question in questions:
            plan = [str(row[0]) for row in conn.exec_driver_sql(f"EXPLAIN {question}")]
            large = [step for step in plan if f"Seq Scan on message_d{TODAY}" in step or "Seq Scan on subject" in step]
            assert not large, (question, plan)
            assert any("Index" in step for step in plan), (question, plan)


# --- one writer, many readers ----------------------------------------------------------------------------------------


@only_postgresql
def test_what_the_writer_told_is_durable_whatever_the_servers_default(store: Engine) -> None:
    name = make_url(store.url).database
    with store.begin() as conn:
        conn.exec_driver_sql(f"ALTER DATABASE {name} SET synchronous_commit = off")
    store.dispose()
    with store.connect() as conn:
        assert conn.scalar(text("SHOW synchronous_commit")) == "on"
        assert conn.scalar(text("SHOW lock_timeout")) == "30s"


@only_postgresql
def test_writers_of_several_hosts_take_turns(store: Engine, tmp_path: Path) -> None:
    """Law of `open_store`: while one is in a transaction, no other begins; afterwards it does."""
    other = schema.open_store(url_of(tmp_path), writer=True)
    with store.begin():
        with other.connect() as bare, pytest.raises(OperationalError, match="lock timeout"):
            assert bare.connection.dbapi_connection is not None
            raw = bare.connection.dbapi_connection
            raw.cursor().execute("SET lock_timeout = 20")
            raw.commit()
            bare.begin()
    with other.connect() as conn:
        assert conn.scalar(text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted")) == 1
    other.dispose()


@only_postgresql
def test_a_reader_cannot_write(store: Engine, tmp_path: Path) -> None:
    reader = schema.open_store(url_of(tmp_path), writer=False)
    with reader.connect() as conn, pytest.raises(InternalError, match="read-only"):
        conn.execute(insert(schema.cursor).values(stream="ev", last_id="1-1"))
    reader.dispose()


def test_without_the_driver_the_operator_hears_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ModuleNotFoundError("No module named 'psycopg'", name="psycopg")

    monkeypatch.setattr(schema, "create_engine", missing)
    with pytest.raises(schema.StoreError, match=r"sales-push\[postgres\]"):
        schema.open_store("postgresql+psycopg://nobody@nowhere/none", writer=True)


# --- partitions ------------------------------------------------------------------------------------------------------


@only_postgresql
def test_days_are_prepared_ahead_and_again_changes_nothing(conn: Connection) -> None:
    days = 1 + 1 + partitions.AHEAD
    assert partitions.prepare(conn, TODAY) == partitions.Prepared(made=3 * days)
    assert partitions.prepare(conn, TODAY) == partitions.Prepared()
    assert partitions.prepare(conn, TODAY + 2) == partitions.Prepared(made=3 * 2)
    told(conn, event(1), event(2, NOON + DAY_US), event(3, kind=Kind.DEFERRED))
    assert conn.scalar(text(f"SELECT count(*) FROM message_d{TODAY}")) == 1
    assert conn.scalar(text(f"SELECT count(*) FROM message_d{TODAY + 1}")) == 1
    assert conn.scalar(text(f"SELECT count(*) FROM history_d{TODAY}")) == 1


@only_postgresql
def test_a_day_nobody_prepared_is_kept_and_told(conn: Connection) -> None:
    """Law: no partition, no loss. The row waits in the default partition until its day is made."""
    partitions.prepare(conn, TODAY)
    assert told(conn, event(1, NOON + 30 * DAY_US), event(2, NOON)).terminal == {1: 2}
    assert partitions.days(conn, "message") == [TODAY, TODAY + 30]
    assert partitions.prepare(conn, TODAY) == partitions.Prepared(made=1, adopted=1)
    assert conn.scalar(text("SELECT count(*) FROM message_default")) == 0
    assert conn.scalar(text(f"SELECT mref FROM message_d{TODAY + 30}")) == 1
    assert told(conn, event(1, NOON + 30 * DAY_US)).folded == 1


@only_postgresql
def test_a_reader_that_stays_delays_partitions_and_nothing_else(
    store: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export of hours: neither the writer's start nor its chores fail for it; rows go where they can."""
    monkeypatch.setattr(partitions, "_LOCK_MS", 20)
    reader = schema.open_store(url_of(tmp_path), writer=False)
    with reader.connect() as reading:
        assert reading.scalar(select(func.count()).select_from(schema.message)) == 0
        with store.begin() as conn:
            days = 1 + 1 + partitions.AHEAD
            assert partitions.prepare(conn, TODAY) == partitions.Prepared(made=2 * days, refused=1)
            assert conn.scalar(text("SHOW lock_timeout")) == "30s"
            assert told(conn, event(1), event(2, kind=Kind.DEFERRED)).terminal == {1: 1}
    reader.dispose()
    with store.begin() as conn:
        assert partitions.prepare(conn, TODAY) == partitions.Prepared(made=days, adopted=1)
        assert conn.scalar(text(f"SELECT count(*) FROM message_d{TODAY}")) == 1


@only_postgresql
def test_partitions_that_stayed_empty_are_taken_away(conn: Connection) -> None:
    partitions.prepare(conn, TODAY)
    told(conn, event(1))
    later = partitions.prepare(conn, TODAY + 30)
    assert later.hollow == 3 * (1 + 1 + partitions.AHEAD) - 1
    assert f"message_d{TODAY}" in tables_of(conn)


def test_a_day_goes_and_the_others_stay(conn: Connection) -> None:
    """P-10, on both stores: what is left is the day before and the day after."""
    partitions.prepare(conn, TODAY)
    told(conn, *[event(mref, NOON + (mref % 3 - 1) * DAY_US) for mref in range(9)])
    assert partitions.days(conn, "message") == [TODAY - 1, TODAY, TODAY + 1]
    assert partitions.drop_day(conn, "message", TODAY) == 3
    assert partitions.days(conn, "message") == [TODAY - 1, TODAY + 1]
    assert sorted(conn.scalars(select(schema.message.c.mref))) == [0, 2, 3, 5, 6, 8]
    assert partitions.drop_day(conn, "message", TODAY) == 0
    assert partitions.days(conn, "history") == partitions.days(conn, "hit") == []


@only_postgresql
def test_a_day_that_is_partly_in_the_default_partition_goes_too(conn: Connection) -> None:
    told(conn, event(1))
    assert partitions.drop_day(conn, "message", TODAY) == 1
    assert conn.scalar(select(func.count()).select_from(schema.message)) == 0


@only_postgresql
def test_a_dropped_day_is_gone_from_the_disk(store: Engine, postgres_server: PostgresServer) -> None:
    """P-10 and P-54: the files of the day, in which the row stood, are empty or no more; those of the next day are."""
    mark = b"a-reply-that-quotes-somebody"
    with store.begin() as conn:
        partitions.prepare(conn, TODAY)
        for mref, at in ((1, NOON), (2, NOON + DAY_US)):
            row = {"job": 1, "mref": mref, "kind": 1, "reason": 0, "domain": 0, "code": 550, "enhanced": "5.1.1",
                   "attempts": 1, "at": at, "day": at // DAY_US, "pseudonym": 1, "tag_sealed": None, "tls": 0,
                   "note": mark}  # fmt: skip
            conn.execute(insert(schema.message).values(row))
    with store.connect() as conn:
        files = {
            day: postgres_server.folder
            / "data"
            / str(conn.scalar(text(f"SELECT pg_relation_filepath('message_d{day}')")))
            for day in (TODAY, TODAY + 1)
        }
    _checkpoint(store)
    assert all(mark in path.read_bytes() for path in files.values())
    with store.begin() as conn:
        assert partitions.drop_day(conn, "message", TODAY) == 1
    _checkpoint(store)
    assert not files[TODAY].exists()
    assert mark in files[TODAY + 1].read_bytes()


def _checkpoint(store: Engine) -> None:
    url = make_url(store.url)
    with psycopg.connect(host=str(url.query["host"]), user=url.username, dbname=url.database, autocommit=True) as raw:
        raw.execute("CHECKPOINT")


@only_postgresql
def test_a_reader_that_does_not_let_go_is_not_waited_for(
    store: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known limit of `drop_day`: it gives up, nothing has changed, and the session's own timeout is as before."""
    monkeypatch.setattr(partitions, "_LOCK_MS", 50)
    with store.begin() as conn:
        partitions.prepare(conn, TODAY)
        told(conn, event(1))
    reader = schema.open_store(url_of(tmp_path), writer=False)
    with reader.connect() as reading:
        assert reading.scalar(select(func.count()).select_from(schema.message)) == 1
        with pytest.raises(OperationalError, match="lock timeout"), store.begin() as conn:
            partitions.drop_day(conn, "message", TODAY)
        assert reading.scalar(select(func.count()).select_from(schema.message)) == 1
    reader.dispose()
    with store.begin() as conn:
        assert partitions.drop_day(conn, "message", TODAY) == 1
        assert conn.scalar(text("SHOW lock_timeout")) == "30s"


@only_sqlite
def test_sqlite_has_nothing_to_prepare(conn: Connection) -> None:
    assert partitions.prepare(conn, TODAY) == partitions.Prepared()
    assert not partitions.is_partitioned(conn, "message")


# --- the same folding ------------------------------------------------------------------------------------------------


def test_what_is_told_again_on_another_day_folds(conn: Connection) -> None:
    """T9 and T10 around midnight: a slice that is settled twice has events with other instants, and they are the same
    events. `day` stands in PostgreSQL's keys, so this is not for the database to find out."""
    partitions.prepare(conn, TODAY)
    first = event(1), event(2, kind=Kind.DEFERRED), event(3, kind=Kind.BOUNCED)
    again = [
        Event(e.kind, e.mref, e.attempt, e.at + DAY_US, e.pseudonym, e.tag, e.reason, e.code, e.enhanced, e.tls)
        for e in first
    ]
    assert told(conn, *first).folded == 0
    recorded = told(conn, *again, event(4, NOON + DAY_US))
    assert (recorded.events, recorded.folded, dict(recorded.terminal)) == (4, 3, {1: 1})
    assert conn.scalar(select(func.count()).select_from(schema.message)) == 3
    assert conn.scalar(select(func.count()).select_from(schema.history)) == 1
    assert conn.scalar(select(func.sum(schema.counter.c.n))) == 4


def test_both_days_of_one_event_in_one_transaction_fold(conn: Connection) -> None:
    recorded = told(conn, event(1), event(1, NOON + DAY_US), event(2, kind=Kind.DEFERRED),
                    event(2, NOON + DAY_US, kind=Kind.DEFERRED))  # fmt: skip
    assert (recorded.folded, dict(recorded.terminal)) == (2, {1: 1})


def test_the_day_a_job_was_accepted_bounds_the_question_and_not_the_answer(conn: Connection) -> None:
    """Rows from before a job's acceptance cannot be; those of its whole life are found, with other jobs beside it."""
    partitions.prepare(conn, TODAY)
    conn.execute(insert(schema.account).values(ACCOUNT))
    job = dict.fromkeys(("priority", "wait", "opens_mode", "clicks_mode", "created_at", "chunks_expected"), 1)
    texts = {"state": "sending", "kind": "campaign", "legal_basis": "", "in_doubt": "hold", "hash": b"", "account": 1}
    for number, days in ((1, 20), (2, 0)):
        row = job | texts | {"number": number, "job_id": f"j{number}", "accepted_at": NOON - days * DAY_US}
        conn.execute(insert(schema.job).values(row))
    assert told(conn, event(1, NOON - 20 * DAY_US)).folded == 0
    book = EventBook(conn.dialect.name, bytes(32))
    recorded = book.record(conn, [("s", "1-1", Batch(number, "one.example", [event(1)])) for number in (1, 2)])
    assert (recorded.folded, dict(recorded.terminal)) == (1, {2: 1})


MREFS = st.integers(0, 2)
EVENTS = st.builds(
    lambda mref, day, kind, attempt, duplicate: event(
        mref, NOON + day * DAY_US, kind, attempt, reason=Reason.DUPLICATE if duplicate else Reason.NONE
    ),
    MREFS,
    st.integers(0, 2),
    st.sampled_from([Kind.DELIVERED, Kind.BOUNCED, Kind.DEFERRED, Kind.REFUSED]),
    st.integers(1, 2),
    st.booleans(),
)
BATCHES = st.lists(
    st.tuples(st.lists(EVENTS, min_size=1, max_size=4), st.sampled_from([-1, 0, 1])), min_size=1, max_size=5
)


@only_postgresql
def test_both_stores_hold_the_same_ledger(store: Engine, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Law (decision 15): whatever is told, in whatever portions, again or on another day: the same rows, counters and
    figures of what was new."""
    with store.begin() as conn:
        partitions.prepare(conn, TODAY)
    used = Counter[str]()
    with policy_store(tmp_path_factory.mktemp("beside")) as beside:

        @settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(BATCHES, min_size=1, max_size=3))
        def law(transactions: list[list[tuple[list[Event], int]]]) -> None:
            used["job"] += 1
            job, figures, held = used["job"], [], []
            for engine in (store, beside):
                book = EventBook(engine.dialect.name, bytes(32))
                for batches in transactions:
                    items = [("s", "1-1", Batch(job, "one.example", events, chunk)) for events, chunk in batches]
                    with engine.begin() as conn:
                        recorded = book.record(conn, items)
                    book.committed()
                    figures.append((recorded.events, recorded.folded, dict(recorded.terminal)))
                with engine.connect() as conn:
                    held.append(_ledger(conn, job))
            assert figures[: len(transactions)] == figures[len(transactions) :]
            assert held[0] == held[1]
            terminal = sum(n for _, _, terminal in figures[: len(transactions)] for n in terminal.values())
            assert terminal == sum(row[-1] for row in held[0]["counter"] if row[1] not in (int(Kind.DEFERRED),)), (
                "I6: counters and terminal rows agree"
            )

        law()
    assert used["job"] >= 100


def _ledger(conn: Connection, job: int) -> dict[str, list[tuple[Any, ...]]]:
    m, h, c = schema.message.c, schema.history.c, schema.counter.c
    asked = {
        "message": select(m.mref, m.kind, m.reason, m.attempts, m.at, m.day).where(m.job == job),
        "history": select(h.mref, h.attempt, h.kind, h.at, h.day, h.reason).where(h.job == job),
        "counter": select(c.reason, c.kind, c.n).where(c.job == job),
    }
    return {name: sorted(tuple(row) for row in conn.execute(question)) for name, question in asked.items()}


def test_hits_of_people_who_agreed_are_rows_of_their_day(conn: Connection) -> None:
    partitions.prepare(conn, TODAY)
    book = EventBook(conn.dialect.name, bytes(32))
    hits = [Hit(Kind.OPENED, 1, n, NOON + n * DAY_US, Mode.INDIVIDUAL, 32) for n in range(3)]
    assert book.record_hits(conn, [("h", "1-1", hits)]) == 3
    assert partitions.days(conn, "hit") == [TODAY, TODAY + 1, TODAY + 2]
    assert len(set(conn.scalars(select(schema.hit.c.id)))) == 3
    assert partitions.drop_day(conn, "hit", TODAY + 1) == 1
    assert sorted(conn.scalars(select(schema.hit.c.mref))) == [0, 2]
