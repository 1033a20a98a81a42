"""What data may be used for: the registry of purposes, and the one question to it (P-03, P-30, P-32, P-36).

`allows` says yes only when all of it holds, and else why not, by a word:

    unknown-purpose   nobody declared it (the registry is `purposes.toml`, closed)
    not-yet           it is declared for later
    field-class       the purpose has no use for such fields; C3 is read for no purpose
    no-consent        people agree to this purpose, and this person does not now
    older-than-purpose  the data were collected before the purpose was declared, and no consent was given since (P-30:
                      a new purpose for old data needs consent)

Consent, and only consent, may be passed over where the law says so (PIPEDA 7, GDPR 6(1)(c)): then `legal_basis_ref`
names the law and the case. A bypass without one is denied, with one it is told apart, so that it can be counted (P-32).

Pure, but for reading the registry once. Instants are microseconds; a purpose begins at 00:00 UTC of its day.

Known limits: it binds who asks. That every command asks is the matter of the commands (`policy.readings`), and the
engine's own use of what it was given to send is bound by what jobs may say (`engine.campaign.job`), not here.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import cache
from importlib.resources import files
from typing import Any, Final

from policy.instants import DAY_US

CLASSES: Final = ("C0", "C1", "C2", "C3")
BASES: Final = frozenset({"consent", "contract", "legal-obligation", "legitimate-interest"})
_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,39}")
# A law or article, then what case it is about: "GDPR 6(1)(c): order 26-118". Both parts, or it is nobody's reference.
_REFERENCE: Final = re.compile(r"[^\s:][^:\n]{1,60}: *\S[^\n]{1,120}")
_EPOCH: Final = date(1970, 1, 1)


class PurposeError(ValueError):
    """The registry says something it may not: which purpose, and what."""


@dataclass(frozen=True, slots=True)
class Purpose:
    """One line of the registry. since: microseconds; reads: field classes; least: people a figure must be about."""

    name: str
    since: int
    basis: str
    consent: bool
    reads: frozenset[str]
    least: int
    what: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """reason: why not; "bypass" where consent was passed over by law; "" else."""

    allowed: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.allowed


@dataclass(frozen=True, slots=True)
class Registry:
    """All purposes there are."""

    purposes: Mapping[str, Purpose]

    @property
    def consented(self) -> frozenset[str]:
        """Those that people agree to: the vocabulary of the consent ledger."""
        return frozenset(name for name, purpose in self.purposes.items() if purpose.consent)

    def allows(
        self,
        purpose: str,
        field_class: str,
        now: int,
        *,
        collected: int | None = None,
        consent: int | None = None,
        legal_basis_ref: str = "",
    ) -> Verdict:
        """Whether fields of a class may be read for a purpose now.

        collected: when the data were collected, None where that is no question (figures); consent: when the person
        agreed to this purpose, if that holds now (`policy.consent.since`), else None."""
        known = self.purposes.get(purpose)
        if known is None:
            return Verdict(False, "unknown-purpose")
        if now < known.since:
            return Verdict(False, "not-yet")
        if field_class not in known.reads:
            return Verdict(False, "field-class")
        missing = ""
        if known.consent and consent is None:
            missing = "no-consent"
        elif collected is not None and collected < known.since and (consent is None or consent < known.since):
            missing = "older-than-purpose"
        if not missing or field_class == "C0":  # figures about nobody are nobody's to agree to
            return Verdict(True)
        return Verdict(True, "bypass") if _REFERENCE.fullmatch(legal_basis_ref) else Verdict(False, missing)

    def allows_figure(self, purpose: str, people: int, now: int) -> Verdict:
        """Whether a figure about so many people may be told for a purpose: a group of few names its members."""
        verdict = self.allows(purpose, "C0", now)
        if verdict and not 0 < self.purposes[purpose].least <= people:
            return Verdict(False, "too-few-people")
        return verdict


def parse(text: str) -> Registry:
    """Raises PurposeError, tomllib.TOMLDecodeError."""
    return Registry({name: _purpose(name, told) for name, told in tomllib.loads(text).items()})


@cache
def registry() -> Registry:
    """The one of this installation."""
    return parse(files("policy").joinpath("purposes.toml").read_text("utf-8"))


def allows(purpose: str, field_class: str, now: int, **asked: Any) -> Verdict:
    """`Registry.allows` of the registry of this installation."""
    return registry().allows(purpose, field_class, now, **asked)


def is_reference(text: str) -> bool:
    """Whether it names a law and a case."""
    return _REFERENCE.fullmatch(text) is not None


def _purpose(name: str, told: Any) -> Purpose:
    if not _NAME.fullmatch(name) or not isinstance(told, dict):
        raise PurposeError(f"{name[:40]!r} is no name of a purpose")
    unknown = told.keys() - {"since", "basis", "consent", "reads", "least", "what"}
    since, reads, least = told.get("since"), told.get("reads", []), told.get("least", 0)
    if unknown:
        raise PurposeError(f"purpose {name}: unknown word {min(unknown)!r}")
    if not isinstance(since, date):
        raise PurposeError(f"purpose {name}: since is a day such as 2026-11-23")
    if told.get("basis") not in BASES:
        raise PurposeError(f"purpose {name}: basis is one of {', '.join(sorted(BASES))}")
    if not isinstance(told.get("consent", False), bool) or told.get("consent", False) != (told["basis"] == "consent"):
        raise PurposeError(f"purpose {name}: consent = true belongs to basis consent, and to no other")
    if not isinstance(reads, list) or not set(reads) < set(CLASSES) or "C3" in reads:
        raise PurposeError(f"purpose {name}: reads is a list of C0, C1, C2; keys (C3) are read for no purpose")
    if not isinstance(least, int) or least < 0 or not isinstance(told.get("what"), str) or not told["what"]:
        raise PurposeError(f"purpose {name}: least is a number of people, what a sentence")
    begins = (date(since.year, since.month, since.day) - _EPOCH).days * DAY_US
    return Purpose(name, begins, told["basis"], told.get("consent", False), frozenset(reads), least, told["what"])
