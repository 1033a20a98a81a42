"""The tables: inventoried to the last column, migrated as declared, one writer beside many readers."""

from __future__ import annotations

import multiprocessing
import re
import stat
import subprocess
import sys
from multiprocessing.queues import Queue
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import JSON, Engine, func, insert, select, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.schema import CreateIndex, CreateTable

from policy import schema
from tests.policy.stores import only_sqlite, policy_store, url_of
from tests.world.octets import octets

ACCOUNT = {
    "name": "acme", "display_name": "", "postal_address": "", "website": "", "privacy_url": "", "state": "active",
    "opens_mode": 3, "clicks_mode": 3, "created": 1,
}  # fmt: skip
CLASSES = {f"R{number}" for number in range(9)} | {"RH"}


def test_every_column_is_in_the_inventory() -> None:
    """Law (P-01, decision 14): a column without personal, purpose and retention class does not exist."""
    items = {item.column: item for item in schema.inventory()}
    for table in schema.metadata.tables.values():
        for column in table.columns:
            item = items.pop(f"{table.name}.{column.name}")
            assert set(column.info) == {"personal", "purpose", "retention"}, item.column
            assert item.personal, item.column
            assert len(item.purpose) > 10, item.column
            assert item.retention in CLASSES, item.column
            assert not isinstance(column.type, JSON), f"{item.column}: a free-form column defeats the inventory"
    assert not items


def test_no_column_is_named_like_what_we_never_keep() -> None:
    """The one address is sealed in the vault; nothing has a place for network addresses, agents or names of people."""
    allowed = {
        "subject.address",
        "request.address",
        "account.postal_address",
        "account.display_name",
        "list.display_name",
    }
    allowed |= {"topic.display_name", "account.name", "list.name", "topic.name", "domain.name"}
    forbidden = re.compile(r"address|mail|_ip|^ip|agent|name$|phone|birth|geo|city", re.IGNORECASE)
    found = {item.column for item in schema.inventory() if forbidden.search(item.column.partition(".")[2])}
    assert found <= allowed


@only_sqlite
def test_the_store_has_exactly_the_tables_of_the_inventory(store: Engine) -> None:
    """Census: no table in the database that the inventory does not know, and no column either."""
    known = {item.column for item in schema.inventory()}
    with store.connect() as connection:
        tables = text("select name from sqlite_master where type = 'table' and name not like 'sqlite_%'")
        found = {
            f"{name}.{row[1]}"
            for name in connection.execute(tables).scalars().all()
            for row in connection.exec_driver_sql(f'PRAGMA table_info("{name}")')
        }
    assert found - known == {"schema_version.version_num"}
    assert known <= found


@only_sqlite
def test_the_migrations_end_where_the_declarations_are(store: Engine) -> None:
    """The revisions build, statement for statement, what `metadata` declares (STRICT and WITHOUT ROWID included)."""
    declared = schema.open_store("sqlite://", writer=True)
    schema.metadata.create_all(declared)
    statements = []
    for engine in (store, declared):
        with engine.connect() as connection:
            rows = connection.execute(
                text("select name, sql from sqlite_master where name not like '%schema_version%'")
            )
            statements.append({str(row[0]): str(row[1]) for row in rows})
    declared.dispose()
    assert statements[0] == statements[1]
    with store.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": "schema_version"})
        assert compare_metadata(context, schema.metadata) == []
    for name, statement in statements[0].items():
        if statement.startswith("CREATE TABLE") and not name.startswith("sqlite_"):
            assert "STRICT" in statement, name


def test_upgrading_again_changes_nothing_and_keeps_rows(tmp_path: Path) -> None:
    with policy_store(tmp_path) as engine, engine.begin() as connection:
        connection.execute(insert(schema.cursor).values(stream="ev", last_id="1-1"))
    with policy_store(tmp_path) as engine, engine.begin() as connection:
        assert connection.execute(select(schema.cursor.c.last_id)).scalar() == "1-1"


@only_sqlite
def test_what_is_asked_of_large_tables_is_found_by_an_index(store: Engine) -> None:
    """Each index costs every row a random page, so there are few, and each question has to fit one."""
    questions = {
        "select number from subject where account = 1 and tag in (x'00', x'01')": "account=? AND tag=?",
        "select mref from message where day = 20000 and pseudonym in (1, 2)": "day=? AND pseudonym=?",
        "select mref from message where day < 20000": "day<?",
        "select kind from message where job = 1 and mref = 2": "job=? AND mref=?",
    }
    with store.connect() as connection:
        for question, how in questions.items():
            plan = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {question}")]
            assert any("INDEX" in step and f"({how})" in step for step in plan), (question, plan)
            assert not any(step.startswith(("SCAN subject", "SCAN message")) for step in plan), (question, plan)


def test_an_older_store_loses_its_indexes_and_none_of_its_rows(tmp_path: Path) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(schema.__file__).with_name("migrations")))
    config.set_main_option("path_separator", "os")
    engine = schema.open_store(url_of(tmp_path), writer=True)
    values = {name: b"" if name in ("tag", "address", "key") else 1 for name in schema.subject.c.keys()}  # noqa: SIM118
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        connection.execute(insert(schema.account).values(number=1, **ACCOUNT))
        connection.execute(insert(schema.subject).values(values))
    names = text("select name from sqlite_master where type = 'index' and name like 'ix_%' and tbl_name in"
                 " ('subject', 'message') order by name")  # fmt: skip
    with engine.begin() as connection:
        assert list(connection.scalars(names)) == [
            "ix_message_day", "ix_message_pseudonym", "ix_subject_kek_id", "ix_subject_tag",
        ]  # fmt: skip
    schema.upgrade(engine)
    with engine.begin() as connection:
        assert list(connection.scalars(names)) == ["ix_message_day_pseudonym"]
        assert connection.execute(select(func.count()).select_from(schema.subject)).scalar() == 1
    engine.dispose()


def test_every_table_is_spelled_for_postgresql_too() -> None:
    """Without SQLite's options, and 64-bit numbers stay 64-bit. What a server makes of them: test_postgres.py."""
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy's dialect classes carry no types
    for table in schema.metadata.sorted_tables:
        statement = str(CreateTable(table).compile(dialect=dialect))
        assert "STRICT" not in statement
        for index in table.indexes:
            assert str(CreateIndex(index).compile(dialect=dialect))
    assert "mref BIGINT NOT NULL" in str(CreateTable(schema.message).compile(dialect=dialect))
    assert "tag BYTEA NOT NULL" in str(CreateTable(schema.suppression).compile(dialect=dialect))


@only_sqlite
def test_the_writer_is_durable_and_wipes_what_it_deletes(store: Engine) -> None:
    pragmas = {
        "journal_mode": "wal",
        "synchronous": 2,
        "secure_delete": 1,
        "foreign_keys": 1,
        "wal_autocheckpoint": 16384,
        "temp_store": 2,  # memory: no page of this database in a temporary file
    }
    with store.connect() as connection:
        for name, value in pragmas.items():
            assert connection.exec_driver_sql(f"PRAGMA {name}").scalar() == value, name


def test_deleted_rows_leave_no_bytes_behind(tmp_path: Path) -> None:
    """secure_delete: after the checkpoint neither the database nor the log holds the marker (canary scan)."""
    marker = "canary-7f3a91"
    with policy_store(tmp_path) as engine:
        with engine.begin() as connection:
            connection.execute(insert(schema.cursor), [{"stream": f"{marker}-{n}", "last_id": "0"} for n in range(500)])
        with engine.begin() as connection:
            connection.execute(schema.cursor.delete())
    scanned = [path for path in tmp_path.iterdir() if path.is_file()]
    assert tmp_path / "policy.db" in scanned
    assert all(marker.encode() not in path.read_bytes() for path in scanned)


@only_sqlite
def test_the_database_is_private(store: Engine, tmp_path: Path) -> None:
    with store.begin() as connection:
        connection.execute(insert(schema.cursor).values(stream="ev", last_id="1-1"))
        names = [path for path in tmp_path.iterdir() if path.name.startswith("policy.db")]
        assert {stat.S_IMODE(path.stat().st_mode) for path in names} == {0o600}
    assert len(names) == 3


def test_opening_it_again_keeps_the_locks_of_who_has_it_open(tmp_path: Path) -> None:
    """Else the next process cuts its -shm short: SIGBUS at the next commit."""
    probe = (
        "import fcntl, sys; file = open(sys.argv[1], 'r+b')\n"
        "try: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, int(sys.argv[3]), int(sys.argv[2]))\n"
        "except OSError: sys.exit(7)"
    )

    def held() -> list[int]:
        """The database's SHARED lock and the -shm's dead man's switch, where SQLite has them."""
        return [
            subprocess.run([sys.executable, "-c", probe, tmp_path / name, str(first), str(size)]).returncode
            for name, first, size in (("policy.db", 0x40000002, 510), ("policy.db-shm", 128, 1))
        ]

    with policy_store(tmp_path) as engine, engine.connect():
        assert held() == [7, 7]
        schema.open_store(url_of(tmp_path), writer=True).dispose()
        assert held() == [7, 7]
        with pytest.raises(RuntimeError, match="would lose its locks"):
            (tmp_path / "policy.db").read_bytes()
        assert octets(tmp_path / "policy.db").startswith(b"SQLite format 3")
        assert held() == [7, 7]


def test_a_file_name_may_hold_what_means_something_in_a_url(tmp_path: Path) -> None:
    folder = tmp_path / "50 % of #1 & %23 ö"
    folder.mkdir()
    with policy_store(folder):
        reader = schema.open_store(url_of(folder), writer=False)
        reader.connect().close()
        reader.dispose()
    assert [path.name for path in folder.iterdir()] == ["policy.db"]


@only_sqlite
def test_a_reader_cannot_write_and_makes_no_database(store: Engine, tmp_path: Path) -> None:
    reader = schema.open_store(url_of(tmp_path), writer=False)
    with reader.connect() as connection, pytest.raises(OperationalError, match="readonly"):
        connection.execute(insert(schema.cursor).values(stream="ev", last_id="1-1"))
    reader.dispose()
    nowhere = schema.open_store(url_of(tmp_path / "keys"), writer=False)
    with pytest.raises(OperationalError, match="unable to open"):
        nowhere.connect()
    assert not (tmp_path / "keys").exists()


def test_a_reader_opens_after_the_writer_closed_and_took_its_log_away(tmp_path: Path) -> None:
    with policy_store(tmp_path) as engine, engine.begin() as connection:
        connection.execute(insert(schema.cursor).values(stream="ev", last_id="1-1"))
    assert [path.name for path in tmp_path.iterdir()] == ["policy.db"]
    reader = schema.open_store(url_of(tmp_path), writer=False)
    with reader.connect() as connection:
        assert connection.execute(select(schema.cursor.c.last_id)).scalar() == "1-1"
    reader.dispose()


def test_a_reader_sees_one_snapshot_a_transaction(store: Engine, tmp_path: Path) -> None:
    reader = schema.open_store(url_of(tmp_path), writer=False)
    count = select(func.count()).select_from(schema.cursor)
    with reader.connect() as reading:
        assert reading.execute(count).scalar() == 0
        with store.begin() as writing:
            writing.execute(insert(schema.cursor).values(stream="ev", last_id="1-1"))
        assert reading.execute(count).scalar() == 0
        reading.rollback()
        assert reading.execute(count).scalar() == 1
    reader.dispose()


def test_a_transaction_that_fails_leaves_nothing(store: Engine) -> None:
    with pytest.raises(IntegrityError), store.begin() as connection:
        connection.execute(insert(schema.cursor).values(stream="ev", last_id="1-1"))
        connection.execute(insert(schema.cursor).values(stream="ev", last_id="2-1"))
    with store.connect() as connection:
        assert connection.execute(select(func.count()).select_from(schema.cursor)).scalar() == 0


@only_sqlite
def test_types_and_references_are_held_by_the_database(store: Engine) -> None:
    with pytest.raises(DBAPIError), store.begin() as connection:
        connection.exec_driver_sql("insert into cursor values ('ev', x'00')")
    with pytest.raises(IntegrityError), store.begin() as connection:
        connection.exec_driver_sql("insert into list (account, name, display_name) values (99, 'n', 'n')")


def _read_until(url: str, wanted: int, results: Queue[int]) -> None:
    """A reader process: counts until it has seen all, and fails on a number that goes back or a torn pair."""
    engine = schema.open_store(url, writer=False)
    seen = 0
    while seen < wanted:
        with engine.connect() as connection:
            rows = connection.execute(select(func.count()).select_from(schema.cursor)).scalar_one()
            chunks = connection.execute(select(func.count()).select_from(schema.domain)).scalar_one()
        if rows < seen or rows != chunks:
            results.put(-1)
            return
        seen = rows
    engine.dispose()
    results.put(seen)


def test_one_writer_and_several_reading_processes(store: Engine, tmp_path: Path) -> None:
    """Law (decision 15): readers in other processes never block the writer and never see half a transaction."""
    context = multiprocessing.get_context("spawn")
    results: Queue[int] = context.Queue()
    wanted = 300
    readers = [context.Process(target=_read_until, args=(url_of(tmp_path), wanted, results)) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(wanted):
        with store.begin() as connection:
            connection.execute(insert(schema.cursor).values(stream=f"s{number}", last_id="0"))
            connection.execute(insert(schema.domain).values(name=f"d{number}.test"))
    try:
        assert [results.get(timeout=60) for _ in readers] == [wanted] * len(readers)
    finally:
        for reader in readers:
            reader.join(timeout=10)
            if reader.is_alive():
                reader.kill()
        results.close()
        results.join_thread()


def test_importing_the_schema_does_not_import_alembic() -> None:
    """A tenth of a second in every worker's start, for something only the writer does."""
    code = "import sys, policy.schema; sys.exit('alembic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
