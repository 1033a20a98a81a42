"""Who works for us with what we know of people: the registry, and what may leave by which way (P-35; GDPR 28(2)-(4)).

    `Subprocessor`    table [policy.subprocessors.<name>]: who, where, what for, which hosts, which data, since when and
                      under which agreement
    `Outlet`          a setting that makes this program hand something of people to a host; every floor declares its own
                      (policy.outlets, engine.outlets)
    `undeclared`      what the registry does not allow; whoever starts or checks a configuration refuses it

Laws:
- an outlet to a host that is not ours is allowed by a subprocessor that names the host, every kind of data the outlet
  hands over, an agreement that is signed and a first day that has come: else nothing starts;
- into a country that is not one of the operator's nothing goes without the ground of that transfer (P-46; GDPR 44-46);
- ours is what cannot be reached from the Internet (addresses that are not global, names without a dot or in a zone of
  one's own network), and what `own_hosts` names;
- who is announced for a day to come is in the list that people read before that day.

Known limits: the mail server of a recipient's own domain is nobody's subprocessor and is not in the registry: the
account of use names it to the person (P-43). Folders may be mounts of another host, and a command may do what it likes:
what goes there holds no address (checkpoints, names of keys), or is the operator's to know (tombstones). What a name
resolves to is not looked up. Account holders are told of a change by the list; letters to them come with accounts.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from policy.configuration import Problem

SETTING: Final = "policy.subprocessors"
OWN: Final = "policy.own_hosts"
HOME: Final = "policy.home_countries"
# RFC 6761, RFC 6762, RFC 8375 and ICANN's reservation of 2024: names that no resolver of the Internet answers
_ZONES: Final = (".localhost", ".local", ".internal", ".home.arpa", ".localdomain")


class Data(StrEnum):
    """What can be handed over."""

    DOMAIN = "domain"  # domains of recipients, without anything else of them
    ADDRESS = "address"  # addresses of recipients
    MESSAGE = "message"  # messages as they are sent, or what they are made of
    LETTER = "letter"  # what an officer writes to a person who asked
    LEDGER = "ledger"  # what became of messages, under pseudonyms; people sealed under keys that stay here


@dataclass(frozen=True, slots=True)
class Outlet:
    """setting: dotted path of what names the host; host: a name or an address; data: what goes there."""

    setting: str
    host: str
    data: frozenset[Data]


def _host(pattern: str) -> str:
    name = pattern.lower().rstrip(".")
    if not name or not name.isprintable() or " " in name or "*" in name.removeprefix("*."):
        raise ValueError('must be a host name, an address, or "*.zone" for every host of a zone')
    return name


Host = Annotated[str, Field(max_length=255), AfterValidator(_host)]
Country = Annotated[str, Field(pattern=r"^[A-Z]{2}$")]  # ISO 3166-1, alpha-2


class Subprocessor(BaseModel):
    """One of those who work for us, under a name of your choice; public (`sales-push policy subprocessors`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=200, description="Legal name, as people may read it.")
    country: Country = Field(description="Where it handles the data: ISO 3166 code of two letters.")
    purpose: str = Field(min_length=1, max_length=300, description="What for, in a few words; public.")
    hosts: list[Host] = Field(
        min_length=1, max_length=64, description='Its hosts as the settings name them; "*.zone" for a whole zone.'
    )
    data: list[Data] = Field(
        min_length=1, description="What it may get: domain, address, message, letter, ledger; nothing else goes there."
    )
    agreement: date = Field(description="Day of the processing agreement (GDPR 28(3)).")
    since: date = Field(
        description="First day on which it may get anything; until then it is announced in the public list."
    )
    safeguard: str = Field(
        default="",
        max_length=300,
        description="Ground of the transfer (GDPR 45, 46) where that country is not one of home_countries; public.",
    )


def is_ours(host: str, own: Sequence[str] = ()) -> bool:
    """own: names, addresses or "*.zone", in lower case."""
    name = host.lower().rstrip(".")
    if any(fits(pattern, name) for pattern in own):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        last = name.rpartition(".")[2]
        # old spellings of IPv4 ("134744072", "0x8.8.8.8") look like names: no top-level domain begins with a digit
        return not last[:1].isdigit() and ("." not in name or name.endswith(_ZONES))
    return not (getattr(address, "ipv4_mapped", None) or address).is_global


def fits(pattern: str, host: str) -> bool:
    return pattern == host or (pattern.startswith("*.") and host.endswith(pattern[1:]))


@dataclass(frozen=True, slots=True)
class Registry:
    """Of an installation: subprocessors by their name in the file, hosts that are ours, countries of the operator."""

    entries: Mapping[str, Subprocessor]
    own: Sequence[str] = ()
    home: Sequence[str] = ()


def undeclared(outlets: Iterable[Outlet], registry: Registry, today: date) -> Iterator[Problem]:
    """What must not start, each with what would make it right."""
    for outlet in outlets:
        if is_ours(outlet.host, registry.own):
            continue
        host = outlet.host.lower().rstrip(".")
        known = [name for name, one in registry.entries.items() if any(fits(pattern, host) for pattern in one.hosts)]
        told = ", ".join(sorted(outlet.data))
        if not known:
            yield Problem(
                outlet.setting,
                f"{host} is not ours, and no subprocessor names it: it would get {told} (P-35)",
                f"add a table [{SETTING}.<name>] with that host, or name the host in {OWN} if it is yours",
            )
            continue
        wrong = {name: _wrong(registry.entries[name], outlet, registry.home, today) for name in known}
        if None in wrong.values():
            continue
        for name, found in wrong.items():
            what, remedy = found or ("", "")
            yield Problem(f"{SETTING}.{name}", f"{what}, and {outlet.setting} would hand it {told}", remedy)


def _wrong(one: Subprocessor, outlet: Outlet, home: Sequence[str], today: date) -> tuple[str, str] | None:
    """(why this subprocessor does not allow that outlet, what to do); None: it does."""
    if missing := sorted(outlet.data - set(one.data)):
        return f"may not get {', '.join(missing)} (P-35)", "add it to data once the agreement covers it"
    if one.agreement > today:
        return f"the agreement of {one.agreement} is not signed yet (P-35)", "sign it and write down the day"
    if one.since > today:
        return f"may get nothing before {one.since} (P-35)", "wait for that day: those concerned were told of it"
    if one.country not in home and not one.safeguard.strip():
        return (
            f"nothing says on which ground data goes to {one.country} (P-46)",
            f"name the ground in safeguard, or the country in {HOME} if data may move there freely",
        )
    return None


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the public list."""

    name: str
    country: str
    purpose: str
    data: str
    since: str
    safeguard: str


def table(registry: Mapping[str, Subprocessor]) -> list[Row]:
    """The list as anybody may read it, by name; hosts and agreements are not in it."""
    return sorted(
        (
            Row(one.name, one.country, one.purpose, ", ".join(sorted(set(one.data))), str(one.since), one.safeguard)
            for one in registry.values()
        ),
        key=lambda row: (row.name, row.since),
    )
