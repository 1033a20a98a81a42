"""Which addresses may be dialled at all: the public internet, and nothing that leads home by a detour.

Law: an address is public only if every IPv4 address hidden in it is public too (faults 3.2: three CVEs of one peer,
and `ipaddress.is_global` alone says True for several IPv6 forms that alias a local address).
"""

from __future__ import annotations

import ipaddress


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is on the public internet, whatever IPv4 address is hidden in it (faults 3.2).

    `ipaddress.is_global` alone says True for several IPv6 forms that lead to a local IPv4 address.
    """
    if isinstance(address, ipaddress.IPv6Address):
        if address.is_multicast or address.is_site_local:
            return False
        if any(not is_public(hidden) for hidden in _hidden(address)):
            return False
        if address.ipv4_mapped is not None or address in _NAT64:
            return True  # judged by what is in it; is_global differs between Python releases here
    return address.is_global and not address.is_multicast and not address.is_unspecified


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052
_NAT64_LOCAL = ipaddress.IPv6Network("64:ff9b:1::/48")  # RFC 8215: somebody's own translation, never public
_COMPATIBLE = ipaddress.IPv6Network("::/96")  # RFC 4291 2.5.5.1, deprecated


def _hidden(address: ipaddress.IPv6Address) -> list[ipaddress.IPv4Address]:
    """IPv4 addresses an IPv6 address stands for: mapped, compatible, NAT64, 6to4, Teredo, ISATAP."""
    number = int(address)
    low = ipaddress.IPv4Address(number & 0xFFFFFFFF)
    hidden = []
    if address.ipv4_mapped is not None:
        hidden.append(address.ipv4_mapped)
    if address in _COMPATIBLE or address in _NAT64 or address in _NAT64_LOCAL:
        hidden.append(low)
    if address in _NAT64_LOCAL:
        hidden.append(ipaddress.IPv4Address("127.0.0.1"))
    if address.sixtofour is not None:
        hidden.append(address.sixtofour)
    if address.teredo is not None:
        hidden.extend(address.teredo)
    if number >> 32 & 0xFDFFFFFF == 0x00005EFE:  # ISATAP, RFC 5214 6.1: ::[02]00:5efe:a.b.c.d
        hidden.append(low)
    return hidden
