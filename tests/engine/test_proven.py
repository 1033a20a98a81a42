"""`Outbound.proven` spares searches (bare line ends, octets above 127, dots): nobody but the composer may say it."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from engine.delivery import campaigns
from engine.delivery import courier as courier_room
from engine.delivery.courier import Courier
from engine.message.dkim import sign_batch
from engine.smtp.words import Outbound

ROOT = Path(__file__).resolve().parents[2]
PLACE = list(inspect.signature(Outbound).parameters).index("proven")


def says(source: str) -> list[str]:
    """Where `proven` may be said: calls that give it, and assignments to an attribute of that name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr == "proven" and isinstance(node.ctx, ast.Store):
            found.append(ast.unparse(node))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "Outbound":
            starred = any(isinstance(one, ast.Starred) for one in node.args)
            named = any(one.arg in ("proven", None) for one in node.keywords)
            if len(node.args) > PLACE or starred or named:
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "source",
    [
        "Outbound(k, s, r, d, 0.0, True)",
        "words.Outbound(k, s, r, d, proven=x)",
        "Outbound(*parts)",
        "Outbound(k, **rest)",
        "message.proven = True",
    ],
)
def test_every_way_to_say_it_is_seen(source: str) -> None:
    assert says(source) == [source.removesuffix(" = True")]


def test_only_the_courier_says_it_of_what_was_composed_and_signed() -> None:
    said = {
        str(path.relative_to(ROOT)): one
        for package in ("engine", "tracker", "policy")
        for path in sorted((ROOT / package).rglob("*.py"))
        if (one := says(path.read_text(encoding="utf-8")))
    }
    assert said == {"engine/delivery/courier.py": ["Outbound(letter, sender, recipient, wire, void_at, True)"]}

    courier = inspect.getsource(Courier.compose)
    assert "composed, failed = compose_together(permitted)" in courier
    assert "for letter, sender, recipient, wire in composed:" in courier
    assert vars(courier_room)["compose_together"] is campaigns.compose_together
    assert vars(campaigns)["sign_batch"] is sign_batch
