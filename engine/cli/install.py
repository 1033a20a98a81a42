"""`sales-push init`: make what is missing, change nothing that exists, say what to publish.

Path: 1. the configuration file; 2. data folder and keys (`policy.keys`), all 0700 and 0600; 3. DKIM keys of each From
domain: RSA-2048, and Ed25519 beside it under a selector of its own (RFC 8463 3: many receivers ignore it, so RSA is
always there); 4. the database, to its newest form, and the first account; 5. the partitions, marked in Redis
(decision 5: they can never change afterwards); 6. the DNS records.

Law: a private key is never printed and never written over. Running it again adds a domain, an account, a lost folder.

Known limits: while `up` runs the account is left to `sales-push account add`: the policy process is the only writer.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from urllib.parse import urlsplit

import redis.exceptions
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from pydantic_settings import BaseSettings

from engine.cli.records import SigningKey, records
from engine.settings import EngineSettings, dkim_files
from policy import accounts, schema
from policy.address import AddressError, parse
from policy.instants import week_of
from policy.keys import Keyring
from policy.settings import PolicySettings, load, load_all
from policy.valkey import EmbeddedServer, check_server, connect

RSA_BITS = 2048  # RFC 8301 3.2 asks for 1024 to 4096; 2048 is what providers ask for and what one TXT record holds


class InstallError(Exception):
    """Init cannot go on; the text says what to give."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What the operator said on the command line; empty means the usual."""

    config: Path
    data_dir: str
    domains: tuple[str, ...]
    selector: str
    account: str
    officer_name: str
    officer_address: str
    public_url: str
    bounce_domain: str
    hostname: str
    display_name: str
    postal_address: str


def install(answers: Answers, models: Sequence[type[BaseSettings]]) -> Iterator[str]:
    """Do it, yielding what was done. Raises InstallError, ConfigError, KeyringError, EmbeddedServerError."""
    domains = [_domain(name) for name in answers.domains]
    if answers.config.exists():
        yield f"kept     {answers.config}"
    else:
        _write(answers.config, first_file(answers, domains, datetime.now(UTC).date()), 0o644)
        yield f"wrote    {answers.config}"
    load_all(models, answers.config)
    policy, engine = load(PolicySettings, answers.config), load(EngineSettings, answers.config)
    policy.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    policy.data_dir.chmod(0o700)
    now_us = time.time_ns() // 1000
    keyring = Keyring.create(policy.keys_dir, week_of(now_us))
    yield f"ready    {policy.keys_dir} (keys: keep a copy where no backup of the data is)"
    yield f"public   {keyring.intake_public.hex()} (intake key: what producers seal to, --intake-key)"
    for domain in domains:
        for path in make_dkim(policy.keys_dir / "dkim", domain, answers.selector):
            yield f"wrote    {path}"
    yield from _database(policy, answers, now_us)
    warnings = asyncio.run(_mark(policy))
    yield f"ready    {'embedded Valkey' if policy.embedded else 'Redis'}, 64 partitions"
    yield from (f"warning  {warning}" for warning in warnings)
    yield from _to_publish(policy, engine, domains)


def first_file(answers: Answers, domains: Sequence[str], reviewed: date) -> str:
    """The first configuration: what differs between installations; the rest has its default (`sales-push config`)."""
    if not (answers.officer_name and answers.officer_address):
        raise InstallError("a privacy officer is needed (P-04): give --officer-name and --officer-address")
    domain = domains[0] if domains else ""
    public_url = answers.public_url or (f"https://link.{domain}" if domain else "")
    bounce = answers.bounce_domain or (f"bounce.{domain}" if domain else "")
    lines = [
        "# sales-push, written by `sales-push init`. Every setting there is: sales-push config, docs/configuration.md.",
        "",
        "[policy]",
        "# The day somebody went through all of this with the officer; `sales-push config --check` asks for it (P-39).",
        f"reviewed = {reviewed}",
        f"data_dir = {_toml(answers.data_dir)}",
        "# Base of the pages in delivered mail: choose a name you will keep for years.",
        f"public_url = {_toml(public_url)}" if public_url else '# public_url = "https://link.example.com"',
        *([f"bounce_domain = {_toml(bounce)}"] if bounce else []),
        "",
        "[policy.officer]",
        f"name = {_toml(answers.officer_name)}",
        f"address = {_toml(answers.officer_address)}",
        "",
        "[tracker]",
        "",
        "[engine]",
        *([f"hostname = {_toml(answers.hostname)}"] if answers.hostname else []),
    ]
    return "\n".join(lines) + "\n"


def make_dkim(folder: Path, domain: str, selector: str = "") -> list[Path]:
    """An RSA-2048 and an Ed25519 key for a From domain, unless it has keys (a new selector adds a pair: rotation)."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not selector and any(folder.glob(f"{domain}.*.rsa.pem")):
        return []
    selector = selector or time.strftime("sp%Y%m", time.gmtime())
    made: list[Path] = []
    rsa_path = folder / f"{domain}.{selector}.rsa.pem"
    if not rsa_path.exists():
        _write(rsa_path, _pem(rsa.generate_private_key(65537, RSA_BITS)), 0o600)
        made.append(rsa_path)
    ed_path = folder / f"{domain}.{selector}-ed.ed25519.pem"
    if not ed_path.exists():
        _write(ed_path, _pem(ed25519.Ed25519PrivateKey.generate()), 0o600)
        made.append(ed_path)
    return made


def _pem(key: rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey) -> str:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption()).decode("ascii")


def public_half(path: Path, domain: str, selector: str) -> SigningKey:
    """What the DKIM record of a private key file says. Raises InstallError for a file that holds no such key."""
    try:
        private = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise InstallError(f"{path} is not an unencrypted PEM private key") from error
    public = private.public_key()
    if isinstance(public, ed25519.Ed25519PublicKey):
        return SigningKey(domain, selector, "ed25519", base64.b64encode(public.public_bytes_raw()).decode("ascii"))
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return SigningKey(domain, selector, "rsa", base64.b64encode(der).decode("ascii"))


def _to_publish(policy: PolicySettings, engine: EngineSettings, domains: Iterable[str]) -> Iterator[str]:
    files = dkim_files(engine, policy.keys_dir)
    keys: list[SigningKey] = []
    shown = [domain for domain in dict.fromkeys([*domains, *files]) if domain in files]
    for domain in shown:
        found = files[domain]
        keys.append(public_half(found.rsa, domain, found.rsa_selector))
        if found.ed25519 is not None and found.ed25519_selector is not None:
            keys.append(public_half(found.ed25519, domain, found.ed25519_selector))
    if not shown:
        yield "next     sales-push init --domain example.com   (makes DKIM keys: without them no job is accepted)"
        return
    public_host = urlsplit(policy.public_url).hostname or "localhost"
    hostname = engine.hostname or f"mail.{shown[0]}"
    yield ""
    yield "; Publish these records before the first campaign:"
    for record in records(keys, shown, policy.bounce_domain, hostname, public_host):
        yield f"; {record.why}"
        yield record.line()


def _database(policy: PolicySettings, answers: Answers, now_us: int) -> Iterator[str]:
    if _answers(policy.writer_socket):
        yield "kept     the database: the policy process is running (sales-push account add for another account)"
        return
    store = schema.open_store(policy.sql_address(), writer=True)
    try:
        schema.upgrade(store)
        with store.begin() as conn:
            if accounts.get(conn, answers.account) is not None:
                yield f"kept     account {answers.account}"
                return
            try:
                accounts.add(
                    conn,
                    answers.account,
                    display_name=answers.display_name or answers.account,
                    postal_address=answers.postal_address,
                    now=now_us,
                )
            except accounts.AccountError as error:
                raise InstallError(str(error)) from error
        yield f"made     account {answers.account}"
    finally:
        store.dispose()


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
        probe.settimeout(1.0)
        probe.connect(str(path))
        return True
    return False


async def _mark(policy: PolicySettings) -> list[str]:
    """Let `policy.valkey.check_server` write partitions and schema version into META; a running server is used."""
    server: EmbeddedServer | None = None
    client = connect(policy.redis_address())
    try:
        try:
            return await check_server(client)
        except (redis.exceptions.ConnectionError, OSError):
            if not policy.embedded:
                raise
        server = EmbeddedServer(policy.redis_socket.parent)
        server.start()
        await server.wait_ready()
        return await check_server(client)
    finally:
        await client.aclose()
        if server is not None:
            await server.stop()


def _domain(name: str) -> str:
    try:
        return parse(f"postmaster@{name}").domain
    except AddressError as error:
        raise InstallError(f"--domain {name}: not a domain ({error.reason})") from error


def _toml(text: str) -> str:
    # TOML basic strings and JSON strings agree on escapes, but TOML has no DEL in clear
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _write(path: Path, text: str, mode: int) -> None:
    """Whole and on disk, or not at all; never over an existing file."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
