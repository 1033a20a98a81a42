"""`sales-push schema`, `submit` and `render`: what producers type, over a real store and a real SMTP listener."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_bytes, policy
from pathlib import Path
from typing import Any

import dkim  # type: ignore[import-untyped]  # dkimpy ships no types
import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from redis import Redis
from typer.testing import CliRunner

from engine.campaign.commands import campaign_commands
from engine.client import audience_purpose, job_purpose, unseal
from policy import accounts, keyspace
from policy.instants import rfc3339
from policy.keys import Keyring
from policy.schema import open_store, upgrade
from tests.engine.test_job import good
from tests.world.valkey_server import running_valkey

AT = 1_795_000_000_000_000


@dataclass
class House:
    folder: Path
    config: Path
    url: str
    public: bytes
    mail: list[Envelope]

    def run(self, *args: object) -> Any:
        return CliRunner().invoke(campaign_commands, [*map(str, args)])

    def job(self, **changes: Any) -> Path:
        base: dict[str, Any] = {
            "created_at": ...,
            "from": {"address": "news@acme.example", "name": "Acme"},
            "legal_basis": {"basis": "legitimate-interest"},
            "tracking": {"opens": "individual", "clicks": "individual"},
            "html": '<p>Hello {{ name }} <a href="https://acme.example/x">x</a></p>',
        }
        path = self.folder / "job.json"
        path.write_text(json.dumps(good(**{**base, **changes})))
        return path


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_valkey() as running:
        yield running.url


@pytest.fixture(scope="module")
def private_pem() -> bytes:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


class _Box:
    def __init__(self) -> None:
        self.mail: list[Envelope] = []

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        self.mail.append(envelope)
        return "250 ok"


@pytest.fixture
def house(server: str, private_pem: bytes) -> Iterator[House]:
    folder = Path(tempfile.mkdtemp(prefix="sp-cli-"))
    data = folder / "data"
    data.mkdir(mode=0o700)
    keyring = Keyring.create(data / "keys", 2967)
    key = data / "keys" / "dkim" / "acme.example.s1.rsa.pem"
    key.parent.mkdir(mode=0o700)
    key.write_bytes(private_pem)
    key.chmod(0o600)
    box = _Box()
    with socket.create_server(("127.0.0.1", 0)) as free:  # aiosmtpd knocks at the port it was given, so not 0
        port = free.getsockname()[1]
    listener = Controller(box, hostname="127.0.0.1", port=port)
    listener.start()
    config = folder / "sales-push.toml"
    config.write_text(
        f'[policy]\ndata_dir = "{data}"\nredis_url = "{server}"\nbounce_domain = "bounce.acme.example"\n'
        f'[policy.officer]\nname = "DPO"\naddress = "dpo@acme.example"\n'
        f'[engine]\nhostname = "mx.acme.example"\n[engine.routes]\n"*.test" = "127.0.0.1:{port}"\n'
    )
    engine = open_store(f"sqlite:///{data}/policy.db", writer=True)
    upgrade(engine)
    with engine.begin() as conn:
        accounts.add(conn, "acme", display_name="Acme", postal_address="1 Road", opens_mode=3, clicks_mode=3, now=AT)
    engine.dispose()
    with Redis.from_url(server) as redis:
        redis.flushall()
        redis.hset(keyspace.META, "intake", keyring.intake_public.hex())
    try:
        yield House(folder, config, server, keyring.intake, box.mail)
    finally:
        listener.stop()
        shutil.rmtree(folder)


def test_render_shows_the_exact_message(house: House, private_pem: bytes) -> None:
    yes = {"source": "form", "time": "2026-03-01T10:00:00Z"}
    rows = [
        {"address": "ada@one.test", "name": "Ada"},
        {"address": "bob@one.test", "name": "Bob", "consent": {"open_tracking": yes, "click_tracking": yes}},
    ]
    public = serialization.load_pem_private_key(private_pem, None).public_key()
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    record = b"v=DKIM1; k=rsa; p=" + base64.b64encode(der)
    job = house.job(recipients=rows)
    plain = house.run("render", job, "--config", house.config)
    assert plain.exit_code == 0, plain.output
    tracked = house.run("render", job, "--recipient", 1, "--config", house.config)
    assert tracked.exit_code == 0, tracked.output
    for shown, name in ((plain, "Ada"), (tracked, "Bob")):
        wire = shown.stdout_bytes
        assert b"\n" not in wire.replace(b"\r\n", b"")
        message = message_from_bytes(wire, policy=policy.default)
        page = message.get_body(("html",))
        assert page is not None
        assert f"Hello {name}" in page.get_content()
        assert message["Subject"] == f"Hello {name}"
        assert message["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
        assert dkim.verify(wire, dnsfunc=lambda name, timeout=5: record)
        assert ("https://acme.example/x" in page.get_content()) == (name == "Ada")
        assert (".gif" in page.get_content()) == (name == "Bob")


def test_render_says_why_there_is_nothing_to_show(house: House) -> None:
    job = house.job(recipients=[{"address": "nobody", "name": "x"}, {"address": "a@b.example"}])
    for number, said in ((0, "would be refused: invalid"), (1, "would be refused: invalid"), (2, "no recipient 2")):
        shown = house.run("render", job, "--recipient", number, "--config", house.config)
        assert shown.exit_code == (2 if number == 2 else 1)
        assert said in shown.stderr
    broken = house.job(html="{{ nmae }}", account="stranger", **{"from": {"address": "a@other.example"}})
    shown = house.run("render", broken, "--config", house.config)
    assert shown.exit_code == 1
    assert all(place in shown.stderr for place in ("$.account", "$.from.address", "$.html"))


def test_send_test_goes_over_the_route(house: House) -> None:
    job = house.job(recipients=[{"address": "ada@one.example", "name": "Ada"}])
    sent = house.run("render", job, "--send-test", "me@desk.test", "--config", house.config)
    assert sent.exit_code == 0, sent.output
    [envelope] = house.mail
    assert envelope.rcpt_tos == ["me@desk.test"]
    assert str(envelope.mail_from).endswith("@bounce.acme.example")
    content = envelope.content
    assert isinstance(content, bytes)
    assert b"To: me@desk.test" in content
    assert b"ada@one.example" not in content


def test_submit_streams_a_file_sealed(house: House) -> None:
    people = house.folder / "people.csv"
    people.write_text("email,name\n" + "".join(f"p{n}@one.test,P{n}\n" for n in range(1500)) + "nobody,X\n")
    done = house.run("submit", house.job(recipients=...), "--recipients", people, "--config", house.config)
    assert done.exit_code == 0, done.output
    assert done.stdout == "letter-47\n"
    assert "line 1502: not an address" in done.stderr
    with Redis.from_url(house.url) as redis:
        entries: Any = redis.xrange(keyspace.INTAKE)
    private = house.public
    job = json.loads(unseal(private, entries[0][1][b"sealed"], job_purpose()))
    assert job["audience"] == {"chunks": 2}
    rows = [
        json.loads(line)
        for number, (_, fields) in enumerate(entries[1:])
        for line in unseal(private, fields[b"sealed"], audience_purpose("acme", "letter-47", number)).split(b"\n")
    ]
    assert rows[:2] == [{"address": "p0@one.test", "name": "P0"}, {"address": "p1@one.test", "name": "P1"}]
    assert len(rows) == 1501
    assert b"one.test" not in repr(entries).encode()


def test_submit_sends_nothing_of_a_file_with_mistakes(house: House) -> None:
    people = house.folder / "people.ndjson"
    people.write_text('{"address": "a@one.test", "name": "A"}\nnonsense\n{"adress": "b@one.test"}\n')
    job = house.job(recipients=...)
    refused = house.run("submit", job, "--recipients", people, "--config", house.config)
    assert refused.exit_code == 2
    assert "line 2: not JSON" in refused.stderr
    assert "line 3.adress" in refused.stderr
    with Redis.from_url(house.url) as redis:
        assert redis.xlen(keyspace.INTAKE) == 0
    again = house.run("submit", job, "--recipients", people, "--skip-bad", "--config", house.config)
    assert again.exit_code == 0, again.output


def test_submit_tells_every_mistake_of_the_job_before_sending(house: House) -> None:
    job = house.job(kind="campagne", subject="a\nb", list=5, created_at=rfc3339(AT))
    refused = house.run("submit", job, "--redis", house.url)
    assert refused.exit_code == 2
    assert all(place in refused.stderr for place in ("$.kind", "$.subject", "$.list"))
    with Redis.from_url(house.url) as redis:
        assert redis.xlen(keyspace.INTAKE) == 0


def test_schema_is_printed(house: House) -> None:
    shown = house.run("schema")
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["$defs"]["Job"]["properties"]["job_id"]
