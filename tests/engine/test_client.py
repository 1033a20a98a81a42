"""What producers import: cut, seal, and never say in clear what can be sealed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from engine.client import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    JobProblem,
    JobStatus,
    Submission,
    SubmitError,
    UnsealError,
    audience_purpose,
    chunks,
    job_purpose,
    seal,
    status_of,
    unseal,
)
from policy import keyspace

PRIVATE = bytes(range(32))
PUBLIC = X25519PrivateKey.from_private_bytes(PRIVATE).public_key().public_bytes_raw()
JOB = {"job_id": "j1", "account": "acme", "subject": "ü"}


def people(count: int) -> list[dict[str, Any]]:
    return [{"address": f"p{n}@one.example", "fields": {"n": n}} for n in range(count)]


def test_sealed_bytes_open_only_as_what_they_are() -> None:
    sealed = seal(PUBLIC, b"hello", job_purpose())
    assert unseal(PRIVATE, sealed, job_purpose()) == b"hello"
    assert seal(PUBLIC, b"hello", job_purpose()) != sealed
    for data, key, purpose in (
        (sealed, PRIVATE, audience_purpose("acme", "j1", 0)),
        (sealed, bytes(32 * [7]), job_purpose()),
        (sealed[:-1], PRIVATE, job_purpose()),
        (sealed[:40], PRIVATE, job_purpose()),
        (b"\x02" + sealed[1:], PRIVATE, job_purpose()),
        (b"\x01" + bytes(32) + sealed[33:], PRIVATE, job_purpose()),  # a point of low order: RFC 7748 6.1
        (b"", PRIVATE, job_purpose()),
    ):
        with pytest.raises(UnsealError):
            unseal(key, data, purpose)


@given(st.binary(max_size=200))
def test_garbage_never_opens_and_never_crashes(data: bytes) -> None:
    with pytest.raises(UnsealError):
        unseal(PRIVATE, data, job_purpose())


@given(st.binary(max_size=50), st.integers(0, 10_000))
def test_a_flipped_bit_is_noticed(plain: bytes, place: int) -> None:
    sealed = bytearray(seal(PUBLIC, plain, job_purpose()))
    sealed[place % len(sealed)] ^= 1 << place % 8
    with pytest.raises(UnsealError):
        unseal(PRIVATE, bytes(sealed), job_purpose())


def test_chunks_are_cut_alike_every_time_and_lose_nobody() -> None:
    rows = people(2 * CHUNK_ROWS + 1)
    cut = list(chunks(rows))
    assert [count for _, count in cut] == [CHUNK_ROWS, CHUNK_ROWS, 1]
    assert list(chunks(iter(rows))) == cut
    assert [msgspec.json.decode(line) for data, _ in cut for line in data.split(b"\n")] == rows


def test_chunks_stay_below_a_mebibyte() -> None:
    rows = [{"address": "a@b.example", "fields": {"x": "y" * 20_000}}] * 120
    cut = list(chunks(rows))
    assert len(cut) == 3
    assert all(len(data) <= CHUNK_BYTES for data, _ in cut)
    assert sum(count for _, count in cut) == 120
    with pytest.raises(SubmitError, match="recipient 1"):
        list(chunks([{"address": "x" * CHUNK_BYTES}]))


def once(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield from rows


@pytest.mark.parametrize("one_shot", [False, True])
def test_a_submission_says_how_many_entries_follow(one_shot: bool) -> None:
    rows = people(CHUNK_ROWS + 5)
    submission = Submission(JOB, once(rows) if one_shot else rows, None)
    entries = [fields for fields, _ in submission.entries()]
    job = json.loads(entries[0]["job"])
    assert job["audience"] == {"chunks": 2}
    assert submission.total == len(rows)
    assert [(e["audience"], e["account"], e["n"]) for e in entries[1:]] == [("j1", "acme", 0), ("j1", "acme", 1)]
    assert "audience" not in JOB  # the caller's job stays as it is


def test_with_a_key_nothing_is_in_clear() -> None:
    submission = Submission(JOB, people(3), PUBLIC)
    entries = [fields for fields, _ in submission.entries()]
    assert [set(fields) for fields in entries] == [{"sealed"}, {"audience", "account", "n", "sealed"}]
    whole = b"".join(bytes(value) for fields in entries for value in fields.values() if isinstance(value, bytes))
    assert b"one.example" not in whole
    sealed = entries[1]["sealed"]
    assert isinstance(sealed, bytes)
    data = unseal(PRIVATE, sealed, audience_purpose("acme", "j1", 0))
    assert [json.loads(line)["address"] for line in data.split(b"\n")] == [p["address"] for p in people(3)]
    with pytest.raises(UnsealError):
        unseal(PRIVATE, sealed, audience_purpose("acme", "j2", 0))


@pytest.mark.parametrize(
    ("job", "rows", "said"),
    [
        ({"account": "a"}, None, "job_id"),
        ({"job_id": "j"}, None, "account"),
        ({**JOB, "recipients": []}, [{"address": "x"}], "twice"),
        (JOB, [], "no recipients"),
    ],
)
def test_mistakes_of_the_caller_are_exceptions(job: dict[str, Any], rows: Any, said: str) -> None:
    with pytest.raises(SubmitError, match=said):
        Submission(job, rows, None)


def test_the_name_of_a_status_is_what_b2sum_makes_and_says_nobody() -> None:
    """printf '%s\\000%s' acme spring | b2sum -l 128 | cut -c1-32 | xxd -r -p | base64 | tr '+/' '-_' | tr -d ="""
    assert keyspace.job_status("acme", "spring") == "salespush:{in}:status:a5kZ4tF0QxQ200MtOeAYqQ"
    assert keyspace.job_status("acme", "a:b") != keyspace.job_status("acme:a", "b")
    entry = keyspace.entry_of(keyspace.job_status("acme", "spring"))
    assert entry is not None
    assert (entry.name, entry.personal) == ("job status", "none")


def test_a_status_is_read_as_it_was_written() -> None:
    problems = [("$.html", "is empty", ""), ("$.adress", "there is no such field", "did you mean 'address'?")]
    fields = {
        b"state": b"rejected", b"reason": b"$.html: is empty (and 1 more)", b"rows": b"", b"updated_at": b"17",
        b"problems_total": b"2", b"problems": msgspec.json.encode(problems),
    }  # fmt: skip
    assert status_of(fields) == JobStatus(
        "rejected", "$.html: is empty (and 1 more)", None, [JobProblem(*problem) for problem in problems], {}, 17, 2
    )
    over = {b"state": b"done", b"rows": b"5", b"updated_at": b"18", b"count:delivered": b"4", b"count:bounced": b"1"}
    assert status_of(over) == JobStatus("done", "", 5, [], {"delivered": 4, "bounced": 1}, 18)
    assert status_of({}) is None


@given(st.dictionaries(st.sampled_from([b"reason", b"rows", b"problems", b"count:x", b"updated_at", b"count:"]),
                       st.binary(max_size=30)))  # fmt: skip
def test_a_status_of_another_version_is_read_as_far_as_it_goes(fields: dict[bytes, bytes]) -> None:
    told = status_of({b"state": b"sending", **fields})
    assert told is not None
    assert told.state == "sending"
