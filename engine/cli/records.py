"""The DNS records to publish before the first campaign. Pure: names and public keys in, lines out.

Sources: RFC 6376 3.6.1 and RFC 8463 (DKIM keys), RFC 7208 (SPF), RFC 9989 (DMARC; ``v=DMARC1`` stays valid),
RFC 1035 3.3.14 (a TXT string holds at most 255 octets, longer ones are several strings).

Known limits: addresses of the host are the operator's to fill in (``<IPv4 of this host>``); the reverse record (PTR)
belongs to whoever owns the address range.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_TXT_OCTETS = 255


@dataclass(frozen=True, slots=True)
class Record:
    """One record. why: what it is for, in one line."""

    name: str
    type: str
    value: str
    why: str

    def line(self) -> str:
        """In master file form (RFC 1035 5.1), TXT in strings of at most 255 octets."""
        value = self.value
        if self.type == "TXT":
            parts = [value[at : at + _TXT_OCTETS] for at in range(0, len(value), _TXT_OCTETS)]
            value = " ".join(f'"{part}"' for part in parts)
        return f"{self.name}. 3600 IN {self.type} {value}"


@dataclass(frozen=True, slots=True)
class SigningKey:
    """Public half of a DKIM key. kind: rsa | ed25519; public: base64 (rsa: DER SubjectPublicKeyInfo, else 32 bytes)."""

    domain: str
    selector: str
    kind: str
    public: str


def records(
    keys: Sequence[SigningKey], domains: Iterable[str], bounce_domain: str, hostname: str, public_host: str
) -> list[Record]:
    """Everything to publish, From domains first. hostname: this host's EHLO name; public_host: host of public_url."""
    found: list[Record] = []
    for domain in domains:
        found += [
            Record(
                f"{key.selector}._domainkey.{domain}",
                "TXT",
                f"v=DKIM1; k={key.kind}; p={key.public}",
                f"DKIM signature of {domain} ({key.kind})",
            )
            for key in keys
            if key.domain == domain
        ]
        found.append(
            Record(domain, "TXT", f"v=spf1 include:{bounce_domain} ~all", "SPF; merge it with the record you have")
        )
        found.append(
            Record(
                f"_dmarc.{domain}",
                "TXT",
                f"v=DMARC1; p=none; rua=mailto:dmarc@{domain}",
                "DMARC; start with none, read the reports, then quarantine or reject",
            )
        )
    found.append(Record(bounce_domain, "MX", f"10 {hostname}.", "bounces and mailto opt-outs come back here"))
    found.append(Record(bounce_domain, "TXT", f"v=spf1 a:{hostname} -all", "SPF of the return path (RFC 7208 2.4)"))
    found.append(Record(hostname, "A", "<IPv4 of this host>", "EHLO name; its PTR must say the same name"))
    found.append(Record(hostname, "TXT", "v=spf1 a -all", "SPF of the EHLO name, used for bounces (RFC 7208 2.3)"))
    if public_host not in (hostname, "localhost"):
        found.append(Record(public_host, "CNAME", f"{hostname}.", "pixel, click and opt-out pages"))
    return found
