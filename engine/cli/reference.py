"""docs/configuration.md, from the settings models: the one place where a setting is declared is the model.

Pure: models in, Markdown out. `make docs` writes the file, tests/engine/test_settings.py says that it is current.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

_HEAD = """\
# Configuration

One TOML file (`--config`, else `$SALES_PUSH_CONFIG`, else `./sales-push.toml`) with one table for each floor; the
environment wins over the file (`SALES_PUSH_ENGINE_RETRY__BASE=60`). Mistakes are reported all at once, with path and
suggestion: `sales-push config --check`. `sales-push config` prints what is in force and where it came from.
Secrets never stand in the file: they are named by the file or the environment variable that holds them.

This page is made by `make docs` from the settings models; do not edit it.
"""


def reference(models: Iterable[type[BaseSettings]]) -> str:
    """The whole page."""
    lines = [_HEAD]
    for model in models:
        prefix = str(model.model_config.get("env_prefix", ""))
        table = prefix.removeprefix("SALES_PUSH_").rstrip("_").lower()
        lines += _table(model, table, prefix)
    return "\n".join(lines).rstrip() + "\n"


def _table(model: type[BaseModel], table: str, prefix: str) -> Iterator[str]:
    yield f"## [{table}]\n"
    # inherited texts (pydantic's own) say nothing about ours
    yield _first_paragraph(model.__doc__ or "") + "\n"
    yield "| setting | default | range | meaning |"
    yield "|---|---|---|---|"
    nested: list[tuple[str, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        inner = model_of(field.annotation)
        if inner is not None and not _is_table_of(field.annotation):
            nested.append((f"{table}.{name}", inner))
            yield f"| [`{name}`](#{(table + name).replace('.', '')}) | table | | {_cell(field)} |"
            continue
        if inner is not None:
            nested.append((f'{table}.{name}."…"', inner))
        yield f"| `{name}` | {_default(field)} | {range_of(field)} | {_cell(field)} |"
    yield ""
    for inner_table, inner in nested:
        yield from _table(inner, inner_table, prefix)


def _first_paragraph(text: str) -> str:
    return " ".join(text.strip().split("\n\n")[0].split())


def _cell(field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).replace("|", "\\|")


def model_of(annotation: Any) -> type[BaseModel] | None:
    """The nested model of a field: itself, behind Optional, or as the values of a free table."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, dict):
        for choice in typing.get_args(annotation):
            if (inner := model_of(choice)) is not None:
                return inner
    return None


def _is_table_of(annotation: Any) -> bool:
    return typing.get_origin(annotation) is dict


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**needed**"
    if field.default_factory is not None:
        made = {list: "[]", dict: "{}"}.get(typing.cast(Any, field.default_factory))
        return f"`{made}`" if made else "see meaning"
    value = field.default
    if value is None:
        return "none"
    return f"`{json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)}`"


def range_of(field: FieldInfo) -> str:
    """The range in words: "1 to 1000", "above 0, at most 60", the choices of a Literal, "" when anything goes."""
    low = high = ""
    for item in field.metadata:
        match item:
            case annotated_types.Ge():
                low = f"{item.ge}"
            case annotated_types.Gt():
                low = f"above {item.gt}"
            case annotated_types.Le():
                high = f"{item.le}"
            case annotated_types.Lt():
                high = f"below {item.lt}"
            case annotated_types.MaxLen():
                high = f"{item.max_length} long" if field.annotation is str else f"{item.max_length} entries"
    if low and high:
        return f"{low} to {high}"
    if high:
        return f"at most {high}"
    if low:
        return low if low.startswith("above") else f"at least {low}"
    if typing.get_origin(field.annotation) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(field.annotation))
    return "true, false" if field.annotation is bool else ""
