"""``sales-push rights`` against the engine behind a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from policy.cli.rights import rights
from policy.doorway import Doorway, handlers
from policy.instants import DAY_US
from tests.policy.rights.conftest import ADA, House

Run = Callable[..., Awaitable[Result]]


@pytest.fixture
async def run(house: House) -> AsyncIterator[Run]:
    config = house.folder / "sales-push.toml"
    socket = house.folder / "s"
    config.write_text(
        f'[policy]\ndata_dir = "{house.folder}"\nwriter_socket = "{socket}"\n'
        '[policy.officer]\nname = "Grace Officer"\naddress = "privacy@platform.example"\n'
    )
    doorway = Doorway(socket, handlers(house.desk))
    await doorway.open()

    async def call(*words: str) -> Result:
        return await asyncio.to_thread(CliRunner().invoke, rights, [*words, "--config", str(config)])

    yield call
    await doorway.close()


async def document(run: Run, *words: str) -> Any:
    result = await run(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


async def test_a_request_from_open_to_done(house: House, run: Run) -> None:
    told = await document(run, "open", "rectification", ADA, "--channel", "letter", "--law", "quebec")
    ticket = told["ticket"]
    assert told["jurisdiction"] == "quebec"
    again = await run("open", "rectification", ADA)
    assert "asked before" in again.output
    assert ADA not in (await run("list")).output
    assert ADA in (await run("show", ticket)).output
    await document(run, "prove", ticket, "--note", "passport")
    await house.desk.round()
    assert "needs you" in (await run("list")).output
    await document(run, "details", ticket, "--field", "name", "--value", "Ada")
    assert (await run("note", ticket, "called back")).exit_code == 0
    await house.desk.round()
    shown = await document(run, "show", ticket)
    assert (shown["state"], shown["details"]) == ("done", {"field": "name", "value": "Ada"})
    assert [one["note"] for one in shown["steps"] if one["note"]] == ["passport", "called back"]
    assert await document(run, "list") == []
    assert len(await document(run, "list", "--all")) == 1


async def test_the_officers_other_words(house: House, run: Run) -> None:
    first = (await document(run, "open", "access", ADA))["ticket"]
    assert (await document(run, "extend", first, "--reason", "many"))["extended"]
    assert (await document(run, "ask", first))["state"] == "identifying"
    assert (await document(run, "refuse", first, "--ground", "excessive"))["state"] == "refused"
    second = (await document(run, "open", "portability", ADA))["ticket"]
    assert (await document(run, "withdraw", second))["state"] == "withdrawn"
    third = (await document(run, "open", "restriction", ADA))["ticket"]
    assert (await document(run, "lift", third, "--reason", "settled"))["ends"] > house.now
    fourth = (await document(run, "open", "access", ADA, "--received", "2026-11-01T00:00:00Z"))["ticket"]
    await document(run, "prove", fourth)
    assert (await document(run, "close", fourth, "--note", "by hand"))["outcome"] == "done by hand"
    closed = await run("refuse", fourth, "--ground", "too late")
    assert (closed.exit_code, "cannot take the act" in closed.output) == (1, True)


async def test_letters_and_what_is_wrong(house: House, run: Run) -> None:
    assert (await run("open", "access", "nobody")).exit_code == 1
    assert (await run("open", "access", ADA, "--received", "yesterday")).exit_code == 2
    assert (await run("show", "R-AAAAAAAAAA")).exit_code == 1
    await document(run, "open", "access", ADA)
    letters = await document(run, "letters")
    assert [one["letter"] for one in letters] == ["acknowledged", "proof"]
    assert (await document(run, "letters", "--sent", letters[0]["name"])) == {"removed": True}
    assert (await run("letters", "--sent", letters[0]["name"])).exit_code == 1
    house.now += 60 * DAY_US
    overdue = await run("list")
    assert (overdue.exit_code, "OVERDUE" in overdue.output) == (1, True)
