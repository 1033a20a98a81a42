"""Visitors: person, mail proxy or machine? One small number is all that is kept of who fetched (tracking.md 3.2).

Law: every request gets exactly one `Visitor`, whatever bytes it sends as User-Agent, and machines are labelled, never
dropped: reports show both the gross figure and the likely human one. A visitor never decides a state: opt-outs and
preferences are POST only, whoever posts.

The User-Agent is judged by the first rule of visitors.toml that fits (family and major system, no version, no model);
the rest is a short score, after the table of tracking.md 3.2:

    library, empty or known scanner as User-Agent              +5
    most of the campaign's links followed within 30 s          +4   (`Bursts`)
    a browser's User-Agent without Accept-Language or Sec-Fetch  +2

5 and more is a machine, 3 and 4 is suspect. The clues are looked at in memory and forgotten; the peer's address is not
looked at at all, so network windows (/24, ASN) are a known limit. Numbers are stored: add, never change, at most 63.
"""

from __future__ import annotations

import enum
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Final


class Visitor(enum.IntEnum):
    """1 to 15 fetch on behalf of a mail service, 16 to 31 are machines, 32 and above are likely people."""

    UNKNOWN = 0
    PROXY_APPLE = 1  # Mail Privacy Protection: fetches whether or not anybody reads
    PROXY_GMAIL = 2  # first fetch only, later opens come from its cache; time unreliable
    PROXY_YAHOO = 3
    PROXY_OTHER = 4
    PREFETCH = 5  # the browser or mail program said so itself
    SCANNER = 16
    LIBRARY = 17
    CRAWLER = 18
    PREVIEW = 19
    NAMELESS = 20  # no User-Agent at all
    MACHINE = 21  # by score
    SUSPECT = 31  # by score: could be either
    BROWSER = 32  # of a system no rule knows
    WINDOWS = 33
    MACOS = 34
    LINUX = 35
    CHROMEOS = 36
    ANDROID = 37
    IOS = 38
    OUTLOOK = 48
    THUNDERBIRD = 49
    MAIL_APP = 50

    @property
    def is_machine(self) -> bool:
        return 16 <= self < 31

    @property
    def is_likely_human(self) -> bool:
        return self >= 32


_MACHINE_SCORE: Final = 5
_SUSPECT_SCORE: Final = 3
_BURST_SCORE: Final = 4
_BARE_BROWSER_SCORE: Final = 2
_LONGEST_AGENT: Final = 512  # characters looked at; the longest honest one we know is about 300


@dataclass(frozen=True, slots=True)
class Rule:
    """contains: any of these, lower case; examples: real agents it must match."""

    visitor: Visitor
    contains: tuple[str, ...]
    examples: tuple[str, ...]


def parse(text: str) -> tuple[Rule, ...]:
    """Rules of a TOML text. Raises KeyError or TypeError on a rule that is not one (ours to mend before shipping)."""
    return tuple(
        Rule(Visitor[rule["visitor"]], tuple(rule["contains"]), tuple(rule["examples"]))
        for rule in tomllib.loads(text)["rule"]
    )


RULES: Final = parse(resources.files(__package__).joinpath("visitors.toml").read_text("utf-8"))


def family(agent: str) -> Visitor:
    """The User-Agent alone: first rule that fits, NAMELESS when there is none, BROWSER for a Mozilla nobody knows."""
    lowered = agent[:_LONGEST_AGENT].strip().lower()
    if not lowered:
        return Visitor.NAMELESS
    for rule in RULES:
        for word in rule.contains:
            if word in lowered:
                return rule.visitor
    return Visitor.BROWSER if lowered.startswith("mozilla/") else Visitor.LIBRARY


@dataclass(frozen=True, slots=True)
class Clues:
    """What a request shows of its sender. has_manners: it sent Accept-Language or any Sec-Fetch header."""

    agent: str
    is_click: bool
    is_prefetch: bool = False
    has_manners: bool = False
    is_burst: bool = False


def classify(clues: Clues) -> Visitor:
    """The one label of a hit."""
    if clues.is_prefetch:
        return Visitor.PREFETCH
    # Apple's proxies send exactly this and nothing after it (tracking.md 3.2); nobody clicks with it.
    if clues.agent == "Mozilla/5.0":
        return Visitor.LIBRARY if clues.is_click else Visitor.PROXY_APPLE
    visitor = family(clues.agent)
    if visitor < Visitor.SUSPECT:
        # A proxy never follows a link for somebody: who clicks under a proxy's name scans.
        return Visitor.SCANNER if clues.is_click and visitor < Visitor.SCANNER else visitor
    if not clues.is_click:
        return visitor  # mail programs fetch images without manners: that says nothing
    score = (_BURST_SCORE if clues.is_burst else 0) + (0 if clues.has_manners else _BARE_BROWSER_SCORE)
    if score >= _MACHINE_SCORE:
        return Visitor.MACHINE
    return Visitor.SUSPECT if score >= _SUSPECT_SCORE else visitor


class Bursts:
    """Who follows most links of one message within 30 s: a window in memory, keyed by (job, mref), then forgotten.

    Law: `saw` is true from the click on which at least 80 % of the message's links (three at the least) have been
    followed within the window; memory is bounded by `capacity` messages, the oldest is forgotten first.
    Known limit: the clicks before that one keep the label they had.
    """

    WINDOW_US: Final = 30_000_000
    FEWEST: Final = 3

    def __init__(self, capacity: int = 10_000) -> None:
        self._capacity = capacity
        self._seen: dict[tuple[int, int], tuple[int, set[int]]] = {}  # message: window's start, links; oldest first

    def __len__(self) -> int:
        return len(self._seen)

    def saw(self, job: int, mref: int, link: int, links: int, now_us: int) -> bool:
        """links: how many the message has. now_us may stand still or jump back (then the window begins anew)."""
        key = (job, mref)
        began, followed = self._seen.pop(key, (now_us, set()))
        if not 0 <= now_us - began <= self.WINDOW_US:
            began, followed = now_us, set()
        self._forget(now_us)
        followed.add(link)
        self._seen[key] = (began, followed)
        return len(followed) >= self.FEWEST and len(followed) * 5 >= links * 4

    def _forget(self, now_us: int) -> None:
        while self._seen:
            key = next(iter(self._seen))
            if len(self._seen) < self._capacity and now_us - self._seen[key][0] <= self.WINDOW_US:
                return
            del self._seen[key]
