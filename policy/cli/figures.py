"""``sales-push status`` and ``why``: how far a job is, what happened to a person (a reading that is written down)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from policy.cli.asking import Config, Json, fail, keyring_of, now_us, reader_of, settings_of, show, when
from policy.cli.readings import SUPPORT, Law, Purpose, ask_to_read

if TYPE_CHECKING:
    from policy.ledger import JobStatus, Reader
    from policy.settings import PolicySettings


def story_of(settings: PolicySettings, address: str, purpose: str, law: str, *, what: str = "story") -> dict[str, Any]:
    """What is kept of an address; the reading is written down before anything is looked up (P-38)."""
    from policy.address import AddressError

    keyring = keyring_of(settings)
    ask_to_read(settings, keyring, purpose, what, address=address, law=law)
    reader = reader_of(settings)
    try:
        return reader.why(address, keyring).as_dict()
    except AddressError as error:
        fail(f"that is not an address ({error.reason})", 2)
    finally:
        reader.close()


def why(
    address: Annotated[str, typer.Argument(help="Whose mail.")],
    purpose: Purpose = SUPPORT,
    law: Law = "",
    as_json: Json = False,
    config: Config = None,
) -> None:
    """What happened to an address in every job still kept, and why nothing is sent to it. Exit code 1: not known.
    The reading is written down, so this needs the policy process."""
    told = story_of(settings_of(config), address, purpose, law)
    show(told, as_json, _why_lines(told))
    if not told["standing"] and not told["stories"]:
        raise typer.Exit(1)


def standing_line(entry: dict[str, Any]) -> str:
    scope = f"{entry['scope']} {entry['scope_name']}".strip()
    until = f" until {when(entry['until'])}" if entry["until"] else ""
    source = f" ({entry['source']})" if entry["source"] else ""
    return f"suppressed: {entry['target']}, {scope}: {entry['reason']} since {when(entry['since'])}{until}{source}"


def _why_lines(told: dict[str, Any]) -> Iterator[str]:
    yield from (standing_line(entry) for entry in told["standing"])
    for story in told["stories"]:
        code = " ".join(str(part) for part in (story["code"] or "", story["enhanced"]) if part)
        reason = f" ({story['reason']})" if story["reason"] else ""
        yield f"job {story['account']}/{story['job_id']}: {story['kind']}{reason} {when(story['at'])} {code}".rstrip()
        if story["reply"]:
            yield f"    {story['reply']}"
        for step in story["history"]:
            detail = " ".join(str(part) for part in (step["reason"], step["code"] or "", step["enhanced"]) if part)
            yield f"    {when(step['at'])} {step['kind']} {detail}".rstrip()
            if step["reply"]:
                yield f"        {step['reply']}"
    if not told["standing"] and not told["stories"]:
        yield "nothing is known of this address"
    if told["unreadable"]:
        yield f"{told['unreadable']} jobs could not be asked: their keys do not open"


def status(
    job: Annotated[str | None, typer.Argument(help="Number, job id or account/job_id; none: an overview.")] = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """A job's figures, or an overview of the newest jobs."""
    reader = reader_of(settings_of(config))
    try:
        if job is None:
            list_jobs(reader, as_json, 20, "")
            return
        found = _found(reader, job)
        show(found.as_dict(), as_json, _status_lines(found))
    finally:
        reader.close()


def _found(reader: Reader, job: str) -> JobStatus:
    from policy.ledger import Ambiguous

    try:
        found = reader.job_status(job, now_us())
    except Ambiguous as error:
        fail(str(error), 2)
    if found is None:
        fail("no such job")
    return found


def _status_lines(status: JobStatus) -> Iterator[str]:
    yield f"job {status.number} {status.account}/{status.job_id}: {status.state}" + (
        f" ({status.reason})" if status.reason else ""
    )
    yield f"  accepted {when(status.accepted_at)}  done {when(status.done_at)}  {status.rate:g}/s"
    rows = status.rows_submitted if status.rows_submitted is not None else f"? ({status.chunks} chunks so far)"
    waiting = status.waiting if status.waiting is not None else "?"
    yield f"  rows {rows}  ended {status.terminal}  waiting {waiting}  deferrals {status.deferrals}"
    for kind, n in sorted(status.counts.items(), key=lambda pair: -pair[1]):
        reasons = ", ".join(f"{reason} {m}" for reason, m in sorted(status.reasons.get(kind, {}).items()))
        yield f"  {kind:>12} {n:>10}" + (f"  ({reasons})" if reasons else "")
    if status.opens or status.clicks:
        yield f"  opens {status.opens}  clicks {status.clicks}"


def list_jobs(reader: Reader, as_json: bool, limit: int, state: str) -> None:
    found = reader.jobs(now_us(), limit, state)
    lines = [
        f"{one.number:>6}  {one.state:<10} {when(one.accepted_at)}  "
        f"{one.terminal:>8}/{one.rows_submitted if one.rows_submitted is not None else '?':<8} "
        f"{one.account}/{one.job_id}"
        for one in found
    ]
    show([one.as_dict() for one in found], as_json, lines or ["no jobs"])
