"""The setting of a rehearsal: who the invented sender is, how the providers behave, and the configuration that follows.

Law: hours are compressed into seconds (retry schedule, pauses of pacing), nothing else: limits, pacing, signing, gate
and ledger work as they always do.

Known limits: the numbers are made so that every answer occurs in a rehearsal of half a minute, not to be realistic.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from engine.rehearsal.audience import PROVIDERS, Provider

DOMAIN: Final = "letter.example"  # RFC 2606: nobody's
ACCOUNT: Final = "goodthings"
OFFICER: Final = ("Privacy Officer", f"privacy@{DOMAIN}")
SENDER: Final = "The Good Things Letter"
POSTAL: Final = "The Good Things Letter, 12 Orchard Lane, Springfield"
DRAIN_SECONDS: Final = 10.0
# What each simulated provider is asked to do; the numbers are small so that a rehearsal meets them.
SINK: Final[Mapping[str, str]] = {
    "accept": "accept",
    "limit": "limit:0:connections=6,messages=40,rate=500",
    "greylist": "greylist:0:seconds=3",
    "unknown": "unknown:0:share=0.25",
    "slow": "slow:0:delay=0.1",
}
_MANY_DOMAINS: Final = 64  # above it their routes are one pattern: a line of configuration each would be read at start


@dataclass(frozen=True, slots=True)
class Setting:
    """How the stage is built. keep, keep_every: messages the sink keeps a provider; lasting: left running; sinks: what
    each behaviour asks of our own sink; sink: own, or one of `strangers.KINDS`; connections: to a site at most, start:
    at first; signing: [engine.signing] implementation, "" to leave it out; tls: STARTTLS, and nothing without it;
    resolver: ``address:port`` that names the domains' MX instead of routes, all of them at the first provider."""

    workers: int = 0
    providers: Sequence[Provider] = PROVIDERS
    keep: int = 120
    keep_every: int = 1
    lasting: bool = False
    sinks: Mapping[str, str] = field(default_factory=lambda: SINK)
    sink: str = "own"
    connections: int = 32
    start: int = 8
    signing: str = ""
    tls: bool = False
    chunking: bool = False
    resolver: str = ""

    @property
    def worker_count(self) -> int:
        return self.workers or os.cpu_count() or 1


def configuration(setting: Setting, ports: Mapping[str, int], tracker_port: int, ops_port: int) -> str:
    """The configuration as TOML. ports: of the sink, by behaviour."""
    routes = "\n".join(
        f'"{domain}" = "127.0.0.1:{ports[provider.behaviour]}"'
        for provider in setting.providers
        for domain in _patterns(provider.domains)
    )
    tls = '\ntls = "required"' if setting.tls else ""
    asked = ""
    if setting.resolver:
        port = ports[setting.providers[0].behaviour]
        routes, tls = "", f"{tls}\nallow_private_targets = true\nmx_port = {port}"
        asked = f'\n[engine.dns]\nservers = ["{setting.resolver}"]\n'
    signing = f'\n[engine.signing]\nimplementation = "{setting.signing}"\n' if setting.signing else ""
    return f"""# A rehearsal: everything on this host, providers simulated, hours compressed into seconds.
[policy]
data_dir = "data"
public_url = "http://127.0.0.1:{tracker_port}"
bounce_domain = "bounce.{DOMAIN}"

[policy.officer]
name = "{OFFICER[0]}"
address = "{OFFICER[1]}"

[tracker]
port = {tracker_port}

[engine]
workers = {setting.worker_count}
hostname = "mail.{DOMAIN}"{tls}

[engine.routes]
{routes}

[engine.retry]
schedule = [1.0, 3.0, 4.0, 5.0, 8.0]

[engine.limits]
connections = {setting.connections}
messages_per_connection = 200

[engine.pace]
start = {setting.start}
calm = 0.5
back_off = 0.5
back_off_cap = 4.0
block_back_off = 2.0

[engine.ops]
port = {ops_port}

[engine.supervisor]
drain_seconds = {DRAIN_SECONDS}
{signing}{asked}"""


def _patterns(domains: Sequence[str]) -> Sequence[str]:
    """The patterns that route them."""
    if len(domains) <= _MANY_DOMAINS:
        return domains
    return sorted({f"*.{domain.partition('.')[2]}" for domain in domains})
