"""What the operator decides about rights: law and calendar, ways in, ways out, and where people may complain.

Law: every default works without the outside world: no listener, no smarthost, letters lie in the outbox folder. The
texts that only the operator can give (who hears complaints) have a neutral default that is true everywhere.

Known limits: one calendar for the installation. The listener is meant for a relay in front on the same host or net: it
offers neither TLS nor a login, and takes mail for the role addresses only.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from policy.rights.due import RULES, Calendar


def _zone(value: str) -> str:
    try:
        ZoneInfo(value)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError("not a time zone of the IANA database, such as Europe/Berlin") from None
    return value


def _jurisdiction(value: str) -> str:
    if value not in RULES:
        raise ValueError(f"one of {', '.join(RULES)}")
    return value


class RightsSettings(BaseModel):
    """Table [policy.rights]."""

    model_config = ConfigDict(extra="forbid")

    jurisdiction: Annotated[str, AfterValidator(_jurisdiction)] = Field(
        default="gdpr", description="Law of a request that names none: gdpr, uk, pipeda, bc, ccpa or quebec."
    )
    zone: Annotated[str, AfterValidator(_zone)] = Field(
        default="UTC", description="IANA time zone of the officer: due dates end at its midnight."
    )
    holidays: list[date] = Field(
        default_factory=list,
        description="Days besides weekends on which nobody works; for business days and Regulation 1182/71.",
    )
    appeal: str = Field(
        default="If you do not agree, you may complain to the data protection authority of the place where you live "
        "or work, or go to court.",
        min_length=20,
        max_length=2000,
        description="Last paragraph of every refusal: name your authority and how to reach it (GDPR 12(4)).",
    )
    outbox_dir: Path | None = Field(
        default=None, description="Folder of letters on their way (0700, files 0600); default data_dir/outbox."
    )
    outbox_days: int = Field(
        default=14, ge=1, le=28, description="Days a letter may lie there: it holds an address (erasure ends in 30)."
    )
    smarthost: str = Field(
        default="",
        pattern=r"^$|^[A-Za-z0-9.\-]+:[0-9]{1,5}$",
        description="host:port that sends letters; empty: they wait in the outbox for the operator's own hand.",
    )
    smarthost_security: Literal["none", "starttls", "tls"] = Field(
        default="starttls", description="How to speak to the smarthost; none only within one host."
    )
    smarthost_user: str = Field(default="", max_length=254, description="Login at the smarthost; empty: none.")
    smarthost_password_file: Path | None = Field(default=None, description="File holding its password.")
    listen: str = Field(
        default="",
        pattern=r"^$|^[A-Za-z0-9.:\[\]\-]+:[0-9]{1,5}$",
        description="host:port (loopback or inner net) that takes mail to the officer by SMTP; empty: none.",
    )
    drop_dir: Path | None = Field(
        default=None, description="Folder where another mail system puts *.eml to the officer; empty: none."
    )
    unsorted_days: int = Field(
        default=90, ge=1, le=1095, description="Days that mail which no rule understood waits for the officer (R6)."
    )
    addresses: list[str] = Field(
        default_factory=list, description="Role mailboxes besides the officer's whose mail is taken for a request."
    )
    strangers_per_hour: int = Field(
        default=60,
        ge=1,
        le=100_000,
        description="Requests an hour that page and mail may open: each writes to an address somebody typed.",
    )

    def calendar(self) -> Calendar:
        return Calendar(ZoneInfo(self.zone), frozenset(self.holidays))
