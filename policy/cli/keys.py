"""``sales-push keys``: which keys there are, and a new pepper. No command of these shows a key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from policy.cli.asking import Config, Json, fail, now_us, settings_of, show, when

if TYPE_CHECKING:
    from policy.keysource import Source
    from policy.settings import PolicySettings

keys = typer.Typer(no_args_is_help=True, help="Keys: which there are, and a new pepper.")


def _source(settings: PolicySettings) -> Source:
    from policy.keysource import source_of

    return source_of(settings)


@keys.command("list")
def keys_list(as_json: Json = False, config: Config = None) -> None:
    """The numbers of the keys there are, and since when, where that is known. Weeks are counted from 1970."""
    from policy.keys import WEEKLY, KeyringError

    source = _source(settings_of(config))
    try:
        keyring = source.load()
        weeks = {name: source.weeks(name) for name in WEEKLY}
    except (KeyringError, OSError) as error:
        fail(str(error), 2)
    told = {
        "pepper": list(keyring.pepper_ids),
        "token": sorted(keyring.token),
        "return-path": sorted(keyring.return_path),
        **{name: {str(week): at for week, at in sorted(found.items())} for name, found in weeks.items()},
    }
    lines = [f"{name:<12} {', '.join(map(str, told[name]))}" for name in ("pepper", "token", "return-path")]
    lines += [f"{name}.{week:<8} {when(at)}" for name, found in weeks.items() for week, at in sorted(found.items())]
    show(told, as_json, lines)


@keys.command("rotate-pepper")
def rotate_pepper(as_json: Json = False, config: Config = None) -> None:
    """A new pepper over all tags, with the service stopped on every host; run it again if it was interrupted.

    Keep a copy of the keys folder afterwards: no suppression is found without the new pepper and all before it.
    """
    from sqlalchemy.exc import SQLAlchemyError

    from policy import peppers
    from policy.keys import KeyringError
    from policy.keysource import Folder
    from policy.schema import open_store

    settings = settings_of(config)
    source = _source(settings)
    if not settings.sql_url and not (settings.data_dir / "policy.db").exists():
        fail(f"there is no database in {settings.data_dir}: run `sales-push init`, then `sales-push up`")
    try:
        with peppers.alone(settings.data_dir):
            writer, reader = (open_store(settings.sql_address(), writer=is_writer) for is_writer in (True, False))
            try:
                if isinstance(source, Folder):
                    done = peppers.rotate(source.path, writer, reader, now_us())
                else:
                    keyring = source.load()
                    with reader.connect() as conn:
                        if peppers.generation(conn, keyring) >= keyring.pepper_id:
                            fail(f"give the keys command a pepper newer than pepper.{keyring.pepper_id}, then again")
                    done = peppers.bring_forward(keyring, writer, reader, now_us())
            finally:
                reader.dispose()
                writer.dispose()
    except (peppers.PepperError, KeyringError) as error:
        fail(str(error))
    except OSError as error:
        fail(f"the keys folder cannot be written ({error.strerror}): put pepper.<n> and token.<n> there, then again")
    except SQLAlchemyError as error:
        fail(f"the store refused ({type(error).__name__}); nothing was changed, run it again")
    told = {
        "pepper": done.pepper_id, "suppressions": done.suppressions, "subjects": done.subjects, "others": done.others,
    }  # fmt: skip
    text = f"pepper.{done.pepper_id}: {done.suppressions} suppressions, {done.subjects} subjects, {done.others} others"
    show(told, as_json, [text, "start the service: the writer brings the new tags to Redis"])
