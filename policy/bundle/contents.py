"""What stands in a bundle: the files, the fields of each, the order of records, the account of use. Pure.

Laws:
- every record of a known kind is in exactly one file, a record of a kind nobody told us of in ``other.jsonl``: there
  is no kind for which a bundle says less than the places said;
- a field that is not in `KINDS` is kept as it is: places may say more than this list knows;
- the order of records is a function of the records alone, so the same records give the same bytes;
- portability differs from access by what was concluded about the person, and by nothing else (WP242 rev.01, P-56).

The account of use (P-43, PIPEDA 4.9.1) is worked out from the records themselves: for each purpose how often, first
and last. Recipients of disclosures are named, one line each (GDPR 15(1)(c), C-154/21); delivering a message discloses
it to the provider of the mailbox, so that is a line too.

Known limits: where a record carries no instant (a suppression of unknown date), its use has a count and no dates.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from policy.personal import Record, Value

ACCESS: Final = "access"
PORTABILITY: Final = "portability"
RIGHTS: Final = (ACCESS, PORTABILITY)


@dataclass(frozen=True, slots=True)
class Field:
    """type: text, instant (RFC 3339, UTC), number or flag; required: in every record, never null; inferred:
    concluded by us, so access only."""

    name: str
    type: str
    about: str
    required: bool = False
    inferred: bool = False


@dataclass(frozen=True, slots=True)
class Kind:
    """One file of records. order: fields that decide the place of a record; inferred: access only."""

    name: str
    file: str
    about: str
    fields: tuple[Field, ...]
    order: tuple[str, ...] = ()
    inferred: bool = False


def _kind(name: str, file: str, about: str, *fields: Field, order: str = "", inferred: bool = False) -> Kind:
    return Kind(name, file, about, fields, tuple(order.split()), inferred)


def _text(name: str, about: str, *, required: bool = False, inferred: bool = False) -> Field:
    return Field(name, "text", about, required, inferred)


def _instant(name: str, about: str, *, required: bool = False) -> Field:
    return Field(name, "instant", about, required)


def _number(name: str, about: str, *, required: bool = False) -> Field:
    return Field(name, "number", about, required)


_ACCOUNT: Final = _text("account", "The sender this belongs to.")
_IN_ACCOUNT: Final = _text("account", "The sender this belongs to.", required=True)
_JOB: Final = _text("job", "The sender's own name of the campaign or message.", required=True)
_REFERENCE: Final = _text("reference", "Our keyed reference of the message, 16 hexadecimal digits.")
_REPLY: Final = (
    _number("code", "Status code of the receiving server (RFC 5321), 0 or null for none."),
    _text("enhanced", "Enhanced status code (RFC 3463)."),
    _text("reply", "What the receiving server said."),
)

KINDS: Final[dict[str, Kind]] = {
    kind.name: kind
    for kind in (
        _kind(
            "profile", "profile", "Who you are to a sender.",
            _IN_ACCOUNT,
            _text("address", "The address as the sender first gave it.", required=True),
            _instant("created_at", "Since when it is known.", required=True),
            order="account created_at",
        ),
        _kind(
            "subscription", "subscriptions", "Lists and topics you are written to under.",
            _IN_ACCOUNT,
            _text("list", "The list.", required=True),
            _text("topic", "The topic within it."),
            _text("state", "subscribed, or unsubscribed.", required=True),
            _instant("since", "Since when this is so."),
            order="account list topic since",
        ),
        _kind(
            "consent", "consents", "What you agreed to, and what you took back.",
            _IN_ACCOUNT,
            _text("purpose", "What for.", required=True),
            _text("basis", "express, implied, contract or legitimate_interest.", required=True),
            _text("wording", "The words shown, or their version."),
            _text("source", "Where and how it was given."),
            _instant("given_at", "When you agreed, or withdrew.", required=True),
            _instant("recorded_at", "When it was entered here."),
            Field("withdrawn", "flag", "True: consent taken back.", required=True),
            _instant("expires_at", "End of consent that was implied only."),
            order="account purpose given_at withdrawn",
        ),
        _kind(
            "message", "messages", "Messages meant for you, and what became of each.",
            _IN_ACCOUNT, _JOB, _REFERENCE,
            _text("kind", "campaign or transactional."),
            _text("list", "The list it was sent under."),
            _text("topic", "The topic it was sent under."),
            _text("outcome", "delivered, bounced, refused, expired, cancelled, unknown, lost, waiting.", required=True),
            _text("reason", "Why it was not delivered."),
            _instant("at", "When that was decided.", required=True),
            _text("domain", "Domain of the mailbox: its provider was handed the message when it was delivered."),
            _number("attempts", "How often delivery was tried."),
            *_REPLY,
            _text("tls", "Encryption on the way: TLS 1.2, TLS 1.3, or empty."),
            order="at account job reference",
        ),
        _kind(
            "event", "events", "What was observed on the way and afterwards.",
            _IN_ACCOUNT, _JOB, _REFERENCE,
            _text("event", "deferred, complained, late-bounce, refused, opened, clicked or opted-out.", required=True),
            _text("reason", "The class of the reply."),
            _instant("at", "When; opens and clicks to the hour.", required=True),
            _number("attempt", "Which try; below zero: your address stood in the audience more than once."),
            *_REPLY,
            _text("link", "Where a link that was followed leads."),
            _text("visitor", "What the fetching program was taken for.", inferred=True),
            order="at account job reference event attempt",
        ),
        _kind(
            "inferred", "inferred", "What was concluded about you. It is no fact, and it is not portable.",
            _ACCOUNT,
            _text("what", "What was concluded.", required=True),
            _text("value", "The conclusion."),
            _text("job", "From which campaign."),
            _REFERENCE,
            _instant("at", "When, or the day it is of."),
            order="account what at job reference",
            inferred=True,
        ),
        _kind(
            "suppression", "suppression", "Why you are not written to. These entries outlive an erasure (P-22).",
            _text("target", "address: yours alone; domain: everybody at it.", required=True),
            _text("scope", "platform, account, list or topic.", required=True),
            _ACCOUNT,
            _text("name", "Name of the list or topic."),
            _text("reason", "opt-out, complaint, bounce, manual, import, restriction, erasure, visits.", required=True),
            _text("source", "How it came here."),
            _instant("created_at", "Since when.", required=True),
            _instant("expires_at", "Until when; null: for ever."),
            order="target scope account name reason",
        ),
        _kind(
            "consultation", "consultations", "When somebody looked at your data here, and what for.",
            _instant("at", "When.", required=True),
            _text("actor", "In what role."),
            _text("purpose", "What for.", required=True),
            _text("what", "What was looked at."),
            _ACCOUNT,
            _number("count", "How many records."),
            order="at purpose what",
        ),
        _kind(
            "disclosure", "disclosures", "To whom your data went.",
            _instant("at", "When.", required=True),
            _text("recipient", "To whom.", required=True),
            _text("purpose", "What for.", required=True),
            _text("basis", "On what legal ground."),
            _text("what", "Which data."),
            _ACCOUNT,
            _number("count", "How many records."),
            order="at recipient purpose what",
        ),
        _kind(
            "use", "uses", "The account of use: what your data was used for, how often, first and last.",
            _text("purpose", "What for.", required=True),
            _text("recipient", "Who received it, when it left this house."),
            _number("count", "How often.", required=True),
            _instant("first", "The first time."),
            _instant("last", "The last time."),
            order="purpose recipient first",
        ),
        _kind(
            "queued", "queued", "Messages that wait to be sent to you.",
            _IN_ACCOUNT, _JOB, _REFERENCE,
            _text("state", "queued, leased, deferred or held.", required=True),
            _instant("due", "Not before."),
            order="account job state reference",
        ),
        _kind(
            "request", "requests", "Requests you made about your data.",
            _text("ticket", "Number of the request.", required=True),
            _text("kind", "Which right.", required=True),
            _ACCOUNT,
            _text("channel", "How it came."),
            _text("jurisdiction", "Whose time limits apply."),
            _text("state", "How far it is.", required=True),
            _text("outcome", "How it ended."),
            _text("ground", "Why it was refused."),
            _instant("received_at", "When it came.", required=True),
            _instant("due_at", "When it must be answered."),
            _instant("closed_at", "When it was answered."),
            order="received_at ticket",
        ),
        _kind(
            "rectification", "rectifications", "What was corrected, and what is contested.",
            _IN_ACCOUNT,
            _text("field", "Which field.", required=True),
            _text("state", "corrected or contested.", required=True),
            _text("value", "The corrected value, or the note to a contested one."),
            _instant("at", "When.", required=True),
            order="account at field",
        ),
        _kind(
            "hold", "holds", "What must be kept of you beyond its time, and why (GDPR 17(3), 18(1)(c)).",
            _number("number", "Number of the hold."),
            _text("reason", "Why.", required=True),
            _text("authority", "On whose word."),
            _instant("placed_at", "Since when.", required=True),
            _instant("review_at", "When it is looked at again."),
            _instant("released_at", "When it ended."),
            _number("records", "How many records are kept."),
            order="placed_at number",
        ),
        _kind(
            "erasure", "erasures", "Erasures of your data, and how far each is (P-17).",
            _ACCOUNT,
            _number("number", "Number of the erasure."),
            _text("cause", "request, minor, account or replay.", required=True),
            _text("state", "suppressed, shredded or purged.", required=True),
            _instant("begun_at", "When it began.", required=True),
            _instant("shredded_at", "When the keys to your data were destroyed."),
            _instant("purged_at", "When the last row was gone."),
            _number("records", "How many records were taken out."),
            order="begun_at number",
        ),
        _kind("other", "other", "Records of kinds this version has no file for; `kind` says which.",
              _text("kind", "Which kind.", required=True), order="kind"),
    )
}  # fmt: skip

SENDING: Final = "to send you messages"
DELIVERING: Final = "to deliver messages to you"
OBSERVING: Final = {
    "opened": "to know whether messages are read",
    "clicked": "to know whether links are followed",
    "opted-out": "to hear your opt-out",
    "complained": "to hear your complaint",
}
NOT_WRITING: Final = "not to write to you any more"


def sort(records: Iterable[Record], right: str) -> dict[str, list[dict[str, Value]]]:
    """Values by the name of their kind, all kinds of this right, in file order; the account of use is added.

    Raises ValueError when `right` is neither access nor portability."""
    if right not in RIGHTS:
        raise ValueError(f"a bundle is for {' or '.join(RIGHTS)}")
    taken = list(records)
    told: dict[str, list[dict[str, Value]]] = {
        name: [] for name, kind in KINDS.items() if right == ACCESS or not kind.inferred
    }
    for record in [*taken, *uses(taken)]:
        kind = KINDS.get(record.kind)
        if kind is None or kind.name == "other":
            told["other"].append({"kind": record.kind, **record.values})
        elif kind.name in told:
            concluded = {field.name for field in kind.fields if field.inferred} if right == PORTABILITY else set()
            told[kind.name].append({name: value for name, value in record.values.items() if name not in concluded})
    for name, lines in told.items():
        lines.sort(key=lambda values, kind=KINDS[name]: _place(kind, values))  # type: ignore[misc]  # bound in place
    return told


def uses(records: Iterable[Record]) -> list[Record]:
    """The account of use of these records, by purpose and recipient; places may tell more of their own."""
    moments: dict[tuple[str, str], list[str]] = {}
    counts: dict[tuple[str, str], int] = {}

    def used(purpose: str, recipient: str, at: Value, count: Value = 1) -> None:
        key = purpose, recipient
        counts[key] = counts.get(key, 0) + (count if isinstance(count, int) and count > 0 else 1)
        if isinstance(at, str) and at:
            moments.setdefault(key, []).append(at)

    for record in records:
        values = record.values
        at = values.get("at")
        if record.kind == "message" and values.get("outcome") == "refused":
            used(NOT_WRITING, "", at)
        elif record.kind == "message":
            used(SENDING, "", at)
            if values.get("outcome") == "delivered" and values.get("domain"):
                used(DELIVERING, f"the mail provider of {values['domain']}", at)
        elif record.kind == "event" and values.get("event") in OBSERVING:
            used(OBSERVING[str(values["event"])], "", at)
        elif record.kind == "consultation":
            used(f"consultation: {values.get('purpose', '')}", "", at)
        elif record.kind == "disclosure":
            used(f"disclosure: {values.get('purpose', '')}", str(values.get("recipient", "")), at)
    return [
        Record(
            "use",
            {
                "purpose": purpose,
                "recipient": recipient,
                "count": counts[purpose, recipient],
                "first": min(moments.get((purpose, recipient), []), default=None),
                "last": max(moments.get((purpose, recipient), []), default=None),
            },
        )
        for purpose, recipient in sorted(counts)
    ]


def line(kind: Kind, values: Mapping[str, Value]) -> str:
    """One line of JSON: known fields first, in the order of `KINDS`, then the others by name; UTF-8 as it is."""
    return json.dumps({name: values[name] for name in columns(kind, [values])}, ensure_ascii=False, allow_nan=False)


def columns(kind: Kind, lines: Iterable[Mapping[str, Value]]) -> list[str]:
    """Which fields these records have, known ones first."""
    there: set[str] = set()
    for values in lines:
        there.update(values)
    known = [field.name for field in kind.fields if field.name in there]
    return known + sorted(there.difference(known))


def _place(kind: Kind, values: Mapping[str, Value]) -> tuple[object, ...]:
    """Texts and numbers do not compare with each other, nor with nothing: a rank says which it is."""
    parts: list[tuple[int, str | int]] = []
    for name in kind.order:
        value = values.get(name)
        if value is None:
            parts.append((0, 0))
        elif isinstance(value, int):
            parts.append((1, int(value)))
        else:
            parts.append((2, value))
    return (*parts, line(kind, values))
