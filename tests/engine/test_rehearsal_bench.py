"""The benchmark's parts alone: what the machine gives, samples, latency, chart, configuration, and wrong usage."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from benchmarks import __main__ as make_bench
from engine.rehearsal import bench, chart, machine, newsletter, strangers
from engine.rehearsal.audience import Provider, people
from engine.rehearsal.commands import _counts, rehearsal_commands
from engine.rehearsal.latency import Watch, percentile
from engine.rehearsal.providers import parse
from engine.rehearsal.samples import Sample, Samples, spread
from engine.rehearsal.setting import configuration
from engine.settings import EngineSettings
from policy.settings import load


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sp-", dir="/tmp") as name:
        yield Path(name)


def test_bench_knows_one_provider_and_its_own_cpu_time() -> None:
    assert len(bench.provider().domains) == 20
    assert bench.provider(1) == Provider("accept", ("mail1.posthaus.test",), 1.0)
    before = sum(bench.cpu_seconds(os.getpid()).values())
    rate = bench.rsa_rate(0.3)

    assert rate > 20
    assert sum(bench.cpu_seconds(os.getpid()).values()) - before >= 0.02


def test_the_letter_is_what_the_benchmark_says_it_is() -> None:
    letter = newsletter.html()
    assert 25_000 <= len(letter.encode()) <= 27_000
    assert letter.count('href="https://www.shop.example') == 25
    assert len(re.findall(r"\{\{[^}|]*\|[^}]*\}\}", letter)) == 3
    assert (letter.count("{% if "), letter.count("{% for ")) == (2, 1)


def test_a_process_is_its_part_and_its_place() -> None:
    use = machine.use_of(os.getpid())

    assert use.total() > 0
    (name,) = [name for name in use.memory if name.startswith("supervisor-0")]
    assert 5 < use.memory[name] <= use.peak[name]
    assert machine.use_of(2**22 + 1).cpu == {}, "no such process"


async def test_the_rate_of_rsa_is_asked_of_a_child() -> None:
    async with machine.RsaClock() as clock:
        rate = await clock.sample(0.02)
        await clock.sample(0.02)

    assert rate > 20
    assert [rate == found for _, found in clock.samples] == [True, False]
    assert clock.samples[0][0] < clock.samples[1][0]


def samples_of(*accepted: int, engine: float = 400e-6) -> Samples:
    """A look a second; every message costs the engine as much, and policy 50 us."""
    taken = [
        Sample(100.0 + n, count, machine.Use({"engine": 3.0 + count * engine, "policy": count * 50e-6}), 0.0, 0.0)
        for n, count in enumerate(accepted)
    ]
    return Samples(taken, [(99.0, 1000.0), (101.0, 4000.0), (102.0, 5000.0), (190.0, 1000.0)])


def test_samples_tell_cpu_a_message_and_the_rate_of_rsa_in_between() -> None:
    samples = samples_of(0, 2000, 5000, 5000)
    began, ended = samples.taken[0], samples.taken[-1]

    assert samples.between(began, ended) == pytest.approx({"engine": 400.0, "policy": 50.0})
    assert samples.rsa_rate(began, ended) == 4500.0
    assert samples.rsa_rate(samples.taken[0], samples.taken[0]) == 2500.0, "nothing in between: all of them"
    assert samples.tail(2500) == (samples.taken[1], ended)
    assert samples.tail(3001) == (began, ended), "the look before, when the part begins between two"
    assert samples.tail(10**6) == (began, ended)
    assert chart.rates(samples) == [(1.0, 2000.0), (2.0, 3000.0), (3.0, 0.0)]


@pytest.mark.parametrize(
    ("values", "points", "wanted"),
    [([1.0], 3, [1.0]), ([1.0, 2.0, 3.0], 3, [1.0, 2.0, 3.0]), (list(map(float, range(101))), 3, [0.0, 50.0, 100.0])],
)
def test_spread_values_hold_both_ends(values: list[float], points: int, wanted: list[float]) -> None:
    assert spread(values, points) == wanted


def test_percentiles_are_values_that_were_there() -> None:
    values = [float(n) for n in range(1, 201)]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 100.0, 198.0, 200.0]
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([], 0.5) is None


def test_the_watch_knows_in_which_entry_a_row_left() -> None:
    begun: list[bool] = []
    rows = [{"address": f"p{n}@a.test"} for n in range(10)]
    watch = Watch(rows, 10, "goodthings", lambda: begun.append(True))
    assert list(watch.rows()) == rows
    assert begun == [True], "once, when all rows are packed"
    assert watch.people == [(n, f"p{n}@a.test") for n in range(10)]
    for sent in (0, 4, 10):
        watch.sent(sent, 10)
    left = [watch.left_at(row) for row in range(10)]
    assert len(set(left[:4])) == len(set(left[4:])) == 1
    assert left[0] <= left[9]


def test_a_long_audience_is_watched_in_part() -> None:
    watch = Watch(({"address": str(n)} for n in range(100_000)), 100_000, "goodthings", lambda: None)
    assert sum(1 for _ in watch.rows()) == 100_000
    assert [place for place, _ in watch.people] == list(range(0, 100_000, 50))


def test_growth_compares_the_largest_run_with_that_nearest_a_hundred_thousand() -> None:
    runs = [{"recipients": n, "tail_cpu_per_rsa": cost} for n, cost in ((10_000, 9.0), (100_000, 2.0), (10**6, 2.2))]
    assert bench.growth(runs) == 1.1
    assert bench.growth(runs[:1]) is None
    assert bench.growth([]) is None


def test_the_chart_is_one_file_of_svg() -> None:
    drawn = chart.svg("500 <messages>", samples_of(0, 2000, 5000), {"engine": 400.0, "sink": 20.0}, 7500.0)
    root = ElementTree.fromstring(drawn)
    texts = [element.text for element in root.iter() if element.text]
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "500 <messages>" in texts
    assert {"engine", "sink", "400", "20", "what all cores sign: 7,500/s", "2.0 s"} <= set(texts)
    lines = [one for one in root.iter() if one.tag.endswith("polyline")]
    assert len(lines[0].attrib["points"].split()) == 2
    assert ElementTree.fromstring(chart.svg("nothing", Samples(), {}, 0.0)) is not None


@pytest.mark.parametrize(
    ("plan", "wanted"),
    [
        (bench.Plan(), []),
        (bench.Plan(tls=True), ['tls = "required"']),
        (bench.Plan(fast=True), ["[engine.signing]", 'implementation = "multi-buffer"']),
        (bench.Plan(fast=False, scene="smart"), ['implementation = "openssl"', "connections = 1000"]),
    ],
)
def test_what_a_benchmark_asks_for_is_in_its_configuration(folder: Path, plan: bench.Plan, wanted: list[str]) -> None:
    config = folder / "sales-push.toml"
    config.write_text(configuration(plan.setting, {"accept": 2525}, 8080, 9090), encoding="utf-8")
    lines = config.read_text().splitlines()

    load(EngineSettings, config)
    assert set(wanted) <= set(lines)
    assert [line for line in lines if line.startswith(("tls =", "implementation"))] == [
        line for line in wanted if line.startswith(("tls", "impl"))
    ]


def test_many_domains_are_one_route(folder: Path) -> None:
    config = folder / "sales-push.toml"
    config.write_text(configuration(bench.Plan(domains=500).setting, {"accept": 2525}, 8080, 9090), encoding="utf-8")
    assert load(EngineSettings, config).routes == {"*.posthaus.test": "127.0.0.1:2525"}
    assert {
        row["address"].partition("@")[2].partition(".")[2] for row in people(50, providers=(bench.provider(500),))
    } == {"posthaus.test"}


@pytest.mark.parametrize("scene", bench.SCENES)
def test_every_scene_is_one_provider_of_our_sink(scene: str) -> None:
    asked = parse(bench.Plan(scene=scene).setting.sinks["accept"])
    assert asked.label == "accept"
    assert asked.behaviour == ("accept" if scene == "plain" else "mixed")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--recipients", "5"], "--recipients '5'"),
        (["--recipients", "1k,many"], "'many'"),
        (["--recipients", ""], "from 100 to 10M"),
        (["--sink", "elsewhere"], "one of own, postfix, smtpd"),
        (["--mix", "--smart"], "give one of them"),
        (["--mix", "--sink", "postfix"], "smtp-sink takes everything"),
        (["--smart", "--sink", "postfix"], "use --sink smtpd"),
        (["--chunking", "--sink", "smtpd"], "leave --sink out"),
        (["--tls", "--sink", "postfix"], "smtp-sink has no STARTTLS"),
        (["--one-domain", "--domains", "7"], "contradict"),
        (["--chart", "nowhere/chart.svg"], "no such folder"),
        (["--chart", "."], "is a folder"),
    ],
)
def test_wrong_usage_of_bench_names_the_option_and_the_remedy(words: list[str], told: str) -> None:
    done = CliRunner().invoke(rehearsal_commands, ["bench", *words])
    assert done.exit_code == 2
    assert told in done.output


def test_a_missing_sink_is_told_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strangers, "_PATH", "/nowhere")
    for kind in strangers.KINDS:
        done = CliRunner().invoke(rehearsal_commands, ["bench", "--sink", kind])
        assert done.exit_code == 2
        assert "apt-get install postfix" in done.output


def test_counts_of_recipients_are_read_as_people_write_them() -> None:
    assert _counts("10k,100k, 1M,20_000,2.5k") == (10_000, 100_000, 1_000_000, 20_000, 2_500)


@pytest.mark.parametrize(
    ("words", "micro", "journey"),
    [
        ([], "", []),
        (["-k", "sign"], "sign", []),
        (["--micro"], "", None),
        (["--journey", "--recipients", "10k,1M", "--no-fast"], None, ["--recipients", "10k,1M", "--no-fast"]),
    ],
)
def test_make_bench_hands_its_options_on(
    words: list[str],
    micro: str | None,
    journey: list[str] | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: dict[str, object] = {}

    def _micro(expression: str) -> tuple[int, dict[str, float]]:
        asked["micro"] = expression
        return 0, {}

    def _journey(options: list[str]) -> tuple[int, dict[str, object]]:
        asked["journey"] = options
        return 3, {"ok": False}

    monkeypatch.setattr(make_bench, "micro", _micro)
    monkeypatch.setattr(make_bench, "journey", _journey)
    monkeypatch.setattr("sys.argv", ["benchmarks", *words])
    code = make_bench.main()

    assert code == (0 if journey is None else 3), "the journey's own"
    assert asked == {name: value for name, value in (("micro", micro), ("journey", journey)) if value is not None}
    assert json.loads(capsys.readouterr().out).keys() == asked.keys()
