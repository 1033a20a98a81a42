"""Settings: declared once, with unit, range and reason; one TOML file, then the environment over it.

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
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import quote, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from policy.address import AddressError, parse

CONFIG_VARIABLE = "SALES_PUSH_CONFIG"
DEFAULT_FILE = "sales-push.toml"
SOCKET_PATH_LIMIT = 104  # sun_path: 108 bytes on Linux, 104 on BSD and macOS

M = TypeVar("M", bound=BaseSettings)


# --- the model of this floor --------------------------------------------------------------------------------------


def _mailbox(value: str) -> str:
    try:
        parse(value)
    except AddressError as error:
        raise ValueError(f"not a deliverable address ({error.reason})") from None
    return value


def _web_base(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be http://host or https://host, optionally with a port and a path")
    if parts.query or parts.fragment or parts.username is not None:
        raise ValueError("must have no query, no fragment and no user")
    return value.rstrip("/")


def _url_without_password(value: str) -> str:
    if value and urlsplit(value).password is not None:
        raise ValueError("holds a password: name a file by the matching *_password_file instead")
    return value


def _under(name: str) -> Any:
    return lambda data: Path(data.get("data_dir", Path())) / name


class Officer(BaseModel):
    """Who answers for privacy: in every notice, export and letter (P-04; GDPR 13(1)(b), 37-39; PIPEDA principle 1)."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=200, description="Person or role; shown to recipients.")]
    address: Annotated[
        str,
        Field(max_length=254, description="Role mailbox for withdrawals and rights requests; must be reachable."),
        AfterValidator(_mailbox),
    ]


class PolicySettings(BaseSettings):
    """Where data and keys live, and who answers for them."""

    model_config = SettingsConfigDict(
        env_prefix="SALES_PUSH_POLICY_", env_nested_delimiter="__", extra="forbid", validate_default=True
    )

    officer: Officer = Field(description="The privacy officer: mandatory, the service does not start without (P-04).")
    data_dir: Path = Field(
        default=Path("sales-push-data"),
        description="Folder of database, journals, embedded server and sockets; made with mode 0700.",
    )
    keys_dir: Path = Field(
        default_factory=_under("keys"),
        description="Folder of key files (0700, files 0600). May be elsewhere: a backup should not hold both.",
    )
    redis_url: Annotated[str, AfterValidator(_url_without_password)] = Field(
        default="",
        description="unix:///path, redis://host:port/0 or rediss://…; empty: embedded server (decision 16).",
    )
    redis_password_file: Path | None = Field(default=None, description="File holding the password of redis_url.")
    sql_url: Annotated[str, AfterValidator(_url_without_password)] = Field(
        default="",
        description="SQLAlchemy URL, e.g. postgresql+psycopg://user@host/db; empty: SQLite at data_dir/policy.db.",
    )
    sql_password_file: Path | None = Field(default=None, description="File holding the password of sql_url.")
    writer_socket: Path = Field(
        default_factory=_under("policy.sock"),
        description="Unix socket of the one SQL writer, made with mode 0600; at most 104 bytes long.",
    )
    public_url: Annotated[str, AfterValidator(_web_base)] = Field(
        default="http://localhost:8025",
        description="Base of pixel, click, opt-out and preference pages. Delivered mail keeps it for years: choose a "
        "name you will keep, and https.",
    )
    bounce_domain: str = Field(
        default_factory=lambda data: urlsplit(str(data.get("public_url", ""))).hostname or "localhost",
        pattern=r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$",
        description="Domain of return paths and mailto opt-outs (A-label, lower case); default: host of public_url.",
    )
    drain_interval: float = Field(
        default=0.1,
        ge=0.01,
        le=5.0,
        description="Seconds between looks at the event streams; shorter is fresher, longer makes bigger batches.",
    )
    drain_batch: int = Field(
        default=8192,
        ge=64,
        le=65536,
        description="Events a transaction: an answer on the socket waits for at most one (about 25 µs an event).",
    )
    clear_seconds: float = Field(
        default=600.0,
        ge=10.0,
        le=600.0,
        description="Seconds a plain address from the intake may stay in the append-only file (decision 18: 10 min).",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severity that is logged, for every role."
    )
    log_json: bool = Field(default=True, description="JSON lines on stderr; false: text for people.")

    @property
    def embedded(self) -> bool:
        """True: nobody gave a Redis URL, `sales-push up` owns a server."""
        return not self.redis_url

    @property
    def redis_socket(self) -> Path:
        """Socket of the embedded server, in a folder of its own (0700)."""
        return self.data_dir / "valkey" / "valkey.sock"

    def redis_address(self) -> str:
        """The URL to connect to, password included: never log it."""
        if self.embedded:
            return f"unix://{self.redis_socket.absolute()}"
        return _with_password(self.redis_url, self.redis_password_file)

    def sql_address(self) -> str:
        """The SQLAlchemy URL to open, password included: never log it."""
        if not self.sql_url:
            return f"sqlite:///{(self.data_dir / 'policy.db').absolute()}"
        return _with_password(self.sql_url, self.sql_password_file)


def _with_password(url: str, file: Path | None) -> str:
    if file is None:
        return url
    password = quote(file.read_text("utf-8").strip(), safe="")
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=f"{parts.username or ''}:{password}@{host}").geturl()


# --- the loader, for the model of any floor -----------------------------------------------------------------------


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
            built = model(**_merge(table, self.environment))
        except ValidationError as error:
            problems += [self._problem(model, detail) for detail in error.errors(include_url=False)]
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
        problems.append(Problem(_prefix(model) + "*", f"{error}", "lists and tables are written as JSON"))
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
    if isinstance(value, BaseModel):
        return _toml(value.model_dump(exclude_none=True))
    # TOML basic strings and JSON strings agree on escapes, but TOML has no DEL in clear
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
