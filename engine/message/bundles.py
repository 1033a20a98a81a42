"""Bundles: the blocks of one variant and of the subject rendered in one go.

minijinja takes the recipient's values over at every call (0.5 us, and 0.1 for each value), so ten blocks cost more than
one template that holds them all with a separator between, and gets the values that they use.

A block of one word or number stays out: recipients share those, and what it makes of one is looked up (`recall`).

Law: a bundle changes no result. Whatever is unusual (a value that holds the separator, an error, a limit reached) and
each block is rendered by itself, under its own limits and with its own error; a block that sets a variable is never in
a bundle, because the next one would see it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import minijinja

from engine.message import template
from engine.message.renderer import Renderer, RenderError, all_plain, may_trust
from engine.message.slots import Frame

_BETWEEN: Final = "\x1e"  # record separator: no text of a mail has it
_SETS: Final = re.compile(r"\bset\b")


@dataclass(frozen=True, slots=True)
class Block:
    """One slot that minijinja renders. name: as the renderer knows it; html: it escapes what it prints."""

    name: str
    source: str
    html: bool


def may_join(source: str) -> bool:
    return _SETS.search(source) is None


def told(source: str, html: bool) -> str:
    """The source for a template that escapes: what does not is told so. Escaping by context is settled before
    (`template` refuses the tag in what producers write)."""
    return source if html else "{% autoescape false %}" + source + "{% endautoescape %}"


def together(
    blocks: Sequence[Block], renderer: Renderer, constants: Mapping[str, Any]
) -> Callable[[Frame], None] | None:
    """What fills `Frame.ready` for these blocks in one go, None when there are too few. constants: what is the same for
    everybody, by name. Raises what `Renderer.add` raises, which took every block alone before."""
    if len(blocks) < 2:
        return None
    source = _BETWEEN.join([told(block.source, block.html) for block in blocks])
    name = renderer.add(source, html=True)
    trusting = renderer.add_trusting(source) if all(may_trust(block.source) for block in blocks) else ""
    names = [block.name for block in blocks]
    used = set[str]().union(*(template.names_used(block.source) for block in blocks))
    always = {key: value for key, value in constants.items() if key in used}
    links = "sp_click" in used
    asked = tuple(sorted(used - constants.keys() - {"sp_click"}))

    def prepare(frame: Frame) -> None:
        own = frame.values
        values = {key: own[key] for key in asked if key in own}
        trusted = trusting and all_plain(values)
        if always:
            values |= always
        if links:
            values["sp_click"] = minijinja.safe(frame.click)
        text = renderer.render_trusting(trusting, values) if trusted else None
        if text is None:
            try:
                text = renderer.render(name, values, html=True)
            except RenderError:
                return
        texts = text.split(_BETWEEN)
        if len(texts) == len(names):
            frame.ready = dict(zip(names, texts, strict=True))

    return prepare


_CONSTRUCT: Final = re.compile(r"\{\{.*?\}\}|\{%.*?%\}", re.DOTALL)


def literals(source: str) -> set[str]:
    """Pieces of a block between its constructs and line ends: when one is printed as a whole line its form is known."""
    return {line for text in _CONSTRUCT.split(source) for line in text.split("\n") if line and "\r" not in line}


def static_lines(source: str) -> set[str]:
    """Whole lines of a block that no template tag touches: what is printed of them is what stands there."""
    lines = source.split("\n")[1:-1]  # the first and the last continue in the tags around them
    return {line for line in lines if line and "{" not in line and "}" not in line and "\r" not in line}
