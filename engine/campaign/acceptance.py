"""Acceptance: a job that reads well becomes a campaign that compiles, and the record that the ledger keeps of it.

Promise (T1): whatever is wrong (shape, templates, sender, account) is told together; what is accepted can be composed.
The stored payload is the message's own `Campaign` in msgpack plus one field ``expansion`` that only this room reads:
delivery decodes it as a `Campaign` and does not see the rest. It holds no recipient.

    1. `review`   Reading + account + domains we sign for -> compiled program and expansion, or every problem
    2. `record`   -> policy.wire.JobRecord, contents sealed, with a fresh job key
    3. `terms`    the stored job -> what expansion needs (expand.Terms), in any worker

Known limits: the fields of an audience that follows are not known here; a row that lacks a printed field is refused
alone (`invalid`) when it is expanded. The size of a message is estimated from its parts.
"""

from __future__ import annotations

import base64
import os
import re
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final

import msgspec

from engine.campaign.expand import Terms
from engine.campaign.job import DEFAULT_LIFE_DAYS, Evidence, Job, Recipient, window_of
from engine.campaign.problems import Problem, broken
from engine.campaign.validation import Reading
from engine.client import CHUNK_ROWS
from engine.message import Attachment, Campaign, Program, compile_campaign, contexts, template
from engine.queue.windows import Timing, Window, opens_in
from policy.accounts import Account
from policy.address import parse
from policy.gate import Mode, strictest
from policy.instants import DAY_US, SECOND_US, parse_rfc3339
from policy.keys import Keyring, open_sealed, seal
from policy.ledger import JobPayload
from policy.wire import Accepted, JobRecord, job_aad

MOST_MESSAGE_BYTES: Final = 10 * 1024 * 1024  # engine.settings: what the strictest large receivers take, encoded
ROWS_A_BUCKET: Final = 1024  # 64 partitions, a few times 64 fingerprints each where domains are uneven (queue.lanes)
_VIEWS_KEPT: Final = 16  # of a megabyte each, at most
_TEMPLATES: Final = ("subject", "html", "text")
_json: Final = msgspec.json.Encoder()
_STAND_IN: Final = "sender@example.org"  # where the real sender is broken: templates are judged all the same


class Expansion(msgspec.Struct, frozen=True, array_like=True):
    """What expansion must know beside the job's columns. entry: id of the stream entry that brought the job;
    start: microseconds from which a `rate` counts; columns, required, one_line, window: see expand.Terms."""

    entry: str
    account: str
    chunks: int
    buckets: int
    start: int
    rate: float
    wait: bool
    needs_consent: bool
    consent: dict[str, Evidence]
    columns: list[str]
    required: list[str]
    one_line: list[str]
    window: Window | None = None


@dataclass(slots=True)
class Review:
    """program and campaign are there exactly when there are no problems; expansion and job_key with the record."""

    reading: Reading
    problems: list[Problem] = field(default_factory=list)
    campaign: Campaign | None = None
    program: Program | None = None
    expansion: Expansion | None = None
    job_key: bytes = b""


def review(
    reading: Reading, account: Account | None, signing_domains: Collection[str], *, most_bytes: int = MOST_MESSAGE_BYTES
) -> Review:
    """Judge everything about a job that was read. Never raises."""
    found = Review(reading, list(reading.problems))
    if reading.account and account is None:
        found.problems.append(Problem("$.account", "there is no such account", "sales-push account add"))
    elif account is not None and account.is_frozen:
        found.problems.append(Problem("$.account", "is frozen: it may not send"))
    job = reading.job
    if job is None:
        found.problems += _template_problems(reading.tree)
        return found
    domain = parse(job.from_.address).domain
    if domain not in signing_domains:
        text = "its domain has no DKIM key here: the mail would not be signed"
        found.problems.append(Problem("$.from.address", text, f"sales-push init --domain {domain}"))
    campaign = campaign_of(job, account)
    size = _encoded_size(campaign)
    if size > most_bytes:
        text = f"the message would have about {size:,} bytes, at most {most_bytes:,}"
        found.problems.append(
            Problem("$.attachments" if campaign.attachments else "$.html", text, "link to large files")
        )
    compiled = compile_campaign(campaign)
    if isinstance(compiled, Program):
        found.campaign, found.program = campaign, compiled
    else:
        found.problems += [_problem(job, problem.path, problem.message, problem.suggestion) for problem in compiled]
    return found


def campaign_of(job: Job, account: Account | None) -> Campaign:
    """The job's contents in the words of engine.message. The job has been judged."""
    mailbox = parse(job.from_.address)
    known: frozenset[str] | None = None
    if job.recipients is not None:
        names = {name for row in job.recipients for name in row.fields}
        known = frozenset(names | ({"name"} if any(row.name for row in job.recipients) else set()))
    return Campaign(
        subject=job.subject,
        from_address=mailbox.wire,
        from_name=job.from_.name,
        reply_to=parse(job.reply_to).wire if job.reply_to else "",
        html=job.html or None,
        text=job.text or None,
        headers=tuple(job.headers.items()),
        attachments=tuple(
            Attachment(file.filename, file.content_type, base64.b64decode(file.content), file.cid or None)
            for file in job.attachments
        ),
        fields=known,
        bulk=job.kind == "campaign",
        list_id=_list_id(job.list_, mailbox.domain) if job.list_ else "",
        list_label=job.list_,
        feedback_id=tuple(_word(word) for word in (job.job_id, job.account, job.kind, mailbox.domain)),
        account_name=(account.display_name or account.name) if account is not None else "",
        postal_address=job.postal_address or (account.postal_address if account is not None else ""),
    )


def record(found: Review, keyring: Keyring, now_us: int, life: Mapping[str, float], entry: str) -> JobRecord:
    """What the writer enters. life: seconds a job of a kind is tried when it names no expires_at."""
    job, campaign, program = found.reading.job, found.campaign, found.program
    assert job is not None
    assert campaign is not None
    assert program is not None
    send_at = parse_rfc3339(job.send_at) if job.send_at else 0
    window = window_of(job.window)
    start = max(now_us, send_at)
    begins = start + round(opens_in(start, window) * SECOND_US)  # 72 hours are counted from when mail may leave
    default = round(life.get(job.kind, DEFAULT_LIFE_DAYS[job.kind] * DAY_US / SECOND_US) * SECOND_US)
    expansion = found.expansion = _expansion(job, campaign, program, entry, start)
    found.job_key = os.urandom(32)

    def sealed(what: str, data: bytes) -> bytes:
        return seal(keyring.service, data, job_aad(what, job.account, job.job_id))

    return JobRecord(
        account=job.account,
        job_id=job.job_id,
        hash=found.reading.hash,
        kind=job.kind,
        created_at=parse_rfc3339(job.created_at),
        payload=sealed("payload", stored(campaign, expansion)),
        job_key=sealed("key", found.job_key),
        legal_basis=job.legal_basis.basis if job.legal_basis is not None else "",
        accepted_at=now_us,
        list=job.list_,
        topic=job.topic,
        subject=sealed("subject", job.subject.encode("utf-8")),
        in_doubt=job.in_doubt or ("hold" if job.kind == "campaign" else "resend"),
        priority=job.kind == "transactional",
        wait=job.wait,
        opens_mode=int(Mode[job.tracking.opens.upper()]),
        clicks_mode=int(Mode[job.tracking.clicks.upper()]),
        send_at=send_at,
        expires_at=parse_rfc3339(job.expires_at) if job.expires_at else begins + default,
        chunks_expected=expansion.chunks,
        links=tuple(program.links),
        view=_view(campaign, program),
        entry_hash=entry_hash(job.recipients) if job.recipients is not None else b"",
        entry_rows=len(job.recipients or ()),
    )


def entry_hash(recipients: Sequence[Recipient]) -> bytes:
    """Recipients in the job itself are its only entry."""
    return sha256(_json.encode(recipients)).digest()


_views: OrderedDict[Campaign, str] = OrderedDict()  # by contents without what names the job


def _view(campaign: Campaign, program: Program) -> str:
    """The web version. Of many small jobs with the same templates it is the same one: 400 us for 5 kB, once."""
    if campaign.attachments:
        return program.view_html  # not worth keeping megabytes for
    contents = replace(campaign, feedback_id=())
    view = _views.get(contents)
    if view is None:
        view = _views[contents] = program.view_html
        while len(_views) > _VIEWS_KEPT:
            _views.popitem(last=False)
    return view


@lru_cache(maxsize=64)
def _names_used(source: str) -> frozenset[str]:
    """Many small jobs have the same templates: 150 us for one of 5 kB, once."""
    return frozenset(template.names_used(source))


def _expansion(job: Job, campaign: Campaign, program: Program, entry: str, start: int) -> Expansion:
    columns: set[str] = set()
    for source in (campaign.subject, campaign.html, campaign.text):
        if source is not None:
            columns |= _names_used(source)
    chunks = job.audience.chunks if job.audience is not None else 1
    rows = len(job.recipients) if job.recipients is not None else chunks * CHUNK_ROWS
    return Expansion(
        entry=entry,
        account=job.account,
        chunks=chunks,
        buckets=1 + rows // ROWS_A_BUCKET,
        start=start,
        rate=job.rate,
        wait=job.wait and job.audience is not None,
        needs_consent=job.legal_basis is not None and job.legal_basis.basis == "consent",
        consent=dict(job.consent.items()),
        columns=sorted(columns - set(contexts.PROVIDED)),
        required=sorted(program.required),
        one_line=sorted(_names_used(campaign.subject) - set(contexts.PROVIDED)),
        window=window_of(job.window),
    )


def stored(campaign: Campaign, expansion: Expansion) -> bytes:
    """A Campaign in msgpack with two fields more, `expansion` and what delivery reads as `Timing`; whoever decodes a
    Campaign sees neither."""
    plain = msgspec.msgpack.decode(msgspec.msgpack.encode(campaign))
    return msgspec.msgpack.encode({**plain, **msgspec.structs.asdict(Timing(expansion.window)), "expansion": expansion})


def opened(payload: bytes) -> tuple[Campaign, Expansion]:
    """The other end of `stored`."""
    raw = msgspec.msgpack.decode(payload)["expansion"]
    return msgspec.msgpack.decode(payload, type=Campaign), msgspec.convert(raw, Expansion)


def terms(job: JobPayload, keyring: Keyring) -> tuple[Terms, Expansion]:
    """What expansion needs of a stored job, in whichever worker. Raises SealError where the keys are not its own."""
    assert job.payload is not None
    assert job.job_key is not None
    _, expansion = opened(open_sealed(keyring.service, job.payload, job_aad("payload", job.account, job.job_id)))
    key = open_sealed(keyring.service, job.job_key, job_aad("key", job.account, job.job_id))
    return _terms(job, expansion, key), expansion


def fresh_terms(found: Review, record: JobRecord, accepted: Accepted) -> tuple[Terms, Expansion]:
    """`terms` of a job that the writer has entered just now as this record, without asking for it back."""
    assert found.expansion is not None
    stored = JobPayload(
        number=accepted.number, account_number=accepted.account, account=record.account, job_id=record.job_id,
        state=accepted.state, kind=record.kind, list_number=accepted.list, list_name=record.list,
        topic_number=accepted.topic, topic_name=record.topic, in_doubt=record.in_doubt, priority=record.priority,
        wait=record.wait, opens_mode=min(record.opens_mode, accepted.opens_mode),
        clicks_mode=min(record.clicks_mode, accepted.clicks_mode), created_at=record.created_at,
        send_at=record.send_at or None, expires_at=record.expires_at or None, chunks_expected=record.chunks_expected,
        payload=None, job_key=None,
    )  # fmt: skip
    return _terms(stored, found.expansion, found.job_key), found.expansion


def _terms(job: JobPayload, expansion: Expansion, job_key: bytes) -> Terms:
    return Terms(
        job=job.number,
        account=job.account_number,
        list_number=job.list_number,
        topic_number=job.topic_number,
        job_key=job_key,
        expires_at=job.expires_at or 0,
        due=expansion.start if expansion.rate else (job.send_at or 0),
        rate=expansion.rate,
        buckets=expansion.buckets,
        priority=job.priority,
        resend=job.in_doubt == "resend",
        needs_consent=expansion.needs_consent,
        consent=expansion.consent,
        opens=Mode(job.opens_mode),
        clicks=Mode(job.clicks_mode),
        columns=frozenset(expansion.columns),
        required=frozenset(expansion.required),
        one_line=frozenset(expansion.one_line),
        window=expansion.window,
    )


def sample_terms(found: Review, account: Account | None, now_us: int) -> Terms:
    """Terms of a job that is not accepted (job 0, a key of its own): what a preview is expanded with."""
    job, campaign, program = found.reading.job, found.campaign, found.program
    assert job is not None
    assert campaign is not None
    assert program is not None
    expansion = _expansion(job, campaign, program, "0-0", now_us)
    ceiling = (account.opens_mode, account.clicks_mode) if account is not None else (0, 0)
    return Terms(
        job=0,
        account=0,
        list_number=0,
        topic_number=0,
        job_key=os.urandom(32),
        expires_at=0,
        needs_consent=expansion.needs_consent,
        consent=expansion.consent,
        opens=strictest(Mode[job.tracking.opens.upper()], Mode(ceiling[0])),
        clicks=strictest(Mode[job.tracking.clicks.upper()], Mode(ceiling[1])),
        columns=frozenset(expansion.columns),
        required=frozenset(expansion.required),
        one_line=frozenset(expansion.one_line),
    )


def _template_problems(tree: Any) -> list[Problem]:
    """The faults of templates in a job that is broken elsewhere, so that they need no second round."""
    if not isinstance(tree, dict):
        return []
    sources = {
        name: value
        for name in _TEMPLATES
        if isinstance(value := tree.get(name), str)
        and value
        and len(value) <= template.MAX_SOURCE
        and not broken(value)
    }
    if not sources:
        return []
    compiled = compile_campaign(
        Campaign(
            subject=sources.get("subject", "-"),
            from_address=_STAND_IN,
            html=sources.get("html"),
            text=sources.get("text", "-" if "html" not in sources else None),
            list_id="list.example.org",
            postal_address="-",
        )
    )
    if isinstance(compiled, Program):
        return []
    return [Problem(f"$.{p.path}", p.message, p.suggestion) for p in compiled if p.path in sources]


_HEADER_PATH = re.compile(r"headers\[(\d+)\]")


def _problem(job: Job, path: str, message: str, suggestion: str) -> Problem:
    header = _HEADER_PATH.fullmatch(path)
    if header is not None:
        path = "headers." + list(job.headers)[int(header[1])]
    return Problem(f"$.{path}" if path else "$", message, suggestion)


def _encoded_size(campaign: Campaign) -> int:
    """About what goes on the wire: base64 is 137 % with its line ends, quoted-printable a little more than the text."""
    files = sum(len(file.content) for file in campaign.attachments) * 137 // 100
    return files + sum(len(part.encode("utf-8")) * 11 // 10 for part in (campaign.html, campaign.text) if part)


def _list_id(name: str, domain: str) -> str:
    """RFC 2919: a label of ours under the sender's domain."""
    return f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-') or 'list'}.{domain}"


def _word(text: str) -> str:
    return re.sub("[^A-Za-z0-9._-]", "-", text)[:63]
