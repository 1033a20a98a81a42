"""Settings: every mistake at once, each with its path; file, environment and origins."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from policy.settings import ConfigError, PolicySettings, annotate, config_file, load, load_all, origins

OFFICER = '[policy.officer]\nname = "Officer"\naddress = "privacy@example.org"\n'


class Site(BaseModel):
    model_config = ConfigDict(extra="forbid")
    connections: int = Field(default=4, ge=1, le=64, description="Connections at once.")


class OtherSettings(BaseSettings):
    """A floor with a nested table, a free table and a list."""

    model_config = SettingsConfigDict(env_prefix="SALES_PUSH_OTHER_", env_nested_delimiter="__", extra="forbid")
    site: Site = Site()
    routes: dict[str, str] = {}
    schedule: list[float] = [1.0, 2.0]
    shaping: Path | None = None


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("SALES_PUSH_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def write(folder: Path, text: str) -> Path:
    file = folder / "sales-push.toml"
    file.write_text(text, "utf-8")
    return file


def problems(error: pytest.ExceptionInfo[ConfigError]) -> dict[str, str]:
    return {problem.path: f"{problem.message} {problem.suggestion}" for problem in error.value.problems}


def test_defaults_hang_on_the_data_folder(tmp_path: Path) -> None:
    settings = load(PolicySettings, write(tmp_path, OFFICER + '[policy]\ndata_dir = "data"\n'))
    assert settings.data_dir == tmp_path / "data"
    assert settings.keys_dir == tmp_path / "data" / "keys"
    assert settings.writer_socket == tmp_path / "data" / "policy.sock"
    assert settings.redis_address() == f"unix://{tmp_path}/data/valkey/valkey.sock"
    assert settings.sql_address() == f"sqlite:///{tmp_path}/data/policy.db"
    assert settings.bounce_domain == "localhost"


def test_without_an_officer_nothing_starts(tmp_path: Path) -> None:
    """P-04."""
    with pytest.raises(ConfigError) as error:
        load(PolicySettings)
    assert "SALES_PUSH_POLICY_OFFICER" in problems(error)["policy.officer"]
    with pytest.raises(ConfigError) as error:
        load(PolicySettings, write(tmp_path, '[policy.officer]\nname = "x"\naddress = "not an address"\n'))
    told = problems(error)["policy.officer.address"]
    assert "not a deliverable address" in told
    assert "not an address" not in told  # the value is not repeated


def test_every_mistake_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(
        tmp_path,
        """
[policy]
drain_intervall = 1
drain_batch = 1
public_url = "ftp://example.org"
redis_url = "redis://:secret@example.org"
log_level = "loud"
[policy.officer]
name = ""
adress = "privacy@example.org"
""",
    )
    monkeypatch.setenv("SALES_PUSH_POLICY_CLEAR_SECONDS", "9999")
    monkeypatch.setenv("SALES_PUSH_POLICY_BOUNCE_DOMAN", "x")
    with pytest.raises(ConfigError) as error:
        load(PolicySettings, file)
    told = problems(error)
    assert set(told) == {
        "policy.drain_intervall", "policy.drain_batch", "policy.public_url", "policy.redis_url", "policy.log_level",
        "policy.officer.name", "policy.officer.adress", "policy.officer.address",
        "SALES_PUSH_POLICY_CLEAR_SECONDS", "SALES_PUSH_POLICY_BOUNCE_DOMAN",
    }  # fmt: skip
    assert "drain_interval?" in told["policy.drain_intervall"]
    assert "address?" in told["policy.officer.adress"]
    assert "SALES_PUSH_POLICY_BOUNCE_DOMAIN?" in told["SALES_PUSH_POLICY_BOUNCE_DOMAN"]
    assert "secret" not in str(error.value)


def test_environment_wins_and_origins_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, OFFICER + "[policy]\ndrain_batch = 100\ndrain_interval = 0.5\n")
    monkeypatch.setenv("SALES_PUSH_POLICY_DRAIN_BATCH", "200")
    monkeypatch.setenv("SALES_PUSH_POLICY_OFFICER__NAME", "Another")
    settings = load(PolicySettings)
    assert (settings.drain_batch, settings.drain_interval, settings.officer.name) == (200, 0.5, "Another")
    assert settings.officer.address == "privacy@example.org"
    said = origins(PolicySettings)
    assert said["drain_batch"] == said["officer.name"] == "environment"
    assert said["drain_interval"] == said["officer.address"] == "file"
    assert said["log_level"] == "default"


def test_the_named_file_then_the_variable_then_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config_file() is None
    write(tmp_path, OFFICER)
    assert config_file() == Path("sales-push.toml")
    monkeypatch.setenv("SALES_PUSH_CONFIG", "/elsewhere.toml")
    assert config_file() == Path("/elsewhere.toml")
    assert config_file(tmp_path / "named.toml") == tmp_path / "named.toml"
    with pytest.raises(ConfigError, match="no such file"):
        load(PolicySettings)


@pytest.mark.parametrize("text", ["[policy", "policy = 3", '[policy]\nofficer = "x"\n'])
def test_a_broken_file_is_a_problem_not_a_crash(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load(PolicySettings, write(tmp_path, text))


def test_several_floors_and_unknown_tables(tmp_path: Path) -> None:
    text = OFFICER + '[other.site]\nconections = 3\n[other.routes]\n"*.test" = "127.0.0.1:25"\n[polcy]\nx = 1\n'
    with pytest.raises(ConfigError) as error:
        load_all([PolicySettings, OtherSettings], write(tmp_path, text))
    told = problems(error)
    assert "did you mean policy?" in told["polcy"]
    assert "did you mean connections?" in told["other.site.conections"]


def test_free_tables_lists_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALES_PUSH_OTHER_SCHEDULE", "[3, 4]")
    text = '[other]\nshaping = "shaping.toml"\n[other.routes]\n"*.test" = "127.0.0.1:25"\n'
    settings = load(OtherSettings, write(tmp_path, text))
    assert settings.routes == {"*.test": "127.0.0.1:25"}
    assert settings.schedule == [3.0, 4.0]
    assert settings.shaping == tmp_path / "shaping.toml"
    monkeypatch.setenv("SALES_PUSH_OTHER_SCHEDULE", "[3, ")
    with pytest.raises(ConfigError, match="JSON"):
        load(OtherSettings, tmp_path / "sales-push.toml")


def test_the_annotated_file_is_the_configuration(tmp_path: Path) -> None:
    """What `sales-push config` prints can be written back and means the same."""
    text = OFFICER + '[policy]\ndata_dir = "a b"\n[other]\nroutes = { "*.te\\"st" = "127.0.0.1:25" }\n'
    file = write(tmp_path, text)
    printed = annotate([PolicySettings, OtherSettings], file)
    assert "origin: file" in printed
    assert "origin: default" in printed
    assert tomllib.loads(printed)["policy"]["officer"]["name"] == "Officer"
    again = tmp_path / "again.toml"
    again.write_text(printed, "utf-8")
    assert load_all([PolicySettings, OtherSettings], again) == load_all([PolicySettings, OtherSettings], file)


def test_passwords_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "redis.secret").write_text("p@ss/word\n")
    text = OFFICER + (
        '[policy]\nredis_url = "redis://example.org:6379/0"\nredis_password_file = "redis.secret"\n'
        'sql_url = "postgresql+psycopg://push@example.org/push"\nsql_password_file = "redis.secret"\n'
    )
    file = write(tmp_path, text)
    settings = load(PolicySettings, file)
    assert not settings.embedded
    assert settings.redis_address() == "redis://:p%40ss%2Fword@example.org:6379/0"
    assert settings.sql_address() == "postgresql+psycopg://push:p%40ss%2Fword@example.org/push"
    assert "p@ss" not in annotate([PolicySettings], file)
    assert "p%40" not in annotate([PolicySettings], file)
