"""What a refusal means: one `Reason` of the closed vocabulary, and whether the mailbox is surely dead.

Law: the first rule of ``rules.toml`` that fits decides; every rule's examples are decided by that very rule (a rule
that can never fire is a bug others have shipped); `hard` is said by rules only, never by a digit. No reply raises.

A rule fits when all it names fit: ``codes`` (basic codes, as prefixes: "5", "552"), ``enhanced`` (codes or prefixes
ending in a dot), ``text`` (a regular expression over the text in lower case, without addresses and with runs of blanks
made one). Text that quotes several replies is judged as a whole.

Known limits: replies in languages other than English, French, German and Spanish are judged by their codes.
"""

from __future__ import annotations

import functools
import re
import tomllib
from dataclasses import dataclass
from importlib.resources import files

from policy.events import Reason

LOOKED_AT = 1000  # characters: the longest honest explanation seen is below 600


@dataclass(frozen=True, slots=True)
class Judgement:
    """reason: class of the refusal; hard: stop writing to this address; rule: name of the rule, for logs and tests."""

    reason: Reason
    hard: bool
    rule: str


@dataclass(frozen=True, slots=True)
class Rule:
    name: str
    reason: Reason
    hard: bool
    codes: tuple[str, ...]
    enhanced: tuple[str, ...]
    text: re.Pattern[str] | None
    examples: tuple[str, ...]


class RuleError(Exception):
    """A shipped rule is wrong; says which and why."""


@functools.cache
def rules() -> tuple[Rule, ...]:
    """The shipped rules in order; raises RuleError when the file is not well made."""
    return read(files("engine.bounce").joinpath("rules.toml").read_text("utf-8"))


_FIELDS = {"name", "reason", "hard", "codes", "enhanced", "text", "examples"}


def read(source: str) -> tuple[Rule, ...]:
    """Rules from TOML text. Unknown fields, nameless rules, doubles and rules without an example are RuleErrors."""
    found: dict[str, Rule] = {}
    for entry in tomllib.loads(source)["rule"]:
        name = str(entry.get("name", ""))
        if not name or name in found:
            raise RuleError(f"rule {name!r}: a name is missing or used twice")
        if unknown := set(entry) - _FIELDS:
            raise RuleError(f"rule {name!r}: unknown fields {sorted(unknown)}")
        if not entry.get("examples"):
            raise RuleError(f"rule {name!r}: no example")
        try:
            reason = Reason[str(entry["reason"]).upper()]
            text = re.compile(entry["text"]) if "text" in entry else None
        except (KeyError, re.error) as error:
            raise RuleError(f"rule {name!r}: {error}") from error
        found[name] = Rule(
            name,
            reason,
            bool(entry.get("hard", False)),
            tuple(entry.get("codes", ())),
            tuple(entry.get("enhanced", ())),
            text,
            tuple(entry["examples"]),
        )
    return tuple(found.values())


UNCLASSIFIED = Judgement(Reason.UNCLASSIFIED, False, "none")
_ADDRESS = re.compile(r"<?[^\s<>,;:()\[\]]{1,128}@[^\s<>,;:()\[\]]{1,255}>?")
_CODE = re.compile(r"\b([245])\.(\d{1,3})\.(\d{1,3})\b")


def classify(code: int, enhanced: str, text: str) -> Judgement:
    """Judge one refusal. code 0 and enhanced "" mean unknown; text without the leading codes. About 20 µs."""
    words = " ".join(_ADDRESS.sub(" @ ", text[:LOOKED_AT]).lower().split())
    if not enhanced and (quoted := _CODE.search(words)) and (not code or quoted[1] == str(code)[0]):
        enhanced = quoted[0]  # "552 sorry, mailbox is over quota (#5.2.2)": qmail puts it behind
    for rule in rules():
        if _fits(rule, str(code), enhanced, words):
            return Judgement(rule.reason, rule.hard, rule.name)
    return UNCLASSIFIED


_REPLY = re.compile(r"\s*(\d{3})(?:[ -]|$)\s*#?([245]\.\d{1,3}\.\d{1,3}(?=[\s:]|$))?\s*(.*)", re.DOTALL)


def classify_line(reply: str) -> Judgement:
    """Judge a reply written as one line: "550 5.1.1 user unknown"."""
    found = _REPLY.match(reply)
    if found is None:
        return classify(0, "", reply)
    return classify(int(found[1]), found[2] or "", found[3])


def _fits(rule: Rule, code: str, enhanced: str, words: str) -> bool:
    if rule.codes and not code.startswith(rule.codes):
        return False
    if rule.enhanced and not any(
        enhanced == wanted or (wanted.endswith(".") and enhanced.startswith(wanted)) for wanted in rule.enhanced
    ):
        return False
    return rule.text is None or rule.text.search(words) is not None
