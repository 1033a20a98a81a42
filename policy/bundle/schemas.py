"""A JSON Schema (draft 2020-12) for each file of a bundle, made from the very table that writes it. Pure.

Law: every line of every bundle is valid against the schema that lies beside it (P-42, P-56).

Fields that are not in the table are allowed, as plain values only: no record has a record inside. A field that is
known but not required may be missing or null.

Known limits: the schema says what kinds of values there are, not which words; vocabularies may grow.
"""

from __future__ import annotations

import json
from typing import Any, Final

from policy.bundle.contents import KINDS, PORTABILITY, Field, Kind

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_TYPES: Final[dict[str, dict[str, Any]]] = {
    "text": {"type": "string"},
    # RFC 3339 in UTC; the pattern is for validators that take "format" as a remark only
    "instant": {
        "type": "string",
        "format": "date-time",
        "pattern": r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d+)?Z$",
    },
    "number": {"type": "integer"},
    "flag": {"type": "boolean"},
}


def schema_of(kind: Kind, right: str) -> dict[str, Any]:
    """The schema of one line."""
    fields = [field for field in kind.fields if not (field.inferred and right == PORTABILITY)]
    return {
        "$schema": DIALECT,
        "title": kind.file,
        "description": kind.about,
        "type": "object",
        "properties": {field.name: _property(field) for field in fields},
        "required": [field.name for field in fields if field.required],
        "additionalProperties": {"type": ["string", "integer", "boolean", "null"]},
    }


def text_of(name: str, right: str) -> str:
    """The schema of a kind as a file."""
    return json.dumps(schema_of(KINDS[name], right), indent=2, ensure_ascii=False) + "\n"


def _property(field: Field) -> dict[str, Any]:
    kind = _TYPES[field.type]
    if field.required:
        return {**kind, "description": field.about}
    return {**kind, "type": [kind["type"], "null"], "description": field.about}
