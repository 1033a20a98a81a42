"""Law: what `dnswire` reads of an answer is what dnspython reads of it; what it does not read, it leaves alone."""

from __future__ import annotations

from typing import Any

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.resolver
import dns.rrset
from hypothesis import given
from hypothesis import strategies as st

from engine.delivery import dnswire

NAMES = st.sampled_from(["a.test", "b.test", "mx1.a.test", "MX2.a.test", "a_b-c.test", "x"])
ODD = st.sampled_from(["a\\.b.test", "\\000.test", "*.test", "a\\ b.test"])  # names that need escapes
TTL = st.integers(0, 2**31 - 1)


@st.composite
def replies(draw: Any) -> tuple[str, str, dns.message.Message]:
    """A reply to (name, kind): any records in any order, aliases among them, odd names now and then."""
    name, kind = draw(NAMES), draw(st.sampled_from(["MX", "A", "AAAA"]))
    message = dns.message.make_response(dns.message.make_query(name + ".", kind), recursion_available=True)
    message.set_rcode(draw(st.sampled_from([dns.rcode.NOERROR] * 6 + [dns.rcode.NXDOMAIN, dns.rcode.SERVFAIL])))
    if draw(st.integers(0, 9)) == 0:
        message.flags |= dns.flags.TC
    for _ in range(draw(st.integers(0, 5))):
        owner = draw(st.one_of(st.just(name), NAMES))
        sort = draw(st.sampled_from([kind, kind, "CNAME", "A", "MX", "TXT"]))
        target = draw(st.one_of(NAMES, NAMES, ODD))
        text = {
            "MX": f"{draw(st.integers(0, 65535))} {draw(st.one_of(st.just(''), st.just(target)))}.",
            "CNAME": f"{target}.", "A": f"192.0.2.{draw(st.integers(0, 255))}", "AAAA": "2001:db8::1", "TXT": "hello",
        }[sort]  # fmt: skip
        message.answer.append(dns.rrset.from_text(owner + ".", draw(TTL), "IN", sort, text))
    return name, kind, message


def by_dnspython(name: str, kind: str, wire: bytes) -> tuple[bool, set[tuple[int, str]], int]:
    """As engine.delivery.lookup reads its Answer; raises for what it calls trouble."""
    message = dns.message.from_wire(wire)
    assert isinstance(message, dns.message.QueryMessage)
    if message.rcode() == dns.rcode.NXDOMAIN:
        return False, set(), 0
    answer = dns.resolver.Answer(
        dns.name.from_text(name + "."), dns.rdatatype.from_text(kind), dns.rdataclass.IN, message
    )
    if answer.rrset is None:
        return True, set(), 0
    if kind == "MX":
        found = {(rr.preference, rr.exchange.to_text(omit_final_dot=True).lower()) for rr in answer.rrset}
    else:
        found = {(0, rr.address) for rr in answer.rrset}
    return True, found, answer.rrset.ttl


@given(replies())
def test_what_is_read_is_what_dnspython_reads(reply: tuple[str, str, dns.message.Message]) -> None:
    name, kind, message = reply
    asked = dnswire.question(name, kind, message.id)
    assert asked is not None
    wire = message.to_wire()
    assert dnswire.answers(asked, wire)
    said = dnswire.read(asked, wire)
    if said is None:
        return
    is_there, records, ttl = said
    assert not message.flags & dns.flags.TC
    there, expected, expected_ttl = by_dnspython(name, kind, wire)
    assert (is_there, set(records)) == (there, expected)
    assert len(records) == len(expected)
    if records:
        assert ttl == expected_ttl


@given(replies(), st.data())
def test_no_octets_are_too_odd_to_be_read_or_left_alone(
    reply: tuple[str, str, dns.message.Message], data: st.DataObject
) -> None:
    """Cut short or garbled: an answer, or None; never an exception, and no endless walk."""
    name, kind, message = reply
    asked = dnswire.question(name, kind, message.id)
    assert asked is not None
    wire = bytearray(message.to_wire())
    for _ in range(data.draw(st.integers(0, 4))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(wire[: data.draw(st.integers(12, len(wire)))])
    if dnswire.answers(asked, cut):
        dnswire.read(asked, cut)


@given(st.text(max_size=70))
def test_a_question_is_dnspythons_question_or_none(name: str) -> None:
    asked = dnswire.question(name, "MX", 7)
    if asked is not None:
        message = dns.message.from_wire(asked)
        assert (message.id, message.flags) == (7, dns.flags.RD)
        [question] = message.question
        assert question.name.to_text(omit_final_dot=True) == name
        assert question.rdtype == dns.rdatatype.MX


def test_plain_answers_are_read_and_not_left_alone() -> None:
    """Else every law above would hold of a function that reads nothing."""
    for kind, texts, records in (
        ("MX", ["10 MX1.a.test.", "20 mx2.a.test."], {(10, "mx1.a.test"), (20, "mx2.a.test")}),
        ("MX", ["0 ."], {(0, ".")}),
        ("A", ["192.0.2.1", "192.0.2.2"], {(0, "192.0.2.1"), (0, "192.0.2.2")}),
        ("AAAA", [], set()),
    ):
        message = dns.message.make_response(dns.message.make_query("a.test.", kind))
        if texts:
            message.answer.append(dns.rrset.from_text_list("a.test.", 77, "IN", kind, texts))
        asked = dnswire.question("a.test", kind, message.id)
        assert asked is not None
        said = dnswire.read(asked, message.to_wire())
        assert said is not None
        assert (said[0], set(said[1]), said[2]) == (True, records, 77 if texts else 0)
    alias = dns.message.make_response(dns.message.make_query("a.test.", "MX"))
    alias.answer.append(dns.rrset.from_text("b.test.", 9, "IN", "MX", "5 mx.test."))
    alias.answer.append(dns.rrset.from_text("a.test.", 300, "IN", "CNAME", "b.test."))
    asked = dnswire.question("a.test", "MX", alias.id)
    assert asked is not None
    assert dnswire.read(asked, alias.to_wire()) == (True, ((5, "mx.test"),), 9)


def test_an_answer_to_another_question_is_none() -> None:
    message = dns.message.make_response(dns.message.make_query("a.test.", "MX"))
    others = (("b.test", "MX", message.id), ("a.test", "A", message.id), ("a.test", "MX", message.id ^ 1))
    for name, kind, number in others:
        asked = dnswire.question(name, kind, number)
        assert asked is not None
        assert not dnswire.answers(asked, message.to_wire())
