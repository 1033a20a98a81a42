"""A whole engine for a journey: policy floor in this process, workers and the rehearsal's server as processes.

async with mail_world() as mail:
    await mail.start_worker()
    await mail.submit(job("letter-1"), rows)
    status = await mail.finished("letter-1")
    counts = await mail.sink_counts()
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from engine.client import AsyncProducer
from engine.message import load_signer
from policy import keyspace
from policy.instants import rfc3339
from policy.keys import open_sealed
from policy.ledger import JobStatus
from policy.valkey import call
from tests.world.servers import PolicyWorld, policy_world, short_folder

ROOT = Path(__file__).parents[2]
SENDER = "letter.example"
_CONFIG = """
[policy]
data_dir = "{folder}"
public_url = "http://127.0.0.1:8999"
log_json = false
[policy.officer]
name = "Privacy Officer"
address = "privacy@example.org"
[engine]
workers = {workers}
hostname = "mx.letter.example"
tls = "{tls}"
lease_seconds = 10
min_free_bytes = 0
[engine.limits]
connections = 8
[engine.pace]
start = 4
calm = 0.1
back_off = 0.3
back_off_cap = 1
block_back_off = 0.3
[engine.retry]
schedule = [0.5, 0.7, 1]
[engine.supervisor]
drain_seconds = 20
[engine.routes]
{routes}
"""


def job(job_id: str, **more: Any) -> dict[str, Any]:
    """A small campaign of the account "shop"; more: fields in the words of the producer contract."""
    return {
        "v": 1,
        "job_id": job_id,
        "created_at": rfc3339(time.time_ns() // 1000),
        "account": "shop",
        "kind": "campaign",
        "from": {"name": "The Letter", "address": f"hello@{SENDER}"},
        "subject": "Hello {{ name }}",
        "html": '<p>Dear {{ name }}, <a href="https://shop.example/a">look</a> '
        '<a href="{{ unsubscribe_url }}">unsubscribe</a> {{ postal_address }}</p>',
        "list": "letter",
        "postal_address": "1 High Street",
        "legal_basis": {"basis": "existing-customer"},
        **more,
    }


def rows(count: int, domain: str, start: int = 0, **more: Any) -> list[dict[str, Any]]:
    return [
        {"address": f"person{number}@{domain}", "fields": {"name": f"Person {number}"}, **more}
        for number in range(start, start + count)
    ]


@dataclass
class MailWorld:
    """ports: by provider name; domains under ``<name>.test`` are routed there."""

    policy: PolicyWorld
    folder: Path
    config: Path
    ports: dict[str, int]
    control: int
    workers: list[asyncio.subprocess.Process] = field(default_factory=list)

    async def start_worker(self, index: int = 0) -> asyncio.subprocess.Process:
        code = "import sys; from pathlib import Path; from engine.worker import run_worker; " + (
            "sys.exit(run_worker(int(sys.argv[1]), Path(sys.argv[2])))"
        )
        log = (self.folder / f"worker-{index}.log").open("ab")
        try:
            worker = await asyncio.create_subprocess_exec(
                sys.executable, "-c", code, str(index), str(self.config), cwd=ROOT, stderr=log, stdout=log
            )
        finally:
            log.close()
        self.workers.append(worker)
        return worker

    async def submit(self, job: Mapping[str, Any], recipients: Sequence[Mapping[str, Any]]) -> str:
        async with AsyncProducer(self.policy.server.url) as producer:
            return await producer.submit(dict(job), recipients)

    async def finished(self, job_id: str, seconds: float = 60.0) -> JobStatus:
        """The status once the job is over; fails with the last figures when it takes too long."""
        status: JobStatus | None = None
        async with asyncio.timeout(seconds):
            try:
                while status is None or status.state not in ("done", "cancelled", "expired", "lost") or status.waiting:
                    await asyncio.sleep(0.05)  # a poll with a deadline: the ledger has no way to call us
                    status = self.policy.reader.job_status(job_id, self.policy.clock())
                    if status is None and (problems := await self.rejected()):
                        raise AssertionError(f"the job was rejected: {problems}")
                    for worker in self.workers:
                        if worker.returncode not in (None, 0, -signal.SIGKILL):
                            raise AssertionError(f"a worker ended with {worker.returncode}: {self.log()}")
            except asyncio.CancelledError:
                print(status, await self.rejected(), self.log())
                raise
        return status

    async def rejected(self) -> list[Any]:
        """The problems of every rejected entry."""
        entries = await call(self.policy.redis, "XRANGE", keyspace.REJECTED, "-", "+")
        service = self.policy.keyring.service
        sealed = [bytes(fields[b"sealed"]) for _, fields in entries]
        return [msgspec.msgpack.decode(open_sealed(service, data, b"rejected"))["problems"] for data in sealed]

    async def sink_counts(self) -> dict[str, dict[str, Any]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.control)
        try:
            writer.write(b"counts\n")
            counts: dict[str, dict[str, Any]] = json.loads(await reader.readline())["providers"]
            return counts
        finally:
            writer.close()
            await writer.wait_closed()

    def kept(self) -> list[bytes]:
        """Every message the server kept."""
        return [path.read_bytes() for path in sorted((self.folder / "kept").rglob("*")) if path.is_file()]

    def dkim_records(self) -> dict[str, str]:
        """The DNS records that belong to the signing keys, by name."""
        records = {}
        for path in (self.policy.settings.keys_dir / "dkim").iterdir():
            selector = path.name.removeprefix(SENDER + ".").split(".")[0]
            signer = load_signer(SENDER, selector, path.read_bytes())
            records[f"{selector}._domainkey.{SENDER}"] = signer.public_record()
        return records

    def log(self) -> str:
        return "".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("worker-*.log")))

    async def kill(self, worker: asyncio.subprocess.Process) -> None:
        worker.kill()
        await worker.wait()

    async def drain(self, worker: asyncio.subprocess.Process) -> int:
        worker.terminate()
        async with asyncio.timeout(30):
            return await worker.wait()


def _keys(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    made: dict[str, rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey] = {
        f"{SENDER}.s1.rsa.pem": rsa.generate_private_key(65537, 2048),
        f"{SENDER}.s1e.ed25519.pem": ed25519.Ed25519PrivateKey.generate(),
    }
    for name, key in made.items():
        path = folder / name
        path.touch(mode=0o600)
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )


@contextlib.asynccontextmanager
async def mail_world(
    *providers: str,
    workers: int = 1,
    tls: str = "off",
    sink_options: Sequence[str] = (),
    others: Mapping[str, int] | None = None,
    prepare: Callable[[Path], Awaitable[None]] | None = None,
) -> AsyncIterator[MailWorld]:
    """providers: descriptions of engine.rehearsal.providers, each with a name of its own; default one that accepts.

    others: ports of servers that are not ours, by name: domains under ``<name>.test`` are routed there.
    prepare: lays out the folder of an installation that was, with its keys, its queue and its account "shop".
    """
    providers = providers or ("accept:0:name=accept",)
    async with contextlib.AsyncExitStack() as stack:
        folder = stack.enter_context(short_folder())
        arguments = [part for text in providers for part in ("--provider", text)]
        sink = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "engine.rehearsal.server", *arguments, "--keep", "-1", "--keep-dir",
            str(folder / "kept"), *sink_options, cwd=ROOT, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        stack.push_async_callback(_end, sink)
        assert sink.stdout is not None
        said = json.loads(await sink.stdout.readline())
        if prepare is not None:
            await prepare(folder)
        policy = await stack.enter_async_context(policy_world(folder))
        if prepare is None:
            _keys(policy.settings.keys_dir / "dkim")
        routes = "\n".join(
            f'"*.{name}.test" = "127.0.0.1:{port}"' for name, port in {**said["ports"], **(others or {})}.items()
        )
        config = folder / "sales-push.toml"
        config.write_text(_CONFIG.format(folder=folder, workers=workers, tls=tls, routes=routes))
        if prepare is None:
            await policy.ask.account_add(
                "shop", display_name="The Shop", postal_address="1 High Street", opens_mode=3, clicks_mode=3
            )
        mail = MailWorld(policy, folder, config, said["ports"], said["control"])

        async def end_workers() -> None:
            for worker in mail.workers:
                await _end(worker)

        stack.push_async_callback(end_workers)
        yield mail


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
    await process.wait()
    # the transport of a pipe closes in a later turn of the loop; a test that ends before it would warn
    if process.stdout is not None:
        while await process.stdout.read(65536):
            pass
