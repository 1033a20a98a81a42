"""Reference renders: what each message must be, written a second time, in another process and another life (I2).

The campaign is compiled anew from what the ledger holds of the job, the recipient's fields are those of the producer's
own ledger (never of a slice), and the message is composed by the product's own rooms without a signature. The date is
the one thing nobody else knows: a slice takes it at its first lease, so every second between acceptance and arrival is
tried, the one of the last message first.

What it proves: whatever crashes lay between, the bytes that arrived for a person are those a worker without a past
would have written for that person of that job, to the last octet but the signature (which a second copy repeats: I2
compares the whole of it). What it does not prove: that compose itself is right; tests/engine and the debian tests do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from engine.delivery.campaigns import Campaigns, Loaded, load_signers
from engine.message import compose, person
from engine.settings import EngineSettings, dkim_files
from policy.address import mref_of, normalise, parse, tag_of
from policy.gate import Permit
from policy.keys import Keyring
from policy.keyspace import partition_of
from policy.ledger import Reader
from policy.settings import PolicySettings, load
from tests.chaos.checker import Job, Key
from tests.chaos.sink_record import Entry
from tests.chaos.world import World

_EARLIER = 2  # s the date may lie before the acceptance: clocks of two processes, cut to seconds


class Renders:
    """One life. `of` answers the hashes that are right for a person."""

    def __init__(self, world: World, reader: Reader) -> None:
        self._keyring: Keyring = world.keyring
        engine, policy = load(EngineSettings, world.config), load(PolicySettings, world.config)
        signers = load_signers(dkim_files(engine, policy.keys_dir))
        self._campaigns = Campaigns(
            reader, lambda: world.keyring, signers, public_url=policy.public_url, bounce_domain=policy.bounce_domain
        )
        self._last = 0

    async def all(
        self, jobs: Sequence[Job], rows: Mapping[str, Sequence[Mapping[str, Any]]], entries: Sequence[Entry],
        accepted: Mapping[int, int], ended: int,
    ) -> dict[Key, frozenset[str]]:  # fmt: skip
        """rows: the producer's, by job id; accepted: seconds since the epoch by job number; ended: the same, of now."""
        wanted: dict[Key, set[str]] = {}
        for entry in entries:
            if entry.t_dot is not None:
                wanted.setdefault((entry.job, entry.mref), set()).add(entry.plain)
        found: dict[Key, frozenset[str]] = {}
        for job in jobs:
            mine = {mref: wanted[job.number, mref] for mref in job.people if (job.number, mref) in wanted}
            loaded = await self._campaigns.get(job.number) if mine else None
            if loaded is None:
                continue
            fields = self._fields(loaded, rows[job.job_id])
            for mref, hashes in mine.items():
                span = range(accepted[job.number] - _EARLIER, ended + 1)
                address, values = fields[mref]
                right = {h for h in hashes if self._matches(loaded, mref, address, values, h, span)}
                found[job.number, mref] = frozenset(right)
        return found

    def _fields(self, job: Loaded, rows: Sequence[Mapping[str, Any]]) -> dict[int, tuple[str, dict[str, Any]]]:
        """By mref, the first row of an address: the others are its duplicates."""
        found: dict[int, tuple[str, dict[str, Any]]] = {}
        for row in rows:
            if "@" in row["address"]:
                mailbox = parse(row["address"])
                mref = mref_of(job.job_key, normalise(mailbox.local, mailbox.domain))
                found.setdefault(mref, (mailbox.wire, row["fields"]))
        return found

    def _matches(self, job: Loaded, mref: int, address: str, fields: dict[str, Any], wanted: str, span: range) -> bool:
        for second in (self._last, *span):
            if second and self._hash(job, mref, address, fields, second) == wanted:
                self._last = second
                return True
        return False

    def _hash(self, job: Loaded, mref: int, address: str, fields: dict[str, Any], second: int) -> str:
        assert job.links is not None
        assert job.program is not None
        mailbox = parse(address)
        someone = person(
            job.links, job.program, job=job.number, mref=mref, subject=1, address=address, fields=fields,
            list_number=job.list_number, partition=partition_of(mailbox.domain),
            tag=tag_of(self._keyring.pepper, normalise(mailbox.local, mailbox.domain)),
        )  # fmt: skip
        unsigned = compose(Permit(job.number, mref, 0.0), job.program, someone, second * 1_000_000)
        return sha256(unsigned.head + b"\r\n" + unsigned.body).hexdigest()
