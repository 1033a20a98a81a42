"""The job as producers write it: one declaration that is decoded, checked, documented and printed as a schema.

Law: a field is declared once, here; the decoder, the second pass (problems.py), the schema that producers see and the
manual (docs/jobs.md) read this declaration. What a type cannot say hangs on it as the name of a check (validation.py).

A *row* is one recipient, inline or one NDJSON line of an audience entry: the same shape.

Known limits: at most `MOST_INLINE` recipients inline; larger audiences come as audience entries.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct, field

from engine.queue.windows import Window

VERSION: Final = 1
DAYS: Final[tuple[Day, ...]] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MOST_BYTES: Final = 24 * 1024 * 1024  # of a job entry: the writer's frame is 32 MiB
MOST_INLINE: Final = 10_000
MOST_CHUNKS: Final = 65_536
CHUNK_BYTES: Final = 1024 * 1024  # design section 5, producer contract
MOST_ROW_BYTES: Final = 24 * 1024  # a slice holds 32 KiB at most (decision 3)
MOST_ATTACHMENT_BYTES: Final = 7 * 1024 * 1024  # 9.6 MiB in base64: the strictest large receivers take 10
STALE_DAYS: Final = 7  # design section 5
LATEST_SEND_DAYS: Final = 90  # job ids are remembered that long
LONGEST_LIFE_DAYS: Final = 7  # after send_at: queue keys die 14 days after their week (decision 3)
DEFAULT_LIFE_DAYS: Final = {"campaign": 3, "transactional": 5}  # S-02: RFC 5321 4.5.4.1 says 4-5 days


def _text(description: str, most: int, least: int = 0, check: str = "", example: str = "", pattern: str = "") -> Meta:
    return Meta(
        description=description,
        min_length=least or None,
        max_length=most,
        pattern=pattern or None,
        examples=[example] if example else None,
        extra={"check": check} if check else None,
    )


Purpose: TypeAlias = Literal["mail_marketing", "open_tracking", "click_tracking", "doe"]
Day: TypeAlias = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
TrackingMode: TypeAlias = Literal["off", "aggregate", "deliverability", "individual"]
Instant: TypeAlias = Annotated[
    str, _text("RFC 3339 date-time with offset", 40, 1, "instant", example="2026-11-22T19:44:00Z")
]
Address: TypeAlias = Annotated[str, _text("E-mail address, internationalised or not", 320, 1, "address")]
Identifier: TypeAlias = Annotated[
    str,
    _text(
        "Letters, digits, dot, dash, underscore, colon", 100, 1, check="line", pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$"
    ),
]
Scalar: TypeAlias = str | int | float | bool | None
FieldValue: TypeAlias = Scalar | list[Scalar | dict[str, Scalar]] | dict[str, Scalar]
FIELD_NAME: Final = r"^[A-Za-z_][A-Za-z0-9_]*$"
FieldName: TypeAlias = Annotated[str, _text("Name of a template variable", 64, 1, pattern=FIELD_NAME)]
Fields: TypeAlias = Annotated[
    dict[FieldName, FieldValue], Meta(description="Template variables of this recipient", max_length=200)
]


_CLOCK: Final = r"^([01][0-9]|2[0-3]):[0-5][0-9]$"
_CLOSING: Final = r"^(([01][0-9]|2[0-3]):[0-5][0-9]|24:00)$"
_NAME: Final = r"^([A-Za-z0-9][A-Za-z0-9._ -]*)?$"


class Evidence(Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """Evidence of consent. Without time or source it counts as none; a later withdrawal always outranks it."""

    source: Annotated[str, _text("Where consent was given: form, page, contract", 500, check="line")] = ""
    time: Annotated[str, _text("When it was given, RFC 3339", 40, check="instant-or-empty")] = ""
    wording: Annotated[str, _text("Version or text of the wording agreed to", 2000, check="body")] = ""
    basis: Annotated[
        Literal["express", "implied"], Meta(description="express, or implied by a purchase or inquiry (CASL 10)")
    ] = "express"
    implied_by: Annotated[
        Literal["purchase", "inquiry", ""],
        Meta(description="With implied: ends 24 months after a purchase, 6 after an inquiry; 6 when it is not said"),
    ] = ""
    expires: Annotated[
        str,
        _text("When it ends by itself, RFC 3339; implied: by law at the latest", 40, check="instant-or-empty"),
    ] = ""


Consent: TypeAlias = Annotated[
    dict[Purpose, Evidence], Meta(description="Evidence by purpose; tracking needs its own, per person")
]


class Recipient(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One row of the audience."""

    address: Annotated[str, Meta(description="E-mail address; one that is none is refused alone, not with the job")]
    name: Annotated[str, _text("Shorthand for the field `name`", 200, check="line")] = ""
    fields: Fields = {}
    consent: Consent = {}


class Sender(Struct, forbid_unknown_fields=True, frozen=True):
    """The From header. Its domain needs a DKIM key here."""

    address: Annotated[str, _text("Address of the sender, ASCII local part", 254, 1, "sender")]
    name: Annotated[str, _text("Display name", 200, check="line")] = ""


class Tracking(Struct, forbid_unknown_fields=True, frozen=True):
    """How much opens and clicks may remember. The strictest of account, campaign and recipient wins (decision 12)."""

    opens: TrackingMode = "off"
    clicks: TrackingMode = "off"


class LegalBasis(Struct, forbid_unknown_fields=True, frozen=True):
    """Why we may write to these people (GDPR 6; ePrivacy 13). With `consent`, rows without evidence are refused."""

    basis: Literal["consent", "existing-customer", "legitimate-interest", "contract", "legal-obligation"]
    note: Annotated[str, _text("Anything a data-protection officer should know", 1000, check="body")] = ""


class Audience(Struct, forbid_unknown_fields=True, frozen=True):
    """Recipients follow as audience entries numbered from 0."""

    chunks: Annotated[int, Meta(description="How many entries follow", ge=1, le=MOST_CHUNKS)]


class Attachment(Struct, forbid_unknown_fields=True, frozen=True):
    """A file, or an inline image when it has a cid that the HTML names as ``cid:…``."""

    filename: Annotated[str, _text("File name without a path", 150, 1, "filename")]
    content_type: Annotated[str, _text("Media type", 127, 3, check="line", pattern=r"^[a-z]+/[a-z0-9][a-z0-9.+-]*$")]
    content: Annotated[str, _text("The bytes in base64", 2 * MOST_ATTACHMENT_BYTES, 1, "base64")]
    cid: Annotated[str, _text("Content-ID of an inline image", 100, check="line", pattern=r"^[A-Za-z0-9._@-]*$")] = ""


class Hours(Struct, forbid_unknown_fields=True, frozen=True):
    """The hours in which mail of the job may leave, by the clock on the wall of a place."""

    from_: Annotated[str, _text("Open from, HH:MM", 5, 5, pattern=_CLOCK, example="08:00")] = field(name="from")
    to: Annotated[
        str,
        _text(
            "Closed from, HH:MM up to 24:00; not after `from`: on the next day", 5, 5, pattern=_CLOSING, example="20:00"
        ),
    ]
    zone: Annotated[str, _text("Time zone, an IANA name", 64, 1, "zone", example="Europe/Berlin")]
    days: Annotated[
        list[Day],
        Meta(description="Days on which it opens; every day when absent", min_length=1, max_length=7),
    ] = field(default_factory=lambda: [*DAYS])


class Job(Struct, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A campaign or a transactional mailing, as producers hand it in."""

    v: Annotated[Literal[1], Meta(description="Version of this contract")]
    job_id: Annotated[Identifier, Meta(description="Your name for the job: repeating it is safe for 90 days")]
    created_at: Annotated[Instant, Meta(description="When you made it; older than 7 days is refused as stale")]
    account: Annotated[Identifier, Meta(description="Whose job it is: an account that exists here")]
    kind: Literal["campaign", "transactional"]
    from_: Sender = field(name="from")
    reply_to: Annotated[str, _text("Reply-To address", 254, check="sender-or-empty")] = ""
    subject: Annotated[str, _text("Subject template", 900, 1, "line")]
    html: Annotated[str, _text("HTML template", 1_000_000, check="body")] = ""
    text: Annotated[str, _text("Text template; derived from the HTML when absent", 1_000_000, check="body")] = ""
    headers: Annotated[
        dict[Annotated[str, _text("Header name", 76, 1, "header")], Annotated[str, _text("One line", 900, 0, "line")]],
        Meta(
            description="Extra headers, values without template variables; those we write are reserved", max_length=30
        ),
    ] = {}
    list_: Annotated[
        str, _text("Mailing list these people are on; campaigns need one", 100, check="line", pattern=_NAME)
    ] = field(name="list", default="")
    topic: Annotated[str, _text("Topic within the list", 100, check="line", pattern=_NAME)] = ""
    postal_address: Annotated[
        str, _text("Postal address of the sender; the account's when absent", 500, check="body")
    ] = ""
    tracking: Tracking = Tracking()
    legal_basis: LegalBasis | None = None
    consent: Annotated[Consent, Meta(description="Evidence for every recipient that brings none of its own")] = {}
    send_at: Annotated[str, _text("Not before, RFC 3339; at most 90 days ahead", 40, check="instant-or-empty")] = ""
    expires_at: Annotated[
        str,
        _text(
            "Not after, RFC 3339; at most 7 days after send_at, default 3 (campaign) or 5", 40, check="instant-or-empty"
        ),
    ] = ""
    window: Annotated[
        Hours | None, Meta(description="Send only in these hours; what is not sent when they end goes on the next day")
    ] = None
    rate: Annotated[
        float, Meta(description="Messages per second at most, 0: no limit of yours", ge=0, le=1_000_000)
    ] = 0.0
    in_doubt: Annotated[
        Literal["hold", "resend", ""],
        Meta(
            description="A message of which nobody knows whether it arrived: hold (never resend), resend (once). "
            "Default: hold for campaigns, resend for transactional"
        ),
    ] = ""
    wait: Annotated[bool, Meta(description="Send nothing before the last audience entry is in")] = False
    recipients: (
        Annotated[
            list[Recipient], Meta(description="Everybody, for small audiences", min_length=1, max_length=MOST_INLINE)
        ]
        | None
    ) = None
    audience: Audience | None = None
    attachments: Annotated[list[Attachment], Meta(max_length=20)] = []  # fmt: skip


def window_of(hours: Hours | None) -> Window | None:
    """The window in the words of the queue."""
    if hours is None:
        return None
    opens, closes = (int(clock[:2]) * 60 + int(clock[3:]) for clock in (hours.from_, hours.to))
    return Window(opens, closes, hours.zone, sum(1 << DAYS.index(day) for day in set(hours.days)))


def schema() -> dict[str, Any]:
    """JSON Schema 2020-12 of a job; one NDJSON line of an audience entry is its ``$defs/Recipient``."""
    described = msgspec.json.schema(Job)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:sales-push:job:v{VERSION}",
        "title": "sales-push job",
        **described,
    }
