"""Derive: the plain text of an HTML template, for campaigns that bring none.

Law: the template's constructs come out in the order they went in, each exactly once, except those a reader of the
HTML does not see (fields in style, script, head, hidden elements, attributes other than a link's destination); blocks
stay balanced, or there is no text and the producer is asked for one.

Walked in the order of the source and not laid out by inscriptis (ecosystem.md c): that one builds a tree first, and a
tree moves {% for %} out of a table and pads the columns of layout tables with spaces, so newsletters come out as ragged
blocks and their loops broken.

Known limits: no columns; an image is its alt text; a list item begins with "- " whether numbered or not.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser

from engine.message import template
from engine.message.template import Sort, Token

_BLOCK = frozenset(
    "address article aside blockquote center dd div dl dt fieldset figcaption figure footer form header hr li main nav "
    "ol p section table td th tr ul".split()
)
_APART = frozenset("h1 h2 h3 h4 h5 h6 p ul ol table blockquote hr".split())
_UNSEEN = frozenset("style script head title noscript".split())
_VOID = frozenset("area base br col embed hr img input link meta param source track wbr".split())
_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden|font-size\s*:\s*0", re.IGNORECASE)
_OPEN, _CLOSE = "\ue000", "\ue001"  # private use: around the number of a construct while the text is made
_MARK = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")
_ALONE = re.compile(f"^({_OPEN}([0-9]+){_CLOSE})\\n+", re.MULTILINE)  # a tag on a line of its own is no line
_PRIVATE = re.compile(f"[{_OPEN}{_CLOSE}]")


class _Reader(HTMLParser):
    def __init__(self, blocks: frozenset[int]) -> None:
        super().__init__(convert_charrefs=True)
        self.source: list[str] = []
        self.out: list[str] = []
        self._blocks = blocks
        self._ended = 2
        self._unseen: list[str] = []
        self._links: list[tuple[str, int]] = []

    def _gap(self, lines: int) -> None:
        """At least so many line ends here, those already there counted."""
        missing = lines - self._ended
        if missing > 0:
            self.out.append("\n" * missing)
            self._ended = lines

    def _say(self, text: str) -> None:
        self.out.append(text)
        if text.strip(" "):
            self._ended = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        hides = tag in _UNSEEN or "hidden" in values or _HIDDEN.search(values.get("style") or "") is not None
        if tag not in _VOID and (self._unseen or hides):
            self._unseen.append(tag)
            return
        if self._unseen or hides:
            return
        if tag in _BLOCK or tag in _APART:
            self._gap(2 if tag in _APART else 1)
        if tag == "br":
            self._gap(self._ended + 1)
        elif tag == "li":
            self._say("- ")
        elif tag == "hr":
            self._say("--")
            self._gap(2)
        elif tag == "img":
            self._say((values.get("alt") or "").strip())
        elif tag == "a":
            self._links.append((values.get("href") or "", len(self.out)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._unseen:
            if tag in self._unseen:
                while self._unseen.pop() != tag:
                    pass
            return
        if tag == "a" and self._links:
            href, begin = self._links.pop()
            label = "".join(self.out[begin:]).strip()
            href = href.strip()
            if href and not href.startswith("#") and href not in (label, "mailto:" + label, "tel:" + label):
                self._say(f" <{href}>" if label else href)
        elif tag in _BLOCK or tag in _APART:
            self._gap(2 if tag in _APART else 1)

    def handle_data(self, data: str) -> None:
        if not self._unseen:
            self._say(re.sub(r"[ \t\r\n\f]+", " ", data))
        else:
            self.out += [found.group() for found in _MARK.finditer(data) if int(found.group(1)) in self._blocks]


def text_of(tokens: list[Token]) -> list[Token] | None:
    """The tokens of a text part that says what this HTML says; None when its blocks would not nest."""
    blocks = frozenset(number for number, token in enumerate(tokens) if token.sort is Sort.TAG)
    reader = _Reader(blocks)
    for number, token in enumerate(tokens):
        is_text = token.sort is Sort.TEXT
        reader.source.append(_PRIVATE.sub("", token.text) if is_text else f"{_OPEN}{number}{_CLOSE}")
    reader.feed("".join(reader.source))
    reader.close()
    text = "".join(reader.out).replace("\xa0", " ")
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    text = _ALONE.sub(lambda found: found.group(1) if int(found.group(2)[:9]) in blocks else found.group(), text)
    result: list[Token] = []
    at = 0
    for found in _MARK.finditer(text):
        if found.start() > at:
            result.append(Token(Sort.TEXT, text[at : found.start()], 1))
        number = int(found.group(1)[:9])
        if number < len(tokens) and tokens[number].sort is not Sort.TEXT:  # else a character reference forged the mark
            result.append(tokens[number])
        at = found.end()
    result.append(Token(Sort.TEXT, text[at:] + "\n", 1))
    return result if _balanced(result) else None


def _balanced(tokens: list[Token]) -> bool:
    """Do the blocks still open and close in pairs? (A block inside a tag's attributes is left out with the tag.)"""
    opened: list[str] = []
    for token in tokens:
        if token.sort is not Sort.TAG:
            continue
        word = template.keyword(token.text)
        if word in template.OPENING or template.is_block_set(token.text):
            opened.append(word)
        elif word in template.CLOSING:
            if not opened or "end" + opened.pop() != word:
                return False
        elif word in ("else", "elif") and not opened:
            return False
    return not opened
