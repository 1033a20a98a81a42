"""The house itself: no drawers, three packages under one roof, plates on the doors, locks without registries."""

from __future__ import annotations

import ast
import importlib
import json
import re
import stat
import subprocess
import tomllib
from importlib.metadata import files, packages_distributions
from pathlib import Path

import pytest

from engine.campaign.audience import AudienceFile
from engine.campaign.validation import read
from policy.instants import parse_rfc3339

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("engine", "tracker", "policy")
DRAWERS = {"util", "utils", "helper", "helpers", "common", "misc", "base", "core", "manager"}
LOCKS = (
    "requirements.txt",
    "requirements-dev.txt",
    "requirements-build.txt",
    "requirements-fast.txt",
    "requirements-postgres.txt",
    "requirements-compile.txt",
)


def sources(*tops: str) -> list[Path]:
    return [path for top in tops for path in sorted((ROOT / top).rglob("*.py"))]


def tracked() -> list[Path]:
    """What git knows or would take; without git (an unpacked archive) the packages and what runs them."""
    if not (ROOT / ".git").exists():
        return [*sources(*PACKAGES, "tests", "benchmarks"), ROOT / ".ci" / "run", ROOT / "Makefile"]
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    return [ROOT / name for name in listed.decode().split("\0") if name and (ROOT / name).is_file()]


def test_there_is_no_drawer() -> None:
    everything = [path for top in (*PACKAGES, "tests", "benchmarks") for path in (ROOT / top).rglob("*")]

    assert [str(path) for path in everything if path.stem.strip("_") in DRAWERS and path.suffix in (".py", "")] == []


def test_the_three_packages_stand_under_one_roof() -> None:
    homes = {Path(str(importlib.import_module(name).__file__)).resolve().parents[1] for name in PACKAGES}

    assert len(homes) == 1, f"another distribution's package was imported: {homes}"


def test_no_other_distribution_owns_our_names() -> None:
    """pip installs two owners of one package in silence, and removing one then deletes files of the other."""
    owners = packages_distributions()

    for name in PACKAGES:
        # an editable install owns a .pth, not the package: then nobody is listed
        assert set(owners.get(name, [])) <= {"sales-push"}, f"{name}/ belongs to {owners[name]}"
    assert files("sales-push"), "sales-push is not installed: run make test, not pytest alone"


@pytest.mark.parametrize("path", sources(*PACKAGES), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_room_has_a_plate(path: Path) -> None:
    if path.parent.name == "versions":
        return  # a migration's name and revision say what it does
    plate = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))

    assert plate, "no docstring that says what the room promises"
    assert len(plate) >= (120 if path.name == "__init__.py" else 40), "a plate says more than a name"


def test_every_folder_with_python_is_a_package() -> None:
    """Without __init__.py a folder is a namespace package: lint contracts and mypy pass it over."""
    folders = {path.parent for path in sources(*PACKAGES, "tests", "benchmarks")}
    bare = [folder for folder in folders if not (folder / "__init__.py").exists() and folder.name != "versions"]

    assert [str(folder) for folder in bare if "migrations" not in folder.parts] == []


@pytest.mark.parametrize("name", LOCKS)
def test_locks_pin_with_hashes_and_name_no_registry(name: str) -> None:
    text = (ROOT / "deploy" / name).read_text(encoding="utf-8")
    requirements = text.replace("\\\n", " ").splitlines()

    assert "://" not in text
    assert "--index" not in text
    assert "--find-links" not in text
    for line in requirements:
        if line and not line.startswith("#"):
            assert re.match(r"[a-z0-9][a-z0-9._-]*==\S+ .*--hash=sha256:[0-9a-f]{64}", line), line[:80]


def test_tests_run_with_what_is_shipped() -> None:
    shipped, tested = (pins(name) for name in ("requirements.txt", "requirements-dev.txt"))

    assert {name: tested.get(name) for name in shipped} == shipped


def pins(name: str) -> dict[str, str]:
    text = (ROOT / "deploy" / name).read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9][a-z0-9._-]*)==(\S+)", text, re.MULTILINE))


def test_every_dependency_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    locked = pins("requirements-dev.txt")

    for requirement in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        name = re.split(r"[\[<>=;~! ]", requirement)[0].lower().replace("_", "-")
        assert name in locked, f"{name} is not locked: run make lock"


def test_nothing_but_scripts_may_be_executed_and_nothing_is_a_key() -> None:
    for path in tracked():
        executable = bool(path.stat().st_mode & stat.S_IXUSR)
        assert executable == path.read_bytes()[:2].startswith(b"#!"), f"{path}: mode and first line disagree"
        assert path.suffix not in (".pem", ".key") or "corpora" in path.parts, f"{path}: no key belongs into the tree"


def test_the_wheel_holds_the_three_packages_and_is_never_uploaded() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == list(PACKAGES)
    assert "Private :: Do Not Upload" in project["project"]["classifiers"]


def test_the_readme_names_commands_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))

    assert set(re.findall(r"`?make ([a-z]+)", readme)) <= targets
    for target in re.findall(r"\]\(([^)#]+)\)", readme):
        assert (ROOT / target).exists(), f"README points to {target}"


def test_the_job_of_the_readme_is_a_job() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [job] = re.findall(r"```json\n(.*?)```", readme, re.DOTALL)
    created = parse_rfc3339(json.loads(job)["created_at"])

    assert read(job.encode(), created).problems == []


def test_the_people_of_the_readme_can_be_read_and_bring_their_consent(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [rows] = re.findall(r"```csv\n(.*?)```", readme, re.DOTALL)
    path = tmp_path / "people.csv"
    path.write_text(rows, encoding="utf-8")

    [person] = list(AudienceFile(path))
    assert {"source", "time"} <= person["consent"]["mail_marketing"].keys()
    assert [line.problems for line in AudienceFile(path).lines()] == [[]]
