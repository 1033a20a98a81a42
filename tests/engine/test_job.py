"""The producer's door: what is a job, what is none, and every mistake told at once."""

from __future__ import annotations

import copy
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from engine.campaign.canonical import canonical, hash_of, number
from engine.campaign.job import schema
from engine.campaign.problems import Problem
from engine.campaign.validation import RESERVED, read, read_row
from policy import keyspace
from policy.instants import DAY_US, SECOND_US, rfc3339

NOW = 1_795_000_000 * SECOND_US  # 2026-11-18
ADDRESS = "secret.person@hidden.example"


def good(**changes: Any) -> dict[str, Any]:
    job: dict[str, Any] = {
        "v": 1,
        "job_id": "letter-47",
        "created_at": rfc3339(NOW),
        "account": "acme",
        "kind": "campaign",
        "from": {"address": "news@acme.example", "name": "Acme Gärten"},
        "subject": "Hello {{ name }}",
        "html": "<p>Hello {{ name }}</p>",
        "list": "newsletter",
        "legal_basis": {"basis": "consent"},
        "recipients": [{"address": "ada@one.example", "name": "Ada", "fields": {"points": 3}}],
    }
    job.update(changes)
    return {name: value for name, value in job.items() if value is not ...}


def problems(job: Any) -> list[Problem]:
    payload = job if isinstance(job, bytes) else json.dumps(job).encode()
    return read(payload, NOW).problems


def places(job: Any) -> set[str]:
    return {problem.path for problem in problems(job)}


def test_a_good_job_is_read_whole() -> None:
    reading = read(json.dumps(good()).encode(), NOW)
    assert reading.problems == []
    assert reading.job is not None
    assert reading.job.from_.name == "Acme Gärten"
    assert reading.job.recipients is not None
    assert reading.job.recipients[0].fields == {"points": 3}
    assert len(reading.hash) == 32
    assert (reading.job_id, reading.account) == ("letter-47", "acme")


THIRTY = good(
    v=2,  # 1 a version nobody knows
    job_id="no spaces, please",  # 2
    created_at="yesterday",  # 3
    account=17,  # 4
    kind="campagne",  # 5
    subject="one\r\nBcc: everybody@example.org",  # 6
    html=True,  # 7
    text="a\x00b",  # 8
    reply_to="Ada <ada@one.example>",  # 9
    topic={"name": "x"},  # 10
    send_at="2026-11-18 10:00",  # 11
    expires_at="2020-01-01T00:00:00Z",  # 12 in the past
    rate=-1,  # 13
    in_doubt="maybe",  # 14
    wait="yes",  # 15
    tracking={"opens": "indvidual", "clicks": 3, "pixel": True},  # 16 17 18
    legal_basis={"basis": "because", "note": 5},  # 19 20
    consent={"marketing": {"source": "form"}, "open_tracking": {"time": "soon"}},  # 21 22
    headers={"Bcc": "a@b.example", "X Y": "z", "X-Fine": "a\nb"},  # 23 24 25
    attachments=[{"filename": "../etc/passwd", "content_type": "PDF", "content": "%%%"}],  # 26 27 28
    recipients=[{"adress": "x@y.example"}, {"address": "x@y.example", "fields": {"1st": 1}}],  # 29 30 31
    audience={"chunks": 0},  # 32 33 also: both given
    unknown_thing=1,  # 34
    **{"from": {"address": "not an address", "nmae": "x"}},  # 35 36
)


def test_thirty_different_mistakes_get_their_errors_at_once() -> None:
    found = problems(THIRTY)
    assert len(found) >= 30
    assert {problem.path for problem in found} >= {
        "$.v", "$.job_id", "$.created_at", "$.account", "$.kind", "$.subject", "$.html", "$.text", "$.reply_to",
        "$.topic", "$.send_at", "$.expires_at", "$.rate", "$.in_doubt", "$.wait", "$.tracking.opens",
        "$.tracking.clicks", "$.tracking.pixel", "$.legal_basis.basis", "$.legal_basis.note", "$.consent.marketing",
        "$.consent.open_tracking.time", "$.headers.Bcc", "$.headers.<a name of 3 characters>", "$.headers.X-Fine",
        "$.attachments[0].filename", "$.attachments[0].content_type", "$.attachments[0].content",
        "$.recipients[0].adress", "$.recipients[0].address", "$.audience.chunks", "$.audience", "$.unknown_thing",
        "$.from.address", "$.from.nmae",
    }  # fmt: skip
    suggestions = {problem.path: problem.suggestion for problem in found}
    assert "'address'" in suggestions["$.recipients[0].adress"]
    assert "'name'" in suggestions["$.from.nmae"]
    assert "'campaign'" in suggestions["$.kind"]
    assert "'individual'" in suggestions["$.tracking.opens"]


def test_no_problem_quotes_a_value() -> None:
    job = copy.deepcopy(THIRTY)
    job[ADDRESS] = ADDRESS
    job["headers"][ADDRESS] = "x"
    job["from"]["address"] = ADDRESS + ADDRESS
    job["reply_to"] = ADDRESS + ">"
    job["kind"] = ADDRESS
    said = "\n".join(str(problem) for problem in problems(job))
    assert "secret" not in said
    assert "hidden" not in said


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (b"", "not JSON"),
        (b"hello", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 50_000, "nested too deeply"),
        (b"[1]", "expected an object"),
        (b"null", "expected an object"),
        (b'{"v": NaN}', "NaN is not JSON"),
        (b'{"v": -Infinity}', "-Infinity is not JSON"),
        (b'{"rate": 1e999}', "too large"),
        (b'{"v": ' + b"9" * 5000 + b"}", "2^53-1"),
        (b'{"v": 9007199254740993}', "2^53-1"),
        (b'{"subject": "\\ud800"}', "surrogate"),
        (b" " * (25 * 1024 * 1024), "at most"),
    ],
)
def test_what_json_readers_let_through_is_refused(payload: bytes, said: str) -> None:
    found = problems(payload)
    assert any(said in problem.message for problem in found), [str(problem) for problem in found]


def test_a_name_that_comes_twice_is_refused_everywhere() -> None:
    text = json.dumps(good())
    assert "$.subject" in places(text.replace('"subject"', '"subject": "other", "subject"').encode())
    twice = text.replace('"points": 3', '"points": 3, "points": 4').encode()
    assert "$.recipients[0].fields.points" in places(twice)
    assert read_row(b'{"address": "a@b.example", "address": "c@d.example"}') is None
    assert read_row(b'{"address": "a@b.example", "fields": {"x": 1, "x": 2}}') is None


@pytest.mark.parametrize("name", ["", "a b", "1a", "a-b", "a" * 65, "ä", "a\\n"])
def test_a_field_that_no_template_can_name_is_no_row(name: str) -> None:
    assert read_row(b'{"address": "a@b.example", "fields": {"good": 1}}') is not None
    for _ in range(2):  # names that were good once are not looked at again: a bad one must not become one
        assert read_row(f'{{"address": "a@b.example", "fields": {{"good": 1, "{name}": 1}}}}'.encode()) is None


def test_deep_values_are_refused_without_a_crash() -> None:
    deep: Any = "x"
    for _ in range(200):
        deep = [deep]
    job = good(recipients=[{"address": "a@b.example", "fields": {"x": deep}}])
    assert any("nested" in p.message or "expected" in p.message for p in problems(job))


@pytest.mark.parametrize("name", [*sorted(RESERVED), "Content-Type", "ARC-Seal", "Resent-From", "CONTENT-ID"])
def test_headers_that_are_ours_are_reserved(name: str) -> None:
    found = problems(good(headers={name.title(): "x"}))
    assert [problem.message for problem in found] == [
        "is a header that sales-push or a receiver writes: it is reserved"
    ]


@pytest.mark.parametrize("value", ["a\r\nb", "a\nb", "a\rb", "a\x00b", "a\u2028b", "a\x85b"])
@pytest.mark.parametrize("place", ["subject", "header", "from-name", "list"])
def test_nothing_that_becomes_a_header_may_break_a_line(value: str, place: str) -> None:
    match place:
        case "header":
            job = good(headers={"X-Campaign": value})
        case "from-name":
            job = good(**{"from": {"address": "a@b.example", "name": value}})
        case _:
            job = good(**{place: value})
    assert problems(job) != []


def test_prototype_names_are_only_names() -> None:
    assert "$.__proto__" in places(good(__proto__={"x": 1}))
    assert problems(good(headers={"X-__proto__": "x"})) == []


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"created_at": rfc3339(NOW - 8 * DAY_US)}, "$.created_at"),
        ({"created_at": rfc3339(NOW + 2 * DAY_US)}, "$.created_at"),
        ({"created_at": "2026-11-18T10:00:00"}, "$.created_at"),
        ({"send_at": rfc3339(NOW + 91 * DAY_US)}, "$.send_at"),
        ({"expires_at": rfc3339(NOW + 9 * DAY_US)}, "$.expires_at"),
        ({"send_at": rfc3339(NOW + DAY_US), "expires_at": rfc3339(NOW + DAY_US)}, "$.expires_at"),
        ({"legal_basis": ...}, "$.legal_basis"),
        ({"legal_basis": {"basis": "contract"}}, "$.legal_basis.basis"),
        ({"list": ...}, "$.list"),
        ({"html": ..., "text": ...}, "$.html"),
        ({"recipients": ...}, "$.recipients"),
        ({"recipients": []}, "$.recipients"),
        ({"audience": {"chunks": 3}}, "$.audience"),
        ({"kind": "transactional", "list": ..., "topic": "x"}, "$.topic"),
        ({"html": '<img src="cid:logo">'}, "$.html"),
        ({"headers": {"X-A": "1", "x-a": "2"}}, "$.headers.x-a"),
        ({"from": {"address": "jürgen@acme.example"}}, "$.from.address"),
    ],
)
def test_what_fields_say_of_one_another(changes: dict[str, Any], place: str) -> None:
    assert places(good(**changes)) == {place}


def test_a_transactional_job_needs_no_list_and_no_basis() -> None:
    assert problems(good(kind="transactional", list=..., legal_basis=...)) == []


def test_the_hash_names_contents_not_spelling() -> None:
    job = good(rate=2.5)
    one = read(json.dumps(job).encode(), NOW).hash
    turned = dict(reversed(list(job.items())))
    two = read(json.dumps(turned, indent=3, ensure_ascii=False).encode().replace(b"2.5", b"25e-1"), NOW).hash
    assert one == two
    assert read(json.dumps(good(rate=2.5, subject="Other")).encode(), NOW).hash != one


# RFC 8785 appendix B, and 3.2.2
@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (-0.0, "0"), (5e-324, "5e-324"), (-5e-324, "-5e-324"),
        (1.7976931348623157e308, "1.7976931348623157e+308"), (9007199254740992.0, "9007199254740992"),
        (-9007199254740992.0, "-9007199254740992"), (295147905179352830000.0, "295147905179352830000"),
        (9.999999999999997e22, "9.999999999999997e+22"), (1e23, "1e+23"),
        (1.0000000000000001e23, "1.0000000000000001e+23"), (999999999999999700000.0, "999999999999999700000"),
        (999999999999999900000.0, "999999999999999900000"), (1e21, "1e+21"),
        (9.999999999999997e-7, "9.999999999999997e-7"), (0.000001, "0.000001"),
        (333333333.3333332, "333333333.3333332"), (333333333.33333325, "333333333.33333325"),
        (-0.0000033333333333333333, "-0.0000033333333333333333"), (1424953923781206.2, "1424953923781206.2"),
        (4.5, "4.5"), (0.002, "0.002"), (1e30, "1e+30"), (1e-27, "1e-27"), (100.0, "100"), (123.456, "123.456"),
    ],
)  # fmt: skip
def test_numbers_of_rfc_8785(value: float, text: str) -> None:
    assert number(value) == text


def test_canonical_form_of_rfc_8785() -> None:
    assert canonical({"numbers": [1e30, 4.5, 0.002, 1e-27], "literals": [None, True, False]}) == (
        b'{"literals":[null,true,false],"numbers":[1e+30,4.5,0.002,1e-27]}'
    )
    # 3.2.3: sorted by UTF-16 code units, where the emoji (a surrogate pair) comes before U+FB33
    names = {"\u20ac": 1, "\r": 2, "\ufb33": 3, "1": 4, "\U0001f600": 5, "\u0080": 6, "\u00f6": 7}
    assert canonical(names, exact=True) == canonical(names)
    assert list(json.loads(canonical(names))) == ["\r", "1", "\u0080", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]
    assert canonical({"s": "\u20ac$\u000f\u000aA'\u0042\u0022\u005c\\\"/"}) == (
        b'{"s":"\xe2\x82\xac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    )
    assert hash_of({"a": 1, "b": "x"}, exact=True) == hash_of({"b": "x", "a": 1})


def _blocks(language: str) -> list[str]:
    manual = Path(__file__).parents[2].joinpath("docs", "jobs.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", manual, re.DOTALL)


def test_the_manual_shows_jobs_that_are_jobs() -> None:
    job, row = (json.loads(block) for block in _blocks("json"))
    assert problems({**job, "created_at": rfc3339(NOW)}) == []
    assert read_row(json.dumps(row).encode()) is not None
    command = next(block for block in _blocks("sh") if "XADD" in block)
    told = json.loads(command.split(" job '")[1].rpartition("'")[0])
    assert problems({**told, "created_at": rfc3339(NOW)}) == []


def test_the_manual_example_without_our_client_runs() -> None:
    """Played against a store that only listens, then read as the intake reads it."""
    sent: list[dict[str, Any]] = []

    class Listening:
        def xadd(self, stream: str, fields: dict[str, Any]) -> None:
            assert stream == keyspace.INTAKE
            sent.append(fields)

    [source] = [block for block in _blocks("python") if "import datetime" in block]
    code = source.replace('redis.Redis.from_url("redis://queue.internal:6379/0")', "store_that_listens")
    exec(code, {"store_that_listens": Listening()})
    clock = int(datetime.now(UTC).timestamp()) * SECOND_US
    assert read(sent[0]["job"].encode(), clock).problems == []
    assert [(entry["audience"], entry["account"], entry["n"]) for entry in sent[1:]] == [
        ("spring-letter-2026", "acme", 0), ("spring-letter-2026", "acme", 1),
    ]  # fmt: skip
    assert all(read_row(line.encode()) for entry in sent[1:] for line in entry["data"].split("\n"))


def test_the_schema_describes_every_field() -> None:
    described = schema()
    job = described["$defs"]["Job"]
    assert job["additionalProperties"] is False
    assert set(job["required"]) == {"v", "job_id", "created_at", "account", "kind", "from", "subject"}
    assert {"recipients", "audience", "in_doubt", "wait", "rate", "attachments", "tracking"} <= set(job["properties"])
    assert described["$defs"]["Recipient"]["required"] == ["address"]
    json.dumps(described)
