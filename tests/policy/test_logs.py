"""Logs hold no address, whoever logs and however he passes it."""

from __future__ import annotations

import io
import json
import logging
import string
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from policy import logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    out = io.StringIO()
    logs.configure("test", json=True, level="debug", stream=out)
    yield out
    root.handlers[:] = before
    root.setLevel(level)
    structlog.reset_defaults()


SECRET = "ada.lovelace@example.org"


def test_a_line_is_json_with_role_level_and_time(stream: io.StringIO) -> None:
    structlog.get_logger().info("listening", port=8080)
    line = json.loads(stream.getvalue())
    assert (line["event"], line["port"], line["role"], line["level"]) == ("listening", 8080, "test", "info")
    assert line["timestamp"].endswith("Z")


def test_addresses_do_not_come_out(stream: io.StringIO) -> None:
    log = structlog.get_logger()
    log.info(f"to {SECRET}", rcpt=SECRET, nested={SECRET: [("x", SECRET)]}, raw=SECRET.encode(), who={SECRET})
    log.info("encoded", url="http://h/u?a=ada.lovelace%40example.org", quoted="ada.lovelace=40example.org")
    log.info("object", thing=Opaque(), path=f"<{SECRET}>")
    logging.getLogger("library").warning("relaying for %s", SECRET)
    try:
        raise ValueError(f"bad address {SECRET}")
    except ValueError:
        log.exception("failed")
        logging.getLogger("library").exception("failed too")
    text = stream.getvalue()
    assert "lovelace" not in text
    assert "ValueError" in text
    assert text.count(logs.BLANK) >= 10
    assert len([json.loads(line) for line in text.splitlines()]) == 6


class Opaque:
    def __repr__(self) -> str:
        return f"<Recipient {SECRET}>"


def test_levels_are_kept(stream: io.StringIO) -> None:
    logs.configure("test", json=True, level="warning", stream=stream)
    structlog.get_logger().info("quiet")
    logging.getLogger("library").info("quiet")
    assert stream.getvalue() == ""


LOCAL = st.text(string.ascii_letters + string.digits + ".+-_~!#$%&*/?^`{|}é用户", min_size=1, max_size=30)
DOMAIN = st.from_regex(r"[a-z0-9]{1,20}(\.[a-z0-9-]{1,10}){1,3}", fullmatch=True)


@given(before=st.text(max_size=20), local=LOCAL, domain=DOMAIN, after=st.text(max_size=20))
def test_no_at_between_a_local_part_and_a_domain_survives(before: str, local: str, domain: str, after: str) -> None:
    """Law: what leaves matches nothing that looks like an address."""
    cleaned = logs.without_addresses(f"{before} {local}@{domain} {after}")
    assert f"@{domain}" not in cleaned


def test_long_hostile_text_is_cut_and_quick() -> None:
    assert len(logs.without_addresses("a" * 1_000_000)) < 9000
    assert "@b" not in logs.without_addresses("a" * 8000 + "@b")
