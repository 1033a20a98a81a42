"""Renderer: the slots that minijinja renders, within limits (faults.md 3.6).

A value that is absent or null prints nowhere: the recipient is refused with `MissingField`, so "{{ name }}" is never
sent. `{% if name %}` and `{{ name|default("friend") }}` may ask for it.

Known limits: minijinja's own filters make something of what is absent (`{{ name|upper }}` prints nothing), and of a
null inside a list or dict (`{{ customer.name|upper }}` prints NONE); a whole float is 5.0 where it stands alone and 5
in a block or behind a filter.

Law: a render ends. Fuel counts instructions; join, replace and range are ours, with a limit on their results; one
slot's output has at most 1 MiB; what multiplies text without fuel noticing is not there. No error text holds a value.

Known limit: a loop may produce `FUEL` times a recipient's longest value before it is stopped, about 100 MB at worst,
once per recipient of a hostile job (the intake limits both).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import minijinja

from engine.message.template import TemplateFault, filters_used

FUEL: Final = 20_000  # instructions; a product grid of 100 rows with ten fields each takes about 6,000
MAX_OUTPUT: Final = 1 << 20  # characters of one slot
RANGE_LIMIT: Final = 1_000


class RenderError(ValueError):
    """One recipient's values cannot be put into the template. Holds names and kinds, never a value."""


class MissingField(RenderError):
    """The template prints a field this recipient does not have."""


def _refuse_absent(value: Any) -> Any:
    if value is None:  # minijinja hands undefined over as None
        raise MissingField("a field the template prints is missing")
    return value


def _show_nothing(value: Any) -> Any:
    return "" if value is None else value


def _bounded_join(values: Iterable[Any], separator: str = "") -> str:
    texts = [str(_refuse_absent(value)) for value in values]
    if sum(map(len, texts)) + len(separator) * len(texts) > MAX_OUTPUT:
        raise RenderError("join makes too much text")
    return separator.join(texts)


def _bounded_replace(value: Any, old: str, new: str) -> str:
    text = str(_refuse_absent(value))
    if len(text) + text.count(old) * len(new) > MAX_OUTPUT:
        raise RenderError("replace makes too much text")
    return text.replace(old, new)


def _bounded_range(*bounds: int) -> list[int]:
    numbers = range(*bounds)
    if len(numbers) > RANGE_LIMIT:
        raise RenderError(f"range has more than {RANGE_LIMIT} numbers")
    return list(numbers)


class Renderer:
    """One campaign's slots that minijinja renders: `html` escapes what it prints, `plain` does not.

    filters: the escapes by context that expressions inside blocks are written with (engine.message.rewrite).
    """

    def __init__(self, filters: Mapping[str, Any], *, strict: bool = True) -> None:
        self._html = _environment(filters, escape=True, strict=strict)
        self._plain = _environment(filters, escape=False, strict=strict)
        self._trusting = _environment(filters, escape=True, strict=None)
        self._number = 0

    def add(self, source: str, *, html: bool) -> str:
        """Keeps the source under a name of its own; raises TemplateFault when it does not stand alone."""
        self._number += 1
        name = f"slot {self._number}"
        try:
            (self._html if html else self._plain).add_template(name, source)
        except minijinja.TemplateError as error:
            raise TemplateFault(error.line or 1, f"syntax error: {error.detail or error.kind}") from None
        return name

    def add_trusting(self, source: str) -> str:
        """Keeps a source that `may_trust` for `render_trusting`."""
        self._number += 1
        name = f"slot {self._number}"
        self._trusting.add_template(name, source)
        return name

    def render_trusting(self, name: str, context: Mapping[str, Any]) -> str | None:
        """What `render` answers for HTML, without a look at every value that is printed (0.5 us each), or None: ask
        `render`. Only for values that are `all_plain`: then nothing is None, and minijinja refuses what is absent."""
        try:
            text: str = self._trusting.render_template(name, **context)
        except Exception:  # whatever it is, `render` knows how to say it
            return None
        return text if len(text) <= MAX_OUTPUT else None

    def render(self, name: str, context: Mapping[str, Any], *, html: bool) -> str:
        """Raises RenderError (MissingField among them): the recipient's values do not fit the template."""
        try:
            text = (self._html if html else self._plain).render_template(name, **context)
        except minijinja.TemplateError as error:
            raise RenderError(f"{error.kind} in line {error.line} of {name}") from None
        except RenderError:
            raise
        except Exception as error:  # a filter of ours met a value of the wrong type: still that recipient's data
            raise RenderError(f"{type(error).__name__} in {name}") from None
        if len(text) > MAX_OUTPUT:
            raise RenderError(f"{name} makes more than {MAX_OUTPUT} characters")
        return text


_NOTHING = re.compile(r"\b(?:none|null)\b", re.IGNORECASE)
_NEVER_NONE: Final = frozenset("capitalize count d default e escape first last length lower title trim upper".split())
# no float: a finalizer gets 5.0 as 5, so that the same block would print another number with one than without
_PLAIN: Final = frozenset((str, int, bool))


def may_trust(source: str) -> bool:
    """Can nothing in this source make a None out of values that hold none?"""
    return _NOTHING.search(source) is None and filters_used(source) <= _NEVER_NONE


def all_plain(values: Mapping[str, Any]) -> bool:
    """Texts, whole numbers and lists of them: nothing that could hold a None further down."""
    plain = _PLAIN
    for value in values.values():
        if type(value) not in plain and not (type(value) is list and plain.issuperset(map(type, value))):
            return False
    return True


def _environment(filters: Mapping[str, Any], *, escape: bool, strict: bool | None) -> minijinja.Environment:
    """strict: what is absent is refused when printed, or shows as nothing; None: minijinja refuses what is undefined
    and nobody looks for None."""
    ours = {"join": _bounded_join, "replace": _bounded_replace, **filters}
    behaviour: Any = "lenient" if strict is not None else "semi_strict"  # minijinja's stub does not know this one
    environment = minijinja.Environment(
        filters=ours,
        globals={"range": _bounded_range},
        debug=False,  # with it an error text would hold the recipient's values
        fuel=FUEL,
        pycompat=False,
        undefined_behavior=behaviour,
        auto_escape_callback=lambda name: escape,
        keep_trailing_newline=True,
    )
    if strict is not None:
        environment.finalizer = _refuse_absent if strict else _show_nothing
    for name in ("safe", "tojson", "format", "indent", "pprint"):
        environment.remove_filter(name)
    return environment
