"""What a type cannot say about a job, and `read`: any bytes in, a job or all its problems out.

Promise (T1, decisions 18 and 19): `read` and `read_row` never raise, whatever the bytes (tests/laws/test_job_laws.py);
problems quote no value. Time is an argument.

1. `strict.parse` reads JSON strictly, ``msgspec.convert`` makes the types: the fast path;
2. when either balks, `problems.examine` walks the whole tree beside the types and collects everything;
3. `judge` adds what fields say of one another: dates, a legal basis, headers that are ours, files that are named;
4. `canonical.hash_of` names the contents (RFC 8785), so that a repeat is known from a conflict.

Sources: reserved headers S-13 and faults.md 3.6 (what we write, what receivers trust, what would track without
consent); legal bases GDPR 6 with ePrivacy 13 (a contract or a duty is no basis for marketing).

Known limits: templates are judged by engine.message when the campaign is compiled (acceptance.py), addresses of
recipients one by one when they are expanded.
"""

from __future__ import annotations

import binascii
import difflib
import json
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any, Final

import msgspec

from engine.campaign import job as contract
from engine.campaign.canonical import hash_of
from engine.campaign.job import FieldValue, Job, Recipient
from engine.campaign.problems import Check, Problem, broken, examine, shown
from engine.campaign.strict import parse
from engine.queue import windows
from policy.address import AddressError
from policy.address import parse as parse_address
from policy.instants import DAY_US, HOUR_US, SECOND_US, parse_rfc3339

# S-13; faults.md 3.6: written by us, trusted by receivers when we did not write them, or receipts that would track
RESERVED: Final = frozenset(
    "from to cc bcc sender reply-to subject date message-id in-reply-to references mime-version return-path"
    " delivered-to received received-spf authentication-results dkim-signature domainkey-signature list-id"
    " list-unsubscribe list-unsubscribe-post feedback-id precedence auto-submitted errors-to cfbl-address"
    " cfbl-feedback-id disposition-notification-to disposition-notification-options return-receipt-to"
    " x-confirm-reading-to apparently-to bimi-location bimi-indicator tls-required".split()
)
_RESERVED_FAMILIES: Final = ("content-", "resent-", "arc-", "x-original-", "x-ms-exchange-", "x-google-")
_HEADER_NAME = re.compile(r"[!-9;-~]+")  # RFC 5322 2.2: printable ASCII without the colon
_NOT_IN_A_LINE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_NOT_IN_A_BODY = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_NOT_IN_A_FILENAME = re.compile(r'[\x00-\x1f\x7f/\\:"<>|*?\u2028\u2029\u202a-\u202e\u2066-\u2069]')
_CID_IN_HTML = re.compile(r"""["'(\s]cid:([^"'\s)<>{}]+)""", re.IGNORECASE)
_MARKETING_BASES: Final = ("consent", "existing-customer", "legitimate-interest")
_MOST_KEPT: Final = 64 * 1024  # characters of a body whose verdict is kept
_AHEAD_US = DAY_US  # promises.md: clocks may be wrong by days, but a job from tomorrow is a clock to look at


def _line(value: str) -> tuple[str, str] | None:
    found = _NOT_IN_A_LINE.search(value)
    if found is None:
        return None
    return f"holds a control character or line break (U+{ord(found[0]):04X}): it must be one plain line", "remove it"


def _body(value: str) -> tuple[str, str] | None:
    return _kept_body(value) if len(value) <= _MOST_KEPT else _searched_body(value)


def _searched_body(value: str) -> tuple[str, str] | None:
    found = _NOT_IN_A_BODY.search(value)
    return None if found is None else (f"holds the control character U+{ord(found[0]):04X}", "remove it")


# many small jobs have the same templates: 18 us for one of 5 kB to search it, 3 to know it again
_kept_body: Final = lru_cache(maxsize=64)(_searched_body)


def _instant(value: str) -> tuple[str, str] | None:
    try:
        parse_rfc3339(value)
    except ValueError:
        return "is not a date-time with an offset", "RFC 3339, such as 2026-11-22T19:44:00Z"
    return None


def _address(value: str) -> tuple[str, str] | None:
    try:
        parse_address(value)
    except AddressError as error:
        return f"is not an address that mail can be sent to ({error.reason})", ""
    return None


def _sender(value: str) -> tuple[str, str] | None:
    try:
        mailbox = parse_address(value)
    except AddressError as error:
        return f"is not an address that mail can be sent from ({error.reason})", "only local@domain, no display name"
    if mailbox.needs_smtputf8:
        return "has a local part outside ASCII: most receivers could not answer it (RFC 6531)", "use an ASCII address"
    return None


def _header(value: str) -> tuple[str, str] | None:
    if not _HEADER_NAME.fullmatch(value):
        return "is not a header name: printable ASCII without spaces and colons (RFC 5322 2.2)", ""
    lower = value.lower()
    if lower in RESERVED or lower.startswith(_RESERVED_FAMILIES):
        return "is a header that sales-push or a receiver writes: it is reserved", "leave it out"
    return None


def _base64(value: str) -> tuple[str, str] | None:
    try:
        binascii.a2b_base64(value, strict_mode=True)
    except (binascii.Error, ValueError):
        return "is not base64", "RFC 4648 4, with padding and without line breaks"
    return None


def _filename(value: str) -> tuple[str, str] | None:
    if _NOT_IN_A_FILENAME.search(value) or value.startswith(".") or value != value.strip():
        return "is not a plain file name: no path, control or direction characters, no leading dot", ""
    return None


def _zone(value: str) -> tuple[str, str] | None:
    known = windows.zones()
    if value in known:
        return None
    spelled = {name.lower(): name for name in known}
    close = difflib.get_close_matches(value.strip().replace(" ", "_").lower(), spelled, n=1, cutoff=0.6)
    cities = {name.rpartition("/")[2]: name for name in sorted(spelled)}
    close = close or difflib.get_close_matches(value.strip().replace(" ", "_").lower(), cities, n=1, cutoff=0.8)
    hint = f"did you mean {spelled[cities.get(close[0], close[0])]!r}?" if close else "an IANA name: 'Europe/Berlin'"
    return "is not a time zone that is known here", hint


CHECKS: Final[dict[str, Check]] = {
    "line": _line,
    "body": _body,
    "instant": _instant,
    "instant-or-empty": lambda value: _instant(value) if value else None,
    "address": _address,
    "sender": _sender,
    "sender-or-empty": lambda value: _sender(value) if value else None,
    "header": _header,
    "base64": _base64,
    "filename": _filename,
    "zone": _zone,
}


@dataclass(slots=True)
class Reading:
    """What `read` made of a payload. job is None exactly when there are problems.

    job_id and account are what the payload called itself ("" when it did not say so in plain words), for reports.
    hash: 32 bytes when the payload is JSON at all. tree: the parsed JSON, None when it is not.
    """

    job: Job | None = None
    problems: list[Problem] = field(default_factory=list)
    hash: bytes = b""
    tree: Any = None
    job_id: str = ""
    account: str = ""


def read(payload: bytes, now_us: int) -> Reading:
    """Judge a payload at an instant (microseconds). Never raises."""
    parsed = parse(payload, contract.MOST_BYTES)
    if parsed.problems:
        return Reading(problems=parsed.problems)
    tree = parsed.value
    reading = Reading(tree=tree)
    if isinstance(tree, dict):
        reading.job_id, reading.account = _plain(tree.get("job_id")), _plain(tree.get("account"))
    made = None if parsed.doubtful else _convert(tree)
    if made is not None and isinstance(tree, dict):
        # the types hold; only what they cannot say is asked, and of recipients nothing but their types (the addresses
        # are judged one by one at expansion, where a bad one is refused alone)
        small = {name: value for name, value in tree.items() if name != "recipients"}
        reading.problems = examine(small, Job, CHECKS)
    else:
        reading.problems = examine(tree, Job, CHECKS)
    if isinstance(tree, dict):
        reading.problems += judge(tree, now_us)
    if not reading.problems:
        made = made if made is not None else _convert(tree)
        if made is None:  # the two passes disagree: a bug of ours, told to the producer rather than hidden
            reading.problems = [Problem("$", "cannot be read as a job")]
        else:
            reading.job = made
            reading.hash = hash_of(tree, exact=parsed.exact)
    return reading


class _Repeated(ValueError):
    """A name twice in one object of a row."""


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(items)
    if len(made) != len(items):
        raise _Repeated
    return made


class _Row(Recipient):
    """A row whose names of fields have not been looked at: msgspec would search each of every row with Python's
    regular expressions, 2 us of the 3.3 that a row of six fields takes to read."""

    fields: Annotated[
        dict[Annotated[str, msgspec.Meta(min_length=1, max_length=64)], FieldValue], msgspec.Meta(max_length=200)
    ] = msgspec.field(default_factory=dict)


_FIELD_NAME = re.compile(contract.FIELD_NAME)
_NAMES_KEPT: Final = 1_000
_good_names: set[str] = set()  # few in all: a template names them
_SPACED_COLON = re.compile(rb'"[ \t\r\n]+:')
_names_once = json.JSONDecoder(object_pairs_hook=_once).decode
_row = msgspec.json.Decoder(_Row).decode


def read_row(line: bytes) -> Recipient | None:
    """One NDJSON line of an audience entry, or None when it is not a row. Never raises; addresses are judged later.

    msgspec takes the last of repeated names in silence, so they are looked for: a row in which as many names are
    followed by a colon as it has after reading has none twice. Any other (names nested deeper, a quoted colon, a value
    that is a default) is read once more by the standard library, which costs 6 us instead of 1.
    """
    if len(line) > contract.MOST_ROW_BYTES:
        return None
    try:
        row = _row(line)
        if not _good_names.issuperset(row.fields):
            for name in row.fields:
                if _FIELD_NAME.fullmatch(name) is None:
                    return None
            if len(_good_names) < _NAMES_KEPT:
                _good_names.update(row.fields)
        if line.count(b'":') != _names_of(row) or (_may_be_spaced(line) and _SPACED_COLON.search(line)):
            _names_once(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return row


def _may_be_spaced(line: bytes) -> bool:
    """Four searches of 0.05 us, where the expression takes 2 for a row of 500 octets."""
    return b'" ' in line or b'"\t' in line or b'"\r' in line or b'"\n' in line


def _names_of(row: Recipient) -> int:
    """How many names its JSON had at least: a default may have been left out."""
    count = 1 + len(row.fields) + len(row.consent) + bool(row.name) + bool(row.fields) + bool(row.consent)
    for word in row.consent.values():
        count += bool(word.source) + bool(word.time) + bool(word.wording) + (word.basis != "express")
        count += bool(word.implied_by) + bool(word.expires)
    return count


def row_problems(value: Any, path: str) -> list[Problem]:
    """Everything wrong with one row, its address included: what the command line says before it sends anything."""
    found = examine(value, Recipient, CHECKS, path)
    address = value.get("address") if isinstance(value, dict) else None
    if isinstance(address, str) and not broken(address):
        verdict = _address(address)
        if verdict is not None:
            found.append(Problem(f"{path}.address", *verdict))
    return found


def _convert(tree: Any) -> Job | None:
    try:
        return msgspec.convert(tree, Job)
    except (ValueError, TypeError, RecursionError):
        return None


def _plain(value: Any) -> str:
    return value if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,99}", value) else ""


def judge(tree: dict[str, Any], now_us: int) -> list[Problem]:
    """What the fields say of one another. Looks only at parts of the right type: the rest is reported elsewhere."""
    found: list[Problem] = []
    _judge_contents(tree, found)
    _judge_law(tree, found)
    _judge_times(tree, now_us, found)
    _judge_window(tree, found)
    _judge_headers(tree, found)
    _judge_files(tree, found)
    return found


def _judge_contents(tree: dict[str, Any], found: list[Problem]) -> None:
    if tree.get("html", "") == "" and tree.get("text", "") == "":
        found.append(Problem("$.html", "there is neither html nor text: nothing to send", "give at least one"))
    has_rows = tree.get("recipients") is not None
    has_audience = tree.get("audience") is not None
    if has_rows and has_audience:
        found.append(Problem("$.audience", "recipients are given twice, inline and as audience", "keep one of the two"))
    elif not has_rows and not has_audience:
        found.append(Problem("$.recipients", "nobody to send to", "give recipients, or audience with its chunks"))
    topic, list_ = tree.get("topic", ""), tree.get("list", "")
    if topic != "" and list_ == "":
        found.append(Problem("$.topic", "a topic belongs to a list, and there is none", "name the list"))


def _judge_law(tree: dict[str, Any], found: list[Problem]) -> None:
    if tree.get("kind") != "campaign":
        return
    if tree.get("list", "") == "":
        found.append(
            Problem("$.list", "a campaign needs a list: opt-outs are recorded for it", "name the list people are on")
        )
    basis = tree.get("legal_basis")
    if basis is None:
        allowed = ", ".join(_MARKETING_BASES)
        found.append(Problem("$.legal_basis", "a campaign must name its legal basis", f'{{"basis": …}}: {allowed}'))
    elif isinstance(basis, dict) and basis.get("basis") in ("contract", "legal-obligation"):
        found.append(
            Problem(
                "$.legal_basis.basis",
                "is no basis for a campaign: advertising is not owed",
                "send it as kind transactional, or name another basis: " + ", ".join(_MARKETING_BASES),
            )
        )


def _at(tree: dict[str, Any], name: str) -> int | None:
    value = tree.get(name)
    if not isinstance(value, str) or not value:
        return None
    try:
        return parse_rfc3339(value)
    except ValueError:
        return None


def _judge_times(tree: dict[str, Any], now_us: int, found: list[Problem]) -> None:
    created, send, expires = _at(tree, "created_at"), _at(tree, "send_at"), _at(tree, "expires_at")
    if created is not None and created < now_us - contract.STALE_DAYS * DAY_US:
        found.append(
            Problem(
                "$.created_at",
                f"is more than {contract.STALE_DAYS} days ago: a stale job is not sent",
                "make it anew if it is still meant",
            )
        )
    if created is not None and created > now_us + _AHEAD_US:
        found.append(Problem("$.created_at", "is more than a day ahead", "look at the clock of the producer"))
    if send is not None and send > now_us + contract.LATEST_SEND_DAYS * DAY_US:
        found.append(Problem("$.send_at", f"is more than {contract.LATEST_SEND_DAYS} days ahead", "submit it later"))
    if expires is None:
        return
    start = max(now_us, send or 0)
    window = _window(tree.get("window"))
    if expires <= now_us:
        found.append(Problem("$.expires_at", "is in the past", "leave it out for the default"))
    elif send is not None and expires <= send:
        found.append(Problem("$.expires_at", "is not after send_at: nothing would be sent", "give it time to send"))
    elif expires > start + contract.LONGEST_LIFE_DAYS * DAY_US + HOUR_US:
        found.append(
            Problem("$.expires_at", f"is more than {contract.LONGEST_LIFE_DAYS} days after the start", "choose less")
        )
    elif window is not None and start + windows.opens_in(start, window) * SECOND_US >= expires:
        found.append(
            Problem("$.window", "does not open before expires_at: nothing would be sent", "widen it, or expire later")
        )


def _window(value: Any) -> windows.Window | None:
    try:
        return contract.window_of(msgspec.convert(value, contract.Hours)) if value is not None else None
    except (ValueError, TypeError, RecursionError):
        return None


def _judge_window(tree: dict[str, Any], found: list[Problem]) -> None:
    window = tree.get("window")
    if not isinstance(window, dict):
        return
    opens = window.get("from")
    if isinstance(opens, str) and opens and opens == window.get("to"):
        whole = 'leave the window out, or write "00:00" to "24:00" for whole days'
        found.append(Problem("$.window.to", "is the hour at which it opens: is it open always, or never?", whole))
    days = window.get("days")
    if isinstance(days, list) and any(days.count(day) > 1 for day in days[:7] if isinstance(day, str)):
        found.append(Problem("$.window.days", "names a day twice", "keep one"))


def _judge_headers(tree: dict[str, Any], found: list[Problem]) -> None:
    headers = tree.get("headers")
    if not isinstance(headers, dict):
        return
    seen: set[str] = set()
    for name in headers:
        lower = name.lower()
        if lower in seen:
            found.append(Problem(f"$.headers.{shown(name)}", "is there twice, in other letters", "keep one"))
        seen.add(lower)


def _may_name_files(html: str) -> bool:
    """Whether the search (9 us a kilobyte) can find anything: case folding has two more letters for `i`."""
    return "cid:" in html.lower() or (not html.isascii() and ("\u0130" in html or "\u0131" in html))


def _judge_files(tree: dict[str, Any], found: list[Problem]) -> None:
    files = tree.get("attachments", [])
    if not isinstance(files, list):
        return
    total, cids = 0, set[str]()
    for index, file in enumerate(files):
        if not isinstance(file, dict):
            continue
        content, cid = file.get("content"), file.get("cid", "")
        total += len(content) * 3 // 4 if isinstance(content, str) else 0
        if isinstance(cid, str) and cid:
            if cid in cids:
                found.append(Problem(f"$.attachments[{index}].cid", "another file has the same cid", "number them"))
            cids.add(cid)
    if total > contract.MOST_ATTACHMENT_BYTES:
        most = contract.MOST_ATTACHMENT_BYTES
        found.append(Problem("$.attachments", f"hold {total:,} bytes together, at most {most:,}", "link to the files"))
    html = tree.get("html")
    if isinstance(html, str) and _may_name_files(html):
        missing = {name for name in _CID_IN_HTML.findall(html) if name not in cids}
        if missing:
            text = f"{len(missing)} inline images are named (cid:…) that no attachment brings"
            found.append(Problem("$.html", text, "give the attachment that cid"))
