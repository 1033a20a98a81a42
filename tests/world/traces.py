"""Every way in which a person may be left lying about, and a search of an installation for all of them at once.

    lost = Traces.of("Ada.L@one.example", "Ada Lovelace", tokens=("AbC…",), raw=(sealed_address,))
    lost.in_files(folder)                 {"policy.db": ["address, hex"]}: form and place, never the text
    await lost.in_redis(client)

A text is looked for as it stands, in lower and upper case, quoted-printable (plain and each octet escaped), URL-encoded
(RFC 3986, and as a form), in base64 of both alphabets at each of its three offsets, as hexadecimal digits, in UTF-16 of
both orders, as a JSON escape; an address by its MD5, SHA-1 and SHA-256, too (octets, digits, base64), because those are
what an address is looked up by elsewhere. Raw: octets that must not be found as they are.

Law: a search that cannot find proves nothing. `test_forgotten` writes each form into a file and finds it there, and
every journey looks once while the person is there.

Known limits: compressed data is not unpacked: `in_redis` asks for values as DUMP gives them, with rdbcompression off
(set by `open_values`). A base64 text is found by the groups that do not depend on its neighbours.
"""

from __future__ import annotations

import base64
import hashlib
import json
import quopri
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, quote_plus

from policy.valkey import Client, call
from tests.world.octets import octets

_SHORTEST = 6  # octets: what is shorter stands somewhere by chance
_NOT_OURS = frozenset({"kept"})  # what the rehearsal's server took: the mailbox of the person, not this installation


def _base64(raw: bytes) -> Iterator[bytes]:
    for before in range(3):
        for coded in (base64.b64encode(b"\0" * before + raw), base64.urlsafe_b64encode(b"\0" * before + raw)):
            yield coded[4 * (before > 0) : (before + len(raw)) // 3 * 4]  # whole groups of the text's own octets


def forms(text: str) -> Iterator[tuple[str, bytes]]:
    """(name of the form, the octets to look for)."""
    for spelled in sorted({text, text.lower(), text.upper()}):
        raw = spelled.encode()
        yield "plain", raw
        yield "quoted-printable", quopri.encodestring(raw, quotetabs=True)
        yield "quoted-printable, escaped", "".join(f"={octet:02X}" for octet in raw).encode()
        yield "URL", quote(spelled, safe="").encode()
        yield "form", quote_plus(spelled).encode()
        yield "JSON", json.dumps(spelled)[1:-1].encode()
        yield "hex", raw.hex().encode()
        yield "HEX", raw.hex().upper().encode()
        yield "UTF-16", spelled.encode("utf-16-le")
        yield "UTF-16, other order", spelled.encode("utf-16-be")
        yield from (("base64", coded) for coded in _base64(raw))


def digests(address: str) -> Iterator[tuple[str, bytes]]:
    for spelled in sorted({address, address.lower(), address.upper()}):
        for name in ("md5", "sha1", "sha256"):
            made = hashlib.new(name, spelled.encode(), usedforsecurity=False).digest()
            yield name, made
            yield f"{name}, hex", made.hex().encode()
            yield f"{name}, HEX", made.hex().upper().encode()
            yield f"{name}, base64", base64.b64encode(made).rstrip(b"=")
            yield f"{name}, base64 of URLs", base64.urlsafe_b64encode(made).rstrip(b"=")


@dataclass(frozen=True, slots=True, repr=False)
class Traces:
    """needles: octets to look for, with what each is."""

    needles: dict[bytes, str]

    @classmethod
    def of(cls, address: str, *names: str, tokens: Iterable[str] = (), raw: Iterable[bytes] = ()) -> Traces:
        """Of an address with its local part, of names, of tokens as they stand in links, of raw octets."""
        found: dict[bytes, str] = {}
        for what, text in [
            ("address", address),
            ("local part", address.partition("@")[0]),
            *(("name", n) for n in names),
        ]:
            for form, needle in forms(text):
                found.setdefault(needle, f"{what}, {form}")  # some forms of a plain text are the text itself
        found.update((needle, form) for form, needle in digests(address))
        found.update((token.encode(), "token") for token in tokens)
        found.update((octets, "sealed octets") for octets in raw)
        return cls({needle: what for needle, what in found.items() if len(needle) >= _SHORTEST})

    def within(self, data: bytes) -> list[str]:
        """What of the person is in there."""
        return sorted({what for needle, what in self.needles.items() if needle in data})

    def in_files(self, folder: Path) -> dict[str, list[str]]:
        """By path from the folder on; names of files are looked at, too."""
        found = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if _NOT_OURS.intersection(name.parts):
                continue
            data = octets(path) if path.is_file() else b""
            if told := self.within(str(name).encode() + b"\0" + data):
                found[str(name)] = told
        return found

    async def in_redis(self, redis: Client) -> dict[str, list[str]]:
        """By key; names of keys are looked at, too."""
        found = {}
        async for key in redis.scan_iter(count=1000):
            dumped = await call(redis, "DUMP", key)
            if told := self.within(key + b"\0" + (dumped or b"")):
                found[key.decode("ascii", "backslashreplace")] = told
        return found


async def open_values(redis: Client) -> None:
    """Have the server write what it holds as it is: a search of compressed values proves little."""
    await call(redis, "CONFIG", "SET", "rdbcompression", "no")
