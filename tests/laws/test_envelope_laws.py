"""Law: whatever policy.address accepts, the envelope takes, or refuses as a value error that ends one recipient."""

from __future__ import annotations

import json
from pathlib import Path

from engine.smtp.words import AddressRefused, Outbound
from policy.address import AddressError, parse

CASES = json.loads((Path(__file__).parents[1] / "policy" / "isemail_cases.json").read_text(encoding="utf-8"))


def outcome(address: str) -> str:
    try:
        wire = parse(address).wire
    except AddressError:
        return "not an address"
    try:
        Outbound(None, "b+token@bounce.example", wire, b"x\r\n", proven=True)
    except ValueError as error:  # what engine.delivery.courier ends one recipient with
        return f"shown: {error}" if wire in str(error) else type(error).__name__
    return "taken"


def test_accepted_addresses_fit_the_envelope_or_are_refused_as_values() -> None:
    outcomes = [outcome(address) for address in CASES["accept"] if isinstance(address, str)]

    assert outcomes.count("taken") > 20
    assert set(outcomes) <= {"taken", AddressRefused.__name__}
