"""What every command needs that shows data of people: it says for what, and the reading is written down (P-03, P-38).

Law: `ask_to_read` comes before the data are looked up; when the policy process denies it, or is not there to write it
down, the command ends with exit code 1 and shows nothing.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Final

import typer

from policy.cli.asking import ask_writer, fail

if TYPE_CHECKING:
    from policy.keys import Keyring
    from policy.settings import PolicySettings

SUPPORT: Final = "support"  # the obvious one of `why`: to answer why a message was sent, or was not
RIGHTS: Final = "rights"  # of what the officer looks at to answer a person
PROOF: Final = "accountability"  # of what is taken out whole and names nobody
FIGURES: Final = "reporting"
ROLE: Final = "operator"  # of whoever has a shell; the desk knows others
OFFICER: Final = "officer"  # who takes out a store whole: no limit of people a day, and a row that says how many

Purpose = Annotated[str, typer.Option("--purpose", help="For what the data are read: see `sales-push purposes`.")]
Role = Annotated[str, typer.Option("--role", help="In what role; each has its limit of people a day.")]
Law = Annotated[
    str, typer.Option("--law", help='Where consent is passed over by law: "PIPEDA 7(3)(c): order 26-118" (P-32).')
]


def ask_to_read(
    settings: PolicySettings,
    keyring: Keyring,
    purpose: str,
    what: str,
    *,
    address: str = "",
    account: int = 0,
    count: int = 1,
    field_class: str = "C2",
    law: str = "",
    role: str = ROLE,
    query: Sequence[str] = (),
) -> None:
    """what: the command in plain words; address: of one person, at all accounts or one; else a group of `count`, who
    were asked for by `query`."""
    from policy.address import AddressError, normalise, parse, tag_of
    from policy.readings import query_hash

    tag, spelled = b"", ""
    if address:
        try:
            mailbox = parse(address)
        except AddressError as error:
            fail(f"that is not an address ({error.reason})", 2)
        spelled = normalise(mailbox.local, mailbox.domain)
        tag = tag_of(keyring.pepper, spelled)
    ask_writer(
        settings, "read_log", actor=actor_here(keyring, role), purpose=purpose, what=what,
        field_class=field_class, tag=tag, account=account, count=count,
        query=query_hash(keyring, what, spelled or str(account), *query), legal_basis_ref=law,
    )  # fmt: skip


def actor_here(keyring: Keyring, role: str = ROLE) -> str:
    """Who sits at this shell, as `policy.readings` writes it down: a role and a keyed reference."""
    from policy.readings import actor_of

    return actor_of(keyring, role, login())


def login() -> str:
    """Who sits at the shell: the user sudo was called by, where it was, else the one we run as."""
    number = os.getuid()
    caller = os.environ.get("SUDO_UID", "")
    if number == 0 and caller.isascii() and caller.isdigit():
        number = int(caller)
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
