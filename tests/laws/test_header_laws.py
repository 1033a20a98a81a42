"""Laws of the header writer, the choke point: one field in, one field out, the same text read back, or refused."""

from __future__ import annotations

import email
import email.header
import email.policy
import email.utils
import re
from collections.abc import Callable

import pytest
from dkim.canonicalization import Relaxed  # type: ignore[import-untyped]  # dkimpy has no types
from hypothesis import given
from hypothesis import strategies as st

from engine.message import headers

FIELD = re.compile(rb"[A-Za-z-]+: [^\x00-\x1f\x7f]+(\r\n [^\x00-\x1f\x7f]+)*\r\n")
FORBIDDEN = "\r\n\x00\x0b\x1b\x7f\x85\u2028\u2029\ud800"
ANY = st.text(st.characters(exclude_categories=[]) | st.sampled_from(FORBIDDEN + '=?"\\<>,;: '), max_size=200)
WRITERS: list[Callable[[str], bytes]] = [
    lambda text: headers.unstructured("Subject", text),
    lambda text: headers.mailbox("To", [(text, "a@b.example")]),
    lambda text: headers.mailbox("To", [("", text)]),
    lambda text: headers.mailbox("To", [(text, text), ("x", text)]),
    lambda text: headers.structured("Feedback-ID", text),
    lambda text: headers.uri_list("List-Unsubscribe", [text, "mailto:u@b.example"]),
    lambda text: headers.parameters("Content-Disposition", "attachment", [("filename", text)]),
    lambda text: headers.parameters("Content-Type", text, [("charset", "utf-8")]),
]


def parsed(field: bytes) -> list[tuple[str, str]]:
    """What the standard library's old parser sees: names and raw values."""
    return email.message_from_bytes(field + b"\r\nbody\r\n", policy=email.policy.compat32).items()


@given(st.sampled_from(WRITERS), ANY)
def test_one_field_or_refused(write: Callable[[str], bytes], text: str) -> None:
    complaint = ""
    try:
        field = write(text)
    except headers.HeaderError as error:
        complaint = str(error)
    if complaint:
        assert len(text) < 12 or text not in complaint  # the text may be personal
        return
    assert FIELD.fullmatch(field)
    assert len(parsed(field)) == 1
    assert max(len(line) for line in field.split(b"\r\n")) <= 998
    assert not re.search(rb"(?<!\r)\n|\r(?!\n)", field)


@given(st.sampled_from(WRITERS), st.text(max_size=20), st.sampled_from(FORBIDDEN), st.text(max_size=20))
def test_what_could_end_a_line_is_refused(write: Callable[[str], bytes], before: str, bad: str, after: str) -> None:
    with pytest.raises(headers.HeaderError):
        write(before + bad + after)


@given(st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=300))
def test_a_subject_is_read_back(text: str) -> None:
    text = text.strip(" ")
    if not text:
        return
    field = headers.unstructured("Subject", text)

    assert field.isascii()
    assert all(len(line) <= 78 for line in field.split(b"\r\n")) or text.isascii()
    _, value = parsed(field)[0]
    unfolded = value.replace("\r\n", "").replace("\n", "")
    assert str(email.header.make_header(email.header.decode_header(unfolded))) == text
    for word in re.findall(rb"=\?utf-8\?[^ ]*\?=", field):
        assert len(word) <= 75


@given(st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=100))
def test_a_display_name_is_read_back(name: str) -> None:
    field = headers.mailbox("From", [(name, "joe@shop.example")])
    message = email.message_from_bytes(field + b"\r\n", policy=email.policy.default)

    assert message["from"].addresses[0].addr_spec == "joe@shop.example"
    assert len(message["from"].addresses) == 1
    _, value = parsed(field)[0]
    phrase, _ = email.utils.parseaddr(value.replace("\r\n", "").replace("\n", ""))
    assert str(email.header.make_header(email.header.decode_header(phrase))) == name.strip(" ")


@given(st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=150))
def test_a_filename_is_read_back(name: str) -> None:
    name = name.strip() or "x"  # acceptance refuses outer spaces
    field = headers.parameters("Content-Disposition", "attachment", [("filename", name)])

    assert field.isascii()
    assert all(len(line) <= 78 for line in field.split(b"\r\n"))
    message = email.message_from_bytes(field + b"\r\n", policy=email.policy.compat32)
    assert message.get_filename() == name


@given(st.sampled_from(WRITERS), ANY)
def test_relaxed_is_what_dkimpy_makes_of_it(write: Callable[[str], bytes], text: str) -> None:
    try:
        field = write(text)
    except headers.HeaderError:
        return
    name, _, value = field.partition(b":")
    [(canonical_name, canonical_value)] = Relaxed.canonicalize_headers([(name, value)])

    assert headers.relaxed(field) == canonical_name + b":" + canonical_value


PREPARED: list[tuple[Callable[[str], headers.Both], Callable[[str], bytes]]] = [
    (headers.Prepared("Subject").text, lambda text: headers.unstructured("Subject", text)),
    (lambda text: headers.Prepared("To").address("", text), lambda text: headers.mailbox("To", [("", text)])),
    (lambda text: headers.Prepared("To").address(text, "a@b.c"), lambda text: headers.mailbox("To", [(text, "a@b.c")])),
    (lambda text: headers.Prepared("L-U").uris([text]), lambda text: headers.uri_list("L-U", [text])),
    (lambda text: headers.Prepared("L-U").uris([text, "m:b"]), lambda text: headers.uri_list("L-U", [text, "m:b"])),
    (lambda text: headers.Prepared("L-U").uris([]), lambda text: headers.uri_list("L-U", [])),
]
LIKELY = st.sampled_from(
    [
        "a b",
        "x" * 67,
        "x" * 68,
        "w " * 33 + "w",
        "=?",
        "a  b",
        "joe@example.com",
        "https://x.example/u/" + "a" * 56,
        "a@" + "b" * 318,
        "a@" + "b" * 319,
        "https://" + "x" * 892,
        "https://" + "x" * 893,
        "",
        "Zoë",
    ]
)


@given(st.sampled_from(PREPARED), ANY | LIKELY)
def test_what_goes_out_at_once_is_what_the_writer_says(
    case: tuple[Callable[[str], headers.Both], Callable[[str], bytes]], text: str
) -> None:
    prepared, write = case
    try:
        field = write(text)
    except headers.HeaderError as error:
        with pytest.raises(headers.HeaderError, match=re.escape(str(error))):
            prepared(text)
        return
    assert prepared(text) == (field, headers.relaxed(field))


@given(ANY)
def test_a_message_id_ends_well_or_not_at_all(domain: str) -> None:
    try:
        end = headers.id_end(domain)
    except headers.HeaderError:
        return
    field = b"Message-ID: <5.7" + end
    assert headers.finished("Message-ID", field) == field
    assert headers.relaxed(field) == b"message-id:<5.7" + end
