"""``sales-push jobs``: list, pause, resume, cancel, and what was rejected with every mistake in it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from policy.cli.asking import Because, Config, Json, ask_writer, keyring_of, reader_of, settings_of, show, when

if TYPE_CHECKING:
    from policy.keys import Keyring
    from policy.settings import PolicySettings

from policy.cli.figures import list_jobs

jobs = typer.Typer(no_args_is_help=True, help="Jobs: list, stop, and what was rejected.")


@jobs.command("list")
def jobs_list(
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 50,
    state: Annotated[str, typer.Option(help="Only jobs in this state.")] = "",
    as_json: Json = False,
    config: Config = None,
) -> None:
    """The newest jobs first."""
    reader = reader_of(settings_of(config))
    try:
        list_jobs(reader, as_json, limit, state)
    finally:
        reader.close()


def _move(job: str, state: str, reason: str, as_json: bool, config: Path | None) -> None:
    settings = settings_of(config)
    stored = ask_writer(settings, "job_state", job=job, state=state, reason=reason)
    show({"job": job, "state": stored}, as_json, [f"{job}: {stored}"])


JobName = Annotated[str, typer.Argument(help="Number, job id or account/job_id.")]


@jobs.command("pause")
def jobs_pause(job: JobName, reason: Because = "", as_json: Json = False, config: Config = None) -> None:
    """Send nothing more of a job until it is resumed."""
    _move(job, "paused", reason, as_json, config)


@jobs.command("resume")
def jobs_resume(job: JobName, reason: Because = "", as_json: Json = False, config: Config = None) -> None:
    """Go on with a paused job."""
    _move(job, "sending", reason, as_json, config)


@jobs.command("cancel")
def jobs_cancel(job: JobName, reason: Because = "", as_json: Json = False, config: Config = None) -> None:
    """Stop a job for good; whoever still waits ends as cancelled."""
    _move(job, "cancelled", reason, as_json, config)


@jobs.command("rejected")
def jobs_rejected(
    limit: Annotated[int, typer.Option(min=1, max=10_000)] = 20,
    dead: Annotated[bool, typer.Option("--dead", help="What nobody could finish, not what was refused.")] = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Jobs that were refused, with every mistake in them; the newest first."""
    from policy import keyspace

    settings = settings_of(config)
    stream, purpose = (keyspace.DEAD, b"dead") if dead else (keyspace.REJECTED, b"rejected")
    found = asyncio.run(_rejected(settings, keyring_of(settings), stream, purpose, limit))
    lines: list[str] = []
    for one in found:
        lines.append(f"{when(one['at'])}  {one['entry']} {one['account'] or '?'}/{one['job_id'] or '?'}")
        lines += [
            f"    {path}: {message}" + (f" ({suggestion})" if suggestion else "")
            for path, message, suggestion in one["problems"]
        ]
    show(found, as_json, lines or ["nothing was rejected"])


async def _rejected(
    settings: PolicySettings, keyring: Keyring, stream: str, purpose: bytes, limit: int
) -> list[dict[str, Any]]:
    import msgspec

    from policy.keys import SealError, open_sealed
    from policy.valkey import connect

    client = connect(settings.redis_address())
    found: list[dict[str, Any]] = []
    try:
        entries: Any = await client.xrevrange(stream, count=limit)
        for _, fields in entries:
            try:
                body = msgspec.msgpack.decode(open_sealed(keyring.service, fields[b"sealed"], purpose))
            except (SealError, KeyError, msgspec.DecodeError):
                continue  # under a key that is gone: nothing can be said about it
            body.pop("payload", None)  # it may hold addresses: not for a terminal
            found.append(body)
    finally:
        await client.aclose()
    return found
