"""``sales-push host``: which hosts work on this queue, ask one to rest, declare one dead (promises.md 1, decision 6).

    list     hosts and their workers from the registry (`policy.hosts`), with what they hold by the leases in Redis; a
             host that only holds leases (a program up to 0.1.0, or a dead one) is shown, too
    drain    its workers lease nothing more, finish, hand back and wait, also after a restart, until --undo
    forget   its leased recipients are in doubt: `hold` ends them unknown, `resend` gives them one more attempt, exactly
             as after an unclean boot (`engine.delivery.replay`); its leases go back, its entries go

Laws: a host that was seen within a lease is not forgotten, nor one that never registered before its heartbeats stood
still for a lease while we watched; --force overrides both. Exit codes: 0 done, 1 no such host or refused, 2 usage.
"""

from __future__ import annotations

import asyncio
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from engine.queue.lanes import Lanes
    from engine.settings import EngineSettings
    from policy.hosts import Registry
    from policy.settings import PolicySettings
    from policy.valkey import Client

host_commands = typer.Typer(no_args_is_help=True)
host = typer.Typer(no_args_is_help=True, help="Hosts at work on this queue: list, let rest, declare dead.")
host_commands.add_typer(host, name="host")

Config = Annotated[
    Path | None,
    typer.Option("--config", help="Configuration file; else $SALES_PUSH_CONFIG, else ./sales-push.toml."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")]
HostName = Annotated[str, typer.Argument(metavar="HOST", help="As `host list` names it.")]


@dataclass
class Holdings:
    """What one host has by the leases in Redis. holders: every name it goes by; leases by (partition, slice id)."""

    holders: set[str] = field(default_factory=set)
    slices: int = 0
    recipients: int = 0


@host.command("list")
def host_list(as_json: Json = False, config: Config = None) -> None:
    """Every host: its workers, how long ago they were heard, what they hold, version and state."""
    policy, _ = _settings(config)

    async def ask(redis: Client) -> list[dict[str, Any]]:
        from engine.queue.lanes import Lanes
        from policy import hosts

        registry = await hosts.read(redis)
        return _described(registry, await _holdings(redis, Lanes(redis, "cli")))

    found = asyncio.run(_with(policy, ask))
    if as_json:
        print(json.dumps(found))
        return
    for line in _lines(found):
        print(line)


@host.command("drain")
def host_drain(
    name: HostName,
    undo: Annotated[bool, typer.Option("--undo", help="The opposite: let it work again.")] = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Its workers lease nothing more, finish what is on the wire, hand the rest back and wait."""
    policy, _ = _settings(config)

    async def ask(redis: Client) -> tuple[bool, bool]:
        from engine.queue.lanes import Lanes
        from policy import hosts

        registry = await hosts.read(redis)
        known = bool(registry.of(name)) or name in registry.resting or name in await _holdings(redis, Lanes(redis, "c"))
        if not known:
            return False, False
        return True, await (hosts.let_work(redis, name) if undo else hosts.ask_to_rest(redis, name))

    known, changed = asyncio.run(_with(policy, ask))
    if not known:
        _fail(f"there is no host {name}: see `sales-push host list`")
    state = "may work" if undo else "is asked to rest"
    text = f"{name} {state}" if changed else f"{name} {state}, as before"
    print(json.dumps({"host": name, "resting": not undo, "changed": changed}) if as_json else text)


@host.command("forget")
def host_forget(
    name: HostName,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Although it seems to live. Wrong: people get two copies.")
    ] = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Declare a host dead that does not come back: what it may have sent is unknown, what it held goes on elsewhere."""
    policy, engine = _settings(config)
    if not yes and not sys.stdin.isatty():
        _fail("nobody is here to ask: say --yes", 2)

    def confirm(text: str) -> None:
        if not yes and not typer.confirm(text):
            _fail("nothing was done")

    told = asyncio.run(_with(policy, lambda redis: _forget(redis, policy, engine, name, force, confirm), fenced=True))
    if as_json:
        print(json.dumps(told))
        return
    print(f"{name} is forgotten: {told['in_doubt']} recipients in doubt, {told['slices']} slices go on elsewhere")


async def _forget(
    redis: Client,
    policy: PolicySettings,
    engine: EngineSettings,
    name: str,
    force: bool,
    confirm: Callable[[str], None],
) -> dict[str, Any]:
    from engine.campaign.claims import Claims, Limits
    from engine.delivery.reclaiming import names
    from engine.delivery.replay import declare_dead
    from engine.queue.lanes import Lanes
    from policy import hosts

    lanes = Lanes(redis, "cli")
    registry = await hosts.read(redis)
    held = (await _holdings(redis, lanes)).get(name, Holdings())
    workers = registry.of(name)
    holders = held.holders | {worker.holder for worker in workers}
    if not holders and name not in registry.resting:
        _fail(f"there is no host {name}: see `sales-push host list`")
    if not force:
        if workers and (age := registry.now - max(worker.at for worker in workers)) < engine.lease_seconds * 1_000_000:
            _fail(f"{name} was seen {age / 1e6:.0f} s ago, within a lease: stop it first, or wait (--force overrides)")
        if name == platform.node() and holders & names(policy.data_dir / "journal"):
            _fail(f"the journal of {name} lies here: start it, it is replayed and less is in doubt (--force overrides)")
    confirm(
        f"{name}: {len(workers)} workers, {held.slices} slices with {held.recipients} recipients in its hands. Those "
        "end unknown (hold) or get one more attempt (resend). Declare it dead?"
    )
    if not force and (unregistered := held.holders - {worker.holder for worker in workers}):
        await _watch(lanes, unregistered, name, engine.lease_seconds)
    done = await declare_dead(sorted(holders), _tools(redis, lanes, policy, engine))
    for holder in holders:  # entries of the intake it had claimed are somebody else's at once
        await Claims(redis, holder, Limits(), time.monotonic).leave()
    await hosts.withdraw(redis, sorted(holders))
    await hosts.let_work(redis, name)
    return {"host": name, "workers": len(holders), "in_doubt": done.in_doubt, "slices": done.released}


async def _watch(lanes: Lanes, holders: set[str], name: str, seconds: float) -> None:
    """Programs that never registered show life by their counters only (decision 6: by our own clock, a full lease)."""
    print(f"{name} never said that it lives: watching its heartbeats for {seconds:.0f} s", file=sys.stderr)
    before = {place: count for place, count in (await lanes.all_holders()).items() if place[1] in holders}
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        await asyncio.sleep(min(1.0, left))
        now = await lanes.all_holders()
        if any(now.get(place, count) != count for place, count in before.items()):
            _fail(f"{name} lives: a heartbeat of it moved (--force overrides)")


def _tools(redis: Client, lanes: Lanes, policy: PolicySettings, engine: EngineSettings) -> Any:
    from engine.delivery.campaigns import Campaigns
    from engine.delivery.conclusions import jitter
    from engine.delivery.replay import Tools
    from engine.worker import retry_plan
    from policy.keysource import source_of
    from policy.ledger import Reader
    from policy.schema import open_store

    keyring = source_of(policy).load()
    reader = Reader(open_store(policy.sql_address(), writer=False))
    campaigns = Campaigns(reader, lambda: keyring, {}, public_url=policy.public_url, bounce_domain=policy.bounce_domain)
    return Tools(redis, lanes, campaigns, keyring, retry_plan(engine), time.time_ns() // 1000, jitter)


async def _holdings(redis: Client, lanes: Lanes) -> dict[str, Holdings]:
    """By host: what it holds, and the names that left a heartbeat or a lease."""
    from engine.queue.slices import HEADER_BYTES, Header, parse_header
    from policy import keyspace
    from policy.hosts import host_of

    found: dict[str, Holdings] = {}
    for _, holder in await lanes.all_holders():
        found.setdefault(host_of(holder), Holdings()).holders.add(holder)
    leases = await lanes.all_leases()
    async with redis.pipeline(transaction=False) as pipe:
        for partition, slice_id, _, _ in leases:
            pipe.getrange(keyspace.slice_key(partition, slice_id), 0, HEADER_BYTES - 1)
        heads = await pipe.execute() if leases else []
    for (_, _, _, holder), head in zip(leases, heads, strict=True):
        held = found.setdefault(host_of(holder), Holdings())
        held.holders.add(holder)
        held.slices += 1
        header = parse_header(head)
        held.recipients += len(header.pending()) if isinstance(header, Header) else 0
    return found


def _described(registry: Registry, holdings: dict[str, Holdings]) -> list[dict[str, Any]]:
    described = []
    for name in sorted({worker.host for worker in registry.workers} | set(holdings) | set(registry.resting)):
        held = holdings.get(name, Holdings())
        workers = [
            {
                "holder": worker.holder,
                "index": worker.index,
                "pid": worker.pid,
                "version": worker.version,
                "schema": worker.schema,
                "state": worker.state,
                "age_seconds": round(max(0, registry.now - worker.at) / 1e6, 1) if worker.at else None,
                "slices": worker.slices,
                "recipients": worker.recipients,
            }
            for worker in registry.of(name)
        ]
        known = {worker.holder for worker in registry.of(name)}
        described.append(
            {
                "host": name,
                "resting": name in registry.resting,
                "leases": held.slices,
                "in_flight": held.recipients,
                "workers": workers,
                "unregistered": sorted(held.holders - known),
            }
        )
    return described


def _lines(found: list[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for one in found:
        resting = ", asked to rest" if one["resting"] else ""
        lines.append(f"{one['host']}: {one['leases']} leases, {one['in_flight']} recipients in flight{resting}")
        for worker in one["workers"]:
            age = "?" if worker["age_seconds"] is None else f"{worker['age_seconds']:.0f} s"
            lines.append(
                f"  {worker['index']:>3}  {worker['state']:<9} heard {age:>6} ago  pid {worker['pid']:<8} "
                f"version {worker['version']}  {worker['slices']} slices, {worker['recipients']} recipients"
            )
        lines += [f"       holds leases or left a heartbeat, never registered: {name}" for name in one["unregistered"]]
    return lines or ["no host is at work"]


def _settings(config: Path | None) -> tuple[PolicySettings, EngineSettings]:
    from engine.settings import EngineSettings
    from policy import logs
    from policy.settings import PolicySettings, load

    policy = load(PolicySettings, config)
    logs.configure("cli", json=False, level="warning")
    return policy, load(EngineSettings, config)


async def _with(policy: PolicySettings, ask: Callable[[Client], Any], *, fenced: bool = False) -> Any:
    """fenced: what is written must not reach a Redis that came back older and is not compared with SQL yet (T12)."""
    from policy.fence import Fence
    from policy.valkey import connect

    client = connect(policy.redis_address(), Fence() if fenced else None, socket_timeout=10.0)
    try:
        return await ask(client)
    finally:
        await client.aclose()


def _fail(text: str, code: int = 1) -> NoReturn:
    print(f"sales-push: {text}", file=sys.stderr)
    raise typer.Exit(code)
