"""The console script: one tree of commands, init that makes what is missing, clear refusals, a quick start."""

from __future__ import annotations

import base64
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from engine.cli import merged
from engine.cli.records import Record, SigningKey, records
from engine.settings import EngineSettings, dkim_files
from policy import accounts, schema
from policy.keys import Keyring
from policy.settings import PolicySettings, load

OFFICER = ("--officer-name", "Privacy Officer", "--officer-address", "privacy@example.com")


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, because the embedded server's socket lies below it."""
    with tempfile.TemporaryDirectory(prefix="sp-") as name:
        yield Path(name)


def sales_push(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from engine.cli import main; main()"]
    return subprocess.run(
        [*program, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip


def names(app: typer.Typer) -> set[str]:
    commands = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    return commands | {str(group.name) for group in app.registered_groups}


def floor(*commands: str, group: str = "", inside: tuple[str, ...] = ()) -> typer.Typer:
    app = typer.Typer()
    for name in commands:
        app.command(name)(lambda: None)
    if group:
        below = typer.Typer(help=f"help of {inside[0]}")
        for name in inside:
            below.command(name)(lambda: None)
        app.add_typer(below, name=group)
    return app


def test_groups_of_one_name_grow_together() -> None:
    whole = merged(
        [floor("status", group="run", inside=("policy",)), floor("up", group="run", inside=("engine", "ops"))]
    )

    assert names(whole) == {"status", "up", "run"}
    [run] = [group.typer_instance for group in whole.registered_groups]
    assert run is not None
    assert names(run) == {"policy", "engine", "ops"}


@pytest.mark.parametrize(
    "apps",
    [
        [floor("status"), floor("status")],
        [floor("run"), floor(group="run", inside=("ops",))],
        [floor(group="run", inside=("ops",)), floor(group="run", inside=("ops",))],
    ],
)
def test_two_things_of_one_name_are_refused(apps: list[typer.Typer]) -> None:
    with pytest.raises(RuntimeError, match="named"):
        merged(apps)


def test_every_floor_is_in_the_tree(folder: Path) -> None:
    listed = sales_push(folder, "--help")
    run = sales_push(folder, "run", "--help")

    assert listed.returncode == run.returncode == 0, listed.stderr + run.stderr
    for name in (
        "init",
        "up",
        "config",
        "status",
        "why",
        "suppress",
        "jobs",
        "account",
        "submit",
        "render",
        "schema",
        "demo",
    ):
        assert re.search(rf"\b{name}\b", listed.stdout), f"{name} is missing"
    for name in ("policy", "engine", "tracker", "ops"):
        assert re.search(rf"\b{name}\b", run.stdout), f"run {name} is missing"


def test_help_loads_no_heavy_library(folder: Path) -> None:
    """It starts fast: what a command needs is imported inside it."""
    asked = "import sys; from engine.cli import assembled; assembled(); print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, timeout=60, check=True)

    heavy = {
        "aiohttp",
        "sqlalchemy",
        "alembic",
        "pydantic",
        "redis",
        "minijinja",
        "aiosmtplib",
        "dns",
        "uvloop",
        "lxml",
    }
    assert heavy.isdisjoint(done.stdout.split())


def test_init_makes_everything_and_a_second_time_changes_nothing(folder: Path) -> None:
    made = sales_push(folder, "init", "--domain", "Example.com", "--hostname", "mail.example.com", *OFFICER)
    assert made.returncode == 0, made.stderr

    policy = load(PolicySettings, folder / "sales-push.toml")
    assert policy.officer.address == "privacy@example.com"
    assert policy.bounce_domain == "bounce.example.com"
    assert Keyring.load(policy.keys_dir).intake_public.hex() in made.stdout
    for path in policy.data_dir.rglob("*"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077 or path.suffix in (".db", ".db-wal"), (
            f"{path} is open to others"
        )
    store = schema.open_store(policy.sql_address(), writer=False)
    with store.begin() as conn:
        assert [account.name for account in accounts.every(conn)] == ["default"]
    store.dispose()

    before = {
        path: path.read_bytes() for path in [folder / "sales-push.toml", *policy.keys_dir.rglob("*")] if path.is_file()
    }
    again = sales_push(
        folder, "init", "--domain", "example.com", "--domain", "example.org", "--account", "second", *OFFICER
    )
    assert again.returncode == 0, again.stderr
    assert {path: path.read_bytes() for path in before} == before
    assert dkim_files(EngineSettings(), policy.keys_dir).keys() == {"example.com", "example.org"}
    assert "made     account second" in again.stdout
    checked = sales_push(folder, "config", "--check")
    assert (checked.returncode, checked.stderr) == (0, ""), "init is the first review (P-39)"


def test_init_prints_the_records_of_the_keys_it_made_and_no_private_key(folder: Path) -> None:
    done = sales_push(folder, "init", "--domain", "example.com", "--hostname", "mail.example.com", *OFFICER)
    files = dkim_files(EngineSettings(), folder / "sales-push-data" / "keys")["example.com"]
    printed = done.stdout.replace('" "', "")

    private = serialization.load_pem_private_key(files.rsa.read_bytes(), password=None)
    assert isinstance(private, rsa.RSAPrivateKey)
    assert private.key_size == 2048
    der = private.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert (
        f'{files.rsa_selector}._domainkey.example.com. 3600 IN TXT "v=DKIM1; k=rsa; p={base64.b64encode(der).decode()}"'
        in printed
    )
    assert files.ed25519 is not None
    second = serialization.load_pem_private_key(files.ed25519.read_bytes(), password=None)
    assert isinstance(second, ed25519.Ed25519PrivateKey)
    raw = base64.b64encode(second.public_key().public_bytes_raw()).decode()
    assert f'{files.ed25519_selector}._domainkey.example.com. 3600 IN TXT "v=DKIM1; k=ed25519; p={raw}"' in printed
    assert "_dmarc.example.com. 3600 IN TXT" in printed
    assert "bounce.example.com. 3600 IN MX 10 mail.example.com." in printed
    assert "link.example.com. 3600 IN CNAME mail.example.com." in printed
    assert "PRIVATE" not in done.stdout
    for path in (folder / "sales-push-data" / "keys").glob("*.*"):
        assert path.read_text().strip() not in done.stdout, f"{path.name} was printed"
    assert base64.b64encode(second.private_bytes_raw()).decode() not in done.stdout


def test_init_refuses_without_a_privacy_officer_and_leaves_nothing(folder: Path) -> None:
    done = sales_push(folder, "init", "--domain", "example.com")

    assert done.returncode == 1
    assert "--officer-address" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("domain", ["", "a b", "example.com\nX", "-x.example", "x" * 64 + ".example"])
def test_init_refuses_a_domain_that_is_none(folder: Path, domain: str) -> None:
    done = sales_push(folder, "init", "--domain", domain, *OFFICER)

    assert done.returncode == 1
    assert "not a domain" in done.stderr


def test_a_wrong_configuration_ends_with_2_and_every_mistake(folder: Path) -> None:
    (folder / "sales-push.toml").write_text("[engine]\nworkers = -1\nhostnam = 'x'\n", encoding="utf-8")

    for command in (("config", "--check"), ("config",), ("up",)):
        done = sales_push(folder, *command)
        assert done.returncode == 2, command
        assert "engine.workers" in done.stderr
        assert "did you mean hostname?" in done.stderr
        assert "policy.officer" in done.stderr
        assert "Traceback" not in done.stderr


def test_up_without_keys_says_what_to_do(folder: Path) -> None:
    (folder / "sales-push.toml").write_text(
        '[policy.officer]\nname = "P"\naddress = "privacy@example.com"\n', encoding="utf-8"
    )

    done = sales_push(folder, "up")

    assert done.returncode == 2
    assert "sales-push init" in done.stderr


def test_a_long_record_is_cut_into_strings_of_255() -> None:
    line = Record("a.example", "TXT", "x" * 600, "test").line()

    strings = re.findall(r'"([^"]*)"', line)
    assert [len(string) for string in strings] == [255, 255, 90]


def test_each_domain_gets_the_records_of_its_own_keys() -> None:
    keys = [SigningKey("a.example", "s", "rsa", "AAA"), SigningKey("b.example", "s", "rsa", "BBB")]

    found = records(keys, ["a.example", "b.example"], "bounce.a.example", "mail.a.example", "mail.a.example")

    values = {record.name: record.value for record in found if "_domainkey" in record.name}
    assert values == {
        "s._domainkey.a.example": "v=DKIM1; k=rsa; p=AAA",
        "s._domainkey.b.example": "v=DKIM1; k=rsa; p=BBB",
    }
    assert not [record for record in found if record.type == "CNAME"]  # a name with other records cannot be an alias
