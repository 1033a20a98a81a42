"""P-39: whoever set the configuration looks at it once a year; a check of it fails when nobody did."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.cli import commands
from policy.instants import add_months
from policy.review import Standing
from tests.promises.marks import promise


def _always_current(_reviewed: date | None, _today: date) -> Standing:
    return Standing.CURRENT


def _checked(folder: Path, reviewed: str) -> tuple[int, str]:
    config = folder / "sales-push.toml"
    officer = '[policy.officer]\nname = "Grace Officer"\naddress = "privacy@platform.example"\n'
    config.write_text(f"[policy]\n{reviewed}\n{officer}")
    told = CliRunner().invoke(commands, ["config", "--check", "--config", str(config)])
    return (1 if told.exception is not None and not isinstance(told.exception, SystemExit) else told.exit_code), (
        f"{told.output}{told.exception or ''}"
    )


@promise("P-39", off={"policy.review.standing": _always_current})
def test_p39_a_review_of_13_months_ago_warned_before_and_is_a_mistake_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SALES_PUSH_POLICY_REVIEWED", raising=False)
    today = datetime.now(UTC).date()
    code, words = _checked(tmp_path, f"reviewed = {today}")
    assert (code, "warning" in words) == (0, False)
    near = add_months(today, -12)
    code, words = _checked(tmp_path, f"reviewed = {near}")
    assert code == 0
    assert f"warning: policy.reviewed: the review of {near} counts until" in words
    late = add_months(today, -13)
    code, words = _checked(tmp_path, f"reviewed = {late}")
    assert code != 0
    assert f"policy.reviewed: the last review was on {late}, more than 12 months ago" in words
    assert "officer" in words
