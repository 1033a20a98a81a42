"""Every command either names its purpose and is written down, or shows nobody's data: there is no third kind (P-38).

The first half is a census: a command nobody declared here fails it by name. The second runs each that reads, in front
of a writer: with a purpose that has no use for it, it shows nothing and leaves a line; with its own, it leaves a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Final

import pytest
from sqlalchemy import Connection, select
from typer.main import get_command

from engine.cli import assembled
from policy import consent, readings, vault
from policy.cli.readings import login
from policy.consent import Evidence
from policy.events import Batch
from policy.instants import week_of
from policy.schema import audit, reading
from policy.writer import clock_us
from tests.journeys.test_policy_cli import Shell, sh
from tests.journeys.test_writer import ADA, accept, delivered, mref, tell
from tests.policy.people import row_of
from tests.world.servers import PolicyWorld, world

__all__ = ["sh", "world"]

# command -> what its rows say, and the purpose it has when none is named
READS: Final[dict[str, tuple[str, str]]] = {
    "why": ("story", "support"),
    "suppress check": ("suppression check", "support"),
    "suppress export": ("suppression export", "accountability"),
    "consent history": ("consent history", "support"),
    "rights show": ("rights show", "rights"),
    "hold list": ("hold list", "rights"),
    "ledger export": ("ledger export", "reporting"),
    "bundle open": ("bundle", "rights"),  # run in tests/policy/bundle/test_commands.py
}
_ACT: Final = "changes something and prints counts, numbers or states"
_SUMS: Final = "sums by job, domain and link; no row is of a person"
_OURS: Final = "of the installation: settings, keys by number, hosts, the program"
NOBODY: Final[dict[str, str]] = {
    **dict.fromkeys(("status", "report", "jobs list"), _SUMS),
    **dict.fromkeys(
        ("config", "init", "up", "run engine", "run ops", "run policy", "run tracker", "host list", "host drain",
         "host forget", "keys list", "keys rotate-pepper", "schema", "purposes", "policy inventory",
         "policy retention", "policy subprocessors", "domain list", "account list", "demo", "bench", "compile"), _OURS,
    ),
    **dict.fromkeys(
        ("account add", "account freeze", "account pause", "account resume", "account cancel", "domain pause",
         "domain resume", "domain cancel", "jobs pause", "jobs resume", "jobs cancel", "suppress add",
         "suppress remove", "suppress import", "erase", "hold place", "hold release", "policy shorten",
         "policy sweep", "disclosure add", "audit checkpoint", "bundle import", "submit", "rights open", "rights ask",
         "rights prove", "rights details", "rights note", "rights extend", "rights refuse", "rights withdraw",
         "rights close", "rights lift"), _ACT,
    ),
    "render": "a message made of what was typed; nothing stored is read",
    "jobs rejected": "mistakes by their place in the job; payloads stay sealed",
    "rights list": "tickets, kinds and dates; whose they are is in `rights show`",
    "rights letters": "names of files, which are tickets",
    "erasures": "numbers, states and counts; an erased person has nothing else",
    "bundle verify": "counts of a file",
    "disclosure list": "numbers of subjects; a row that told of it would break a gag (P-33)",
    **dict.fromkeys(
        ("audit verify", "audit export", "audit checkpoints", "audit key", "audit bypasses"),
        "keyed references and digests; whoever proves the chain must be able to read it",
    ),
    **dict.fromkeys(("backup", "backups", "restore"), "sealed copies and their dates; to read one, restore it"),
}  # fmt: skip


def commands() -> Iterator[tuple[str, Any]]:
    def walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        if not hasattr(command, "commands"):
            yield " ".join(words), command
            return
        for name, inner in command.commands.items():  # a group
            yield from walk(inner, (*words, name))

    return walk(get_command(assembled()), ())


def test_p38_every_command_names_its_purpose_or_shows_nobody() -> None:
    found = dict(commands())
    assert not READS.keys() & NOBODY.keys()
    assert sorted(found.keys() - READS.keys() - NOBODY.keys()) == [], "does it show data of people? Say so here"
    assert sorted(READS.keys() - found.keys()) == []
    for name, (_, purpose) in READS.items():
        [option] = [one for one in found[name].params if one.name == "purpose"]
        assert option.default == purpose, name


# Operations whose answer could hold data of people: what it holds instead. The two that do hold some ask for a purpose.
READING_OPS: Final = frozenset({"rights_show", "hold_list"})
ANSWERS: Final[dict[str, str]] = {
    **dict.fromkeys(("ping", "statistics", "bypasses", "checkpoint", "sweep", "bundle_import"), "counts"),
    **dict.fromkeys(("accept_job", "expanded_all", "halt_account", "halt_domain"), "states of jobs"),
    **dict.fromkeys(("backups", "rights_letters"), "names of files and instants"),
    **dict.fromkeys(("erase", "erasures"), "numbers and states; of who is held, the authority"),
    **dict.fromkeys(
        ("rights_open", "rights_ask", "rights_prove", "rights_extend", "rights_refuse", "rights_withdraw",
         "rights_close", "rights_details", "rights_lift", "rights_list"), "a ticket, its kind, state and dates",
    ),
    "hold_place": "numbers of holds",
    "resolve": "numbers for rows that the engine just sent: delivery, which is in the send log",
}  # fmt: skip
_PLAIN: Final = ("int", "bool", "None", "str")


async def test_p38_every_operation_names_its_purpose_or_answers_with_nobody(world: PolicyWorld) -> None:
    assert not READING_OPS & ANSWERS.keys()
    for name, run in world.writer.operations.items():
        method = inspect.getclosurevars(run).nonlocals["method"]
        if str(inspect.signature(method).return_annotation) not in _PLAIN and name not in READING_OPS:
            assert name in ANSWERS, "does it answer with data of people? Say so here"
    for name in READING_OPS:
        method = inspect.getclosurevars(world.writer.operations[name]).nonlocals["method"]
        assert {"actor", "purpose"} <= inspect.signature(method).parameters.keys(), name


async def _words(world: PolicyWorld, sh: Shell) -> dict[str, list[str]]:
    """How each is typed, about ADA: she agreed, was written to, asked for her data, and is held and suppressed."""
    number = (await accept(world)).number
    now = clock_us()

    def enter(conn: Connection) -> None:
        [(ada, _)] = vault.resolve(conn, world.keyring, 1, [row_of(world.keyring.pepper, ADA)], week_of(now), now)
        consent.record(conn, [Evidence(ada, "open_tracking", "express", "v2", "form", now)], now)

    await world.writer.store.write(enter)
    await tell(world, Batch(number, "one.example", delivered(mref(ADA))))
    await world.drain()
    told = await sh.json("rights", "open", "access", ADA)
    await sh("hold", "place", ADA, "--reason", "claim of ada", "--authority", "Court of Graz")
    await sh("suppress", "add", ADA, "--scope", "account", "--of", "acme")
    return {
        "why": ["why", ADA],
        "suppress check": ["suppress", "check", ADA],
        "suppress export": ["suppress", "export"],
        "consent history": ["consent", "history", ADA],
        "rights show": ["rights", "show", told["ticket"]],
        "hold list": ["hold", "list"],
        "ledger export": ["ledger", "export", "-"],
    }


async def _rows(world: PolicyWorld) -> list[Any]:
    return list(await world.writer.store.write(lambda conn: conn.execute(select(reading).order_by(reading.c.id)).all()))


async def _denied(world: PolicyWorld) -> list[tuple[str, str]]:
    lines = select(audit.c.object_ref, audit.c.result).where(audit.c.action == readings.DENIED).order_by(audit.c.seq)
    return [tuple(row) for row in await world.writer.store.write(lambda conn: conn.execute(lines).all())]


@pytest.mark.parametrize("name", sorted(READS.keys() - {"bundle open"}))
async def test_p38_a_read_is_denied_or_written_down(world: PolicyWorld, sh: Shell, name: str) -> None:
    words = (await _words(world, sh))[name]
    what, purpose = READS[name]
    for other, reason in (("curiosity", "unknown-purpose"), ("market_research", "field-class")):
        told = await sh(*words, "--purpose", other, code=1)
        assert len(told.splitlines()) == 1, told
        assert "ada" not in told.lower()
        assert (await _denied(world))[-1] == (f"reading/{what}", reason)
    assert [row for row in await _rows(world) if row.what == what] == []
    await sh(*words)
    rows = [row for row in await _rows(world) if row.what == what]
    assert [(row.purpose, row._mapping["count"]) for row in rows] == [(purpose, 1)] * len(rows)
    assert rows, name
    role = "officer" if name.endswith("export") else "operator"
    assert {row.actor for row in rows} == {readings.actor_of(world.keyring, role, login())}
    assert "ada" not in repr(rows).lower()
    if not name.endswith("export"):
        assert all(row.subject for row in rows), "of one person: they are told"
