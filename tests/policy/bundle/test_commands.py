"""``ledger export``, ``report`` and ``bundle`` as they are typed, against a writer's doorway on a real socket."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import typer
from redis.asyncio import Redis
from sqlalchemy import Engine, select
from typer.testing import CliRunner, Result

from policy import schema
from policy.bundle.contents import ACCESS
from policy.bundle.operations import BundleOperations, Bundles, Written
from policy.cli.exporting import bundle, ledger, report
from policy.doorway import Doorway, handlers
from policy.enforcement import Enforcement
from policy.erasure import person_of
from policy.instants import week_of
from policy.keys import Keyring
from policy.personal import Premises
from policy.readings import ReadingOperations
from policy.records import build
from policy.settings import Officer, PolicySettings
from policy.store import Store
from tests.policy.bundle.house import EVE, NOW, furnish
from tests.policy.people import row_of
from tests.policy.stores import url_of
from tests.world.servers import short_folder

commands = typer.Typer()
commands.add_typer(ledger, name="ledger")
commands.add_typer(bundle, name="bundle")
commands.command("report")(report)


class Shell:
    """Runs commands off the loop, because they bring loops of their own."""

    def __init__(self, folder: Path, premises: Premises, written: Written) -> None:
        self.folder = folder
        self.premises = premises
        self.written = written
        self.secret = folder / "passphrase"
        self.secret.write_text(written.passphrase + "\n")
        self.config = folder / "sales-push.toml"
        officer = '[policy.officer]\nname = "O"\naddress = "privacy@example.org"\n'
        sql_url = premises.settings.sql_address()
        self.config.write_text(f'[policy]\ndata_dir = "{folder}"\nsql_url = "{sql_url}"\n{officer}')

    async def __call__(self, *words: str, code: int = 0, stdin: str | None = None, config: bool = True) -> str:
        tail = ["--config", str(self.config)] if config else []

        def invoke() -> Result:
            return CliRunner().invoke(commands, [*words, *tail], input=stdin)

        result = await asyncio.to_thread(invoke)
        assert result.exit_code == code, (result.output, result.exception)
        return result.output


@pytest.fixture
async def sh(store: Engine, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shell]:
    for name in [name for name in os.environ if name.startswith("SALES_PUSH_")]:
        monkeypatch.delenv(name)
    with short_folder() as folder:
        keyring = Keyring.create(folder / "keys", week_of(NOW))
        officer = Officer(name="O", address="privacy@example.org")
        settings = PolicySettings(officer=officer, data_dir=folder, sql_url=url_of(tmp_path))
        premises = Premises(settings, Store(store), redis, lambda: keyring, lambda: NOW)
        await premises.store.write(lambda conn: furnish(conn, keyring))
        tag, _, _ = row_of(keyring.pepper, EVE)
        person = await premises.store.write(lambda conn: person_of(conn, keyring, None, tag))
        written = await Bundles(premises, build(premises)).write(person, "T-1", ACCESS)
        enforcement = Enforcement(premises.store, redis, lambda: NOW, lambda: store)
        operations = handlers(BundleOperations(premises, enforcement), ReadingOperations(premises.store, lambda: NOW))
        door = Doorway(settings.writer_socket, operations)
        await door.open()
        try:
            yield Shell(folder, premises, written)
        finally:
            await door.close()
            await enforcement.close()
            await premises.store.close()


def _readings(sh: Shell, what: str = "ledger export") -> list[Any]:
    with sh.premises.store.engine.connect() as conn:
        columns = schema.reading.c
        wanted = select(columns.purpose, columns.what, columns.subject, columns["count"], columns.actor)
        return list(conn.execute(wanted.where(columns.what == what)).all())


async def test_a_ledger_is_exported_and_that_is_written_down(sh: Shell) -> None:
    out = sh.folder / "ledger.jsonl"
    told = json.loads(await sh("ledger", "export", str(out), "--json"))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert told == {"rows": len(lines), "format": "jsonl", "file": str(out)}
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    [(purpose, what, subject, count, actor)] = _readings(sh)
    assert (purpose, what, subject, count) == ("reporting", "ledger export", 0, 5)
    assert actor.startswith("officer/")
    same = await sh("ledger", "export", "-", "--since", "2000-01-01", "--quiet")
    assert [json.loads(line) for line in same.splitlines()] == lines
    only = await sh("ledger", "export", "-", "--job", "globex/job-2")
    assert {json.loads(line)["job"] for line in only.splitlines()} == {"job-2"}
    with sh.premises.store.engine.connect() as conn:
        columns = schema.reading.c
        accounts = conn.scalars(select(columns.account).where(columns.what == "ledger export").order_by(columns.id))
        globex = conn.scalar(select(schema.account.c.number).where(schema.account.c.name == "globex"))
        assert accounts.all() == [0, 0, globex], "people of other accounts were not in it, and are not told so"


async def test_without_leave_nothing_is_exported(sh: Shell) -> None:
    out = sh.folder / "ledger.jsonl"
    assert "no such purpose" in await sh("ledger", "export", str(out), "--purpose", "curiosity", code=1)
    assert "no use for such fields" in await sh("ledger", "export", str(out), "--purpose", "market_research", code=1)
    assert "limit" in await sh("ledger", "export", str(out), "--role", "visitor", code=1)
    assert not out.exists()
    assert _readings(sh) == []


async def test_what_is_mistyped_is_said(sh: Shell) -> None:
    out = str(sh.folder / "x")
    assert "--since is a date" in await sh("ledger", "export", out, "--since", "yesterday", code=2)
    assert "jsonl or parquet" in await sh("ledger", "export", out, "--format", "xlsx", code=2)
    assert "no such job" in await sh("ledger", "export", out, "--job", "nothing", code=1)
    assert "cannot be written" in await sh("ledger", "export", str(sh.folder / "no" / "x"), code=1)


async def test_report(sh: Shell) -> None:
    told = json.loads(await sh("report", "acme/job-0", "--json"))
    assert told["domains"] == [
        {"domain": "example.com", "kind": "delivered", "reason": "", "n": 2},
        {"domain": "example.com", "kind": "deferred", "reason": "greylisted", "n": 2},
    ]
    assert {(line["kind"], line["url"], line["n"]) for line in told["links"]} == {
        ("opened", "", 4), ("clicked", "https://shop.example/?a=1&b=2", 2),
    }  # fmt: skip
    text = await sh("report", "acme/job-0", "--top", "1")
    assert "1 more: --top 0" in text
    assert "https://shop.example/?a=1&b=2" in text
    assert "(the mail itself)" in text
    assert "no such job" in await sh("report", "nothing", code=1)


async def test_a_bundle_is_verified_and_opened_with_its_passphrase(sh: Shell) -> None:
    path = str(sh.written.path)
    text = await sh("bundle", "verify", path, stdin=sh.written.passphrase + "\n", config=False)
    assert "every file as its manifest says" in text
    told = json.loads(await sh("bundle", "verify", path, "--passphrase-file", str(sh.secret), "--json", config=False))
    assert (told["right"], told["records"]["messages"]) == ("access", 3)
    out = sh.folder / "open"
    denied = ("bundle", "open", path, str(out), "--passphrase-file", str(sh.secret), "--purpose", "reporting")
    assert "no use for such fields" in await sh(*denied, code=1)
    assert (out.exists(), _readings(sh, "bundle")) == (False, [])
    await sh("bundle", "open", path, str(out), "--passphrase-file", str(sh.secret))
    read = _readings(sh, "bundle")
    assert [(purpose, count) for purpose, _, _, count, _ in read] == [("rights", 1)] * 2  # at both accounts
    assert all(subject for _, _, subject, _, _ in read)
    assert stat.S_IMODE((out / "README.html").stat().st_mode) == 0o600
    with (out / "csv" / "profile.csv").open(newline="", encoding="utf-8") as file:
        assert [row["address"] for row in csv.DictReader(file)] == [EVE, EVE]
    await sh("bundle", "open", path, str(out), "--passphrase-file", str(sh.secret), code=1)  # is there
    assert "not the one of this file" in await sh("bundle", "verify", path, stdin="wrong\n", code=1, config=False)
    assert "cannot be read" in await sh("bundle", "verify", path + "x", code=1, config=False)


async def test_a_bundle_is_taken_in(sh: Shell) -> None:
    told = json.loads(await sh("bundle", "import", str(sh.written.path), "--passphrase-file", str(sh.secret), "--json"))
    assert told["taken"]["profile"] == 2
    assert told["left"]["message"] == 3  # jobs that were sent from here
