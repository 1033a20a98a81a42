"""Delivery windows: at which hours of somebody's day the mail of a job may leave (issue 3, item 1).

Laws:
- a window is open while the clock on the wall of its zone reads a time from `opens` up to, not including, `closes`, on
  one of its days. Nothing else counts: in the night in which that clock jumps from 2 to 3, a window that opens at 2:30
  opens at 3; where an hour is lived twice, it is open twice;
- a window that closes at or before the hour it opens spans midnight, and its days are those on which it opens;
- a zone this host does not know is closed, and asked again after `UNKNOWN_ZONE` seconds: mail at the wrong hour cannot
  be called back, mail that waits can be sent (acceptance refuses such zones, so this is another host's missing tzdata).

    `opens_in`    seconds from now until it is open, 0 when it is
    `closes_in`   seconds from now until it is closed, 0 when it is; infinite for a window that never closes
    `after`       the instant at which it will have been open for so many seconds: how a `rate` counts

Pure: the clock is an argument. The rules of a zone are data (zoneinfo: RFC 9636 files of the system, else the package
tzdata), read once. Cost: 2 us a question, 20 us when the answer lies behind a change of the clock.

Known limits: of two changes of one zone's clock within a day the first may be missed (tzdata has no such pair since
1970). New rules of a zone are read at the next start.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final
from zoneinfo import ZoneInfo, available_timezones

import msgspec

from policy.instants import DAY_US, SECOND_US, WEEK_US

UNKNOWN_ZONE: Final = 900.0  # seconds
EVERY_DAY: Final = (1 << 7) - 1
_MINUTE_US: Final = 60 * SECOND_US
_DAY_MINUTES: Final = 24 * 60
_WEEK_MINUTES: Final = 7 * _DAY_MINUTES
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_EPOCH_DAY_US: Final = 3 * DAY_US  # since Monday: 1970-01-01 was a Thursday
_MOST_CHANGES: Final = 64  # of a clock within the days one question may look ahead: a bound, not a number ever reached
_NO_ZONES: Final = frozenset({"Factory", "localtime", "posixrules"})  # files of the system that are no place's time


class Window(msgspec.Struct, frozen=True):
    """opens, closes: minutes since midnight, closes up to 1440; zone: an IANA name; days: bit 0 is Monday."""

    opens: int
    closes: int
    zone: str
    days: int = EVERY_DAY


class Timing(msgspec.Struct, frozen=True):
    """What the stored contents of a job say about when: the fields delivery reads beside the campaign."""

    window: Window | None = None


def opens_in(now_us: int, window: Window | None) -> float:
    """Seconds until mail may leave, 0.0 when it may at `now_us` (microseconds). None is a job without a window."""
    if window is None:
        return 0.0
    zone = _zone(window.zone)
    if zone is None:
        return UNKNOWN_ZONE
    wait = _until(now_us, window, zone, is_open=True)
    return UNKNOWN_ZONE if wait is None else wait / SECOND_US


def closes_in(now_us: int, window: Window | None) -> float:
    """Seconds for which mail may still leave."""
    if window is None:
        return float("inf")
    zone = _zone(window.zone)
    if zone is None:
        return 0.0
    wait = _until(now_us, window, zone, is_open=False)
    return float("inf") if wait is None else wait / SECOND_US


def after(start_us: int, seconds: float, window: Window | None, latest_us: int) -> int:
    """The instant at which the window will have been open for `seconds` since `start_us`, `latest_us` at most."""
    at, left = start_us, round(seconds * SECOND_US)
    while at < latest_us:
        at += round(opens_in(at, window) * SECOND_US)
        span = closes_in(at, window)
        if span == 0.0:  # a zone nobody knows: the lease asks again
            break
        if span * SECOND_US > left:
            return min(at + left, latest_us)
        at, left = at + round(span * SECOND_US), left - round(span * SECOND_US)
    return min(at, latest_us)


@lru_cache(maxsize=1)
def zones() -> frozenset[str]:
    """Every zone this host knows. Reads some 600 names once, 30 ms."""
    return frozenset(available_timezones() - _NO_ZONES)


@lru_cache(maxsize=256)
def _zone(name: str) -> ZoneInfo | None:
    try:
        return ZoneInfo(name)
    except (KeyError, OSError, ValueError):  # no such zone, a folder of zones, a name no file can have
        return None


@lru_cache(maxsize=256)
def _spans(window: Window) -> tuple[tuple[int, int], ...]:
    """When it is open, in microseconds since Monday 00:00 by the clock on the wall: half-open, sorted, apart."""
    length = (window.closes - window.opens) % _DAY_MINUTES or _DAY_MINUTES
    pieces: list[tuple[int, int]] = []
    for day in range(7):
        if window.days >> day & 1:
            start = day * _DAY_MINUTES + window.opens
            pieces.append((start, min(start + length, _WEEK_MINUTES)))
            if start + length > _WEEK_MINUTES:
                pieces.append((0, start + length - _WEEK_MINUTES))
    merged: list[tuple[int, int]] = []
    for start, end in sorted(pieces):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple((start * _MINUTE_US, end * _MINUTE_US) for start, end in merged)


def _until(now_us: int, window: Window, zone: ZoneInfo, *, is_open: bool) -> int | None:
    """Microseconds until the window is open (or closed), None when it never is."""
    at = now_us
    for _ in range(_MOST_CHANGES):
        offset = _offset(at, zone)
        wait = _steady(at + offset, window, is_open=is_open)
        if wait == 0:
            return at - now_us
        if wait is None:
            return None
        change = _change(at, at + wait, zone, offset)
        if change is None:
            return at + wait - now_us
        at = change  # from here the clock on the wall reads otherwise
    return None


def _steady(local_us: int, window: Window, *, is_open: bool) -> int | None:
    """`_until`, by a clock on the wall that is never changed. local_us: what it reads, as microseconds."""
    now = (local_us + _EPOCH_DAY_US) % WEEK_US
    spans = _spans(window)
    inside = next((end for start, end in spans if start <= now < end), None)
    if is_open == (inside is not None):
        return 0
    if inside is None:
        starts = [start for start, _ in spans]
        return min(((start - now) % WEEK_US for start in starts), default=None)
    if inside == WEEK_US and spans[0][0] == 0:  # over the end of Sunday into Monday's span
        if len(spans) == 1:
            return None
        inside += spans[0][1]
    return inside - now


def _offset(at_us: int, zone: ZoneInfo) -> int:
    """Microseconds by which the clock on the wall is ahead of UTC."""
    offset = (_EPOCH + timedelta(microseconds=at_us)).astimezone(zone).utcoffset()
    assert offset is not None
    return offset // timedelta(microseconds=1)


def _change(after_us: int, until_us: int, zone: ZoneInfo, offset: int) -> int | None:
    """The first instant in (after_us, until_us] at which the offset is another."""
    before = after_us
    while before < until_us:
        then = min(before + DAY_US, until_us)
        if _offset(then, zone) != offset:
            while then - before > 1:
                middle = (before + then) // 2
                if _offset(middle, zone) == offset:
                    before = middle
                else:
                    then = middle
            return then
        before = then
    return None
