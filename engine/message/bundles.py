"""Bundles: the blocks of one variant and of the subject rendered in one go.

minijinja takes the recipient's values over at every call (1 to 5 us for eight fields), so ten blocks cost far more than
one template that holds them all with a separator between.

Law: a bundle changes no result. Whatever is unusual (a value that holds the separator, an error, a limit reached) and
each block is rendered by itself, under its own limits and with its own error; a block that sets a variable is never in
a bundle, because the next one would see it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

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


def together(
    blocks: Sequence[Block], renderer: Renderer, context: Callable[[Frame], Mapping[str, Any]]
) -> Callable[[Frame], None] | None:
    """What fills `Frame.ready` for these blocks in one go, None when there are too few. Raises what `Renderer.add`
    raises, which took every block alone before."""
    if len(blocks) < 2:
        return None
    # those that do not escape are told so in the one template: escaping by context is settled before (`template`
    # refuses the tag in what producers write)
    sources = [
        block.source if block.html else "{% autoescape false %}" + block.source + "{% endautoescape %}"
        for block in blocks
    ]
    source = _BETWEEN.join(sources)
    name = renderer.add(source, html=True)
    trusting = renderer.add_trusting(source) if all(may_trust(block.source) for block in blocks) else ""
    names = [block.name for block in blocks]

    def prepare(frame: Frame) -> None:
        values = context(frame)
        text = renderer.render_trusting(trusting, values) if trusting and all_plain(frame.values) else None
        if text is None:
            try:
                text = renderer.render(name, values, html=True)
            except RenderError:
                return
        texts = text.split(_BETWEEN)
        if len(texts) == len(names):
            frame.ready.update(zip(names, texts, strict=True))

    return prepare


_CONSTRUCT: Final = re.compile(r"\{\{.*?\}\}|\{%.*?%\}", re.DOTALL)


def literals(source: str) -> set[str]:
    """Pieces of a block between its constructs and line ends: when one is printed as a whole line its form is known."""
    return {line for text in _CONSTRUCT.split(source) for line in text.split("\n") if line and "\r" not in line}


def static_lines(source: str) -> set[str]:
    """Whole lines of a block that no template tag touches: what is printed of them is what stands there."""
    lines = source.split("\n")[1:-1]  # the first and the last continue in the tags around them
    return {line for line in lines if line and "{" not in line and "}" not in line and "\r" not in line}
