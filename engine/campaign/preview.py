"""Preview: the exact message one recipient would get, made on the path that mail takes, and a copy of it to try out.

Promise: review, expansion, compile, compose and sign are those of delivery; only the numbers a job gets when it is
accepted are not there yet (it is job 0 and list 0, so links of a preview lead nowhere and an opt-out in it opts nobody
out). What expansion would refuse is refused here with the same reason, except what only the store knows (suppression,
duplicates, the consent ledger).

`send` hands the copy to the configured route of the test address (route, smarthost, else MX) through aiosmtplib.

Known limits: the MX is tried in order of preference without the address checks of delivery: the operator typed it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from engine.bounce.verp import ReturnPaths
from engine.campaign import acceptance, expand
from engine.campaign.job import Recipient
from engine.campaign.people import Person
from engine.campaign.problems import Problem, examine
from engine.campaign.validation import CHECKS, Reading
from engine.message import Signer, Unwritable, compile_campaign, compose, person, sign_batch
from engine.message.program import Program
from engine.settings import EngineSettings, parse_target
from policy.accounts import Account
from policy.address import parse
from policy.events import Reason
from policy.gate import Mode, Permit
from policy.keys import Keyring
from tracker.links import Links

NOBODY = 0  # the job number of a message that is not sent: no job has it, so its links lead nowhere
SAMPLE = 1  # a subject number; 0 would say "aggregate" in a token


@dataclass(frozen=True, slots=True)
class Preview:
    """wire: the message with CRLF line ends, signed; sender: envelope sender; address: where it goes."""

    wire: bytes
    sender: str
    address: str


class CannotShow(Exception):
    """There is no such message; problems say why."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__("; ".join(str(problem) for problem in problems))
        self.problems = problems


def preview(
    reading: Reading,
    row: Mapping[str, Any],
    account: Account | None,
    keyring: Keyring,
    signers: Mapping[str, Sequence[Signer]],
    *,
    public_url: str,
    bounce_domain: str,
    now_us: int,
    to: str = "",
) -> Preview:
    """The message for one recipient row; `to` addresses it to somebody else. Raises CannotShow."""
    found = acceptance.review(reading, account, signers.keys())
    if found.problems or found.campaign is None:
        raise CannotShow(*found.problems)
    wrong = examine(row, Recipient, CHECKS, "recipient")
    if wrong:
        raise CannotShow(*wrong)
    links = Links(keyring.token, keyring.token_id, public_url)
    campaign = replace(found.campaign, view_url=links.view_url(NOBODY), notice_url=links.notice_url(NOBODY))
    program = compile_campaign(campaign)
    assert isinstance(program, Program)  # it was reviewed with shorter addresses of its pages
    someone = _expanded(found, keyring, msgspec.convert(row, Recipient), account, now_us)
    address = parse(to).wire if to else someone.wire
    permit = Permit(NOBODY, someone.mref, time.monotonic())
    try:
        recipient = person(
            links, program, job=NOBODY, mref=someone.mref, subject=SAMPLE, address=address,
            fields=dict(zip(someone.columns, someone.values, strict=True)), list_number=NOBODY,
            partition=someone.partition, tag=someone.tag,
            mode_opens=Mode(someone.opens), mode_clicks=Mode(someone.clicks),
        )  # fmt: skip
        unsigned = compose(permit, program, recipient, now_us)
    except Unwritable as error:
        raise CannotShow(Problem("recipient", f"its values do not fit the message: {error}")) from None
    [message] = sign_batch([unsigned], signers[campaign.from_address.rpartition("@")[2]])
    paths = ReturnPaths(keyring.return_path, keyring.return_path_id, bounce_domain)
    return Preview(message.wire, paths.make(NOBODY, someone.mref), address)


def _expanded(
    found: acceptance.Review, keyring: Keyring, row: Recipient, account: Account | None, now_us: int
) -> Person:
    """The row as expansion would make it."""
    terms = acceptance.sample_terms(found, account, now_us)
    prepared = expand.prepare(terms, keyring, 0, [row], 0, now_us)
    facts = {partition: bytes(len(people)) for partition, people in prepared.people.items()}
    permitted = expand.decide(terms, prepared, facts, {}, time.monotonic())
    if not permitted:
        reason = Reason(next(iter(prepared.events.values()))[0].reason).name.lower().replace("_", " ")
        hint = "an address that is none, a printed field that is missing, or a line break for a header"
        raise CannotShow(Problem("recipient", f"would be refused: {reason}", hint if reason == "invalid" else ""))
    return permitted[0]


async def send(message: Preview, settings: EngineSettings) -> str:
    """Hand it over; where to. Raises aiosmtplib.SMTPException, OSError, or dns.exception.DNSException."""
    import aiosmtplib

    domain = message.address.rpartition("@")[2]
    smarthost = settings.smarthost
    routed = _route(settings.routes, domain)
    if routed is None and smarthost.host:
        secure = {"implicit": (True, False), "starttls": (False, True), "none": (False, False)}[smarthost.tls]
        await aiosmtplib.send(
            message.wire, sender=message.sender, recipients=[message.address], hostname=smarthost.host,
            port=smarthost.port, use_tls=secure[0], start_tls=secure[1], local_hostname=settings.ehlo_name,
            username=smarthost.username or None, password=smarthost.password() if smarthost.username else None,
        )  # fmt: skip
        return smarthost.host
    targets = [routed] if routed is not None else await _exchangers(domain)
    for place, (host, port) in enumerate(targets):
        try:
            await aiosmtplib.send(
                message.wire, sender=message.sender, recipients=[message.address], hostname=host, port=port,
                local_hostname=settings.ehlo_name, timeout=30.0,
            )  # fmt: skip
        except OSError:  # the next MX, as long as there is one
            if place == len(targets) - 1:
                raise
        else:
            return f"{host}:{port}"
    raise OSError("the domain takes no mail (null MX)")


def _route(routes: Mapping[str, str], domain: str) -> tuple[str, int] | None:
    """The longest pattern wins: a domain, ``*.suffix`` or ``*`` (engine.settings)."""
    fitting = [
        pattern
        for pattern in routes
        if pattern in ("*", domain) or (pattern.startswith("*.") and domain.endswith(pattern[1:]))
    ]
    return parse_target(routes[max(fitting, key=len)]) if fitting else None


async def _exchangers(domain: str) -> list[tuple[str, int]]:
    import dns.asyncresolver
    import dns.resolver

    try:
        answer = await dns.asyncresolver.resolve(domain, "MX")
    except dns.resolver.NoAnswer:
        return [(domain, 25)]  # RFC 5321 5.1: without MX the domain itself
    ranked = sorted((record.preference, record.exchange.to_text(omit_final_dot=True)) for record in answer)
    return [(host, 25) for _, host in ranked if host not in ("", ".")]
