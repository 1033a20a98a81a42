"""The engine's settings: everything said once and said fully, every mistake told at once, keys readable by us only."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from engine.cli import settings_models
from engine.cli.reference import model_of, range_of, reference
from engine.settings import EngineSettings, KeyFileError, Smarthost, dkim_files, parse_target
from policy.settings import ConfigError, annotate, load, load_all, origins

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, text: str) -> Path:
    path = folder / "sales-push.toml"
    path.write_text(text, encoding="utf-8")
    return path


def leaves(model: type[BaseModel], before: str) -> list[tuple[str, str, str, object]]:
    found: list[tuple[str, str, str, object]] = []
    for name, field in model.model_fields.items():
        inner = model_of(field.annotation)
        if inner is not None:
            found += leaves(inner, f"{before}.{name}")
        found.append(
            (f"{before}.{name}", " ".join((field.description or "").split()), range_of(field), field.annotation)
        )
    return found


def test_every_setting_says_what_it_means_and_every_number_has_bounds() -> None:
    for model in settings_models():
        for name, description, bounds, kind in leaves(model, model.__name__):
            assert len(description) >= 12, f"{name} has no description"
            if kind in (int, float):
                assert " to " in bounds, f"{name} is a number without two bounds"


def test_the_reference_page_is_current() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")

    assert written == reference(settings_models()), "run: make docs"


def test_values_come_from_the_file_and_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "[engine]\nworkers = 3\n[engine.retry]\nbase = 60.0\ncap = 600.0\n")
    monkeypatch.setenv("SALES_PUSH_ENGINE_RETRY__BASE", "90")

    settings = load(EngineSettings, path)
    said = origins(EngineSettings, path)

    assert (settings.workers, settings.retry.base, settings.retry.cap) == (3, 90.0, 600.0)
    assert (said["workers"], said["retry.base"], said["retry.cap"]) == ("file", "environment", "file")
    assert said["retry.greylist"] == "default"


def test_all_mistakes_of_all_floors_are_told_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        [policy]
        drain_interval = -1
        [tracker]
        prot = 1
        [engine]
        workers = "many"
        lease_second = 5
        routes = { "*.test" = "127.0.0.1" }
        [engine.retry]
        base = 99
        cap = 9
        [engine.smarthost]
        host = "mail.example.com"
        tls = "none"
        username = "someone"
        [enigne]
        workers = 1
        """,
    )

    with pytest.raises(ConfigError) as caught:
        load_all(settings_models(), path)

    told = {problem.path: f"{problem.message} {problem.suggestion}" for problem in caught.value.problems}
    assert "did you mean lease_seconds" in told["engine.lease_second"]
    assert "did you mean port" in told["tracker.prot"]
    assert "did you mean engine" in told["enigne"]
    assert "not host:port" in told["engine.routes"]
    assert "cap is below base" in told["engine.retry"]
    assert "in clear" in told["engine.smarthost"]
    assert {"policy.drain_interval", "policy.officer", "engine.workers"} <= told.keys()
    assert "someone" not in str(caught.value)


def test_the_printed_configuration_is_toml_that_loads_to_the_same(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        [engine]
        hostname = "Mail.Example.com"
        routes = { "*.test" = "127.0.0.1:2525", "example.org" = "[::1]:25" }
        [engine.shaping."*.example.net"]
        connections = 2
        [engine.dkim."example.com"]
        selector = "s1"
        rsa_key = "/keys/rsa.pem"
        """,
    )
    settings = load(EngineSettings, path)

    printed = tmp_path / "printed.toml"
    printed.write_text(annotate([EngineSettings], path), encoding="utf-8")

    assert load(EngineSettings, printed) == settings
    assert settings.hostname == settings.ehlo_name == "mail.example.com"
    assert settings.shaping["*.example.net"].connections == 2
    for line in printed.read_text(encoding="utf-8").splitlines():
        assert not line or line[0] in "#[" or " = " in line


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("127.0.0.1:2525", ("127.0.0.1", 2525)),
        ("[::1]:25", ("::1", 25)),
        ("mail.example.com:587", ("mail.example.com", 587)),
    ],
)
def test_a_target_is_a_host_and_a_port(text: str, target: tuple[str, int]) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize(
    "text",
    ["", "host", "host:", ":25", "host:0", "host:65536", "::1:25", "a b:25", "host:25\r\nX", "-x.example:25", "h:٣"],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not"):
        parse_target(text)


@pytest.mark.parametrize(
    "name", ["a b", "mail.example.com\r\nMAIL FROM:<>", "mail_x.example", "-a.example", "a..b", "x" * 64 + ".example"]
)
def test_an_ehlo_name_is_a_host_name(name: str) -> None:
    with pytest.raises(ValidationError):
        EngineSettings(hostname=name)


def test_a_password_is_named_and_read_when_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "password"
    secret.write_text("hunter2\n", encoding="utf-8")
    by_file = Smarthost(host="mail.example.com", username="u", password_file=str(secret))
    by_name = Smarthost(host="mail.example.com", username="u", password_env="SMARTHOST_PASSWORD")
    monkeypatch.setenv("SMARTHOST_PASSWORD", "hunter3")

    assert (by_file.password(), by_name.password()) == ("hunter2", "hunter3")
    assert "hunter2" not in repr(by_file)
    with pytest.raises(ValidationError, match="without a secret"):
        Smarthost(host="mail.example.com", username="u")


def key(folder: Path, name: str, mode: int = 0o600) -> Path:
    folder.joinpath("dkim").mkdir(exist_ok=True)
    path = folder / "dkim" / name
    path.write_text("key", encoding="ascii")
    path.chmod(mode)
    return path


def test_dkim_keys_are_found_by_their_names_and_the_newest_selector_signs(tmp_path: Path) -> None:
    key(tmp_path, "example.com.sp202610.rsa.pem")
    newest = key(tmp_path, "example.com.sp202611.rsa.pem")
    beside = key(tmp_path, "example.com.sp202611-ed.ed25519.pem")
    key(tmp_path, "news.example.org.a.rsa.pem")
    key(tmp_path, "only-ed.example.a.ed25519.pem")

    found = dkim_files(EngineSettings(), tmp_path)

    assert found.keys() == {"example.com", "news.example.org"}  # a domain without an RSA key cannot sign
    assert (found["example.com"].rsa_selector, found["example.com"].rsa) == ("sp202611", newest)
    assert (found["example.com"].ed25519_selector, found["example.com"].ed25519) == ("sp202611-ed", beside)
    assert found["news.example.org"].ed25519 is None


def test_a_key_others_can_read_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = key(tmp_path, "example.com.a.rsa.pem", 0o640)

    with pytest.raises(KeyFileError, match=rf"chmod 600 {path}"):
        dkim_files(EngineSettings(), tmp_path)


def test_a_key_file_with_another_name_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    key(tmp_path, "example.com.pem")

    with pytest.raises(KeyFileError, match="rename"):
        dkim_files(EngineSettings(), tmp_path)
