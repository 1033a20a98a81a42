"""Program: a campaign compiled, so that a recipient costs joins (decision 1).

The contents (engine.message.contents) are compiled once and shared by all jobs that have the same ones; a `Program` is
one job's light view of them: its headers, hashed as far as they never change, and the addresses of its public pages.
Ten thousand jobs of one recipient each with the same template compile it once.

`engine.message.acceptance` makes programs and says what is wrong with a campaign.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from engine.message import headers, webview
from engine.message.attachment import Attachment
from engine.message.contents import BOUNDARY_MARK, JOBS_OWN, Contents, boundary_field
from engine.message.recall import Recall
from engine.message.slots import Frame, Variant


@dataclass(frozen=True, slots=True)
class Campaign:
    """What is to be written, as plain values. Nothing here is trusted.

    fields: the names recipients have, or None when unknown; bulk: a campaign (list headers, footer) as against
    transactional mail; list_id: "weekly.shop.example" (RFC 2919, without brackets), "" for none;
    view_url, notice_url: the job's public pages, "" while the job has no number yet; feedback_id: at most four words.
    """

    subject: str
    from_address: str
    from_name: str = ""
    reply_to: str = ""
    html: str | None = None
    text: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    attachments: tuple[Attachment, ...] = ()
    fields: frozenset[str] | None = None
    bulk: bool = True
    list_id: str = ""
    list_label: str = ""
    feedback_id: tuple[str, ...] = ()
    account_name: str = ""
    postal_address: str = ""
    view_url: str = ""
    notice_url: str = ""


class Program:
    """A compiled campaign. `compose` is its one caller on the hot path.

    links: the link table, by number; view_html: the web version without any personal data or tracking;
    required: fields that a recipient must have (printed whatever the other values are);
    static_head, signed, head_hash: the headers that never change, the DKIM h= list, and SHA-256 over the canonical
    form of those headers so far; type_cut: the Content-Type field around its boundary, and its canonical form around
    it, None when it is among the static headers (a single part); constants: provided variables that are the same for
    all recipients of the job.
    """

    def __init__(self, campaign: Campaign, contents: Contents) -> None:
        self._contents = contents
        self.links = contents.links
        self.required = contents.required
        self.listed = bool(campaign.list_id)
        self.domain = campaign.from_address.rpartition("@")[2]
        self.constants = dict(zip(JOBS_OWN, (campaign.view_url, campaign.notice_url), strict=True))
        self.id_end = headers.id_end(self.domain)
        self._subjects: Recall[str, headers.Both] = Recall()
        self._heads(campaign)

    @functools.cached_property
    def view_html(self) -> str:
        page = self._contents.page
        constants = {**self.constants, "postal_address": self._contents.postal_address}
        return webview.show(page, constants) if page is not None else ""

    # ---- used by compose

    def variant(self, *, tracked: bool, pixel: bool) -> Variant:
        return self._contents.variant(tracked=tracked, pixel=pixel)

    def subject(self, frame: Frame) -> headers.Both | None:
        """The Subject field of one recipient, None when it is among the static headers."""
        if not self._subject_varies:
            return None
        text = self._contents.subject_text(frame)
        both = self._subjects.get(text)
        return self._subjects.keep(text, _SUBJECT.text(text)) if both is None else both

    def missing(self, fields: Mapping[str, Any]) -> list[str]:
        """The required fields that a recipient lacks: asked at expansion, not at the wire."""
        return [name for name in self.required if fields.get(name) is None]

    # ---- headers

    def _heads(self, campaign: Campaign) -> None:
        contents = self._contents
        fixed = [headers.mailbox("From", [(campaign.from_name, campaign.from_address)])]
        if campaign.reply_to:
            fixed.append(headers.mailbox("Reply-To", [("", campaign.reply_to)]))
        self._subject_varies = any(not isinstance(piece, str) for piece in contents.subject)
        if not self._subject_varies:
            fixed.append(headers.unstructured("Subject", "".join(map(str, contents.subject))))
        fixed.append(headers.structured("MIME-Version", "1.0"))
        self.type_cut: tuple[bytes, bytes, bytes, bytes] | None = None
        has_files = any(attachment.cid is None for attachment in campaign.attachments)
        if contents.encoding:
            fixed.append(headers.parameters("Content-Type", "text/plain", [("charset", "utf-8")]))
            fixed.append(headers.structured("Content-Transfer-Encoding", contents.encoding))
        else:
            kind = "multipart/mixed" if has_files or contents.page is None else "multipart/alternative"
            before, after = boundary_field(kind, "a", ())
            mark = BOUNDARY_MARK.encode("ascii")
            low_before, _, low_after = headers.relaxed(before + mark + after).partition(mark)
            self.type_cut = before, after, low_before, low_after
        if self.listed:
            fixed.append(headers.structured("List-Id", _list_id(campaign)))
            fixed.append(headers.structured("List-Unsubscribe-Post", "List-Unsubscribe=One-Click"))
        if campaign.feedback_id:
            fixed.append(headers.structured("Feedback-ID", ":".join(campaign.feedback_id)))
        fixed.append(
            headers.structured("Precedence", "bulk")
            if campaign.bulk
            else headers.structured("Auto-Submitted", "auto-generated")
        )
        fixed += [headers.unstructured(name, value) for name, value in campaign.headers]
        self.static_head = b"".join(fixed)
        names = [one.partition(b":")[0].decode("ascii").lower() for one in fixed]
        names += ["subject"] if self._subject_varies else []
        names += ["date", "to", "message-id"]
        names += ["content-type"] if self.type_cut is not None else []
        names += ["list-unsubscribe"] if self.listed else []
        self.signed = ":".join([*names, *OVERSIGNED])
        self.head_hash = sha256(b"".join(headers.relaxed(one) for one in fixed))


_SUBJECT: Final = headers.Prepared("Subject")

# RFC 6376 5.4.2 and mail-standards.md 2.3: one instance more than there is, so that none can be added
OVERSIGNED: Final = (
    "from", "reply-to", "subject", "date", "to", "cc", "content-type", "mime-version",
    "list-unsubscribe", "list-unsubscribe-post",
)  # fmt: skip


def _list_id(campaign: Campaign) -> str:
    label = campaign.list_label.strip()
    if re.fullmatch(r"[A-Za-z0-9]+(?: [A-Za-z0-9]+)*", label) and len(label) <= 60:
        return f'"{label}" <{campaign.list_id}>'
    return (
        f"<{campaign.list_id}>"  # a label with other letters would have to be encoded, which many readers do not undo
    )
