"""A generated audience: invented people at invented providers, the same ones for the same seed.

Every domain ends in ``.test`` (RFC 6761: never delegated), so that a rehearsal that escapes its routes reaches nobody.
A small share of the rows is wrong on purpose (an invalid address, a repeated one, somebody without consent), because
a campaign without such rows shows nothing of what intake is for.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_FIRST = (
    "Ada Amir Anna Béla Ben Carla Chidi Clara Dana Elif Emil Erik Eva Farid Finn Freya Greta Hana Hugo Ines Ivan Jana "
    "Jonas Kaito Karl Lena Liam Linh Lucía Mads Maja Marta Mei Milan Mira Nadia Nils Nora Olga Omar Paul Petra Priya "
    "Rosa Ruth Samir Selma Sofia Théo Tilda Uma Victor Wanda Yara Yusuf Zoë"
).split()
_LAST = (
    "almeida bauer berg castro chen cohen dahl diaz eriksen fischer garcia haddad ito jensen kaya keller kim kowalski "
    "larsen lopez martin meyer moreau nakamura nguyen novak okafor olsen patel pereira popov rossi russo sato schmidt "
    "silva singh svensson tanaka toth varga weber wolf yilmaz zhang"
).split()
_CITIES = ("Graz", "Malmö", "Porto", "Leeds", "Gdańsk", "Lyon", "Bergen", "Turin", "Ghent", "Brno", "Aarhus", "Košice")
_OFFERS = ("tea tasting", "bookbinding hour", "harbour walk", "cellar concert", "pottery bench", "bread workshop")


@dataclass(frozen=True, slots=True)
class Provider:
    """One rehearsed provider: its behaviour (engine.rehearsal.providers), its domains and its share of the audience."""

    behaviour: str
    domains: tuple[str, ...]
    share: float


PROVIDERS: tuple[Provider, ...] = (
    Provider("accept", tuple(f"mail{n}.posthaus.test" for n in range(1, 13)), 0.88),
    Provider("limit", ("box.tollgate.test", "in.tollgate.test"), 0.03),
    Provider("greylist", ("mx.patience.test", "post.patience.test"), 0.03),
    Provider("unknown", ("home.strict.test",), 0.03),
    Provider("slow", ("mail.snail.test",), 0.03),
)


def people(count: int, *, seed: int = 1, providers: tuple[Provider, ...] = PROVIDERS) -> Iterator[dict[str, Any]]:
    """Yield `count` recipient rows as a producer would submit them: address, name, fields, consent.

    Half of them agreed to be tracked, one in a hundred agreed to nothing (not even to the mail itself), one in four
    hundred is an address that is none, one in four hundred repeats an earlier row.
    """
    draw = random.Random(seed)
    domains = [domain for provider in providers for domain in provider.domains]
    weights = [provider.share / len(provider.domains) for provider in providers for _ in provider.domains]
    chosen = draw.choices(domains, weights, k=count)
    earlier = ""
    for number, domain in enumerate(chosen):
        first, last = draw.choice(_FIRST), draw.choice(_LAST)
        address = f"{_ascii(first)}.{last}{number}@{domain}"
        if number % 400 == 199:
            address = f"{_ascii(first)}.{last}{number}..@{domain}"
        elif number % 400 == 399:
            address = earlier
        earlier = address
        evidence = {"source": "signup form", "time": f"2024-03-0{1 + number % 9}T10:00:00Z", "wording": "letter-v2"}
        consent: dict[str, Any] = {} if number % 100 == 50 else {"mail_marketing": evidence}
        if consent and number % 2 == 0:
            consent |= {"open_tracking": evidence, "click_tracking": evidence}
        yield {
            "address": address,
            "name": first,
            "fields": {
                "name": first,
                "city": draw.choice(_CITIES),
                "member": number % 3 == 0,
                "since": 2009 + number % 17,
                "points": draw.randrange(0, 400),
                "offers": draw.sample(_OFFERS, 3),
            },
            "consent": consent,
        }


def _ascii(name: str) -> str:
    folded = name.lower().translate(str.maketrans("éëíòóöüï", "eeiooouu"[:8]))
    return "".join(c for c in folded if c.isascii() and c.isalpha()) or "x"
