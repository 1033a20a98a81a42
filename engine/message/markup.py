"""Markup: html.parser's walk over a template, as spans of the source (decision 1; ecosystem.md c).

Nothing is built and nothing is written: every tag, attribute value, style, script, comment and hidden element comes
out as where it begins and ends. Comments that only Outlook reads (<!--[if mso]>) are walked too, once, not deeper.

Known limit: html.parser of Python 3.11 to 3.13 differ in how they end broken comments; the sources of campaigns that
end inside a construct are refused (`Walk.unclosed`), so the difference stays inside the document.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html.parser import HTMLParser

_ATTRIBUTE = re.compile(
    r"""[\s/]*(?P<name>[^\s/>=][^\s/>=]*)(?:\s*=\s*(?:"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<bare>[^\s>"'][^\s>]*)))?"""
)
_TAG_NAME = re.compile(r"<\s*[A-Za-z][^\s/>]*")
URL_ATTRIBUTES = frozenset(
    ("href", "src", "action", "formaction", "background", "cite", "poster", "data", "xlink:href", "longdesc", "lowsrc")
)
NO_FIELDS = frozenset(("style", "srcdoc", "srcset", "ping", "content"))
_VOID = frozenset("area base br col embed hr img input link meta param source track wbr".split())
_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden|mso-hide\s*:\s*all|font-size\s*:\s*0", re.IGNORECASE)
_RAW_TEXT = frozenset("xmp iframe noembed noframes noscript plaintext".split())  # some readers take no references there
_OTHER_LETTERS = re.compile("[^\x00-\x7f]+")
_NO_REFERENCE = re.compile("[\x80-\x9f\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff]")  # would be read as something else
_STUCK = re.compile("&#(?!(?:[0-9]+|[xX][0-9a-fA-F]+)[^0-9a-fA-F])")  # html.parser may see no tag behind such
_CONDITION = re.compile(r"\[if [^\]>]*\]>", re.IGNORECASE)
_CONDITION_END = re.compile(r"<!\[endif\]\s*$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Value:
    """One attribute value's span in the masked source."""

    start: int
    end: int
    tag: str
    name: str
    quoted: bool
    shown: bool
    text: str


class Walk(HTMLParser):
    """Spans of tags, attribute values and raw elements. base: where this piece begins in the whole."""

    def __init__(self, masked: str, base: int = 0, *, comment: bool = False) -> None:
        super().__init__(convert_charrefs=False)
        self.base = base
        self.comment = comment
        self.tags: list[tuple[int, int, str]] = []
        self.values: list[Value] = []
        self.raws: list[tuple[int, int]] = []
        self.comments: list[tuple[int, int]] = []
        self.body_end: int | None = None
        self.html_end: int | None = None
        self.hidden: list[tuple[int, int]] = []
        self.opaque = False
        """Letters that are not ASCII stand in a comment, a declaration or an instruction."""
        self._hidden_tag = ""
        self._hidden_depth = 0
        self._hidden_from = 0
        self._raw_from: int | None = None
        self._lines = [0]
        self._lines += [found.end() for found in re.finditer("\n", masked)]
        self.unclosed = False
        self.feed(masked)
        if (self.rawdata.startswith("<") and self.rawdata[1:2].isalpha()) or self.rawdata.startswith("<!--"):
            self.unclosed = True
        if self._raw_from is not None:
            self.unclosed = True
        if self._hidden_tag:
            self.hidden.append((self._hidden_from, base + len(masked)))
        if not self.unclosed:
            self.close()  # at the end of a broken source it would look for an end from every "<" again: quadratic

    def _at(self) -> int:
        line, offset = self.getpos()
        return self.base + self._lines[line - 1] + offset

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        source, start = self.get_starttag_text() or "", self._at()
        self.tags.append((start, start + len(source), tag))
        hides = self._attributes(tag, source, start)
        if tag in ("style", "script"):
            self._raw_from = start + len(source)
        if self._hidden_tag:
            if tag == self._hidden_tag:
                self._hidden_depth += 1
        elif hides and tag not in _VOID:
            self._hidden_tag, self._hidden_depth, self._hidden_from = tag, 1, start

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        source, start = self.get_starttag_text() or "", self._at()
        self.tags.append((start, start + len(source), tag))
        self._attributes(tag, source, start)

    def handle_endtag(self, tag: str) -> None:
        at = self._at()
        if tag in ("style", "script") and self._raw_from is not None:
            self.raws.append((self._raw_from, at))
            self._raw_from = None
        if tag == "body":
            self.body_end = at
        elif tag == "html":
            self.html_end = at
        if tag == self._hidden_tag:
            self._hidden_depth -= 1
            if not self._hidden_depth:
                self.hidden.append((self._hidden_from, at))
                self._hidden_tag = ""

    def handle_comment(self, data: str) -> None:
        start = self._at()
        self.comments.append((start, start + len(data) + 7))
        condition = _CONDITION.match(data)
        if not (data if condition is None or self.comment else condition.group()).isascii():
            self.opaque = True
        if condition is not None and not self.comment:
            inner = _CONDITION_END.sub("", data[condition.end() :])
            walk = Walk(inner, start + 4 + condition.end(), comment=True)
            self.tags += walk.tags
            self.values += walk.values
            self.raws += walk.raws
            self.opaque = self.opaque or walk.opaque or (walk.unclosed and not inner.isascii())

    def handle_decl(self, decl: str) -> None:
        self.opaque = self.opaque or not decl.isascii()

    def unknown_decl(self, data: str) -> None:
        self.opaque = self.opaque or not data.isascii()

    def handle_pi(self, data: str) -> None:
        self.opaque = self.opaque or not data.isascii()

    def referable(self, masked: str) -> bool:
        """Can every letter that is not ASCII be written as a character reference? In text and attribute values a
        browser reads it as the letter; in a style, script, comment or name it stays what is written."""
        if masked.isascii():
            return True
        if self.opaque or _NO_REFERENCE.search(masked) or _STUCK.search(masked):
            return False
        if any(tag in _RAW_TEXT for _, _, tag in self.tags):
            return False
        values, raws = Values(self.values), Places(self.raws)
        tags = Places((start, end) for start, end, _ in self.tags)
        for found in _OTHER_LETTERS.finditer(masked):
            start = found.start()
            if raws.find(start) is not None:
                return False
            if tags.find(start) is not None and any(values.at(at) is None for at in range(*found.span())):
                return False
        return True

    def _attributes(self, tag: str, source: str, start: int) -> bool:
        """Notes the values; True when the element hides itself."""
        name_end = _TAG_NAME.match(source)
        at = name_end.end() if name_end else 1
        hides = False
        while True:
            found = _ATTRIBUTE.match(source, at)
            if found is None or found.end() == at:
                return hides
            at = found.end()
            name = found.group("name").lower()
            hides = hides or name == "hidden"
            for group in ("double", "single", "bare"):
                if found.group(group) is not None:
                    value = found.group(group)
                    hides = hides or (name == "style" and _HIDDEN.search(value) is not None)
                    span = found.span(group)
                    shown = not self.comment and not self._hidden_tag
                    self.values.append(
                        Value(start + span[0], start + span[1], tag, name, group != "bare", shown and not hides, value)
                    )


class Places:
    """Spans that do not overlap, asked for the one that holds a place: a hostile template has thousands of both."""

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        self._spans = sorted(spans)
        self._starts = [start for start, _ in self._spans]

    def find(self, at: int) -> int | None:
        """Where the span begins that holds `at`."""
        index = bisect.bisect_right(self._starts, at) - 1
        return self._starts[index] if index >= 0 and at < self._spans[index][1] else None


class Values:
    """The attribute value that holds a place."""

    def __init__(self, values: list[Value]) -> None:
        self._places = Places((value.start, value.end) for value in values)
        self._values = {value.start: value for value in values}

    def at(self, place: int) -> Value | None:
        start = self._places.find(place)
        return None if start is None else self._values[start]
