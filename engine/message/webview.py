"""The web version: the page of a campaign as anybody may see it.

Law: no recipient's values, no link with a person in it, no tracking: it is kept in the clear and served to whoever has
the job's view link (design section 5). Fields show nothing, blocks take the branch of an absent value, links are the
original ones, opt-out and preferences lead nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping

from engine.message import contexts, template
from engine.message.renderer import Renderer, RenderError
from engine.message.rewrite import Layout, Link, Literal, Pixel, Tag
from engine.message.slots import block_end, block_source


def show(page: Layout, constants: Mapping[str, str]) -> str:
    """The HTML. constants: the provided variables that are the same for everybody."""
    renderer = Renderer(contexts.FILTERS, strict=False)
    context = {**constants, "unsubscribe_url": "#", "preferences_url": "#", "view_url": "#"}
    shown: list[str] = []
    preamble = ""
    nodes, at = page.nodes, 0
    while at < len(nodes):
        first = nodes[at]
        end = block_end(nodes, at) if isinstance(first, Tag) else at + 1
        source = "".join(block_source(node, tracked=False) for node in nodes[at:end])
        at = end
        if isinstance(first, Tag) and template.keyword(first.source) == "set":
            preamble += source
        elif isinstance(first, Literal | Link):
            shown.append(first.text if isinstance(first, Literal) else first.original)
        elif not isinstance(first, Pixel):
            try:
                shown.append(renderer.render(renderer.add(preamble + source, html=True), context, html=True))
            except RenderError:
                continue  # it cannot be shown without a recipient's values
    return "".join(shown)
