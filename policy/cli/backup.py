"""``sales-push backup``, ``backups``, ``restore``: copies of the store, their ends, and the way back.

A backup needs the policy process (it notes the copy); a restore needs it stopped. Secrets are named by file, never
typed: a key file (``--key``, made by ``--new-key``) or a passphrase (``--passphrase-file``).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from policy.cli.asking import Config, Json, ask_writer, fail, keyring_of, now_us, settings_of, show, when

if TYPE_CHECKING:
    from policy.backup import Made
    from policy.containers import Secret
    from policy.settings import PolicySettings

Key = Annotated[
    Path | None, typer.Option("--key", help="File with the key that seals it: 64 hexadecimal digits, 0600.")
]
Passphrase = Annotated[
    Path | None, typer.Option("--passphrase-file", help="File with a passphrase of 20 characters or more, 0600.")
]


def backup(
    out: Annotated[Path | None, typer.Argument(help="Where the sealed copy of the store goes.")] = None,
    keys: Annotated[Path | None, typer.Option("--keys", help="Also the keys, apart: to another place.")] = None,
    key: Key = None,
    passphrase_file: Passphrase = None,
    days: Annotated[int, typer.Option(help="When it is to be destroyed: 35 at most, keys 14.", min=1, max=35)] = 35,
    new_key: Annotated[
        Path | None, typer.Option("--new-key", help="Make a key file for backups, and no backup.")
    ] = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """A sealed, consistent copy of the store; with an end, without keys and without the erasure ledger."""
    from policy.containers import new_key_file

    if new_key is not None:
        try:
            new_key_file(new_key)
        except OSError as error:
            fail(f"{new_key}: {error.strerror}")
        show({"key": str(new_key)}, as_json, [f"{new_key}: keep it away from the backups, nobody can replace it"])
        return
    if out is None and keys is None:
        fail("name a file for the backup, or --keys", 2)
    settings = settings_of(config)
    secret = _secret(key, passphrase_file)
    told: dict[str, Any] = {}
    lines: list[str] = []
    with _told():
        if out is not None:
            told = _store(settings, secret, out, days)
            lines.append(
                f"backup {told['number']}: {told['bytes']} bytes in {out}, to be destroyed {when(told['ends'])}"
            )
        if keys is not None:
            told["keys"] = _keys(settings, secret, keys, days)
            lines.append(f"keys in {keys}, to be destroyed {when(told['keys']['ends'])}")
    show(told, as_json, lines)


def _store(settings: PolicySettings, secret: Secret, out: Path, days: int) -> dict[str, Any]:
    from policy.backup import publish, write

    ask_writer(settings, "ping")  # before the work: without the writer nobody would know of the copy
    with _bar() as step:
        made = write(settings, keyring_of(settings), secret, out, now_us(), days, step)
    try:
        number = _noted(settings, made)
    except BaseException:
        made.part.unlink(missing_ok=True)
        raise
    publish(made, out)
    return {
        "number": number, "file": str(out), "at": made.at, "ends": made.ends, "bytes": made.bytes,
        "digest": made.digest.hex(),
    }  # fmt: skip


def _keys(settings: PolicySettings, secret: Secret, out: Path, days: int) -> dict[str, Any]:
    from policy.backup import pack_keys, publish

    ask_writer(settings, "ping")
    made = pack_keys(settings, keyring_of(settings), secret, out, now_us(), days)
    try:
        number = _noted(settings, made)
    except BaseException:
        made.part.unlink(missing_ok=True)
        raise
    publish(made, out)
    return {"number": number, "file": str(out), "ends": made.ends}


def _noted(settings: PolicySettings, made: Made) -> int:
    told = ask_writer(settings, "backup_made", at=made.at, ends=made.ends, digest=made.digest, size=made.bytes)
    return int(told)


def backups(
    due: Annotated[bool, typer.Option("--due", help="Only those past their end that are not destroyed yet.")] = False,
    destroyed: Annotated[int, typer.Option(help="Note that every copy of this number was destroyed.")] = 0,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """The copies there are, and which of them are to be destroyed."""
    settings = settings_of(config)
    if destroyed:
        is_new = ask_writer(settings, "backup_destroyed", number=destroyed)
        show({"number": destroyed, "new": is_new}, as_json, ["noted" if is_new else "that was known"])
        return
    told = ask_writer(settings, "backups", due_only=due)
    lines = [
        f"{one['number']:>5}  {when(one['at'])}  {one['bytes']:>14} bytes  ends {when(one['ends'])}  "
        + ("destroyed" if one["destroyed"] else "DESTROY IT" if one["due"] else "kept")
        for one in told
    ]
    show({"backups": told}, as_json, lines or ["no backups"])


def restore(
    source: Annotated[Path | None, typer.Argument(help="A backup of the store.", exists=True, dir_okay=False)] = None,
    keys: Annotated[
        Path | None, typer.Option("--keys", help="A backup of keys: what is missing.", exists=True, dir_okay=False)
    ] = None,
    key: Key = None,
    passphrase_file: Passphrase = None,
    without_tombstones: Annotated[
        bool, typer.Option("--without-tombstones", help="An officer's word: erasures since the backup are not known.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask whether it is meant.")] = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Put a backup in the place of the store. What starts then is quarantined until it has caught up."""
    from policy import restoring

    settings = settings_of(config)
    if source is None and keys is None and not without_tombstones:
        fail("name a backup, --keys, or --without-tombstones for one that is quarantined", 2)
    told: dict[str, Any] = {}
    lines: list[str] = []
    if without_tombstones and not yes:
        _confirm("People erased since the backup would come back. Does the privacy officer answer for it?")
    with _told():
        if keys is not None:
            back, gone = restoring.restore_keys(settings, _secret(key, passphrase_file), keys, now_us())
            told["keys"] = {"back": back, "destroyed": gone}
            lines.append(f"{len(back)} keys are back, {len(gone)} stay destroyed")
        if source is not None:
            if not yes:
                _confirm("The store as it is now will be gone. Restore?")
            secret = _secret(key, passphrase_file)
            with _bar() as step:
                mark = restoring.restore(settings, secret, source, now_us(), step, forgiven=without_tombstones)
            told |= {"at": mark.at, "state": "quarantined"}
            lines.append(f"restored as of {when(mark.at)}; quarantined: start the policy process, it catches up first")
        elif without_tombstones:
            restoring.forgive(settings.data_dir)
            told["forgiven"] = True
            lines.append("noted; the next start goes on without tombstones, and the audit chain says so")
    show(told, as_json, lines)


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        fail("--yes is needed where nobody can be asked", 2)
    typer.confirm(question, abort=True)


def _secret(key: Path | None, passphrase: Path | None) -> Secret:
    from policy.containers import ContainerError, Secret

    if (key is None) == (passphrase is None):
        fail("name --key or --passphrase-file; `sales-push backup --new-key FILE` makes a key", 2)
    try:
        return Secret.of_key_file(key) if key is not None else Secret.of_passphrase_file(passphrase or Path())
    except ContainerError as error:
        fail(str(error), 2)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What can go wrong, as one line."""
    from policy.backup import BackupError
    from policy.containers import ContainerError
    from policy.keys import KeyringError
    from policy.restoring import RestoreError

    try:
        yield
    except (BackupError, ContainerError, KeyringError, RestoreError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or 'the disk'}: {error.strerror}")


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress

    with Progress(
        *Progress.get_default_columns(), DownloadColumn(), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("", total=None)

        def step(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=min(done, total) if total else done, total=total or None)

        yield step
