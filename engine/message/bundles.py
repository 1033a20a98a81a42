"""Bundles: the blocks of one variant rendered in one go.

minijinja takes the recipient's values over at every call (5 us for eight fields), so six blocks cost 30 us more than
one template that holds them all with a separator between.

Law: a bundle changes no result. Whatever is unusual (a value that holds the separator, an error, a limit reached) and
each block is rendered by itself, under its own limits and with its own error; a block that sets a variable is never in
a bundle, because the next one would see it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from engine.message.renderer import RenderError
from engine.message.slots import Frame, Source, Variant

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
    variant: Variant,
    blocks: Mapping[Source, Block],
    add: Callable[[str, bool], str],
    render: Callable[[str, Frame, bool], str],
) -> Variant:
    """The same variant with a `prepare` that fills `Frame.ready`. add: a template by (source, html), its name;
    render: by (name, frame, html). Raises what add raises, which took every block alone before."""
    bundles: list[tuple[str, list[str], bool]] = []
    for html in (True, False):
        found = [
            block for source in variant.sources if (block := blocks.get(source)) is not None and block.html is html
        ]
        if len(found) > 1:
            name = add(_BETWEEN.join(block.source for block in found), html)
            bundles.append((name, [block.name for block in found], html))
    if not bundles:
        return variant

    def prepare(frame: Frame) -> None:
        for name, names, html in bundles:
            try:
                texts = render(name, frame, html).split(_BETWEEN)
            except RenderError:
                continue
            if len(texts) == len(names):
                frame.ready.update(zip(names, texts, strict=True))

    return replace(variant, prepare=prepare)


def static_lines(source: str) -> set[str]:
    """Whole lines of a block that no template tag touches: what is printed of them is what stands there."""
    lines = source.split("\n")[1:-1]  # the first and the last continue in the tags around them
    return {line for line in lines if line and "{" not in line and "}" not in line and "\r" not in line}
