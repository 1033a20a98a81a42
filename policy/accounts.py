"""Accounts, their lists and topics: names outside, small numbers inside (never "tenant").

Law: a number, once given, never means anything else: list numbers stand in opt-out links of delivered mail, which
never expire (section 5). Lists and topics come into being when a job first names them; accounts only by `add`.

Known limits: nothing is renamed or deleted here; account erasure is a right, with its own order of steps.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Connection, Row, Table, insert, select, update

from policy import schema, statements

# Names travel in configuration, logs, Feedback-ID (no colon) and List-Id (RFC 2919: dot-atom text).
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,62}[A-Za-z0-9])?")


class AccountError(ValueError):
    """A name that cannot be, or is taken."""


@dataclass(frozen=True, slots=True)
class Account:
    """opens_mode, clicks_mode: policy.gate.Mode, the most that a campaign may ask for; created: microseconds."""

    number: int
    name: str
    display_name: str
    postal_address: str
    website: str
    privacy_url: str
    state: str
    opens_mode: int
    clicks_mode: int
    created: int

    @property
    def is_frozen(self) -> bool:
        return self.state != "active"


# asked for every job, so it is a text for the driver
_BY_NAME: Final = f"SELECT {', '.join(Account.__dataclass_fields__)} FROM account WHERE name = "


def is_name(text: str) -> bool:
    """1 to 64 letters, digits, dots, hyphens and underscores, a letter or digit at both ends, no two dots in a row."""
    return bool(_NAME.fullmatch(text)) and ".." not in text


def add(
    conn: Connection,
    name: str,
    *,
    display_name: str,
    now: int,
    postal_address: str = "",
    website: str = "",
    privacy_url: str = "",
    opens_mode: int = 3,
    clicks_mode: int = 3,
) -> Account:
    """A new account, active. Raises AccountError when the name is taken or none."""
    if not is_name(name):
        raise AccountError(f"{name!r} is not a name for an account: 1 to 64 of A-Z a-z 0-9 . _ -")
    if get(conn, name) is not None:
        raise AccountError(f"account {name!r} exists already")
    conn.execute(
        insert(schema.account).values(
            name=name,
            display_name=display_name,
            postal_address=postal_address,
            website=website,
            privacy_url=privacy_url,
            state="active",
            opens_mode=opens_mode,
            clicks_mode=clicks_mode,
            created=now,
        )
    )
    account = get(conn, name)
    assert account is not None
    return account


def get(conn: Connection, name: str) -> Account | None:
    row = conn.exec_driver_sql(_BY_NAME + statements.mark(conn.dialect.name), (name,)).one_or_none()
    return None if row is None else Account(*row)


def by_number(conn: Connection, number: int) -> Account | None:
    row = conn.execute(select(schema.account).where(schema.account.c.number == number)).one_or_none()
    return None if row is None else _account(row)


def every(conn: Connection) -> list[Account]:
    """All accounts by name."""
    return [_account(row) for row in conn.execute(select(schema.account).order_by(schema.account.c.name))]


def freeze(conn: Connection, name: str) -> bool:
    """Stop everything of an account until `thaw`; False when there is no such account."""
    return _set_state(conn, name, "frozen")


def thaw(conn: Connection, name: str) -> bool:
    return _set_state(conn, name, "active")


def list_number(conn: Connection, account: int, name: str, display_name: str = "") -> int:
    """The number of an account's list, made when new. Raises AccountError when it is no name."""
    return _number(conn, schema.list_, account, name, display_name)


def topic_number(conn: Connection, account: int, name: str, display_name: str = "") -> int:
    """The number of an account's topic, made when new. Raises AccountError when it is no name."""
    return _number(conn, schema.topic, account, name, display_name)


def _number(conn: Connection, table: Table, account: int, name: str, display_name: str) -> int:
    if not is_name(name):
        raise AccountError(f"{name!r} is not a name for a {table.name}: 1 to 64 of A-Z a-z 0-9 . _ -")
    one = statements.mark(conn.dialect.name)
    asked = f"SELECT number FROM {table.name} WHERE account = {one} AND name = {one}"
    number: Any = conn.exec_driver_sql(asked, (account, name)).scalar()
    if number is None:
        made = conn.execute(insert(table).values(account=account, name=name, display_name=display_name or name))
        assert made.inserted_primary_key is not None
        number = made.inserted_primary_key[0]
    return int(number)


def _set_state(conn: Connection, name: str, state: str) -> bool:
    return conn.execute(update(schema.account).where(schema.account.c.name == name).values(state=state)).rowcount == 1


def _account(row: Row[Any]) -> Account:
    return Account(**row._mapping)
