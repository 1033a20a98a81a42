"""What goes when: each class exactly at its boundary, under a clock of our own; nothing without a plan for its end."""

from __future__ import annotations

from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy import keyspace, schema
from policy.classes import RETENTION, Period, RetentionSettings, gone_from
from policy.instants import DAY_US
from policy.retention import BY_ACT, ENDLESS, PLACES, TRIMMED, Place, Sweep, limits, place_of, plan

PERIODS = RetentionSettings().periods()
DATED = [place for place in PLACES if place.dated]


def day(text: str) -> int:
    return (date.fromisoformat(text) - date(1970, 1, 1)).days


def test_every_table_has_exactly_one_plan_for_its_end() -> None:
    """Law (decision 14): a table that nobody swept, or two rooms end, fails here by its name."""
    swept = {f"table:{place.table}" for place in PLACES if place.name == place.table}
    along = {f"table:{table}" for place in PLACES for table, _ in place.with_rows}
    told = [name for name in (*BY_ACT, *ENDLESS) if name.startswith("table:")]
    tables = {f"table:{name}" for name in schema.metadata.tables}
    assert tables - swept - along - set(told) == set(), "no plan for their end"
    assert (swept | along | set(told)) - tables == set(), "no such table"
    assert swept & set(told) == set()
    assert len(told) == len(set(told))
    assert (along - {"table:purge"}) & set(told) == set()


def test_every_family_of_keys_has_exactly_one_plan_for_its_end() -> None:
    told = [f"key:{name}" for name in TRIMMED] + [name for name in (*BY_ACT, *ENDLESS) if name.startswith("key:")]
    assert sorted(told) == sorted(f"key:{entry.name}" for entry in keyspace.CATALOGUE)
    assert all(len(reason) > 5 for reason in (BY_ACT | ENDLESS).values())


def test_places_name_columns_that_there_are_with_the_class_of_the_column() -> None:
    for place in PLACES:
        table = schema.metadata.tables[place.table]
        assert place.retention in RETENTION
        if place.dated:
            assert place.dated in table.c
        for column in place.clears:
            assert table.c[column].nullable
        for name, column in place.with_rows:
            assert column in schema.metadata.tables[name].c
    for name, retention in (
        ("hit", "R2"),
        ("message", "R3"),
        ("history", "R3"),
        ("last_open", "R2"),
        ("reading", "R6"),
    ):
        assert place_of(name).retention == retention
        assert {column.info["retention"] for column in schema.metadata.tables[name].c} == {retention}
    for name, columns in (("link", {"url"}), ("job_view", {"html"})):
        assert {schema.metadata.tables[name].c[column].info["retention"] for column in columns} == {"R2"}


@pytest.mark.parametrize("place", DATED, ids=lambda place: str(place.name))
@pytest.mark.parametrize("start", ["2026-11-23", "2028-02-29", "2027-12-31", "2026-03-29", "2026-10-25"])
def test_p10_each_class_goes_at_its_boundary_and_not_a_microsecond_before(place: Place, start: str) -> None:
    """Leap day and both changes of summer time among the days."""

    name, kept = place.name, PERIODS.get(place.retention)
    dated = day(start)
    boundary = (gone_from(dated, kept) if kept is not None else dated) * DAY_US
    holdings = {name: [dated, dated + 1]}
    assert [one.day for one in plan(boundary, PERIODS, {}, holdings) if one.day == dated] == [dated]
    assert dated not in [one.day for one in plan(boundary - 1, PERIODS, {}, holdings)]


def test_p10_ninety_days() -> None:
    """R3: day 91 gone, day 89 still there."""
    holdings = {"message": [1000]}
    assert plan(1091 * DAY_US, PERIODS, {}, holdings) == [Sweep("message", 1000, 0, "R3")]
    assert plan(1089 * DAY_US, PERIODS, {}, holdings) == []


def test_an_account_that_keeps_less_has_sweeps_of_its_own() -> None:
    shorter = {(7, "R3"): 30, (8, "R3"): 0, (9, "R2"): 10}
    holdings = {"message": [900, 909, 910, 950, 969, 970, 971, 999, 1000]}
    sweeps = plan(1000 * DAY_US, PERIODS, shorter, holdings)
    assert [(one.day, one.account) for one in sweeps] == [
        (900, 0), (909, 0), (910, 0), (950, 7), (969, 7), (970, 7), (950, 8), (969, 8), (970, 8), (971, 8), (999, 8),
    ]  # fmt: skip


def test_a_shortening_that_is_none_changes_nothing() -> None:
    assert limits(1000 * DAY_US, PERIODS, {(7, "R3"): 90, (8, "R3"): 400}) == limits(1000 * DAY_US, PERIODS, {})


@given(
    st.integers(9000, 60_000),
    st.dictionaries(st.sampled_from([(a, c) for a in (1, 2) for c in ("R2", "R3", "R4")]), st.integers(0, 500)),
    st.sets(st.integers(-1500, 5), max_size=8),
)
def test_nothing_is_kept_longer_than_its_class_and_nothing_goes_before_today(
    today: int, shorter: dict[tuple[int, str], int], offsets: set[int]
) -> None:
    days = [today + offset for offset in offsets]
    sweeps = plan(today * DAY_US, PERIODS, shorter, {place.name: days for place in DATED})
    assert len(sweeps) == len(set(sweeps))
    gone = {(one.place, one.day, one.account) for one in sweeps}
    for place in DATED:
        kept = PERIODS.get(place.retention)
        for one in days:
            over = one <= today if kept is None else gone_from(one, kept) <= today
            assert ((place.name, one, 0) in gone) == over
            for account in (1, 2):
                length = shorter.get((account, place.retention), 10_000) if place.account else 10_000
                if one + length <= today and one < today:
                    assert over or (place.name, one, account) in gone
                else:
                    assert (place.name, one, account) not in gone
    assert all(one.day < today or place_of(one.place).retention == "RH" for one in sweeps)


def test_another_period_is_another_boundary() -> None:
    """P-06: R2 of 12 months instead of 13."""
    shorter = RetentionSettings.model_validate({"r2": "12 months"}).periods()
    holdings = {"hit": [day("2026-11-23")]}
    at = day("2027-11-23") * DAY_US
    assert plan(at, shorter, {}, holdings) == [Sweep("hit", day("2026-11-23"), 0, "R2")]
    assert plan(at, PERIODS, {}, holdings) == []
    assert plan(at, PERIODS | {"R2": Period(12, "month")}, {}, holdings) != []
