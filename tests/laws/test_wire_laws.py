"""Law where composer and conversation meet: a search of what is composed would find nothing.

``proven`` messages are not searched for bare line ends, octets above 127 and lines that begin with a dot;
`engine.message` promises that there are none. Neither knows the other, so the promise is
asked for here, with what a stranger can put into a message: a field in the subject, at the beginning of a
line of text, in HTML between tags, in an attribute.
"""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.message import Campaign, OpenSSLSigner, Program, sign_batch
from engine.smtp.lines import stuffed
from engine.smtp.words import Outbound, UnsafeData, check_data
from tests.laws.test_message_laws import compiled, plain, unsigned_of

HARMFUL = st.lists(
    st.sampled_from([".", "..", "\r\n.\r\n", "\n.\n", "\r.\r", "\n", "\r", "\r\n", " ", "=", "a", "é", "x" * 75, "<p>"])
    | st.text(max_size=5),
    max_size=12,
).map("".join)
SIGNER = OpenSSLSigner("shop.example", "s1", rsa.generate_private_key(65537, 2048))
CAMPAIGNS: list[Campaign] = [
    plain("{{ a }}\n{{ b }}\n.{{ a }}\n{% if b %}\n{{ b }}.{% endif %}\n"),
    plain("Grüße\n{{ a }}", "<p>\n{{ a }}\n.<b title='{{ b }}'>{{ b }}</b>\n.\n{{ a }}{{ b }}</p>\n"),
    plain(None, "<p>{{ a }}.\n{{ b|upper }}\n</p>"),
]
PROGRAMS = [compiled(campaign) for campaign in CAMPAIGNS]


@settings(deadline=None)
@given(st.sampled_from(PROGRAMS), HARMFUL, HARMFUL)
def test_nothing_composed_needs_the_search_it_is_spared(program: Program, one: str, other: str) -> None:
    unsigned = unsigned_of(program, {"a": one, "b": other})
    [message] = sign_batch([unsigned], [SIGNER])

    try:
        check_data(message.wire)
    except UnsafeData as error:
        raise AssertionError("a composed message has a bare CR or LF") from error
    outbound = Outbound(None, "", "x@them", message.wire, proven=True)
    assert stuffed(message.wire) is message.wire
    assert outbound.eight_bit is not message.wire.isascii()
    assert b"\r\n.\r\n" not in message.wire
