"""What the papers say is there: commands, settings, rooms, and the table of what reads people's data."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from engine.cli import settings_models
from policy.pages import PagesSettings
from policy.purposes import registry
from tests.journeys.test_reading_commands import READS, commands

ROOT = Path(__file__).resolve().parents[1]
PAPERS = ("README.md", "SECURITY.md", "docs/privacy.md")
SOON: set[str] = set()  # rooms that are there already, on their way into the tree of commands
PRIVACY = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("paper", PAPERS)
def test_a_command_that_a_paper_names_exists(paper: str) -> None:
    known = {name for name, _ in commands()} | SOON
    groups = {name.split()[0] for name in known if " " in name}
    typed = re.findall(r"`sales-push ([a-z][^`]*)`", (ROOT / paper).read_text(encoding="utf-8"))
    assert typed
    for line in typed:
        first, second = [*line.split(), "", ""][:2]
        alone = first in groups and not second  # the group as such
        assert alone or first in known or {f"{first} {one}" for one in second.split("|")} <= known, (
            f"{paper}: sales-push {line}"
        )


def test_the_readme_lists_the_commands_of_this_floor() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Privacy")[1].split("\n## ")[0]
    known = {name for name, _ in commands()} | SOON
    listed = {
        f"{group} {name}"
        for group, names in re.findall(r"`([a-z]+) ([a-z-]+(?:\\\|[a-z-]+)+)", text)
        for name in names.split("\\|")
    }
    listed |= {
        " ".join(re.findall(r"[a-z-]+", words)) for words in re.findall(r"`([a-z]+(?: [a-z]+)?)(?: [A-Z]+)?`", text)
    }
    listed -= {"policy-table"}
    assert len(listed) > 25
    assert listed <= known
    assert set(READS) - {"why", "suppress check", "suppress export"} <= listed


def fields_of(model: type[BaseModel]) -> set[str]:
    return set(model.model_fields)


def test_a_setting_that_the_privacy_page_names_exists() -> None:
    models: dict[str, Any] = {model.__name__: model for model in settings_models()}
    policy = models["PolicySettings"]
    named = re.findall(r"`\[policy(?:\.([a-z]+))?\] ([a-z_`, ]+)`", PRIVACY)
    assert len(named) >= 6
    for table, names in named:
        model = policy if not table else PagesSettings if table == "pages" else policy.model_fields[table].annotation
        for name in re.findall(r"[a-z_]+", names):
            assert name in fields_of(model), f"[policy.{table}] {name}"


def test_a_room_that_the_privacy_page_names_exists() -> None:
    rooms = set(re.findall(r"`((?:policy|tracker|engine)(?:\.[a-z_]+)+)`", PRIVACY))
    assert len(rooms) >= 6
    for room in rooms:
        assert importlib.util.find_spec(room) is not None, room


def test_the_privacy_page_settles_all_ten_contradictions_and_says_what_is_left() -> None:
    parts = re.split(r"^### (\d+)\. .+$", PRIVACY, flags=re.MULTILINE)
    assert [int(number) for number in parts[1::2]] == list(range(1, 11))
    for number, part in zip(parts[1::2], parts[2::2], strict=True):
        settled = part.split("\n## ")[0]
        assert settled.count("**The program**") == 1, number
        assert settled.count("**You decide**") == 1, number


def test_the_privacy_page_lists_the_commands_that_read_with_their_purposes() -> None:
    rows = re.findall(r"^\| `([a-z ]+)` \| `([a-z_]+)` \| (C\d) \|", PRIVACY, re.MULTILINE)
    assert {command: purpose for command, purpose, _ in rows} == {name: own for name, (_, own) in READS.items()}
    for command, purpose, field_class in rows:
        assert field_class in registry().purposes[purpose].reads, command
