"""Commands that read people's data or prove what was done, against the operations behind a real socket."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import typer
from sqlalchemy import Connection, delete, select
from typer.testing import CliRunner, Result

from policy import accounts, audit, consent, readings, vault
from policy.checkpoints import AuditKeys, CheckpointOperations, Checkpoints, Elsewhere
from policy.cli.audit import audit as audit_commands
from policy.cli.audit import consent as consent_commands
from policy.cli.audit import disclosure, purposes
from policy.cli.figures import why
from policy.cli.readings import login
from policy.consent import Evidence
from policy.disclosures import DisclosureOperations
from policy.doorway import Doorway, handlers
from policy.instants import week_of
from policy.keys import Keyring
from policy.readings import ReadingOperations
from policy.schema import audit as chain
from policy.schema import open_store, reading, upgrade
from policy.store import Store
from policy.writer import clock_us
from tests.policy.people import row_of
from tests.policy.stores import url_of
from tests.world.servers import short_folder

ADA = "ada@one.example"
commands = typer.Typer()
commands.add_typer(audit_commands, name="audit")
commands.add_typer(disclosure, name="disclosure")
commands.add_typer(consent_commands, name="consent")
commands.command("purposes")(purposes)
commands.command("why")(why)


class Place:
    """A data folder with a database, keys and a socket, and a shell before it."""

    def __init__(self, folder: Path, sql_url: str) -> None:
        self.folder = folder
        self.keyring = Keyring.create(folder / "keys", week_of(clock_us()))
        self.keys = AuditKeys.ensure(folder / "keys")
        self.elsewhere = folder / "elsewhere"
        engine = open_store(sql_url, writer=True)
        upgrade(engine)
        self.store = Store(engine)
        self.checkpoints = Checkpoints(self.store, lambda: self.keys, clock_us, Elsewhere(self.elsewhere))
        self.doorway = Doorway(
            folder / "policy.sock",
            handlers(
                ReadingOperations(self.store, clock_us, limits={"operator": 3}),
                DisclosureOperations(self.store, clock_us),
                CheckpointOperations(self.checkpoints),
            ),
        )
        self.config = folder / "sales-push.toml"
        officer = '[policy.officer]\nname = "O"\naddress = "privacy@example.org"\n'
        self.config.write_text(f'[policy]\ndata_dir = "{folder}"\nsql_url = "{sql_url}"\n{officer}')

    async def __call__(self, *words: str, code: int = 0) -> str:
        def invoke() -> Result:
            where = [] if words[0] == "purposes" else ["--config", str(self.config)]
            return CliRunner().invoke(commands, [*words, *where])

        result = await asyncio.to_thread(invoke)
        assert result.exit_code == code, (result.output, result.exception)
        return result.output

    async def json(self, *words: str, code: int = 0) -> Any:
        return json.loads(await self(*words, "--json", code=code))

    async def rows(self) -> list[Any]:
        return list(await self.store.write(lambda conn: conn.execute(select(reading).order_by(reading.c.id)).all()))

    async def lines(self) -> list[tuple[str, str, str]]:
        columns = select(chain.c.action, chain.c.purpose, chain.c.result).order_by(chain.c.seq)
        return [tuple(row) for row in await self.store.write(lambda conn: conn.execute(columns).all())]


@pytest.fixture
async def sh(dialect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Place]:
    for name in [name for name in os.environ if name.startswith("SALES_PUSH_")]:
        monkeypatch.delenv(name)
    with short_folder() as folder:
        place = Place(folder, url_of(tmp_path))
        await place.doorway.open()
        yield place
        await place.doorway.close()
        await place.store.close()


def _ada(keyring: Keyring) -> Any:
    def work(conn: Connection) -> int:
        now = clock_us()
        account = accounts.add(conn, "acme", display_name="Acme", now=now).number
        [(number, _)] = vault.resolve(conn, keyring, account, [row_of(keyring.pepper, ADA)], week_of(now), now)
        consent.record(conn, [Evidence(number, "open_tracking", "express", "v2", "form", now - 9)], now)
        return int(number)

    return work


async def test_p_38_looking_somebody_up_is_written_down(sh: Place) -> None:
    ada = await sh.store.write(_ada(sh.keyring))
    await sh("why", ADA, code=1)  # nothing was sent to her
    told = await sh.json("consent", "history", "ADA@one.example", "--purpose", "rights")
    assert [(act["account"], act["purpose"], act["withdrawn"]) for act in told] == [("acme", "open_tracking", False)]
    rows = await sh.rows()
    assert [(row.subject, row.purpose, row.what) for row in rows] == [
        (ada, "support", "story"), (ada, "rights", "consent history"),
    ]  # fmt: skip
    assert {row.actor for row in rows} == {readings.actor_of(sh.keyring, "operator", login())}
    assert "ada" not in repr(rows)


async def test_a_read_that_is_denied_shows_nothing(sh: Place) -> None:
    await sh.store.write(_ada(sh.keyring))
    assert "no use for such fields" in await sh("why", ADA, "--purpose", "market_research", code=1)
    assert "no such purpose" in await sh("why", ADA, "--purpose", "curiosity", code=1)
    told = await sh("consent", "history", ADA, "--purpose", "mail_marketing", code=1)
    assert "needs consent" in told
    assert "open_tracking" not in told
    by_law = ("--purpose", "mail_marketing", "--law", "PIPEDA 7(3)(c): order 26-118")
    assert "open_tracking" in await sh("consent", "history", ADA, *by_law)
    assert await sh.json("audit", "bypasses") == {"PIPEDA 7(3)(c): order 26-118": 1}
    assert await sh("audit", "bypasses", "--since", "2099-01-01T00:00:00Z") == "none\n"
    await sh("audit", "bypasses", "--since", "yesterday", code=2)
    for _ in range(2):
        await sh("consent", "history", ADA)
    assert "limit of people" in await sh("consent", "history", ADA, code=1)
    assert await sh.lines() == [
        ("read-denied", "market_research", "field-class"), ("read-denied", "unknown", "unknown-purpose"),
        ("read-denied", "mail_marketing", "no-consent"), ("consent-bypass", "mail_marketing", "done"),
        ("read-denied", "support", "over-limit"),
    ]  # fmt: skip
    assert len(await sh.rows()) == 3


async def test_without_the_policy_process_nothing_is_read(sh: Place) -> None:
    await sh.store.write(_ada(sh.keyring))
    await sh.doorway.close()
    assert "does not answer" in await sh("consent", "history", ADA, code=1)
    assert "does not answer" in await sh("why", ADA, code=1)
    assert "not an address" in await sh("why", "nobody", code=2)


async def test_the_chain_is_checked_here_and_by_a_stranger(sh: Place) -> None:
    assert "0 entries" in await sh("audit", "verify")
    for n in range(3):
        await sh.store.write(lambda conn, n=n: audit.append(conn, clock_us(), "operator", "x", f"job/{n}", "", "done"))  # type: ignore[misc]
    assert "signed" in await sh("audit", "checkpoint")
    assert (await sh.json("audit", "checkpoint")) == {"made": 0, "waiting": 0}
    told = await sh.json("audit", "verify", "--checkpoints", str(sh.elsewhere))
    assert (told["whole"], told["entries"], told["checkpoints"], told["uncovered"]) == (True, 3, 2, 0)
    out, signed = sh.folder / "chain.jsonl", sh.folder / "signed.jsonl"
    await sh("audit", "export", str(out))
    await sh("audit", "export", str(out), code=2)
    assert "1 checkpoints" in await sh("audit", "checkpoints", str(signed))
    (sh.folder / "audit.pub").write_text(await sh("audit", "key"))
    command = [sys.executable, "-m", "policy.verifier", str(out), str(signed), "--key", str(sh.folder / "audit.pub")]
    stranger = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    assert (stranger.returncode, stranger.stderr) == (0, "")
    await sh.store.write(lambda conn: conn.execute(delete(chain).where(chain.c.seq == 3)))
    assert "cut: entry 3" in await sh("audit", "verify", code=1)


async def test_disclosures_are_written_down_and_listed(sh: Place) -> None:
    ada = await sh.store.write(_ada(sh.keyring))
    said = ("--basis", "GDPR 6(1)(c): order 26-118", "--what", "messages and events", "--purpose", "court")
    assert "1 lines" in await sh("disclosure", "add", "Court of Graz", *said, "--address", ADA)
    assert "has happened" in await sh("disclosure", "add", "Court", *said, "--at", "2099-01-01T00:00:00Z", code=1)
    assert "a law and a case" in await sh("disclosure", "add", "Court", *said[2:], "--basis", "asked", code=1)
    assert "no account knows" in await sh("disclosure", "add", "Court", *said, "--address", "x@y.example", code=1)
    await sh("disclosure", "add", "Court", *said, "--address", "x", code=2)
    await sh("disclosure", "add", "Court", *said, "--gag-until", "tomorrow", code=2)
    [line] = await sh.json("disclosure", "list")
    assert (line["subject"], line["recipient"], line["purpose"]) == (ada, "Court of Graz", "court")
    assert f"subject {ada}" in await sh("disclosure", "list")
    assert [action for action, _, _ in await sh.lines()] == ["disclosed"]


async def test_the_registry_is_shown(sh: Place) -> None:
    found = {one["name"]: one for one in await sh.json("purposes")}
    assert found["market_research"]["reads"] == ["C0"]
    assert "to carry out the rights" in await sh("purposes")
