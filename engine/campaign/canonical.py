"""The canonical form of a job: RFC 8785 (JSON Canonicalization Scheme), so that the same job has the same hash.

Law: two payloads that parse to the same tree have the same hash, whatever their white space, order of names or
escapes; any other difference changes it. Numbers follow ECMAScript (RFC 8785 3.2.2.3), names sort by UTF-16 code
units (3.2.3).

Known limits: the caller has refused integers beyond 2**53, NaN, infinities and lone surrogates (problems.py).
"""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any


def canonical(value: Any, *, exact: bool = False) -> bytes:
    """The RFC 8785 bytes of a tree of dict, list, str, int, float, bool and None.

    exact: the caller knows that no float is in it; then the C encoder gives the same bytes unless a name lies outside
    the basic plane (there, and only there, code points and UTF-16 code units sort differently).
    """
    if exact:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True, allow_nan=False)
        if text.isascii() or max(text) <= "\uffff":
            return text.encode("utf-8")
    parts: list[str] = []
    _write(value, parts)
    return "".join(parts).encode("utf-8")


def hash_of(value: Any, *, exact: bool = False) -> bytes:
    """32 bytes, SHA-256 of the canonical form: what makes a repeat a repeat and a conflict a conflict."""
    return sha256(canonical(value, exact=exact)).digest()


def _write(value: Any, parts: list[str]) -> None:
    match value:
        case dict():
            parts.append("{")
            for index, name in enumerate(sorted(value, key=lambda name: name.encode("utf-16-be"))):
                parts.append(f"{',' if index else ''}{json.dumps(name, ensure_ascii=False)}:")
                _write(value[name], parts)
            parts.append("}")
        case list():
            parts.append("[")
            for index, item in enumerate(value):
                if index:
                    parts.append(",")
                _write(item, parts)
            parts.append("]")
        case bool() | None | str():
            parts.append(json.dumps(value, ensure_ascii=False))
        case float():
            parts.append(number(value))
        case _:
            parts.append(str(value))


def number(value: float) -> str:
    """A double as ECMAScript writes it (ECMA-262 Number::toString): Python's repr has the same shortest digits."""
    if value == 0:
        return "0"
    sign = "-" if value < 0 else ""
    mantissa, _, exponent = repr(abs(value)).partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).lstrip("0")
    # position of the decimal point counted from the first significant digit (the specification's n)
    point = int(exponent or 0) + (len(whole) if whole != "0" else len(digits) - len(fraction))
    digits = digits.rstrip("0") or "0"
    count = len(digits)
    if count <= point <= 21:
        return sign + digits + "0" * (point - count)
    if 0 < point <= 21:
        return f"{sign}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    shown = f"{'+' if point > 0 else '-'}{abs(point - 1)}"
    return f"{sign}{digits[0]}{'.' + digits[1:] if count > 1 else ''}e{shown}"
