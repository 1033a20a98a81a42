"""From a job number to a compiled campaign that writes signed messages (step 7), once per job and worker.

Promise: a job is read, opened, compiled and given its signers once, by whoever asks first, however many wait; the
compiled program of a job whose template another job had is the same object (`message.compile_campaign` keeps them).
Keys that are exchanged (`Campaigns.reload_signers`) sign from the next batch on, also for jobs in hand.

Known limits: the job row is read in a thread, because SQLite has no other way. A domain whose key is taken away signs
on with the old one in jobs in hand; new jobs of it do not load.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import msgspec

from engine.bounce.verp import ReturnPaths
from engine.message import (
    Campaign,
    OpenSSLSigner,
    Program,
    Signer,
    Unsigned,
    Unwritable,
    compile_campaign,
    compose,
    load_signer,
    person,
    sign_batch,
)
from engine.message.multibuffer import LaneMaker, Unavailable, accelerate, open_library
from engine.queue.windows import Timing, Window, opens_in
from engine.settings import DkimFiles, KeyFileError
from policy.gate import Mode, Permit
from policy.keys import Keyring, SealError, open_sealed
from policy.ledger import JobPayload, Reader
from policy.wire import job_aad
from tracker.links import Links

if TYPE_CHECKING:
    from engine.delivery.hand import Letter

log = logging.getLogger(__name__)

# The mailto form of List-Unsubscribe stays out until something hears that mailbox (bounce.inbox, to come): an opt-out
# that is offered and not heard is worse than one way less. RFC 8058 asks for the https form only.
OPTOUT_DOMAIN = ""
Implementation = Literal["auto", "openssl", "multi-buffer"]  # of signatures
Composed = tuple["Letter", str, str, bytes]  # with envelope sender, recipient, wire bytes
_MODES = {int(mode): mode for mode in Mode}  # a call of the enum costs five times a look into here
KEPT = 256  # jobs compiled and ready, per worker; one is about 200 kB with four variants


def load_signers(
    files: Mapping[str, DkimFiles],
    implementation: Implementation = "auto",
    *,
    opened: Callable[[], LaneMaker] = open_library,
    clock: Callable[[], float] = time.thread_time,
) -> dict[str, list[Signer]]:
    """Signers by From domain, RSA first. A key is parsed and tried once: that costs 37 ms, and 10 more for lanes.

    implementation: as `[engine.signing]` says; opened: finds the multi-buffer library; clock: seconds of CPU of this
    thread. Raises ValueError (a key that does not fit its public half; "multi-buffer" where there is none), OSError.
    """
    plain: dict[str, list[OpenSSLSigner]] = {}
    for domain, keys in files.items():
        found = [load_signer(domain, keys.rsa_selector, keys.rsa.read_bytes())]
        if keys.ed25519 is not None and keys.ed25519_selector is not None:
            found.append(load_signer(domain, keys.ed25519_selector, keys.ed25519.read_bytes()))
        if not all(signer.self_test() for signer in found):
            raise ValueError(f"a DKIM key of {domain} does not sign what its public half verifies")
        plain[domain] = found
    signers: dict[str, list[Signer]] = {domain: list(found) for domain, found in plain.items()}
    if implementation == "openssl":
        return signers
    reasons: list[str] = []
    try:
        maker = opened()
    except Unavailable as error:
        reasons.append(str(error))
    else:
        signers = {domain: [_fast(one, maker, clock, reasons) for one in found] for domain, found in plain.items()}
    if reasons and implementation == "multi-buffer":
        raise ValueError(f'[engine.signing] implementation = "multi-buffer" cannot be had: {"; ".join(reasons)}')
    if reasons:
        log.info("OpenSSL signs, one message at a time", extra={"why": "; ".join(reasons)})
    return signers


def _fast(plain: OpenSSLSigner, maker: LaneMaker, clock: Callable[[], float], reasons: list[str]) -> Signer:
    """The same key by lanes, or itself and one reason more."""
    try:
        return accelerate(plain, maker, clock)
    except Unavailable as error:
        reasons.append(str(error))
        return plain


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A job ready to be written: everything but the recipient. signers: the one list of its domain, in which keys are
    exchanged (`Campaigns.reload_signers`)."""

    number: int
    job_key: bytes
    list_number: int
    program: Program | None
    signers: Sequence[Signer]
    links: Links | None
    return_path: ReturnPaths | None
    window: Window | None = None

    def opens_in(self, now_us: int) -> float:
        """Seconds until its mail may leave, 0.0 when it may now."""
        return opens_in(now_us, self.window) if self.window is not None else 0.0

    def compose(self, pairs: Sequence[tuple[Permit, Letter]]) -> tuple[list[Composed], list[Letter]]:
        """Signed messages of letters of this job, and the letters whose values do not fit."""
        return compose_together(pairs)

    def write(self, permit: Permit, letter: Letter) -> tuple[str, Unsigned]:
        """One message: its recipient, and all of it but the signatures. Raises Unwritable, ValueError."""
        program, links = self.program, self.links
        assert program is not None
        assert links is not None
        hand, index = letter.hand, letter.index
        row = hand.contents.rows[index]
        address = f"{row.local}@{hand.contents.domain}"
        try:
            opens, clicks = _MODES[row.mode_opens], _MODES[row.mode_clicks]
        except KeyError:
            raise ValueError("not a tracking mode") from None
        someone = person(  # by position: names cost a microsecond
            links,
            program,
            self.number,
            letter.mref,
            row.subject,
            address,
            dict(zip(hand.contents.columns, row.values, strict=False)),
            self.list_number,
            hand.lease.partition,
            hand.reference(index)[1],
            OPTOUT_DOMAIN,
            "",
            opens,
            clicks,
        )
        return address, compose(permit, program, someone, hand.header.date)


def compose_together(pairs: Sequence[tuple[Permit, Letter]]) -> tuple[list[Composed], list[Letter]]:
    """Signed messages in the order of pairs, and the letters whose values do not fit. They may be of many jobs: what
    the same keys sign is signed together."""
    failed: list[Letter] = []
    written: list[tuple[Loaded, Letter, str]] = []
    batches: dict[tuple[Signer, ...], tuple[list[int], list[Unsigned]]] = {}
    for permit, letter in pairs:
        own = letter.hand.job
        try:
            address, unsigned = own.write(permit, letter)
        except (Unwritable, ValueError) as error:
            log.info("a recipient cannot be written to", extra={"job": own.number, "fault": type(error).__name__})
            failed.append(letter)
            continue
        key = tuple(own.signers)
        batch = batches.get(key)
        if batch is None:
            batch = batches[key] = [], []
        batch[0].append(len(written))
        batch[1].append(unsigned)
        written.append((own, letter, address))
    wires = [b""] * len(written)
    for signers, (places, messages) in batches.items():
        for place, message in zip(places, sign_batch(messages, signers), strict=True):
            wires[place] = message.wire
    composed: list[Composed] = []
    for (own, letter, address), wire in zip(written, wires, strict=True):
        assert own.return_path is not None
        composed.append((letter, own.return_path.make(own.number, letter.mref), address, wire))
    return composed, failed


class Campaigns:
    """One per worker. signers by From domain; public_url and bounce_domain as in the policy settings."""

    def __init__(
        self,
        reader: Reader,
        keyring: Callable[[], Keyring],
        signers: Mapping[str, Sequence[Signer]],
        *,
        public_url: str,
        bounce_domain: str,
    ) -> None:
        self._reader = reader
        self._keyring = keyring
        self._signers = {domain: list(found) for domain, found in signers.items()}  # the lists live on, see Loaded
        self._keyless: set[str] = set()  # domains whose key was taken away
        self._reload_fault = ""
        self._public_url = public_url
        self._bounce_domain = bounce_domain
        self._loaded: OrderedDict[int, asyncio.Future[Loaded | None]] = OrderedDict()
        self.nothing = Loaded(0, b"", 0, None, (), None, None)

    async def get(self, number: int) -> Loaded | None:
        """None: no such job, its payload is destroyed, or its keys do not open. Raises what the store raises."""
        known = self._loaded.get(number)
        if known is None:
            known = asyncio.ensure_future(self._load(number))
            self._loaded[number] = known
            if len(self._loaded) > KEPT:
                self._loaded.popitem(last=False)
        else:
            self._loaded.move_to_end(number)
        try:
            return await asyncio.shield(known)
        except BaseException:
            self._loaded.pop(number, None)
            raise

    @property
    def signing_domains(self) -> frozenset[str]:
        """From domains there is a key for, now."""
        return frozenset(self._signers.keys() - self._keyless)

    async def reload_signers(self, load: Callable[[], Mapping[str, Sequence[Signer]]]) -> bool:
        """Exchanges the signing keys for what load answers (in a thread: a key costs 50 ms). False: it failed, the old
        ones stay, and one error line says why (not again for the same reason); ask again later, a file may have been
        half written. Jobs in hand sign with the new ones from their next batch on."""
        try:
            signers = await asyncio.to_thread(load)
        except (KeyFileError, OSError, ValueError) as error:
            if str(error) != self._reload_fault:
                self._reload_fault = str(error)
                log.error("the signing keys could not be read again; the old ones stay", extra={"why": str(error)})
            return False
        self._reload_fault = ""
        for domain, found in signers.items():
            self._signers.setdefault(domain, [])[:] = found  # in place: every job of the domain has this list
        for domain in self._signers.keys() - signers.keys() - self._keyless:
            log.error(
                "a domain has no signing key any more; its jobs in hand keep the old one", extra={"domain": domain}
            )
        self._keyless = self._signers.keys() - signers.keys()
        for number, known in list(self._loaded.items()):
            if known.done() and (known.cancelled() or known.exception() is not None or known.result() is None):
                del self._loaded[number]  # perhaps its key was missing
        return True

    def resends(self, number: int) -> bool:
        """Whether the job tries again who is in doubt (T8). Blocking: ask in a thread."""
        row = self._reader.job_payload(number)
        return row is not None and row.in_doubt == "resend"

    async def job_key(self, number: int) -> bytes | None:
        """What a job's recipients are named by, where nothing is to be composed; None as in `get`, but the signing keys
        need not be here."""
        row = await asyncio.to_thread(self._reader.job_payload, number)
        if row is None or row.job_key is None:
            return None
        try:
            return open_sealed(self._keyring().service, row.job_key, job_aad("key", row.account, row.job_id))
        except SealError:
            log.critical("a job's key does not open", extra={"job": number})
            return None

    async def _load(self, number: int) -> Loaded | None:
        row = await asyncio.to_thread(self._reader.job_payload, number)
        if row is None or row.payload is None or row.job_key is None:
            return None
        keyring = self._keyring()
        try:
            payload = open_sealed(keyring.service, row.payload, job_aad("payload", row.account, row.job_id))
            job_key = open_sealed(keyring.service, row.job_key, job_aad("key", row.account, row.job_id))
            campaign = msgspec.msgpack.decode(payload, type=Campaign)
            window = msgspec.msgpack.decode(payload, type=Timing).window
        except (SealError, msgspec.DecodeError) as error:
            log.critical("a job does not open", extra={"job": number, "fault": type(error).__name__})
            return None
        return self._ready(row, campaign, window, job_key, keyring)

    def _ready(
        self, row: JobPayload, campaign: Campaign, window: Window | None, job_key: bytes, keyring: Keyring
    ) -> Loaded | None:
        links = Links(keyring.token, keyring.token_id, self._public_url)
        # Only now does the job have a number, and its public pages with it.
        campaign = replace(campaign, view_url=links.view_url(row.number), notice_url=links.notice_url(row.number))
        program = compile_campaign(campaign)
        domain = campaign.from_address.rpartition("@")[2]
        signers = self._signers.get(domain) if domain not in self._keyless else None
        if not isinstance(program, Program) or not signers:
            log.critical("an accepted job does not compile any more, or its key is gone", extra={"job": row.number})
            return None
        paths = ReturnPaths(keyring.return_path, keyring.return_path_id, self._bounce_domain)
        return Loaded(row.number, job_key, row.list_number, program, signers, links, paths, window)
