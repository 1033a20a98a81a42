"""The rehearsal's parts alone: censuses, figures, proofs that can fail, what is shown, a stage that loads and ends."""

from __future__ import annotations

import base64
import io
import json
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import dkim  # type: ignore[import-untyped]  # dkimpy ships no types
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from rich.console import Console
from sqlalchemy import Engine, insert

from engine.campaign.validation import read
from engine.rehearsal import campaigns, findings, proof
from engine.rehearsal.audience import PROVIDERS, people
from engine.rehearsal.findings import Course, Tally
from engine.rehearsal.outcome import Outcome, Story
from engine.rehearsal.report import html
from engine.rehearsal.screen import Screen
from engine.rehearsal.setting import SINK, Setting, configuration
from engine.rehearsal.stage import Stage, StageError
from engine.settings import EngineSettings
from policy import schema
from policy.events import Kind, Reason
from policy.settings import PolicySettings, load, load_all
from tracker.settings import TrackerSettings

HOMES = {"a.test": "accept", "g.test": "greylist"}


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, because sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="sp-", dir="/tmp") as name:
        yield Path(name)


# --- audience and campaigns ---------------------------------------------------------------------------------------


def test_census_counts_every_row_once_and_the_accepting_provider_has_most() -> None:
    audience = campaigns.Audience(4000)
    found = campaigns.census(audience)

    assert found.submitted == 4000 == sum(1 for _ in audience)
    assert found.rows["accept"] >= 0.6 * 4000  # the issue: at least 12,000 of 20,000
    assert set(found.rows) == {"accept", "limit", "greylist", "unknown", "slow", campaigns.NO_ADDRESS}
    assert found.rows[campaigns.NO_ADDRESS] == 10
    assert len(found.without_consent) == 40
    assert 0.4 * 4000 < len(found.tracked) < 0.6 * 4000
    assert found.tracked.isdisjoint(found.without_consent)


def test_audience_is_the_same_each_time() -> None:
    audience = campaigns.Audience(300, seed=7)

    assert list(audience) == list(audience) == list(people(300, seed=7))


@pytest.mark.parametrize("job", [campaigns.first("one"), campaigns.second("two")], ids=["first", "second"])
def test_both_campaigns_are_good_jobs(job: dict[str, object]) -> None:
    reading = read(json.dumps(job | {"audience": {"chunks": 1}}).encode(), time.time_ns() // 1000)

    assert [str(problem) for problem in reading.problems] == []
    assert reading.job is not None


# --- findings -----------------------------------------------------------------------------------------------------


def store_with(folder: Path, rows: list[tuple[int, str, int, Kind, int]]) -> Engine:
    """A ledger with messages of job 1: (mref, domain, at, kind, attempts)."""
    engine = schema.open_store(f"sqlite:///{folder / 'ledger.db'}", writer=True)
    schema.upgrade(engine)
    with engine.begin() as conn:
        numbers = {}
        for number, name in enumerate(sorted({row[1] for row in rows}), 1):
            conn.execute(insert(schema.domain).values(number=number, name=name))
            numbers[name] = number
        for mref, name, at, kind, attempts in rows:
            conn.execute(
                insert(schema.message).values(
                    job=1, mref=mref, kind=int(kind), reason=0, domain=numbers[name], code=250, enhanced="",
                    attempts=attempts, at=at, day=0, pseudonym=0, tls=0,
                )
            )  # fmt: skip
        conn.execute(
            insert(schema.history).values(
                job=1, mref=4, attempt=1, kind=int(Kind.DEFERRED), at=500_000, day=0,
                reason=int(Reason.GREYLISTED), code=450, enhanced="",
            )
        )  # fmt: skip
    return engine


def test_course_knows_when_and_where(folder: Path) -> None:
    engine = store_with(
        folder,
        [
            (1, "a.test", 1_000_000, Kind.DELIVERED, 1),
            (2, "a.test", 2_000_000, Kind.DELIVERED, 1),
            (3, "a.test", 3_000_000, Kind.BOUNCED, 1),
            (4, "g.test", 3_500_000, Kind.DELIVERED, 2),
            (5, "a.test", 100_000, Kind.REFUSED, 0),
        ],
    )
    try:
        course = findings.course(engine, 1, HOMES)
    finally:
        engine.dispose()

    assert course.at["accept", "delivered"] == [1_000_000, 2_000_000]
    assert course.at["greylist", "deferred"] == [500_000]
    assert course.attempts == Counter({1: 2, 2: 1})
    assert course.span == (100_000, 3_500_000)
    # two delivered between the first outcome at 1 s and the last at 3 s; what the gate refused is no outcome there
    assert course.rate("accept") == pytest.approx(1.0)
    assert course.buckets("accept", "delivered", 0, 1_000_000, 4) == [0, 1, 1, 0]


def test_rate_of_nothing_is_nothing() -> None:
    assert Course().rate("accept") == 0.0
    assert Course({("accept", "delivered"): [5]}).rate("accept") == 0.0
    assert Course().span == (0, 0)


# --- proof --------------------------------------------------------------------------------------------------------

MESSAGE = (
    b"From: a <letter@letter.example>\r\nTo: b@a.test\r\nSubject: hello\r\nDate: Mon, 1 Jun 2026 10:00:00 +0000\r\n"
    b"List-Unsubscribe: <https://l.example/u/x>\r\nList-Unsubscribe-Post: List-Unsubscribe=One-Click\r\n"
    b"Message-ID: <1@letter.example>\r\n\r\nhello\r\n"
)
COVERED = [b"from", b"to", b"subject", b"date", b"list-unsubscribe", b"list-unsubscribe-post", b"message-id"]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("dkim")
    plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (home / "letter.example.s1.rsa.pem").write_bytes(rsa.generate_private_key(65537, 2048).private_bytes(*plain))
    (home / "letter.example.s1-ed.ed25519.pem").write_bytes(ed25519.Ed25519PrivateKey.generate().private_bytes(*plain))
    return home


def signed(keys: Path, covered: list[bytes], message: bytes = MESSAGE) -> bytes:
    """Signed twice by dkimpy."""
    rsa_key = serialization.load_pem_private_key((keys / "letter.example.s1.rsa.pem").read_bytes(), None)
    old = serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    pem = rsa_key.private_bytes(*old)
    ed_key = serialization.load_pem_private_key((keys / "letter.example.s1-ed.ed25519.pem").read_bytes(), None)
    assert isinstance(ed_key, ed25519.Ed25519PrivateKey)
    seed = base64.b64encode(ed_key.private_bytes_raw())
    form = (b"relaxed", b"relaxed")
    first = dkim.sign(message, b"s1", b"letter.example", pem, canonicalize=form, include_headers=covered)
    second = dkim.sign(
        message, b"s1-ed", b"letter.example", seed, canonicalize=form,
        signature_algorithm=b"ed25519-sha256", include_headers=covered,
    )  # fmt: skip
    return bytes(first + second + message)


def test_good_signatures_are_proven_and_changed_messages_are_not(keys: Path) -> None:
    wire, records = signed(keys, COVERED), proof.records(keys)

    assert sorted(records) == [b"s1-ed._domainkey.letter.example.", b"s1._domainkey.letter.example."]
    good = proof.verify(wire, records)
    assert [(one.algorithm, one.selector, one.is_good) for one in good] == [
        ("rsa-sha256", "s1", True),
        ("ed25519-sha256", "s1-ed", True),
    ]
    assert proof.is_proven(good)
    for changed in (wire.replace(b"\r\n\r\nhello", b"\r\n\r\nhallo"), wire.replace(b"/u/x", b"/u/y")):
        assert [one.is_good for one in proof.verify(changed, records)] == [False, False]


def test_one_click_outside_the_signature_is_no_proof(keys: Path) -> None:
    loose = [name for name in COVERED if name != b"list-unsubscribe-post"]
    judged = proof.verify(signed(keys, loose), proof.records(keys))

    assert [one.is_good for one in judged] == [True, True]
    assert not proof.is_proven(judged)


def test_one_signature_or_none_is_no_proof(keys: Path) -> None:
    assert proof.verify(MESSAGE, proof.records(keys)) == []
    assert not proof.is_proven([])
    only_rsa = proof.verify(signed(keys, COVERED), proof.records(keys))[:1]
    assert only_rsa[0].is_good
    assert not proof.is_proven(only_rsa)


def test_scan_finds_what_is_there_in_every_spelling_and_across_blocks(tmp_path: Path) -> None:
    who = "Ada.Berg1@mail1.posthaus.test"
    for name, data in {
        "clean": b"nothing here, mail1.posthaus.test",
        "plain": b"x" * 100 + who.encode(),
        "lower": who.lower().encode(),
        "url": b"/u?a=Ada.Berg1%40mail1.posthaus.test",
        "wide": who.encode("utf-16-le"),
        "split": b"x" * ((1 << 20) - 7) + who.encode() + b"y" * 50,
    }.items():
        (tmp_path / name).write_bytes(data)
    found = proof.scan([tmp_path], [who, "nobody@a.test"])

    assert {Path(name).name for name in found.hits} == {"plain", "lower", "url", "wide", "split"}
    assert set(found.hits.values()) == {1}
    assert found.files == 6
    assert found.size == sum(path.stat().st_size for path in tmp_path.iterdir())


# --- what is shown ------------------------------------------------------------------------------------------------


def tally(deferrals: int = 0, **counts: int) -> Tally:
    return Tally(Counter(counts), deferrals, Counter({("bounced", "user-unknown"): counts.get("bounced", 0)}))


def test_off_a_terminal_there_are_lines_without_control_characters() -> None:
    out = io.StringIO()
    screen = Screen(Console(file=out, width=140, highlight=False))
    with screen.progress({"accept": 10}) as progress:
        for n in range(200):
            progress.show({"accept": tally(delivered=n % 10)})
    screen.outcome({"accept": 10}, {"accept": tally(3, delivered=8, bounced=2)})
    text = out.getvalue()

    assert "\x1b" not in text
    assert "\r" not in text
    assert text.count(" of 10: ") == 1, "more than a line in two seconds"
    assert "put off" in text


def test_on_a_terminal_the_table_moves_and_goes() -> None:
    out = io.StringIO()
    screen = Screen(Console(file=out, width=120, force_terminal=True, legacy_windows=False))
    with screen.progress({"accept": 10}) as progress:
        progress.show({"accept": tally(delivered=5)})

    assert "\x1b[" in out.getvalue()
    assert "████" in out.getvalue()


class Page(HTMLParser):
    """Every tag, address and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.outside: list[str] = []
        self.said = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.outside += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.said += data


def outcome() -> Outcome:
    made = Outcome(submitted=12, rows={"accept": 10, "greylist": 2}, workers=2)
    made.tallies = {"accept": tally(delivered=9, bounced=1), "greylist": tally(4, delivered=2)}
    made.course = Course(
        {
            ("accept", "delivered"): [1_000_000 + n * 100_000 for n in range(9)],
            ("greylist", "delivered"): [4_000_000, 4_100_000],
            ("greylist", "deferred"): [1_000_000] * 4,
        },
        Counter({1: 9, 3: 2}),
    )
    made.submitted_at = 900_000
    made.stories = [Story("why <b>somebody</b>", "sales-push why a@b.test", "delivered <script>alert(1)</script>")]
    made.troubles = ["late & <sorry>"]
    return made


def test_the_report_stands_alone_and_escapes_what_it_was_told() -> None:
    page = html(outcome())
    read_back = Page(page)

    assert read_back.tags["script"] == 0
    assert read_back.outside == []
    assert read_back.tags["svg"] >= 3
    assert read_back.tags["polygon"] == 2
    assert "delivered <script>alert(1)</script>" in read_back.said
    assert "late & <sorry>" in read_back.said
    assert "url(" not in page
    assert "@import" not in page


def test_the_report_of_a_rehearsal_that_never_began() -> None:
    page = Page(html(Outcome(troubles=["it did not start"])))

    assert "it did not start" in page.said
    assert "Nothing was delivered." in page.said


def test_equations_fail_when_they_should() -> None:
    good = outcome()
    good.sink = {"accepted": 11, "unique": 11, "providers": {"accept": {"bare_newlines": 0}}}
    verdicts = dict(good.checks())
    assert verdicts["delivered + refused + bounced + expired = submitted"]
    assert verdicts["the sink counts as many accepted as we count delivered"]
    assert not verdicts["no address in clear in any file of the data folder"], "nothing was scanned"
    assert not verdicts["the second campaign refused exactly those who opted out"], "nobody opted out"

    good.sink["accepted"] = 12
    good.submitted = 13
    verdicts = dict(good.checks())
    assert not verdicts["delivered + refused + bounced + expired = submitted"]
    assert not verdicts["nobody is left deferred"]
    assert not verdicts["the sink counts as many accepted as we count delivered"]
    assert good.figures()["deferred"] == 1
    assert not good.figures()["ok"]


def test_the_last_line_has_every_figure_of_the_issue() -> None:
    wanted = (
        "submitted, delivered, refused, bounced, deferred, expired, unknown, sink_accepted, messages_per_second,"
        " dkim_verified, opted_out, second_refused, seconds"
    )

    assert set(wanted.split(", ")) <= json.loads(json.dumps(outcome().figures())).keys()


# --- the stage ----------------------------------------------------------------------------------------------------


def test_the_configuration_of_a_stage_is_one(folder: Path) -> None:
    ports = {behaviour: 2500 + n for n, behaviour in enumerate(SINK)}
    config = folder / "sales-push.toml"
    config.write_text(configuration(Setting(workers=3), ports, 8080, 9090), encoding="utf-8")

    load_all([PolicySettings, TrackerSettings, EngineSettings], config)
    engine, policy = load(EngineSettings, config), load(PolicySettings, config)
    assert engine.worker_count == 3
    assert set(engine.routes) == {domain for provider in PROVIDERS for domain in provider.domains}
    assert policy.data_dir == folder / "data"
    assert tomllib.loads(config.read_text())["tracker"]["port"] == 8080


async def test_a_folder_too_deep_for_a_socket_is_refused(folder: Path) -> None:
    with pytest.raises(StageError, match="too long"):
        await Stage(folder / ("x" * 90), Setting()).start()


def test_every_behaviour_of_the_audience_is_played() -> None:
    assert {provider.behaviour for provider in PROVIDERS} == set(SINK)
