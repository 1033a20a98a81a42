"""Settings of the ground floor: where data and keys live and who answers for them; each with unit, range and reason.

Law: nothing starts without a privacy officer (P-04). Secrets never stand here: passwords are named by file
(``*_password_file``), keys live in ``keys_dir``. The loader for the models of all floors is `policy.configuration`; its
names may be imported from here.

Known limits: the file of a password is read at each use, so a rotated one is used from the next connection on.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from policy.address import AddressError, parse
from policy.classes import RetentionSettings
from policy.configuration import (
    CONFIG_VARIABLE,
    ConfigError,
    Problem,
    annotate,
    config_file,
    load,
    load_all,
    origins,
    table_of,
)
from policy.pages import PagesSettings
from policy.rights.settings import RightsSettings
from policy.subprocessors import Country, Host, Subprocessor

__all__ = [
    "CONFIG_VARIABLE", "ConfigError", "Officer", "PolicySettings", "Problem", "annotate", "config_file", "load",
    "load_all", "origins", "table_of",
]  # fmt: skip

SOCKET_PATH_LIMIT = 104  # sun_path: 108 bytes on Linux, 104 on BSD and macOS


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
    reviewed: date | None = Field(
        default=None,
        description="Day of the last review of this configuration with the officer: `sales-push config --check` warns "
        "after 11 months and fails after 12 (P-39).",
    )
    data_dir: Path = Field(
        default=Path("sales-push-data"),
        description="Folder of database, journals, embedded server and sockets; made with mode 0700.",
    )
    keys_dir: Path = Field(
        default_factory=_under("keys"),
        description="Folder of key files (0700, files 0600). May be elsewhere: a backup should not hold both.",
    )
    keys_command: list[str] = Field(
        default=[],
        description="Program and arguments that print the keys as JSON, instead of keys_dir (policy.keysource); it is "
        "also asked to make and to destroy weekly keys. Empty: keys_dir. DKIM keys stay in keys_dir.",
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
        default="http://localhost:8080",
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
        description="Events a transaction: an answer on the socket waits for at most one (about 10 µs an event).",
    )
    clear_seconds: float = Field(
        default=600.0,
        ge=10.0,
        le=600.0,
        description="Seconds a plain address from the intake may stay in the append-only file (decision 18: 10 min).",
    )
    retention: RetentionSettings = Field(
        default_factory=RetentionSettings,
        description="How long each class is kept: shorter than by default, never longer.",
    )
    bounce_days: int = Field(
        default=0,
        ge=0,
        le=3650,
        description="Days for which an account does not write again to a mailbox whose own server said that it does "
        "not exist (P-41); 0: until an operator takes the mark away.",
    )
    subprocessors: dict[str, Subprocessor] = Field(
        default_factory=dict,
        description="Who works for you with people's data, each a table under a name of your choice. Nothing starts "
        "that would hand data to a host of somebody who is not here (P-35).",
    )
    home_countries: list[Country] = Field(
        default=[],
        max_length=64,
        description="ISO 3166 codes of the countries in which you handle data, and of those to which it moves as "
        "freely: a subprocessor elsewhere names the ground of the transfer (P-46).",
    )
    own_hosts: list[Host] = Field(
        default=[],
        max_length=64,
        description='Hosts that you run yourselves although they look like others\': names, addresses or "*.zone". '
        "Addresses of private networks and names without a dot are yours anyway.",
    )
    rights: RightsSettings = Field(default_factory=RightsSettings, description="Rights of the people concerned.")
    pages: PagesSettings = Field(
        default_factory=PagesSettings, description="Pages and names that only the operator can give."
    )
    tombstones_dir: Path = Field(
        default_factory=_under("tombstones"),
        description="Folder of the erasure ledger, which a restored backup must replay: keep it out of the backups, on "
        "another disk (P-11).",
    )
    checkpoints_dir: Path | None = Field(
        default=None,
        description="Folder for signed checkpoints of the audit chain: a mount of another host. Without it and without "
        "a command, the log is the only place elsewhere.",
    )
    checkpoints_command: tuple[str, ...] = Field(
        default=(), description="Program and arguments that read a checkpoint on their input and keep it elsewhere."
    )
    reading_limits: dict[str, Annotated[int, Field(ge=0)]] = Field(
        default={"support": 200, "operator": 2000, "officer": 0, "service": 0},
        description="People whose data an actor of a role may read in a day; 0: no limit; not named: reads nothing.",
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
