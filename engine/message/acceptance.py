"""Acceptance: everything that is wrong with a campaign, all at once, or the compiled program.

Law: a campaign that passes here can be written to any recipient whose values fit; what is refused names path, line and
remedy (P-47 destinations, undeclared fields, reserved headers S-13, lists and postal addresses P-52, birth dates P-48).
A campaign whose text lacks a visible opt-out, preferences, notice or postal address gets them in a footer, in HTML and
text.

Pure, and the same campaign gives the same object: the last 16 are kept by content, so intake and workers may ask as
often as they like.

Birth dates: a recipient's field that no template names is dropped at expansion, so templates that may not name one keep
them off the lanes. Rows that wait for their time as sealed chunks are kept as they came until then.

Known limits: the footer's wording is English; a variable inside an {% if %} does not count as visible; a birth date
whose name is in another language is not known for one.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from engine.message import contexts, derive, headers, mime, rewrite, template
from engine.message.contents import Contents
from engine.message.program import Campaign, Program
from engine.message.rewrite import Layout, Literal
from engine.message.template import Token

MAX_ATTACHMENTS: Final = 20 * 1024 * 1024  # octets in all before base64; large providers refuse 25 MB on the wire
MAX_LINKS: Final = 1_000


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault of a campaign. path: "html", "headers[2]"; message: where and what, never personal data."""

    path: str
    message: str
    suggestion: str = ""


# names that are ours, the transport's, or would forge what others say about the message (S-13)
RESERVED: Final = frozenset(
    "from sender reply-to to cc bcc subject date message-id mime-version return-path received delivered-to "
    "dkim-signature domainkey-signature authentication-results arc-seal arc-message-signature "
    "arc-authentication-results auto-submitted precedence feedback-id cfbl-address cfbl-feedback-id "
    "x-original-to x-envelope-to errors-to apparently-to disposition-notification-to return-receipt-to".split()
)
_RESERVED_PREFIXES = ("content-", "list-", "resent-", "arc-", "received-")


def reserved(name: str) -> bool:
    """Is this header not the producer's to set?"""
    return name.lower() in RESERVED or name.lower().startswith(_RESERVED_PREFIXES)


def compile_campaign(campaign: Campaign) -> Program | list[Problem]:
    """The compiled campaign, or everything that is wrong with it. Pure; the same campaign gives the same object, and
    campaigns that differ in headers and pages of their job only share what is compiled."""
    result = _judged(campaign)
    return result if isinstance(result, Program) else list(result)


@functools.lru_cache(maxsize=16)
def _judged(campaign: Campaign) -> Program | list[Problem]:
    problems = _head_problems(campaign)
    contents = _compile(_shared(campaign))
    if not isinstance(contents, Contents):
        return [*problems, *contents]
    if problems:
        return problems
    try:
        return Program(campaign, contents)
    except headers.HeaderError as error:
        return [Problem("", str(error))]


def _shared(campaign: Campaign) -> Campaign:
    """The campaign without what does not reach its body: what jobs with the same template may differ in."""
    return replace(
        campaign,
        from_address="",
        from_name="",
        reply_to="",
        headers=(),
        list_id="list" if campaign.list_id else "",
        list_label="",
        feedback_id=(),
        view_url="",
        notice_url="",
    )


@functools.lru_cache(maxsize=16)
def _compile(campaign: Campaign) -> Contents | list[Problem]:
    problems = _attachment_problems(campaign)
    known = None if campaign.fields is None else campaign.fields | set(contexts.PROVIDED)
    sources: dict[str, list[Token]] = {}
    for path, source in (("subject", campaign.subject), ("html", campaign.html), ("text", campaign.text)):
        if source is None:
            continue
        if re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]", source):
            problems.append(Problem(path, "control characters or lone surrogates", "remove them"))
            continue
        source = mime.unify_line_ends(source)
        faults = template.check(source, known)
        problems += [_problem(path, fault) for fault in faults]
        if not faults:
            sources[path] = template.tokenise(source)
            problems += [*_listless(campaign, path, source), *_of_birth(path, source)]
    if campaign.html is None and campaign.text is None:
        problems.append(Problem("html", "there is neither html nor text", "give at least one"))
    for path in ("html", "text"):
        if (campaign.html if path == "html" else campaign.text) is not None and path in sources and not sources[path]:
            problems.append(Problem(path, "is empty", "leave it out, or write something"))
    page = _lay_out_page(campaign, sources, problems)
    text = _lay_out_text(campaign, sources, problems)
    subject = rewrite.lay_out_header(sources.get("subject", []))
    if any("\n" in node.text for node in subject.nodes if isinstance(node, Literal)):
        problems.append(Problem("subject", "has more than one line", "write it in one"))
    if problems or text is None:
        return problems
    try:
        return Contents(campaign, page, text, subject)
    except (headers.HeaderError, template.TemplateFault) as error:
        return [Problem("", str(error))]


def _lay_out_page(campaign: Campaign, sources: dict[str, list[Token]], problems: list[Problem]) -> Layout | None:
    if "html" not in sources:
        return None
    footer = functools.partial(_html_footer, campaign) if campaign.bulk else None
    layout = rewrite.lay_out(sources["html"], footer=footer)
    problems += [_problem("html", fault) for fault in layout.faults]
    return layout


def _lay_out_text(campaign: Campaign, sources: dict[str, list[Token]], problems: list[Problem]) -> Layout | None:
    tokens = sources.get("text")
    if tokens is None and campaign.text is None and "html" in sources and not any(p.path == "html" for p in problems):
        tokens = derive.text_of(sources["html"])
        if tokens is None:
            problems.append(
                Problem("text", "cannot be derived: the HTML's blocks do not nest with its tags", "give a text part")
            )
    if tokens is None:
        return None
    layout = rewrite.lay_out_text(tokens)
    problems += [_problem("text", fault) for fault in layout.faults if campaign.text is not None]
    if campaign.bulk:
        addition = _text_footer(campaign, layout.visible)
        layout.nodes += rewrite.lay_out_text(template.tokenise(addition)).nodes
    return layout


def _problem(path: str, fault: template.Fault) -> Problem:
    return Problem(path, f"line {fault.line}: {fault.message}", fault.suggestion)


def _listless(campaign: Campaign, path: str, source: str) -> list[Problem]:
    if campaign.list_id:
        return []
    used = template.names_used(source) & {"unsubscribe_url", "preferences_url"}
    return [
        Problem(path, f"{name} is used, but the message has no list to leave", "name a list") for name in sorted(used)
    ]


_OF_BIRTH = re.compile(r"birth|^dob$|^born(_|$)", re.IGNORECASE)


def _of_birth(path: str, source: str) -> list[Problem]:
    """Fields that are a birth date by their name (P-48): whoever has none cannot know that somebody is a child."""
    if re.search("birth|dob|born", source, re.IGNORECASE) is None:  # spares most sources a second parsing
        return []
    named = sorted(name for name in template.names_used(source) if _OF_BIRTH.search(name))
    return [Problem(path, f"{name} is a birth date: they are not taken here (P-48)", "remove it") for name in named]


_FEEDBACK_WORD = re.compile(r"[A-Za-z0-9._-]{1,63}")
_LIST_ID = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)+")


def _head_problems(campaign: Campaign) -> list[Problem]:
    problems: list[Problem] = []

    def attempt(path: str, make: Callable[[], bytes]) -> None:
        try:
            make()
        except headers.HeaderError as error:
            problems.append(Problem(path, str(error)))

    attempt("from", lambda: headers.mailbox("From", [(campaign.from_name, campaign.from_address)]))
    if "@" not in campaign.from_address:
        problems.append(Problem("from.address", "is not an address"))
    if campaign.reply_to:
        attempt("reply_to", lambda: headers.mailbox("Reply-To", [("", campaign.reply_to)]))
    if campaign.bulk and not campaign.list_id:
        problems.append(Problem("list", "a campaign needs a list that people can leave", "name a list"))
    if campaign.bulk and not campaign.postal_address.strip():
        problems.append(Problem("postal_address", "a campaign needs the sender's postal address (P-52)", "add it"))
    if campaign.list_id and (not _LIST_ID.fullmatch(campaign.list_id) or len(campaign.list_id) > 255):
        problems.append(Problem("list", "its id is not a dotted name (RFC 2919)"))
    if len(campaign.feedback_id) > 4 or not all(_FEEDBACK_WORD.fullmatch(word) for word in campaign.feedback_id):
        problems.append(Problem("feedback_id", "has at most four words of letters, digits and ._-"))
    seen: set[str] = set()
    for number, (name, value) in enumerate(campaign.headers):
        path = f"headers[{number}]"
        if not headers.valid_name(name):
            problems.append(Problem(path, "is not a header name", "use letters, digits and hyphens"))
        elif reserved(name):
            problems.append(Problem(path, f"{name} is not the producer's to set", "remove it"))
        elif name.lower() in seen:
            problems.append(Problem(path, f"{name} is given twice", "keep one"))
        elif "{{" in value or "{%" in value:
            problems.append(Problem(path, f"{name}: templates are not available in headers", "use a fixed value"))
        else:
            attempt(path, functools.partial(headers.unstructured, name, value))
        seen.add(name.lower())
    return problems


def _attachment_problems(campaign: Campaign) -> list[Problem]:
    problems: list[Problem] = []
    cids: set[str] = set()
    for number, attachment in enumerate(campaign.attachments):
        fault = mime.attachment_fault(attachment)
        if fault is not None:
            problems.append(Problem(f"attachments[{number}]", fault))
        if attachment.cid is not None and attachment.cid in cids:
            problems.append(Problem(f"attachments[{number}].cid", "is used twice", "give each image its own"))
        cids.add(attachment.cid or "")
    if sum(len(attachment.content) for attachment in campaign.attachments) > MAX_ATTACHMENTS:
        problems.append(Problem("attachments", f"are longer than {MAX_ATTACHMENTS} octets together"))
    return problems


def _wanted(campaign: Campaign, visible: set[str], source: str | None) -> list[str]:
    """Which of the lines every campaign owes its readers (P-52; CASL 6(2); CAN-SPAM (a)(5)) are not in sight."""
    wanted = [
        name for name in ("postal_address", "unsubscribe_url", "preferences_url", "notice_url") if name not in visible
    ]
    if source is not None and " ".join(campaign.postal_address.split()) in " ".join(source.split()):
        wanted = [name for name in wanted if name != "postal_address"]
    return wanted


_WORDING: Final = {
    "unsubscribe_url": "Unsubscribe",
    "preferences_url": "Preferences and tracking choices",
    "notice_url": "Privacy notice",
}


def _html_footer(campaign: Campaign, visible: set[str]) -> str:
    wanted = _wanted(campaign, visible, campaign.html)
    if not wanted:
        return ""
    lines = [template.literal_source(html.escape(campaign.account_name))] if campaign.account_name else []
    lines += ["{{ postal_address }}"] if "postal_address" in wanted else []
    links = [
        f'<a href="{{{{ {name} }}}}" style="color:#666">{_WORDING[name]}</a>' for name in wanted if name in _WORDING
    ]
    content = (
        "<br>".join([" &middot; ".join(lines), " &middot; ".join(links)]) if lines and links else "".join(lines + links)
    )
    style = "margin:24px 0 0;padding:12px;font:12px/1.5 sans-serif;color:#666;text-align:center"
    return f'<div style="{style}">{content}</div>\n'


def _text_footer(campaign: Campaign, visible: set[str]) -> str:
    wanted = _wanted(campaign, visible, campaign.text)
    if not wanted:
        return ""
    lines = [template.literal_source(campaign.account_name)] if campaign.account_name else []
    lines += ["{{ postal_address }}"] if "postal_address" in wanted else []
    lines += [f"{_WORDING[name]}: {{{{ {name} }}}}" for name in wanted if name in _WORDING]
    return "\n\n--\n" + "\n".join(lines) + "\n"
