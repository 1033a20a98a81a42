"""Configuration: one TOML file, the environment over it, every mistake at once, every value with its origin.

Law: a configuration is either whole or refused with *every* mistake at once, each with its path and, where a name is
unknown, the nearest known one. Values come from (strongest first) environment, file, default; `origins` says which.

Every floor has one model (a plain `pydantic_settings.BaseSettings` with ``env_prefix="SALES_PUSH_<FLOOR>_"``), found by
the entry point ``sales_push.settings``; the table of the file is the floor's name in lower case.

    file      --config, else $SALES_PUSH_CONFIG, else ./sales-push.toml when it is there
    [policy.officer]  address = ...          SALES_PUSH_POLICY_OFFICER__ADDRESS=...

Relative paths in a file are relative to that file, so that a service started elsewhere finds the same data.
Secrets never stand in the file: passwords are named by file (``*_password_file``), keys live in ``keys_dir``.

Known limits: one file, no include; a list in the environment is written as JSON.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

from pydantic import AfterValidator, BaseModel, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource
from pydantic_settings.exceptions import SettingsError

CONFIG_VARIABLE = "SALES_PUSH_CONFIG"
DEFAULT_FILE = "sales-push.toml"

M = TypeVar("M", bound=BaseSettings)


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake: where (dotted path, or the variable's name), what, and what would be right ("" if unknown)."""

    path: str
    message: str
    suggestion: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" + (f" ({self.suggestion})" if self.suggestion else "")


class ConfigError(Exception):
    """The configuration is refused; problems lists every mistake. No value is repeated: it may be a secret."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def config_file(path: Path | None = None) -> Path | None:
    """The file that holds: the one named, else $SALES_PUSH_CONFIG, else ./sales-push.toml if it exists, else none."""
    if path is not None:
        return path
    if named := os.environ.get(CONFIG_VARIABLE):
        return Path(named)
    fallback = Path(DEFAULT_FILE)
    return fallback if fallback.is_file() else None


def table_of(model: type[BaseSettings]) -> str:
    """ "policy" for env_prefix SALES_PUSH_POLICY_."""
    return _prefix(model).removeprefix("SALES_PUSH_").rstrip("_").lower()


def _prefix(model: type[BaseSettings]) -> str:
    return str(model.model_config.get("env_prefix", ""))


def load(model: type[M], path: Path | None = None) -> M:
    """The settings of one floor; raises ConfigError with every mistake."""
    return _gather(model, path).build(model)


def load_all(models: Iterable[type[BaseSettings]], path: Path | None = None) -> list[BaseSettings]:
    """Several floors at once: one ConfigError for the mistakes of all, unknown tables included."""
    models = list(models)
    problems: list[Problem] = []
    loaded: list[BaseSettings] = []
    tables = [table_of(model) for model in models]
    file = config_file(path)
    if file is not None:
        try:
            problems += [
                Problem(name, "unknown table", _nearest(name, tables)) for name in _read(file) if name not in tables
            ]
        except ConfigError as error:
            raise error from None
    for model in models:
        try:
            loaded.append(load(model, path))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return loaded


def origins(model: type[BaseSettings], path: Path | None = None) -> dict[str, str]:
    """default | file | environment for every setting, by dotted path inside the model ("officer.address")."""
    gathered = _gather(model, path)
    found: dict[str, str] = {}
    for name, nested in _leaves(model):
        keys = name.split(".")
        if _reach(gathered.environment, keys) is not None:
            found[name] = "environment"
        elif _reach(gathered.table, keys) is not None:
            found[name] = "file"
        else:
            found[name] = "default"
        assert nested is not None
    return found


def annotate(models: Iterable[type[BaseSettings]], path: Path | None = None) -> str:
    """The effective configuration as TOML: every setting with its description, range and origin as a comment."""
    lines: list[str] = []
    for model in models:
        settings = load(model, path)
        said = origins(model, path)
        lines += _annotated(settings, table_of(model), "", said)
    return "\n".join(lines).rstrip() + "\n"


@dataclass(frozen=True, slots=True)
class _Gathered:
    file: Path | None
    table: dict[str, Any]
    environment: dict[str, Any]
    problems: list[Problem]

    def build(self, model: type[M]) -> M:
        problems = list(self.problems)
        base = self.file.absolute().parent if self.file is not None else Path()
        table = _anchor(model, self.table, base) if self.file is not None else self.table
        try:
            built = model.__new__(model)
            BaseModel.__init__(built, **_merge(table, self.environment))  # not BaseSettings': sources are merged here
        except ValidationError as error:
            problems += [
                self._problem(model, detail)
                for detail in error.errors(include_url=False)
                if detail["type"] != "default_factory_not_called"  # the echo of another field's mistake
            ]
        if problems:
            raise ConfigError(problems)
        return built

    def _problem(self, model: type[BaseSettings], detail: Any) -> Problem:
        loc = [str(part) for part in detail["loc"]]
        path = ".".join([table_of(model), *loc])
        if _reach(self.environment, loc) is not None:
            path = _prefix(model) + "__".join(loc).upper()
        if detail["type"] == "extra_forbidden":
            return Problem(path, "unknown setting", _nearest(loc[-1], _names(model, loc[:-1])))
        if detail["type"] == "missing":
            variable = _prefix(model) + "__".join(loc).upper()
            return Problem(path, "missing", f"set {path} in the file or {variable} in the environment")
        return Problem(path, str(detail["msg"]).removeprefix("Value error, "))


def _gather(model: type[BaseSettings], path: Path | None) -> _Gathered:
    file = config_file(path)
    problems: list[Problem] = []
    table: Any = _read(file).get(table_of(model), {}) if file is not None else {}
    if not isinstance(table, dict):
        problems.append(Problem(table_of(model), "must be a table", f"write [{table_of(model)}]"))
        table = {}
    environment: dict[str, Any] = {}
    try:
        environment = dict(EnvSettingsSource(model)())
    except SettingsError as error:
        named = re.search(r'field "(\w+)"', str(error))
        variable = _prefix(model) + (named[1].upper() if named else "*")
        problems.append(Problem(variable, "cannot be parsed", "lists and tables are written as JSON"))
    problems += _unknown_variables(model)
    return _Gathered(file, table, environment, problems)


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError([Problem(str(file), "no such file", "make one with: sales-push init")]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem(str(file), f"cannot be read ({type(error).__name__})")]) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([Problem(str(file), f"is not TOML: {error}")]) from None


def _unknown_variables(model: type[BaseSettings]) -> list[Problem]:
    prefix = _prefix(model)
    known = {prefix + name.replace(".", "__").upper() for name, _ in _leaves(model, tables=True)}
    problems = []
    for variable in sorted(os.environ):
        upper = variable.upper()
        if not upper.startswith(prefix) or upper in known:
            continue
        if any(upper.startswith(prefix + name.upper() + "__") for name in _free_tables(model)):
            continue
        problems.append(Problem(variable, "unknown setting", _nearest(upper, sorted(known))))
    return problems


def _free_tables(model: type[BaseModel]) -> list[str]:
    """Settings whose keys are the operator's own (dict[...]): anything below them is known."""
    return [name for name, field in model.model_fields.items() if typing.get_origin(field.annotation) is dict]


def _leaves(model: type[BaseModel], before: str = "", tables: bool = False) -> Iterable[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        nested = _model_in(field.annotation)
        if nested is not None:
            if tables:
                yield before + name, field
            yield from _leaves(nested, f"{before}{name}.", tables)
        else:
            yield before + name, field


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The nested model of a field, also behind Optional; None for plain values, lists and free tables."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for choice in typing.get_args(annotation):
            if (nested := _model_in(choice)) is not None:
                return nested
    return None


def _names(model: type[BaseModel], loc: Sequence[str]) -> list[str]:
    here: type[BaseModel] | None = model
    for part in loc:
        field = here.model_fields.get(part) if here is not None else None
        here = _model_in(field.annotation) if field is not None else None
    return list(here.model_fields) if here is not None else []


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return f"known here: {', '.join(known[:12])}" if known else ""


def _reach(tree: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _anchor(model: type[BaseModel], table: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Relative paths of a file, and relative defaults, begin at the file's folder."""
    anchored = dict(table)
    for name, field in model.model_fields.items():
        nested = _model_in(field.annotation)
        value = anchored.get(name)
        if nested is not None and isinstance(value, Mapping):
            anchored[name] = _anchor(nested, value, base)
        elif _is_path(field.annotation):
            if isinstance(value, str):
                anchored[name] = base / value
            elif value is None and isinstance(field.default, Path):
                anchored[name] = base / field.default
    return anchored


def _is_path(annotation: Any) -> bool:
    return annotation is Path or Path in typing.get_args(annotation)


def _annotated(settings: BaseModel, table: str, before: str, said: Mapping[str, str]) -> list[str]:
    lines = [f"[{table}]"]
    nested_tables: list[str] = []
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            nested_tables += _annotated(value, f"{table}.{name}", f"{before}{name}.", said)
            continue
        limits = ", ".join(str(item) for item in field.metadata if not isinstance(item, AfterValidator))
        origin = said.get(before + name, "default")
        if field.description:
            lines.append(f"# {field.description}")
        lines.append(f"# {'range: ' + limits + '; ' if limits else ''}origin: {origin}")
        if value is None:
            lines.append(f"# {name} =")
        else:
            lines.append(f"{name} = {_toml(value)}")
    return [*lines, "", *nested_tables]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return (
            "{ " + ", ".join(f"{json.dumps(str(k))} = {_toml(v)}" for k, v in value.items()) + " }" if value else "{}"
        )
    if isinstance(value, list | tuple | set | frozenset):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, BaseModel):
        return _toml(value.model_dump(exclude_none=True))
    # TOML basic strings and JSON strings agree on escapes, but TOML has no DEL in clear
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
