"""The keyring: every secret of an installation, read from one place, shown nowhere.

Promise: a key file that others may read is refused, with the file and the fix; a missing key is an error, never a
default; no key appears in a repr, an error text or a log.

The folder (0700) holds one file a key (0600, hexadecimal text): ``pepper.<n>`` suppression tags · ``token.<n>`` masters
of link tokens · ``return-path.1`` · ``queue.<week>`` slices · ``kek.<week>`` wraps the subjects' keys · ``service.1``
jobs, job keys, rejected entries and reply notes at rest · ``intake.1`` X25519 private key · ``lane.1`` names lanes and
sites and never rotates. DKIM keys lie in ``dkim/`` and are read by `engine`. ``<week>`` is `policy.instants.week_of`.
They may come from a command instead of a folder: `policy.keysource`.

Several peppers: each further one is chained over the tags of those before (`policy.address.chain`), so all are kept for
ever. ``pepper.<n>`` comes with ``token.<n>`` (`policy.peppers`): a link made under token key k carries a tag made with
the peppers numbered k and below, and `Keyring.heard` brings it forward. A pepper without its token key is half a
rotation, and refused: links made then would be read wrongly for years.

Sealing is AES-256-GCM: 12 random bytes, then ciphertext and tag (NIST SP 800-38D 8.2.2: below 2^32 messages a key;
queue and wrapping keys change weekly, a subject's key seals one address).

Weekly keys are destroyed 14 days after their week (decisions 3 and 13), and never before a younger one has been there
for a day: `due` decides, `policy.chores.turn_keys` does it. Of ``kek`` two always stay.

Known limits: Python cannot wipe memory, so keys live until the process ends (LimitCORE=0, no swap). The token master
derives AES-SIV keys elsewhere (`tracker.links`). A disk may keep a copy of what was overwritten (journalling, wear
levelling): encrypt it. A week's key made while the clock was ahead stays the newest until the clock is there.

The folder may be systemd's ($CREDENTIALS_DIRECTORY, deploy/README.md). It cannot be written: new weeks' keys are then
put there by whoever keeps them, and taken away again by the same hand.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from policy.address import PEPPER_BYTES, chain
from policy.instants import DAY_US, WEEK_US

KEY_BYTES = 32
NONCE_BYTES = 12
SEAL_OVERHEAD = NONCE_BYTES + 16

_NUMBERED = ("pepper", "token", "return-path", "service", "intake", "lane")
WEEKLY = ("queue", "kek")
QUEUE_KEY_LIFE_US = 14 * DAY_US  # after the end of its week (decision 3; of wrapping keys: decision 13)
_DYING = ".destroyed."
SUCCESSOR_AGE_US = DAY_US  # 24 walks of re-sealing, also on a host that was away for a month or woke with a wrong clock
_NOTE_AAD = b"sp-note"


class KeyringError(Exception):
    """A key is missing, readable by others or not a key. The text names the file and the fix, never the content."""


class SealError(Exception):
    """Sealed bytes that this key does not open: another key, another purpose, or changed on the way."""

    def __init__(self) -> None:
        super().__init__("sealed bytes do not open under this key and purpose")


@dataclass(frozen=True, slots=True, repr=False)
class Keyring:
    """Every key of the installation, 32 bytes each; an ``_id`` says which of several is used for new work.

    pepper: for `policy.address.tag_of`: all peppers one behind another, the oldest first; pepper_ids: their numbers."""

    pepper: bytes
    token: dict[int, bytes]
    token_id: int
    return_path: dict[int, bytes]
    return_path_id: int
    queue: dict[int, bytes]
    queue_id: int
    kek: dict[int, bytes]
    kek_id: int
    service: bytes
    intake: bytes
    lane: bytes
    folder: Path | None = field(default=None, compare=False)
    pepper_ids: tuple[int, ...] = (1,)

    @classmethod
    def load(cls, dir: Path) -> Keyring:
        """Read all keys of a folder. Raises KeyringError."""
        _check_folder(dir)
        return cls.of(
            {path.name: read_key(path) for path in sorted(dir.iterdir()) if is_key(path.name)}, f"{dir}/", dir
        )

    @classmethod
    def of(cls, keys: Mapping[str, bytes], where: str, folder: Path | None = None) -> Keyring:
        """A keyring of keys by name (``pepper.1``); where: how error texts begin a name. Raises KeyringError."""
        found: dict[str, dict[int, bytes]] = {name: {} for name in (*_NUMBERED, *WEEKLY)}
        for name, key in keys.items():
            kind, _, number = name.rpartition(".")
            found[kind][int(number)] = key
        for name in _NUMBERED:
            if not found[name]:
                raise KeyringError(f"key file {where}{name}.1 is missing: run `sales-push init`, or restore it")
        for name in WEEKLY:
            if not found[name]:
                raise KeyringError(f"no key file {where}{name}.<week>: run `sales-push init`, or restore it")
        for name in ("token", "return-path"):
            if max(found[name]) > 255:
                raise KeyringError(f"key file {where}{name}.{max(found[name])}: a key id is one byte in what we send")
        peppers = sorted(found["pepper"])
        for newer in peppers[1:]:
            if newer not in found["token"]:
                raise KeyringError(
                    f"key file {where}pepper.{newer} is without token.{newer}: finish with `sales-push keys"
                    " rotate-pepper`, or move it away if it got there by mistake"
                )
        return cls(
            pepper=b"".join(found["pepper"][newer] for newer in peppers),
            token=found["token"],
            token_id=max(found["token"]),
            return_path=found["return-path"],
            return_path_id=max(found["return-path"]),
            queue=found["queue"],
            queue_id=max(found["queue"]),
            kek=found["kek"],
            kek_id=max(found["kek"]),
            service=_only(where, "service", found),
            intake=_only(where, "intake", found),
            lane=_only(where, "lane", found),
            folder=folder,
            pepper_ids=tuple(peppers),
        )

    @classmethod
    def create(cls, dir: Path, week: int) -> Keyring:
        """Make the folder and whatever key files are missing (never replaces one), then load."""
        dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_folder(dir)
        for name in _NUMBERED:
            if not any(path.suffix[1:].isdigit() and path.stem == name for path in dir.iterdir()):
                write_key(dir / f"{name}.1")
        ensure_week(dir, week)
        return cls.load(dir)

    @property
    def intake_public(self) -> bytes:
        """The 32 raw bytes producers seal to."""
        return X25519PrivateKey.from_private_bytes(self.intake).public_key().public_bytes_raw()

    @property
    def pepper_id(self) -> int:
        """The pepper of today's tags."""
        return self.pepper_ids[-1]

    def forward(self, tag: bytes, pepper_id: int) -> bytes:
        """Today's tag of one that was made when this pepper was the newest. No pepper has been added: itself."""
        if pepper_id >= self.pepper_ids[-1]:
            return tag
        known = sum(1 for number in self.pepper_ids if number <= pepper_id)
        return chain(self.pepper[max(known, 1) * PEPPER_BYTES :], tag)

    def heard(self, token_id: int, tag: bytes) -> bytes:
        """Today's tag of one that came in a link made under this token key."""
        return self.forward(tag, token_id)  # pepper.<n> came with token.<n>: they count alike

    def __repr__(self) -> str:
        return f"Keyring(token_id={self.token_id}, queue_id={self.queue_id}, kek_id={self.kek_id})"


def is_key(name: str) -> bool:
    """True for the name of a key of this keyring: ``kek.2968``; drafts and DKIM keys are none."""
    kind, dot, number = name.rpartition(".")
    return bool(dot) and kind in (*_NUMBERED, *WEEKLY) and number.isascii() and number.isdigit()


def ensure_week(dir: Path, week: int) -> bool:
    """Make this week's slice and wrapping keys if they are missing. True: something was made, load again."""
    made = False
    for name in WEEKLY:
        if not (dir / f"{name}.{week}").exists():
            made = write_key(dir / f"{name}.{week}") or made
    return made


def due(born: Mapping[int, int], now_us: int, keep: int = 1) -> list[int]:
    """Weeks whose key may be destroyed. born: when each week's key was made, microseconds; keep: how many stay always.

    A key goes 14 days after its week, and only when a younger one has been there for a day: until then what it seals
    could not have been sealed anew, and a clock that was far ahead for a moment destroys nothing.
    """
    weeks = sorted(born)
    return [
        week
        for week, successor in itertools.pairwise(weeks)
        if week in weeks[:-keep]
        and now_us >= (week + 1) * WEEK_US + QUEUE_KEY_LIFE_US
        and now_us >= born[successor] + SUCCESSOR_AGE_US
    ]


def weeks_in(dir: Path, name: str) -> dict[int, int]:
    """The weeks of which a folder holds a key ("queue", "kek"), and when each was made, microseconds."""
    return {
        int(path.suffix[1:]): path.stat().st_mtime_ns // 1000
        for path in dir.glob(f"{name}.*")
        if path.suffix[1:].isascii() and path.suffix[1:].isdigit()
    }


def destroy(dir: Path, name: str, weeks: Iterable[int]) -> None:
    """Destroy keys of these weeks. Each file is renamed, so that no reader meets half a key, overwritten, synced and
    removed, and the folder synced; what a crash left of that is finished by the next call. Raises OSError: try again.
    """
    for week in weeks:
        (dir / f"{name}.{week}").rename(dir / f"{_DYING}{name}.{week}")
    for path in dir.glob(f"{_DYING}{name}.*"):
        _sync_folder(dir)
        _wipe(path)


def destroy_old(dir: Path, now_us: int) -> list[int]:
    """Destroy slice keys past their time; their weeks. Slices in old dumps die with them (decision 3)."""
    weeks = due(weeks_in(dir, "queue"), now_us)
    destroy(dir, "queue", weeks)
    return weeks


def parse_key(text: bytes, name: str) -> bytes:
    """The key that a hexadecimal text stands for; name: how errors call it. Raises KeyringError."""
    try:
        key = bytes.fromhex(text.decode("ascii").strip())
    except ValueError:
        raise KeyringError(f"key file {name} is not hexadecimal text: restore it from where keys are kept") from None
    if len(key) != KEY_BYTES:
        raise KeyringError(f"key file {name} holds {len(key)} bytes, {KEY_BYTES} are expected: restore it")
    return key


def seal(key: bytes, plaintext: bytes, aad: bytes) -> bytes:
    """Nonce and AES-256-GCM ciphertext; aad names the purpose and what it belongs to, and must be given to open."""
    nonce = os.urandom(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plaintext, aad)


def open_sealed(key: bytes, data: bytes, aad: bytes) -> bytes:
    """Raises SealError."""
    if len(data) < SEAL_OVERHEAD:
        raise SealError
    try:
        return AESGCM(key).decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], aad)
    except InvalidTag:
        raise SealError from None


def seal_note(keyring: Keyring, text: str) -> bytes:
    """A peer's reply text, sealed: it often quotes the address (P-12). No text, no bytes."""
    return seal(keyring.service, text.encode("utf-8", "replace"), _NOTE_AAD) if text else b""


def open_note(keyring: Keyring, note: bytes) -> str:
    """Raises SealError."""
    return open_sealed(keyring.service, note, _NOTE_AAD).decode("utf-8") if note else ""


def _only(where: str, name: str, found: dict[str, dict[int, bytes]]) -> bytes:
    if len(found[name]) != 1:
        raise KeyringError(f"several key files {where}{name}.<number>: exactly one is expected, move the others away")
    return next(iter(found[name].values()))


def _check_folder(dir: Path) -> None:
    try:
        mode = dir.stat().st_mode
    except FileNotFoundError:
        raise KeyringError(f"keys folder {dir} does not exist: run `sales-push init`") from None
    if not stat.S_ISDIR(mode):
        raise KeyringError(f"keys folder {dir} is not a folder")
    if mode & _closed_to(dir):
        raise KeyringError(f"keys folder {dir} is open to others: chmod 0700 {dir}")


def _closed_to(dir: Path) -> int:
    """Mode bits that must not be set. In systemd's own folder the group's show the mask of its ACL entry for our user
    (acl(5)), and the group is root's: there they say nothing about others."""
    granted = os.environ.get("CREDENTIALS_DIRECTORY")
    return 0o007 if granted and Path(granted) == dir else 0o077


def read_key(path: Path) -> bytes:
    """Raises KeyringError: open to others, or not a key."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode  # of what was opened, not of what the name meant a moment ago
            text = file.read(4 * KEY_BYTES)
    except OSError as error:
        raise KeyringError(f"key file {path} cannot be read: {error.strerror}") from None
    if mode & _closed_to(path.parent):
        raise KeyringError(f"key file {path} is readable by others: chmod 0600 {path}, and consider it known to them")
    return parse_key(text, str(path))


def write_key(path: Path) -> bool:
    """A new key: appears whole or not at all (link(2) of a finished file), and never replaces what somebody else just
    made."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_bytes(KEY_BYTES).hex() + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
    finally:
        draft.unlink()
    _sync_folder(path.parent)  # a key that a power cut takes away takes everything sealed under it
    return True


def give_name(draft: Path, path: Path) -> None:
    """A draft becomes the key of that name, if there is none yet; without a draft nothing happens."""
    if draft.exists():
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
        draft.unlink()
        _sync_folder(path.parent)


def _wipe(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        os.write(descriptor, b"\0" * os.fstat(descriptor).st_size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    path.unlink()
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
