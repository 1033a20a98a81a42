"""The one way to write a line of the audit chain: RFC 8785 (JSON Canonicalization Scheme), of what such lines hold.

Law: equal values have equal bytes, different values different bytes: a hash of the bytes is a hash of the meaning, and
whoever checks it needs no program of ours. Names sort by UTF-16 code units (RFC 8785 3.2.3), strings escape only what
JSON must (3.2.2.2), nothing stands between the tokens.

Pure. Objects, arrays, text, whole numbers up to 2**53, true, false and null; a float has no place in a line of account.

Known limits: the engine has a room of the same kind for jobs, floats included; this floor may not enter it (design
section 2), and what is hashed for seven years should not hang on another room's needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

LARGEST: Final = 2**53 - 1  # RFC 8785 appendix D, RFC 7493 2.2: beyond it readers disagree what a number is


def encode(value: Any) -> bytes:
    """The RFC 8785 bytes. Raises ValueError for what it has no form for (floats, huge integers, lone surrogates)."""
    parts: list[str] = []
    _write(value, parts)
    return "".join(parts).encode("utf-8")  # UnicodeEncodeError is a ValueError


def _write(value: Any, parts: list[str]) -> None:
    if value is None or isinstance(value, bool | str):
        parts.append(json.dumps(value, ensure_ascii=False))
    elif isinstance(value, int):
        if not -LARGEST <= value <= LARGEST:
            raise ValueError("an integer beyond 2**53 has no canonical form: write it as text")
        parts.append(str(value))
    elif isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise ValueError("names of an object are text")
        for index, name in enumerate(sorted(value, key=lambda name: name.encode("utf-16-be"))):
            parts.append(f"{',' if index else '{'}{json.dumps(name, ensure_ascii=False)}:")
            _write(value[name], parts)
        parts.append("}" if value else "{}")
    elif isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        for index, item in enumerate(value):
            parts.append("," if index else "[")
            _write(item, parts)
        parts.append("]" if value else "[]")
    else:
        raise ValueError(f"a {type(value).__name__} has no canonical form")
