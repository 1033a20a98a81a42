"""The second pass: every mistake of a payload at once, each with its place and a way out.

Law: whatever tree comes in, `examine` returns; it never raises, and nothing it says quotes a value (values are
addresses and letters; a path names fields only, and a field name that is not a plain word is described). [] means that
``msgspec.convert`` will succeed.

`examine` walks the tree beside the msgspec type it should have (`msgspec.inspect`), so a field declared once is
checked, documented (`sales-push schema`) and decoded by the same declaration. Checks that a type cannot say (an
address, an instant) hang on the type as ``Meta(extra={"check": name})``.

Known limits: at most `MOST` problems are listed; then a last line says that there are more.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec
from msgspec import inspect

MOST = 500  # a report nobody reads to the end helps nobody; a payload of pure garbage must not fill the stream
DEEPEST = 12  # objects and lists inside one another; the schema itself needs six
_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,39}")


class Problem(msgspec.Struct, frozen=True, array_like=True):
    """One mistake. path: JSONPath-like, ``$.from.address``; message: what is wrong; suggestion: what to do, or ""."""

    path: str
    message: str
    suggestion: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" + (f" ({self.suggestion})" if self.suggestion else "")


Check: TypeAlias = Callable[[str], tuple[str, str] | None]


class Unusable:
    """Stands in a tree (strict.py) where JSON text held something no two readers agree on."""

    __slots__ = ("message",)

    def __init__(self, message: str) -> None:
        self.message = message


class Doubled(dict[str, Any]):
    """An object in which at least one name came twice."""

    __slots__ = ("names",)
    names: list[str]


def shown(name: str) -> str:
    """A field name fit for a report: plain words as they are, anything else (an address?) only described."""
    return name if _PLAIN_NAME.fullmatch(name) else f"<a name of {len(name)} characters>"


def nearest(name: str, known: list[str]) -> str:
    """A sentence naming the field that was probably meant, or the fields there are."""
    close = difflib.get_close_matches(name[:60].lower(), known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(known) if len(known) <= 8 else ""


class _Full(Exception):
    """Our own way out of the walk once enough was found; never leaves this room."""


@dataclass(slots=True)
class _Walk:
    checks: Mapping[str, Check]
    found: list[Problem] = field(default_factory=list)

    def say(self, path: str, message: str, suggestion: str = "") -> None:
        if len(self.found) >= MOST:
            self.found.append(Problem("$", f"more than {MOST} problems: only the first are listed"))
            raise _Full
        self.found.append(Problem(path, message, suggestion))


def examine(value: Any, type_: type | inspect.Type, checks: Mapping[str, Check], path: str = "$") -> list[Problem]:
    """Every way in which `value` is not a `type_`. Never raises; [] means that ``msgspec.convert`` will succeed."""
    walk = _Walk(checks)
    try:
        _examine(walk, value, type_ if isinstance(type_, inspect.Type) else type_info(type_), path, 0)
    except _Full:
        pass
    except RecursionError:
        walk.found.append(Problem(path, "nested too deeply to be read"))
    return walk.found


_infos: dict[type, inspect.Type] = {}


def type_info(type_: type) -> inspect.Type:
    info = _infos.get(type_)
    if info is None:
        info = _infos[type_] = inspect.type_info(type_)
    return info


def _examine(walk: _Walk, value: Any, type_: inspect.Type, path: str, depth: int) -> None:
    if isinstance(value, Unusable):
        walk.say(path, value.message)
    elif depth > DEEPEST:
        walk.say(path, f"nested deeper than {DEEPEST} levels")
    elif isinstance(value, Doubled) and not isinstance(type_, inspect.Metadata):
        for name in value.names:
            walk.say(f"{path}.{shown(name)}", "the name comes twice in one object: which one is meant?", "keep one")
        _by_type(walk, value, type_, path, depth)
    else:
        _by_type(walk, value, type_, path, depth)


def _by_type(walk: _Walk, value: Any, type_: inspect.Type, path: str, depth: int) -> None:
    match type_:
        case inspect.Metadata():
            before = len(walk.found)
            _examine(walk, value, type_.type, path, depth)
            name = (type_.extra or {}).get("check")
            if name is not None and isinstance(value, str) and len(walk.found) == before:
                answer = walk.checks[name](value)
                if answer is not None:
                    walk.say(path, *answer)
        case inspect.StructType():
            _object(walk, value, type_, path, depth)
        case inspect.UnionType():
            _union(walk, value, type_, path, depth)
        case inspect.StrType():
            _text(walk, value, type_, path)
        case inspect.IntType() | inspect.FloatType():
            _number(walk, value, type_, path)
        case inspect.BoolType():
            if not isinstance(value, bool):
                walk.say(path, f"expected true or false, got {_kind(value)}")
        case inspect.NoneType():
            if value is not None:
                walk.say(path, f"expected null, got {_kind(value)}")
        case inspect.LiteralType():
            _literal(walk, value, type_, path)
        case inspect.ListType():
            _list(walk, value, type_, path, depth)
        case inspect.DictType():
            _mapping(walk, value, type_, path, depth)
        case _:
            raise TypeError(f"the walk does not know {type_!r}: a declaration of ours, not a mistake of the producer")


def _object(walk: _Walk, value: Any, type_: inspect.StructType, path: str, depth: int) -> None:
    if not isinstance(value, dict):
        walk.say(path, f"expected an object, got {_kind(value)}")
        return
    fields = {known.encode_name: known for known in type_.fields}
    for name, known in fields.items():
        if name in value:
            _examine(walk, value[name], known.type, f"{path}.{name}", depth + 1)
        elif known.required:
            walk.say(f"{path}.{name}", "is missing, and required")
    for name in value:
        if name not in fields:
            walk.say(f"{path}.{shown(name)}", "there is no such field", nearest(name, list(fields)))


def _union(walk: _Walk, value: Any, type_: inspect.UnionType, path: str, depth: int) -> None:
    for choice in type_.types:
        if _fits(value, choice):
            _examine(walk, value, choice, path, depth)
            return
    wanted = [_named(choice) for choice in type_.types if not isinstance(choice, inspect.NoneType)]
    walk.say(path, f"expected {' or '.join(dict.fromkeys(wanted))}, got {_kind(value)}")


def _text(walk: _Walk, value: Any, type_: inspect.StrType, path: str) -> None:
    if not isinstance(value, str):
        walk.say(path, f"expected text, got {_kind(value)}", 'put it in "quotes"' if _is_number(value) else "")
        return
    if broken(value):
        walk.say(path, "holds half of a surrogate pair: that is no character", "escape characters as UTF-16 pairs")
        return
    if type_.min_length is not None and len(value) < type_.min_length:
        few = f"is too short: {len(value)} characters, at least {type_.min_length}"
        walk.say(path, few if value else "is empty, and must not be")
    elif type_.max_length is not None and len(value) > type_.max_length:
        walk.say(path, f"is too long: {len(value):,} characters, at most {type_.max_length:,}")
    elif type_.pattern is not None and re.search(type_.pattern, value) is None:
        walk.say(path, "has characters or a form that are not allowed here", f"must match {type_.pattern}")


def _number(walk: _Walk, value: Any, type_: inspect.IntType | inspect.FloatType, path: str) -> None:
    whole = isinstance(type_, inspect.IntType)
    if not _is_number(value) or (whole and isinstance(value, float) and not value.is_integer()):
        walk.say(path, f"expected {_named(type_)}, got {_kind(value)}", _unquote(value))
    elif type_.ge is not None and value < type_.ge:
        walk.say(path, f"is too small: at least {type_.ge}")
    elif type_.gt is not None and value <= type_.gt:
        walk.say(path, f"is too small: more than {type_.gt}")
    elif type_.le is not None and value > type_.le:
        walk.say(path, f"is too large: at most {type_.le}")


def _literal(walk: _Walk, value: Any, type_: inspect.LiteralType, path: str) -> None:
    if type(value) in (str, int) and value in type_.values:
        return
    allowed = ", ".join(str(choice) for choice in type_.values)
    close = (
        difflib.get_close_matches(value[:60].lower(), [str(v) for v in type_.values], n=1) if _is_text(value) else []
    )
    said = "is not one of the values allowed here" if _is_text(value) else f"got {_kind(value)}"
    walk.say(path, f"{said}: {allowed}", f"did you mean {close[0]!r}?" if close else "")


def _list(walk: _Walk, value: Any, type_: inspect.ListType, path: str, depth: int) -> None:
    if not isinstance(value, list):
        walk.say(path, f"expected a list, got {_kind(value)}")
        return
    if type_.min_length is not None and len(value) < type_.min_length:
        walk.say(path, f"has too few entries: {len(value)}, at least {type_.min_length}")
    if type_.max_length is not None and len(value) > type_.max_length:
        walk.say(path, f"has too many entries: {len(value):,}, at most {type_.max_length:,}")
        return
    for index, item in enumerate(value):
        _examine(walk, item, type_.item_type, f"{path}[{index}]", depth + 1)


def _mapping(walk: _Walk, value: Any, type_: inspect.DictType, path: str, depth: int) -> None:
    if not isinstance(value, dict):
        walk.say(path, f"expected an object, got {_kind(value)}")
        return
    if type_.max_length is not None and len(value) > type_.max_length:
        walk.say(path, f"has too many names: {len(value):,}, at most {type_.max_length:,}")
        return
    for name, item in value.items():
        place = f"{path}.{shown(name)}"
        before = len(walk.found)
        _examine(walk, name, type_.key_type, place, depth + 1)
        if len(walk.found) == before:
            _examine(walk, item, type_.value_type, place, depth + 1)


def broken(text: str) -> bool:
    """True when the text holds a lone surrogate and so cannot be written as UTF-8."""
    if text.isascii():
        return False
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unquote(value: Any) -> str:
    return "write it without quotes" if isinstance(value, str) and value.replace(".", "", 1).isdigit() else ""


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
        case dict():
            return "an object"
    return "something that is not JSON"


_NAMES: tuple[tuple[type[inspect.Type], str], ...] = (
    (inspect.StructType, "an object"),
    (inspect.DictType, "an object"),
    (inspect.StrType, "text"),
    (inspect.IntType, "a whole number"),
    (inspect.FloatType, "a number"),
    (inspect.BoolType, "true or false"),
    (inspect.ListType, "a list"),
    (inspect.LiteralType, "one of a few words"),
)


def _named(type_: inspect.Type) -> str:
    if isinstance(type_, inspect.Metadata):
        return _named(type_.type)
    return next((name for kind, name in _NAMES if isinstance(type_, kind)), "null")


def _fits(value: Any, type_: inspect.Type) -> bool:
    """Is this member of a union the one that was meant? By JSON type only."""
    match type_:
        case inspect.Metadata():
            return _fits(value, type_.type)
        case inspect.StructType() | inspect.DictType():
            return isinstance(value, dict)
        case inspect.StrType():
            return isinstance(value, str)
        case inspect.LiteralType():
            return isinstance(value, str | int) and not isinstance(value, bool)
        case inspect.IntType():
            return isinstance(value, int) and not isinstance(value, bool)
        case inspect.FloatType():
            return _is_number(value)
        case inspect.BoolType():
            return isinstance(value, bool)
        case inspect.ListType():
            return isinstance(value, list)
        case inspect.NoneType():
            return value is None
    return False
