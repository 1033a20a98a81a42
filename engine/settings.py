"""The engine's settings: every knob once, with its unit, its range and the reason for its default.

Table ``[engine]`` of the configuration file; the environment (``SALES_PUSH_ENGINE_RETRY__BASE=60``) wins over it.
`policy.settings.load` reads both, collects all mistakes at once and knows where each value came from;
docs/configuration.md is generated from these descriptions (``make docs``) and a test says that it is current.

Law: no secret is a value here. What is secret is named: by the file that holds it or by the environment variable.

Known limits: a value is read once, when the process starts; to change one, restart the role (it drains first).
"""

from __future__ import annotations

import ipaddress
import os
import platform
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

# RFC 1123 2.1 and RFC 5321 4.1.2: letters, digits and hyphens, at least one dot; underscores never in a host name.
_HOST = re.compile(
    r"(?=.{1,253}\Z)(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)*[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
)
_TARGET = re.compile(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<host>[^\[\]:]+)):(?P<port>[0-9]{1,5})")
_SELECTOR = re.compile(r"(?P<domain>.+)\.(?P<selector>[a-z0-9-]+)\.(?P<kind>rsa|ed25519)\.pem")


def _host_name(text: str) -> str:
    if text and not _HOST.fullmatch(text):
        raise ValueError("is not a host name: letters, digits, hyphens and dots (write international names as xn--…)")
    return text.lower()


def parse_target(text: str) -> tuple[str, int]:
    """``host:port``, IPv6 in brackets -> (host, port). Raises ValueError."""
    match = _TARGET.fullmatch(text)
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ValueError(f"{text!r} is not host:port (IPv6 in brackets), for example 127.0.0.1:2525")
    if match["host"] is not None and not _HOST.fullmatch(match["host"]):
        raise ValueError(f"{match['host']!r} is not a host name or address")
    return match["six"] or match["host"], int(match["port"])


def parse_server(text: str, port: int = 53) -> tuple[str, int]:
    """``address``, ``address:port`` or ``[address]:port`` of a resolver -> (address, port). Raises ValueError."""
    try:
        return str(ipaddress.ip_address(text)), port
    except ValueError:
        address, port = parse_target(text)
    try:
        return str(ipaddress.ip_address(address)), port
    except ValueError:
        raise ValueError(f"{text!r} is not the address of a resolver: a name would need one") from None


def _servers(servers: list[str]) -> list[str]:
    for text in servers:
        parse_server(text)
    return servers


def _routes(routes: dict[str, str]) -> dict[str, str]:
    for pattern, target in routes.items():
        if pattern != "*" and not _HOST.fullmatch(pattern.removeprefix("*.")):
            raise ValueError(f"{pattern!r} is no domain pattern: write a domain, *.suffix or *")
        parse_target(target)
    return {pattern.lower(): target for pattern, target in routes.items()}


def _patterns(shaping: dict[str, SiteLimits]) -> dict[str, SiteLimits]:
    for pattern in shaping:
        if pattern != "*" and not _HOST.fullmatch(pattern.removeprefix("*.")):
            raise ValueError(f"{pattern!r} is no host pattern: write a host, *.suffix or *")
    return {pattern.lower(): limits for pattern, limits in shaping.items()}


HostName = Annotated[str, AfterValidator(_host_name)]


class _Described:
    """Descriptions stand under the settings as docstrings; printed, they are one line."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_options: object) -> None:
        for field in getattr(cls, "model_fields", {}).values():
            field.description = " ".join((field.description or "").split())


class _Table(_Described, BaseModel):
    """A table inside [engine]: unknown names are refused, values never change while a process runs."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SiteLimits(_Table):
    """What one site (the MX set that several domains share) may get from one source address at most."""

    connections: int = Field(default=10, ge=1, le=1000)
    """Connections open to one site at once, all workers together. Large providers refuse beyond about 10 to 20 from
    an address without reputation (421); pace climbs from below."""
    rate: float = Field(default=0.0, ge=0.0, le=100_000.0)
    """Messages per second to one site, all workers together; 0 is no ceiling. A ceiling for warm-up and for contracts
    with a provider: pacing finds the working rate by itself."""
    burst: float = Field(default=20.0, ge=1.0, le=100_000.0)
    """Messages that may go at once before the rate holds. Workers take rate tokens in blocks; a burst below their
    number makes them take turns."""
    messages_per_connection: int = Field(default=100, ge=1, le=100_000)
    """Messages on one connection before QUIT. Most servers end a session after 20 to 100 messages by themselves, some
    with a 421 that costs pace."""


class Pace(_Table):
    """How concurrency at a site eases down and climbs back (decision 11), inside the limits above."""

    start: float = Field(default=2.0, ge=1.0, le=1000.0)
    """Connections to a site at first. Two show within a second whether more are welcome; warm-up begins here too."""
    calm: float = Field(default=5.0, ge=0.0, le=3600.0)
    """Seconds after a step down in which further bad replies count as the same trouble. They answer what was sent
    before the step, so stepping down for each of them would stop a site for one 421."""
    dead_after: int = Field(default=5, ge=1, le=1000)
    """Failed connections in a row after which a site is left alone. One refused connection is an accident, five are
    a server that is down."""
    back_off: float = Field(default=60.0, gt=0.0, le=86_400.0)
    """Seconds a dead site is left alone at first; doubles each time."""
    back_off_cap: float = Field(default=3600.0, gt=0.0, le=86_400.0)
    """Longest such pause in seconds. An hour: servers come back without telling anybody."""
    block_back_off: float = Field(default=900.0, gt=0.0, le=86_400.0)
    """Seconds a site is left alone when it says that it blocks us. Going on makes a block longer."""

    @model_validator(mode="after")
    def _ordered(self) -> Pace:
        if self.back_off_cap < self.back_off:
            raise ValueError("back_off_cap is below back_off: the longest pause would be shorter than the first")
        return self


class Retry(_Table):
    """When a deferred recipient is tried again (RFC 5321 4.5.4.1)."""

    base: float = Field(default=1800.0, gt=0.0, le=86_400.0)
    """Seconds before the second attempt; doubles with each further one. RFC 5321 4.5.4.1 asks for at least 30
    minutes."""
    cap: float = Field(default=14_400.0, gt=0.0, le=172_800.0)
    """Longest pause between two attempts in seconds. Four hours is what the large mail servers settle at."""
    schedule: list[float] = Field(default_factory=list, max_length=64)
    """Pauses in seconds before attempt 2, 3, …, instead of base and cap; the last one repeats. Empty: the exponential
    schedule. The rehearsal compresses time with it."""
    greylist: float = Field(default=600.0, gt=0.0, le=3600.0)
    """Seconds before the second attempt when the reply says greylisting. Greylisting servers ask for 5 to 15 minutes;
    coming at the ordinary 30 only delays the mail."""

    @model_validator(mode="after")
    def _ordered(self) -> Retry:
        if self.cap < self.base and not self.schedule:
            raise ValueError("cap is below base: the longest pause would be shorter than the first")
        if any(not 0.0 < pause <= 172_800.0 for pause in self.schedule):
            raise ValueError("schedule: every pause is above 0 and at most 172800 seconds")
        return self


class Expiry(_Table):
    """How long a job without its own expires_at is tried."""

    campaign: float = Field(default=259_200.0, ge=1.0, le=2_592_000.0)
    """Seconds until a campaign that names no expires_at is given up. 72 hours: a newsletter is stale after that,
    though RFC 5321 would allow five days (S-02)."""
    transactional: float = Field(default=432_000.0, ge=1.0, le=2_592_000.0)
    """The same for transactional mail, in seconds. Five days as RFC 5321 4.5.4.1 has it."""


class Batches(_Table):
    """How much is taken at a time. Larger is faster and leaves more in flight when a worker dies."""

    lease_slices: int = Field(default=16, ge=1, le=1024)
    """Slices (up to 64 recipients each) leased in one call. 16 keeps a worker busy for about half a second at 2,000
    messages/s, within the gate's promise of 1 s."""
    settle_seconds: float = Field(default=0.25, gt=0.0, le=5.0)
    """Outcomes are settled at least this often, in seconds. Promise T7 says 0.25."""


class Intake(_Table):
    """Limits on what producers may hand in; a job beyond them is rejected with its reason, never cut."""

    claim: int = Field(default=8, ge=1, le=256)
    """Entries of the intake stream claimed at a time by one worker. An audience chunk is up to 1 MiB: 8 keep memory
    flat."""
    message_bytes: int = Field(default=10 * 1024 * 1024, ge=16 * 1024, le=64 * 1024 * 1024)
    """Largest message in bytes after encoding. 10 MiB is what the strictest large providers take; a larger one
    bounces at every recipient."""
    deliveries: int = Field(default=5, ge=1, le=100)
    """Times an entry may come back before it counts as poison and goes to the dead stream. Promise T1 says 5."""


class Dns(_Table):
    """Looking up MX sets."""

    servers: Annotated[list[str], AfterValidator(_servers)] = Field(default_factory=list, max_length=8)
    """Addresses of resolvers, with a port where it is not 53 (IPv6 then in brackets); empty reads /etc/resolv.conf. A
    resolver on the same host saves a round trip for each new domain."""
    timeout: float = Field(default=10.0, gt=0.0, le=60.0)
    """Seconds until a lookup counts as temporary failure. Two tries of the usual 5 s; a timeout is never a bounce."""
    cache_entries: int = Field(default=50_000, ge=100, le=5_000_000)
    """Names remembered per worker until their TTL. About 300 bytes each; a mailing to a million people meets some
    30,000 domains."""


class Smarthost(_Table):
    """Another mail server that takes everything, instead of the MX of each domain."""

    host: HostName = Field(default="")
    """Host name; empty delivers to the MX of each domain. Routes win over it."""
    port: int = Field(default=465, ge=1, le=65535)
    """TCP port. RFC 8314: submission over TLS is 465."""
    tls: Literal["implicit", "starttls", "none"] = Field(default="implicit")
    """implicit, starttls or none. RFC 8314 3: implicit TLS for submission; none is refused together with a user name,
    for it would send the password in clear."""
    username: str = Field(default="", max_length=320)
    """User name for AUTH; empty sends without."""
    password_file: str = Field(default="")
    """Path of the file (mode 0600) that holds the password. Never the password itself."""
    password_env: str = Field(default="")
    """Name of the environment variable that holds the password, when no file does."""

    @model_validator(mode="after")
    def _secret(self) -> Smarthost:
        if self.username and self.tls == "none":
            raise ValueError('tls = "none" with a username would send the password in clear: use implicit or starttls')
        if self.username and not (self.password_file or self.password_env):
            raise ValueError("username without a secret: name password_file or password_env")
        return self

    def password(self) -> str:
        """Read the secret now; raises OSError or KeyError naming the file or variable, never its content."""
        if self.password_file:
            return Path(self.password_file).read_text(encoding="utf-8").strip()
        return os.environ[self.password_env]


class DkimKey(_Table):
    """The keys of one From domain, when they do not lie in the keys folder under their usual names."""

    selector: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
    """Selector of the RSA key: the name under _domainkey."""
    rsa_key: str = Field()
    """Path of the RSA-2048 private key, PEM, mode 0600."""
    ed25519_selector: str = Field(default="", pattern=r"^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)?$")
    """Selector of the Ed25519 key; empty when there is none. It needs a name of its own (RFC 8463 3)."""
    ed25519_key: str = Field(default="")
    """Path of the Ed25519 private key, PEM, mode 0600; empty when there is none."""

    @model_validator(mode="after")
    def _pair(self) -> DkimKey:
        if bool(self.ed25519_key) != bool(self.ed25519_selector):
            raise ValueError("ed25519_selector and ed25519_key belong together")
        return self


class Signing(_Table):
    """How DKIM signatures are made; the bytes are the same either way."""

    implementation: Literal["auto", "openssl", "multi-buffer"] = Field(default="auto")
    """auto, openssl or multi-buffer. Multi-buffer signs eight messages at a time for about half the CPU; it needs the
    extra "fast" and a processor with AVX-512 IFMA. auto takes it for every key whose signatures come out equal to
    OpenSSL's and cheaper at start, and says in the log why not; multi-buffer does not start without."""


class Ops(_Table):
    """The listener for metrics and health."""

    host: str = Field(default="127.0.0.1", min_length=1, max_length=253)
    """Address the listener binds to. Loopback: it has no authentication (faults 5.2)."""
    port: int = Field(default=9187, ge=0, le=65535)
    """TCP port of /metrics, /healthz, /readyz; 0 picks one free."""
    stale_seconds: float = Field(default=15.0, ge=1.0, le=600.0)
    """A process that said nothing for this many seconds makes the host not ready. Processes publish every 2 s; seven
    missed in a row is not a pause."""


class Supervisor(_Table):
    """How `sales-push up` keeps its children."""

    restart_base: float = Field(default=0.5, gt=0.0, le=60.0)
    """Seconds before a dead child is started again; doubles with each death."""
    restart_cap: float = Field(default=30.0, gt=0.0, le=3600.0)
    """Longest pause before a restart in seconds. Half a minute: a broken child must not spin."""
    stable_seconds: float = Field(default=60.0, gt=0.0, le=86_400.0)
    """A child that lived this many seconds starts again without a pause history."""
    drain_seconds: float = Field(default=90.0, ge=0.0, le=3600.0)
    """Seconds children get after SIGTERM to finish what is on the wire, before SIGKILL. systemd's TimeoutStopSec must
    be longer. Too short risks duplicates: a message after its dot has 600 s (RFC 5321)."""
    hurry_seconds: float = Field(default=3.0, ge=0.0, le=600.0)
    """What is left of that after a second SIGTERM, in seconds."""


class EngineSettings(_Described, BaseSettings):
    """Table [engine]: making and delivering mail."""

    model_config = SettingsConfigDict(
        env_prefix="SALES_PUSH_ENGINE_",
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )

    workers: int = Field(default=0, ge=0, le=256)
    """Engine processes on this host; 0 is one per core. Signing fills a core; more processes than cores only queue
    behind each other."""
    hostname: HostName = Field(default="")
    """Name said in EHLO; empty takes the host's own. It must resolve to the sending address and back (RFC 5321
    4.1.1.1, provider rules): a wrong one costs more mail than any other setting."""
    routes: Annotated[dict[str, str], AfterValidator(_routes)] = Field(default_factory=dict)
    """Fixed targets by recipient domain instead of MX: "*.test" = "127.0.0.1:2525". The longest pattern wins; a route
    may name any address, also a private one."""
    allow_private_targets: bool = Field(default=False)
    """Connect to loopback and private addresses that DNS names. Off: a hostile MX record must not make us talk to our
    own network (faults 3.2). Routes are not affected."""
    mx_port: int = Field(default=25, ge=1, le=65535)
    """TCP port of the hosts that DNS names. 25 (RFC 5321 2.3.4); another one only for rehearsals, which may not listen
    there."""
    smarthost: Smarthost = Field(default_factory=Smarthost)
    """Deliver everything through one server."""
    dkim: dict[str, DkimKey] = Field(default_factory=dict)
    """Keys by From domain, for keys that lie elsewhere. Every key in keys_dir/dkim is found by itself."""
    signing: Signing = Field(default_factory=Signing)
    """How signatures are made."""
    limits: SiteLimits = Field(default_factory=SiteLimits)
    """Limits for every site."""
    shaping: Annotated[dict[str, SiteLimits], AfterValidator(_patterns)] = Field(default_factory=dict)
    """Limits by MX host pattern: ["*.example.net"]. The longest pattern wins and replaces [engine.limits] whole."""
    pace: Pace = Field(default_factory=Pace)
    """How concurrency at a site eases down and climbs back."""
    retry: Retry = Field(default_factory=Retry)
    """When deferred recipients are tried again."""
    expiry: Expiry = Field(default_factory=Expiry)
    """How long jobs without expires_at are tried."""
    batch: Batches = Field(default_factory=Batches)
    """How much is taken at a time."""
    intake: Intake = Field(default_factory=Intake)
    """Limits on jobs."""
    dns: Dns = Field(default_factory=Dns)
    """Looking up MX sets."""
    ops: Ops = Field(default_factory=Ops)
    """Metrics and health."""
    supervisor: Supervisor = Field(default_factory=Supervisor)
    """How `sales-push up` keeps its children."""
    lease_seconds: float = Field(default=60.0, ge=2.0, le=3600.0)
    """A lease whose heartbeat stands still this long is taken over, in seconds. Heartbeats come every third of it; a
    worker stopped for longer must find its slices gone (promise T3)."""
    patience: float = Field(default=1.0, gt=0.0, le=10.0)
    """Factor on every deadline of RFC 5321 4.5.3.2. Below 1 only for rehearsals: an impatient client sends duplicates
    after the dot (S-01)."""
    tls: Literal["opportunistic", "required", "off"] = Field(default="opportunistic")
    """STARTTLS: opportunistic, required or off. Opportunistic (RFC 7435) encrypts wherever the peer can; required
    defers mail for peers that cannot; off is for rehearsals on loopback."""
    min_free_bytes: int = Field(default=256 * 1024 * 1024, ge=0, le=1 << 40)
    """Free space under the data folder below which no new attempt starts, in bytes. Refusing before the disk is full
    keeps the journal writable for what is on the wire (faults 3.4)."""

    @property
    def worker_count(self) -> int:
        """Engine processes to run here, at least one."""
        return self.workers or os.cpu_count() or 1

    @property
    def ehlo_name(self) -> str:
        """The name said in EHLO; a host that has no usable name of its own says localhost.localdomain."""
        name = self.hostname or platform.node().lower()
        return name if "." in name and _HOST.fullmatch(name) else self.hostname or "localhost.localdomain"


@dataclass(frozen=True, slots=True)
class DkimFiles:
    """Where the signing keys of one From domain lie. ed25519 and its selector are None when there is only RSA."""

    domain: str
    rsa_selector: str
    rsa: Path
    ed25519_selector: str | None
    ed25519: Path | None


class KeyFileError(Exception):
    """A key file that must not be used as it is: the text names the file and the way out, never its content."""


def dkim_files(settings: EngineSettings, keys_dir: Path) -> dict[str, DkimFiles]:
    """Every From domain we can sign for: keys_dir/dkim/<domain>.<selector>.{rsa,ed25519}.pem, [engine.dkim] over it.

    Of several selectors of one domain the last by name is used (rotation: name selectors by date). A domain needs an
    RSA key: many receivers ignore Ed25519 (mail-standards 2.3). Raises KeyFileError for a file others can read.
    """
    found: dict[str, dict[str, tuple[str, Path]]] = {}
    for path in sorted((keys_dir / "dkim").glob("*.pem")):
        match = _SELECTOR.fullmatch(path.name)
        if match is None:
            raise KeyFileError(f"{path}: is not named <domain>.<selector>.rsa.pem or .ed25519.pem; rename or move it")
        _owner_only(path)
        found.setdefault(match["domain"], {})[match["kind"]] = (match["selector"], path)
    files: dict[str, DkimFiles] = {}
    for domain, kinds in found.items():
        if "rsa" in kinds:
            selector, rsa = kinds["rsa"]
            ed_selector, ed = kinds.get("ed25519", (None, None))
            files[domain] = DkimFiles(domain, selector, rsa, ed_selector, ed)
    for domain, key in settings.dkim.items():
        ed_path = Path(key.ed25519_key) if key.ed25519_key else None
        for configured in (Path(key.rsa_key), ed_path):
            if configured is not None:
                _owner_only(configured)
        files[domain.lower()] = DkimFiles(
            domain.lower(), key.selector, Path(key.rsa_key), key.ed25519_selector or None, ed_path
        )
    return files


def _owner_only(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise KeyFileError(f"{path}: mode {stat.S_IMODE(mode):04o} lets others read the key; run: chmod 600 {path}")
