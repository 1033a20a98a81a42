"""What jobs share: ten thousand jobs with the same template compile it once, and each still writes its own message."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import replace

import pytest

from engine.message import Campaign, Person, Problem, Program, Unsigned, compile_campaign, compose
from engine.message import acceptance as judge
from engine.message.contents import Contents
from policy.gate import Permit
from tests.engine.newsletter import campaign, recipient

JOBS = 10_000


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Campaign]]:
    """Every compilation of contents from here on; nothing is known yet."""
    seen: list[Campaign] = []

    class Counted(Contents):
        def __init__(self, campaign: Campaign, *layouts: object) -> None:
            seen.append(campaign)
            super().__init__(campaign, *layouts)  # type: ignore[arg-type]

    judge._compile.cache_clear()
    judge._judged.cache_clear()
    monkeypatch.setattr(judge, "Contents", Counted)
    yield seen
    judge._compile.cache_clear()
    judge._judged.cache_clear()


def job(number: int, template: str = "") -> Campaign:
    """A job as a worker opens it: the same words, pages, reports and headers of its own."""
    text = f"{template}Hello {{{{ first_name }}}}, see {{{{ view_url }}}} or {{{{ notice_url }}}}\n"
    return replace(
        campaign(),
        text=text,
        html=f'<p>{text}<a href="{{{{ notice_url }}}}">Privacy</a></p>',
        headers=(("In-Reply-To", f"<{number}@shop.example>"),),
        feedback_id=(f"job-{number}", "shop", "campaign", "salespush"),
        view_url=f"https://track.shop.example/v/{number}",
        notice_url=f"https://track.shop.example/n/{number}?a=1&b=2",
    )


def written(program: Program, number: int) -> Unsigned:
    person = Person(number, 7, "joe@example.com", recipient(1))
    person.optout_url, person.preferences_url = "https://track.shop.example/u/x", "https://track.shop.example/p/x"
    return compose(Permit(number, 7, 0.0), program, person, 1_790_000_000_000_000)


@pytest.mark.doubles
def test_ten_thousand_jobs_compile_their_template_once(compilations: list[Campaign]) -> None:
    for number in range(JOBS):
        program = compile_campaign(job(number))
        assert isinstance(program, Program)
    assert len(compilations) == 1

    other = compile_campaign(job(1, "Another letter. "))
    assert isinstance(other, Program)
    assert len(compilations) == 2


@pytest.mark.doubles
def test_every_job_writes_its_own(compilations: list[Campaign]) -> None:
    for number in (3, 4):
        program = compile_campaign(job(number))
        assert isinstance(program, Program)
        unsigned = written(program, number)
        other = b"%d" % (7 - number)

        assert b"In-Reply-To: <%d@shop.example>\r\n" % number in unsigned.head
        assert b"Feedback-ID: job-%d:" % number in unsigned.head
        assert b'<a href="https://track.shop.example/n/%d?a=1&amp;b=2">' % number in unsigned.body
        assert b"https://track.shop.example/v/%d " % number in unsigned.body
        assert b"/v/" + other not in unsigned.body
        assert b"/n/" + other not in unsigned.body
        page = html.unescape(program.view_html)
        assert f"https://track.shop.example/n/{number}?a=1&b=2" in page
        assert f"/v/{number}" not in page
    assert len(compilations) == 1


@pytest.mark.doubles
def test_what_is_wrong_with_one_job_is_not_the_others(compilations: list[Campaign]) -> None:
    wrong = compile_campaign(replace(job(1), headers=(("Received", "x"),), html="{{ nobody }}"))
    assert isinstance(wrong, list)
    assert [problem.path for problem in wrong] == ["headers[0]", "html"]
    assert all(isinstance(problem, Problem) for problem in wrong)

    assert isinstance(compile_campaign(replace(job(1), headers=(("Received", "x"),))), list)
    assert isinstance(compile_campaign(job(1)), Program)
    assert len(compilations) == 1


@pytest.mark.doubles
def test_the_same_campaign_is_the_same_program(compilations: list[Campaign]) -> None:
    assert compile_campaign(job(5)) is compile_campaign(job(5))


def test_a_job_without_pages_prints_nothing_there() -> None:
    program = compile_campaign(replace(job(6), view_url="", notice_url=""))
    assert isinstance(program, Program)

    assert b'<a href="">Privacy</a>' in written(program, 6).body
