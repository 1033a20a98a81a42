"""Pages of the operator that our own pages, letters and notices point to: slots, never texts (P-06, P-52).

The policy page this product keeps names a Terms page, a data processing agreement, a cookie page, a security page and a
guide to people's rights; none of them came with it (requirements.md, contradiction 7). Nobody but the operator can
write them, so each is an address to fill in. What is empty is left out: no page points to nothing.

    `PagesSettings`   table [policy.pages]: addresses, who is behind the platform, authorities to complain to
    `shown`           what a recipient's page shows of it, with how long what of them is kept

Laws: an address is http or https and carries no user, so it may stand in any page; periods are those that the sweeper
goes by, words those of the public table (`policy.classes`, P-06). Pure.

Known limits: one set of pages for the installation; a sender's own privacy policy is the account's `privacy_url`. Terms
and the processing agreement are for account holders, whose desk comes later: recipients' pages do not show them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from policy.classes import RETENTION, Period, RetentionSettings
from policy.subprocessors import Subprocessor

# Kept of recipients, and told to them: their visits, their messages, their word, and that they want none.
_TOLD: Final = ("R2", "R3", "R4", "R5")


def _address(value: str) -> str:
    if not value:
        return value
    try:
        parts = urlsplit(value)
        named = bool(parts.hostname) and parts.username is None
    except ValueError:
        named = False
    # urlsplit takes blanks and control characters away, a browser would not have to agree
    if not named or not value.isprintable() or " " in value or parts.scheme not in ("http", "https"):
        raise ValueError("must be http://host/… or https://host/…, without a user")
    return value


Address = Annotated[str, Field(max_length=2000), AfterValidator(_address)]


class Regulator(BaseModel):
    """An authority that people may complain to."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=200)] = Field(description="Its name, as people look for it.")
    page: Address = Field(default="", description="Where one complains; empty: none shown.")
    reach: str = Field(default="", max_length=500, description="Postal address or telephone; empty: none shown.")


class PagesSettings(BaseModel):
    """Pages and names that only the operator can give; what is empty is left out of every page (docs/privacy.md)."""

    model_config = ConfigDict(extra="forbid")

    operator: str = Field(
        default="", max_length=500, description="Who runs the platform: legal name and place; in every notice."
    )
    privacy: Address = Field(default="", description="Address of the privacy policy of the platform.")
    rights: Address = Field(default="", description="Address of your guide to people's rights (GDPR guide).")
    cookies: Address = Field(default="", description="Address of your cookie page. Pages of ours set none (P-26).")
    security: Address = Field(default="", description="Address of your security page.")
    terms: Address = Field(default="", description="Address of the Terms; for account holders.")
    processing: Address = Field(
        default="", description="Address of the data processing agreement (GDPR 28); for account holders."
    )
    regulators: dict[str, Regulator] = Field(
        default_factory=dict,
        description="Authorities to complain to, each a table under a name of your choice; in every notice.",
    )


@dataclass(frozen=True, slots=True)
class Shown:
    """For recipients. links: (words, address); kept: (what, how long at most), in plain words; working: for us."""

    operator: str = ""
    links: tuple[tuple[str, str], ...] = ()
    regulators: tuple[Regulator, ...] = ()
    kept: tuple[tuple[str, str], ...] = ()
    working: tuple[Subprocessor, ...] = ()


NOTHING: Final = Shown()


def shown(
    pages: PagesSettings, retention: RetentionSettings, registry: Mapping[str, Subprocessor] | None = None
) -> Shown:
    """What a recipient's page shows."""
    slots: Mapping[str, str] = {
        "Privacy policy": pages.privacy,
        "Your rights": pages.rights,
        "Cookies": pages.cookies,
        "Security": pages.security,
    }
    periods = retention.periods()
    kept = tuple((_sentence(RETENTION[name].content), _until(name, periods.get(name))) for name in _TOLD)
    return Shown(
        pages.operator,
        tuple((words, address) for words, address in slots.items() if address),
        tuple(pages.regulators.values()),
        kept,
        tuple(sorted((registry or {}).values(), key=lambda one: one.name)),
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _until(name: str, period: Period | None) -> str:
    """R5 has no period: what is kept not to write again ends with the possibility to write."""
    known = RETENTION[name]
    return known.end if period is None else f"{period}, counted from: {known.trigger}"
