"""Must show (issue 3): an address is queued; Redis's memory, its append-only file and an RDB hold it nowhere in clear.

Two jobs with an address marker each, through the real intake: one sealed by `engine.client`, one plain JSON as any
other producer may send it. Of each, some wait queued and some deferred. A third marker is stored in clear on purpose:
every way of searching has to find that one, or it proves nothing.

What is claimed (decisions 3 and 18): of the sealed job nothing is anywhere, ever. Of the plain one nothing is in any
key, and after the rewrite nothing in any file. What the allocator has freed it does not wipe: the bytes of the plain
entry may lie in the server's free memory until they are overwritten, MEMORY PURGE or not; how many do is reported, not
judged (measured: 0 to 51 of 51 places). Producers who mind seal.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.client import META_FIELD
from policy import keyspace
from policy.valkey import call
from tests.world.mail import MailWorld, job, mail_world
from tests.world.octets import octets

EACH = 40  # recipients of each job at each of its two domains


def marker() -> str:
    """20 letters that occur nowhere else."""
    return "zq" + "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(18))


def forms(text: str) -> list[bytes]:
    """A text as it may be stored: in either case, in UTF-16, as hexadecimal digits, inside base64 at any offset."""
    found = []
    for spelled in (text.lower(), text.upper(), text.capitalize()):
        raw = spelled.encode()
        found += [raw, spelled.encode("utf-16-le"), spelled.encode("utf-16-be"), raw.hex().encode()]
        for before in range(3):
            whole = base64.b64encode(b"\0" * before + raw)
            found.append(whole[4 * (before > 0) : len(raw) // 3 * 4 - 4])  # what does not depend on the neighbours
    return [form for form in found if form] + [text.encode().hex().upper().encode()]


def count(data: bytes, text: str) -> int:
    return sum(data.count(form) for form in set(forms(text)))


def people(text: str, domain: str) -> list[dict[str, Any]]:
    return [{"address": f"{text}{place}@{domain}", "fields": {"name": f"{text} {place}"}} for place in range(EACH)]


def test_every_form_of_a_marker_is_found() -> None:
    text = marker()
    for before in range(4):
        for spelled in (text, text.upper()):
            held = b"x" * before + spelled.encode() + b"yz"
            assert count(held, text) == 1
            assert count(base64.b64encode(held), text) == 1
            assert count(held.hex().encode(), text) == 1
    assert count(text.encode("utf-16-le"), text) == 1
    assert count(marker().encode(), text) == 0


async def test_an_address_in_the_queue_is_nowhere_in_clear(record_property: Callable[[str, object], None]) -> None:
    sealed, plain, control = marker(), marker(), marker()
    async with mail_world("greylist:0:name=grey,seconds=3600") as mail:
        text = mail.config.read_text()
        mail.config.write_text(text.replace("schedule = [0.5, 0.7, 1]", "schedule = [7200]"))
        redis = mail.policy.redis
        await call(redis, "CONFIG", "SET", "rdbcompression", "no")  # else a search of dumps proves little
        await mail.policy.ask.halt_domain("queued.grey.test", "pause")
        await mail.start_worker()
        await _until(lambda: redis.hexists(keyspace.META, META_FIELD))  # a producer knows whom to seal to

        await mail.submit(job("sealed"), people(sealed, "queued.grey.test") + people(sealed, "tried.grey.test"))
        await _submit_plainly(mail, job("plain"), people(plain, "queued.grey.test") + people(plain, "tried.grey.test"))
        for name in ("sealed", "plain"):
            await _until(lambda name=name: _deferred(mail, name, EACH))  # type: ignore[misc]  # a default argument
        await _until(lambda: _cleared(mail))
        await redis.set("control", control)
        queued = await redis.keys("sp:{p*}:s:*")
        assert len(queued) >= 4, "of each job something queued and something deferred"

        values = [value async for value in _values(mail)]
        assert [sum(count(value, each) for value in values) for each in (sealed, plain)] == [0, 0]
        assert sum(count(value, control) for value in values) == 1

        before = _in_memory(mail.policy.server.embedded.pid, sealed, plain, control)
        await call(redis, "MEMORY", "PURGE")
        after = _in_memory(mail.policy.server.embedded.pid, sealed, plain, control)
        assert (before[sealed], after[sealed]) == (0, 0)
        assert after[control] >= 1
        record_property("plain_in_freed_memory", after[plain])
        print(f"plain JSON entry in freed memory: {before[plain]} places, {after[plain]} after MEMORY PURGE")

        await call(redis, "BGREWRITEAOF")
        await _until(lambda: _rewritten(mail))
        await call(redis, "SAVE")
        folder = mail.policy.server.embedded.folder
        store = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for name in ("appendonly.aof.", "dump.rdb"):
            assert sum(count(data, control) for path, data in store.items() if path.name.startswith(name)) == 1
        found = [path.name for path, data in _files(mail.folder) if count(data, sealed) or count(data, plain)]
        assert found == [], "nor in any other file of the installation: ledger, journals, logs"

        await mail.policy.ask.job_state("sealed", "cancelled")
        await mail.policy.ask.job_state("plain", "cancelled")
        for name in ("sealed", "plain"):
            assert (await mail.finished(name)).counts["cancelled"] == 2 * EACH, "it was all there, and could be opened"


@pytest.mark.parametrize("kept", [False, True])
async def test_clearing_takes_a_plain_entry_out_of_the_file(kept: bool) -> None:
    """The counter-proof: before the rewrite the append-only file holds the plain entry, after it no longer."""
    text = marker()
    async with mail_world() as mail:
        await call(mail.policy.redis, "CONFIG", "SET", "rdbcompression", "no")
        await mail.policy.ask.halt_account("shop", "pause")
        await _submit_plainly(mail, job("one"), people(text, "a.accept.test"))
        folder = mail.policy.server.embedded.folder / "appendonlydir"
        assert sum(count(path.read_bytes(), text) for path in folder.iterdir()) >= EACH
        if kept:  # nobody takes it: the file is rewritten all the same, and what waits is in the new one, too
            await call(mail.policy.redis, "BGREWRITEAOF")
            await _until(lambda: _rewritten(mail))
            assert sum(count(path.read_bytes(), text) for path in folder.iterdir()) >= EACH
        await mail.start_worker()
        await _until(lambda: _expanded(mail, "one"))
        await _until(lambda: _cleared(mail))
        await _until(lambda: _rewritten(mail))
        assert sum(count(path.read_bytes(), text) for path in folder.iterdir()) == 0


async def _submit_plainly(mail: MailWorld, made: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """As a program does that knows nothing but the contract (docs/jobs.md)."""
    data = "\n".join(json.dumps(row) for row in rows)
    redis = mail.policy.redis
    await redis.xadd(keyspace.INTAKE, {"job": json.dumps({**made, "audience": {"chunks": 1}})})
    await redis.xadd(keyspace.INTAKE, {"audience": made["job_id"], "account": "shop", "n": 0, "data": data})


async def _values(mail: MailWorld) -> Any:
    """Name and serialised value of every key."""
    async for key in mail.policy.redis.scan_iter(count=1000):
        dumped = await call(mail.policy.redis, "DUMP", key)
        yield key + b" " + (dumped or b"")


def _in_memory(pid: int, *texts: str) -> dict[str, int]:
    """How often each text is in the readable memory of a process."""
    found = dict.fromkeys(texts, 0)
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            region, rights, *_ = line.split()
            if not rights.startswith("r") or line.endswith(("[vvar]", "[vsyscall]", "[vvar_vclock]")):
                continue
            first, last = (int(part, 16) for part in region.split("-"))
            memory.seek(first)
            data = b"".join(iter(lambda: memory.read(min(last - memory.tell(), 1 << 24)), b""))  # noqa: B023 - used here
            for text in texts:
                found[text] += count(data, text)
    return found


def _files(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Everything the installation wrote; not what the recipients' server kept."""
    for path in folder.rglob("*"):
        if path.is_file() and "kept" not in path.parts:
            yield path, octets(path)


def _deferred(mail: MailWorld, job_id: str, wanted: int) -> bool:
    status = mail.policy.reader.job_status(job_id, mail.policy.clock())
    return status is not None and status.deferrals >= wanted


def _expanded(mail: MailWorld, job_id: str) -> bool:
    status = mail.policy.reader.job_status(job_id, mail.policy.clock())
    return status is not None and status.rows_submitted is not None


def _cleared(mail: MailWorld) -> bool:
    """The writer has seen the intake become quiet and has had the file rewritten."""
    told = mail.policy.writer.statistics()
    return told["aof_rewrites"] != 0 and told["intake_clear_age_seconds"] == 0


async def _rewritten(mail: MailWorld) -> bool:
    """No rewrite is under way, and the files of the last one are gone."""
    told = await mail.policy.redis.info("persistence")
    if told["aof_rewrite_in_progress"] or told["aof_rewrite_scheduled"]:
        return False
    folder = mail.policy.server.embedded.folder / "appendonlydir"
    listed = {line.split()[1] for line in (folder / "appendonly.aof.manifest").read_text().splitlines()}
    return {path.name for path in folder.iterdir()} == {*listed, "appendonly.aof.manifest"}


async def _until(is_so: Callable[[], bool | Awaitable[bool]], seconds: float = 40.0) -> None:
    async with asyncio.timeout(seconds):
        while True:
            told = is_so()
            if told if isinstance(told, bool) else await told:
                return
            await asyncio.sleep(0.02)
