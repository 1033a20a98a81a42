"""P-04: nothing starts without a privacy officer who can be written to, and everybody is told who it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from policy import settings as settings_room
from policy.cli.retention import policy as commands
from policy.configuration import ConfigError
from policy.rights.letters import Letterhead
from policy.settings import Officer, PolicySettings
from tests.policy.rights.conftest import ADA, House, house
from tests.promises.marks import promise
from tests.tracker.twins import CHOOSE, LEAVE, NOTICE, open_house
from tracker.answers import Answers

__all__ = ["house"]

NAME, ADDRESS = "Grace Officer", "privacy@platform.example"


class Unmanned(PolicySettings):
    officer: Any = None


def _nobodys_head(_name: str, _address: str, *rest: Any) -> Letterhead:
    return Letterhead("", "noreply@platform.example", *rest)


def _nobodys_pages(*_: str, **options: Any) -> Answers:
    return Answers("", "", **options)


@promise("P-04", off={"policy.settings.PolicySettings": Unmanned})
@pytest.mark.parametrize("officer", ["", "officer = { }\n", 'officer = { name = "", address = "" }\n'])
def test_p04_without_an_officer_it_refuses_to_start_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, officer: str
) -> None:
    monkeypatch.delenv("SALES_PUSH_POLICY_OFFICER__ADDRESS", raising=False)
    config = tmp_path / "sales-push.toml"
    config.write_text(f"[policy]\n{officer}")
    told = CliRunner().invoke(commands, ["inventory", "--json", "--config", str(config)])
    assert told.exit_code != 0
    with pytest.raises(ConfigError, match="officer"):
        settings_room.load(settings_room.PolicySettings, config)


@promise("P-04", off={"policy.settings.parse": lambda address: None})
@pytest.mark.parametrize("address", ["nobody", "privacy@", "a b@example.org", "privacy@-example.org"])
def test_p04_an_address_nobody_can_deliver_to_is_no_officer(address: str) -> None:
    with pytest.raises(ValueError, match="not a deliverable address"):
        Officer(name=NAME, address=address)


@promise("P-04", off={"tracker.app.Answers": _nobodys_pages})
async def test_p04_every_notice_names_the_officer() -> None:
    async with open_house() as opened:
        for path in (NOTICE, LEAVE, CHOOSE, "/r", "/r/" + "A" * 43, "/nothing-here"):
            _, body = await opened.ask("GET", path)
            assert ADDRESS.encode() in body, path
            assert NAME.encode() in body, path


@promise("P-04", off={"policy.rights.casework.Letterhead": _nobodys_head})
async def test_p04_every_letter_comes_from_the_officer(house: House) -> None:
    told = await house.desk.op_rights_open("access", ADA)
    await house.desk.op_rights_confirm(house.token())
    await house.desk.round()
    other = await house.desk.op_rights_open("erasure", ADA)
    await house.desk.op_rights_refuse(other["ticket"], "GDPR 17(3)(e)")
    waiting = house.desk.outbox.waiting()
    assert {one.letter for one in waiting} >= {"acknowledged", "proof", "done", "refused"}
    assert told["ticket"]
    for one in waiting:
        message = house.desk.outbox.read(one.name)
        assert message is not None
        assert message["From"] == f"{NAME} <{ADDRESS}>", one.letter
