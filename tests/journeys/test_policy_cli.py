"""The commands of the ground floor against a running writer: what they print, change and exit with."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner, Result

from policy import keyspace
from policy.cli import commands
from policy.events import Batch, Event, Kind, Reason, encode_batch
from policy.keys import seal
from policy.ledger import Reader
from policy.schema import open_store
from policy.wire import WriterClient
from tests.journeys.test_writer import ADA, AT, accept, mref, tag
from tests.world.servers import PolicyWorld, settings_for, short_folder, valkey_server, world

__all__ = ["world"]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SALES_PUSH_")]:
        monkeypatch.delenv(name)


def config(folder: Path) -> Path:
    file = folder / "sales-push.toml"
    text = f'[policy]\ndata_dir = "{folder}"\n[policy.officer]\nname = "O"\naddress = "privacy@example.org"\n'
    file.write_text(text)
    return file


class Shell:
    """Runs commands off the loop, because they bring loops of their own."""

    def __init__(self, folder: Path) -> None:
        self._config = str(config(folder))

    async def __call__(self, *words: str, code: int = 0, stdin: str | None = None) -> str:
        def invoke() -> Result:
            return CliRunner().invoke(commands, [*words, "--config", self._config], input=stdin)

        result = await asyncio.to_thread(invoke)
        assert result.exit_code == code, (result.output, result.exception)
        return result.output

    async def json(self, *words: str, code: int = 0) -> Any:
        return json.loads(await self(*words, "--json", code=code))


@pytest.fixture
def sh(world: PolicyWorld) -> Shell:
    return Shell(world.settings.data_dir)


async def test_accounts(sh: Shell) -> None:
    assert "no accounts" in await sh("account", "list")
    assert (await sh.json("account", "add", "acme", "--display-name", "Acme", "--opens", "aggregate"))["number"] == 1
    assert "exists" in await sh("account", "add", "acme", code=1)
    assert "is not a name" in await sh("account", "add", "no name", code=1)
    await sh("account", "add", "b", "--clicks", "everything", code=2)
    await sh("account", "freeze", "acme")
    [account] = await sh.json("account", "list")
    assert (account["state"], account["opens_mode"], account["clicks_mode"]) == ("frozen", 1, 3)
    await sh("account", "freeze", "acme", "--thaw")
    await sh("account", "freeze", "nobody", code=1)


async def test_suppressing_by_hand(world: PolicyWorld, sh: Shell) -> None:
    await accept(world)
    where, partition = tag(world)
    assert "nothing is known" in await sh("suppress", "check", ADA, code=1)
    assert "suppressed" in await sh("suppress", "add", ADA, "--scope", "list", "--of", "acme/news")
    assert await world.redis.hexists(keyspace.suppression(partition, where), where)
    told = await sh.json("suppress", "check", "ADA@one.example")
    assert [(one["scope"], one["scope_name"], one["reason"]) for one in told["suppressed"]] == [
        ("list", "news", "manual")
    ]
    await sh("suppress", "add", "@one.example", "--reason", "complaint")
    assert "domain" in await sh("suppress", "check", "somebody@one.example")
    await sh("suppress", "remove", ADA, "--scope", "list", "--of", "acme/news")
    await sh("suppress", "remove", ADA, "--scope", "list", "--of", "acme/news", code=1)
    await sh("suppress", "add", ADA, "--scope", "list", "--of", "acme/none", code=1)
    await sh("suppress", "add", ADA, "--scope", "list", code=2)
    await sh("suppress", "add", ADA, "--scope", "galaxy", code=2)
    assert "not-an-address" not in await sh("suppress", "add", "not-an-address", code=2)


async def test_import_and_export(world: PolicyWorld, sh: Shell, tmp_path: Path) -> None:
    await accept(world)
    people = tmp_path / "people.csv"
    people.write_text(
        "\ufeffemail,name\n" + "".join(f"p{n}@one.example,P\n" for n in range(2500)) + "broken\n\n@x.org\n"
    )
    told = await sh.json("suppress", "import", str(people), code=1)
    assert (told["changed"], told["bad_lines"]) == (2501, [2502])
    exported = await sh("suppress", "export")
    assert exported.count("\n") == 2502
    assert "@" not in exported
    for n in (0, 1234, 2499):
        assert await sh("suppress", "check", f"p{n}@one.example")
    copy = tmp_path / "export.csv"
    copy.write_text(exported)
    assert (await sh.json("suppress", "import", str(copy)))["changed"] == 0  # the same entries, not entries about tags
    assert "2 new" in await sh(
        "suppress", "import", "-", "--scope", "account", "--of", "acme", stdin="a@b.org\nc@b.org\n"
    )
    await sh("suppress", "import", str(tmp_path / "none.csv"), code=2)


async def test_status_jobs_and_why(world: PolicyWorld, sh: Shell) -> None:
    assert "no jobs" in await sh("jobs", "list")
    number = (await accept(world)).number
    bounced = Event(Kind.BOUNCED, mref(ADA), 1, AT, 7, b"", Reason.USER_UNKNOWN, 550, "5.1.1")
    await world.redis.xadd(keyspace.events(1), {"b": encode_batch(Batch(number, "one.example", [bounced]))})
    await world.drain()
    assert (await sh.json("status", "spring"))["counts"] == {"bounced": 1}
    assert "user-unknown 1" in await sh("status", "acme/spring")
    assert "acme/spring" in await sh("status")
    assert "no such job" in await sh("status", "summer", code=1)
    story = await sh("why", ADA)
    assert "bounced (user-unknown)" in story
    assert "550 5.1.1" in story
    assert "nothing is known" in await sh("why", "nobody@one.example", code=1)
    await sh("why", "nobody", code=2)
    assert (await sh.json("jobs", "pause", "spring", "--reason", "asked"))["state"] == "paused"
    assert [one["job_id"] for one in await sh.json("jobs", "list", "--state", "paused")] == ["spring"]
    assert "expanding" in await sh("jobs", "resume", "spring")
    assert "cancelled" in await sh("jobs", "cancel", "spring")
    assert "is cancelled" in await sh("jobs", "resume", "spring", code=1)


async def test_rejected_jobs_are_listed_without_their_payload(world: PolicyWorld, sh: Shell) -> None:
    """As engine.campaign.intake leaves them: sealed, with every mistake."""
    body = {"at": AT, "entry": "job", "account": "acme", "job_id": "bad", "payload": ADA.encode(),
            "problems": [["$.subject", "missing", "add it"], ["$.from", "no DKIM key", ""]]}  # fmt: skip
    sealed = seal(world.keyring.service, msgspec.msgpack.encode(body), b"rejected")
    await world.redis.xadd(keyspace.REJECTED, {"sealed": sealed})
    await world.redis.xadd(keyspace.REJECTED, {"sealed": b"under another key, long ago destroyed"})
    text = await sh("jobs", "rejected")
    assert "$.subject: missing (add it)" in text
    assert "$.from: no DKIM key" in text
    assert ADA not in text + await sh("jobs", "rejected", "--json")
    assert "nothing was rejected" in await sh("jobs", "rejected", "--dead")


async def test_without_a_writer_looking_works_and_changing_says_so(world: PolicyWorld, sh: Shell) -> None:
    await accept(world)
    await world.writer.stop()
    assert "spring" in await sh("status")
    assert "does not answer" in await sh("jobs", "pause", "spring", code=1)
    assert "does not answer" in await sh("suppress", "import", "-", code=1, stdin="a@b.org\n")
    world.writer = type(world.writer)(world.settings, world.keyring)
    await world.writer.start()


async def test_the_role_runs_alone_and_ends_on_sigterm() -> None:
    """`sales-push run policy` as a process of its own: answers, beats, takes its socket away."""
    from policy.instants import week_of
    from policy.keys import Keyring
    from policy.vitals import read_all
    from policy.writer import clock_us

    with short_folder() as folder:
        settings = settings_for(folder)
        Keyring.create(settings.keys_dir, week_of(clock_us()))
        async with valkey_server(settings.redis_socket.parent):
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", "from policy.cli import commands; commands()", "run", "policy", "--config",
                str(config(folder)), stderr=subprocess.PIPE,
            )  # fmt: skip
            try:
                async with WriterClient(settings.writer_socket) as client, asyncio.timeout(30):
                    while not settings.writer_socket.exists():
                        assert child.returncode is None
                        await asyncio.sleep(0.02)
                    assert (await client.ping())["pid"] == child.pid
                    assert await client.account_add("acme") == 1
                    while not read_all(folder):
                        await asyncio.sleep(0.02)
            finally:
                child.terminate()
                _, errors = await child.communicate()
            assert child.returncode == 0, errors
            assert json.loads(errors.splitlines()[-1])["role"] == "policy"
            assert not settings.writer_socket.exists()
            assert read_all(folder) == []
            reader = Reader(open_store(settings.sql_address(), writer=False))
            assert [account.name for account in reader.accounts()] == ["acme"]
            reader.close()
