"""``README.html``: the bundle for people, the same records as the data files, in one page that loads nothing. Pure.

Law: every value of every record stands in it, escaped; it has no script, no picture and no address to call.

Known limits: English only. Thousands of messages make a long page.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Final

from policy.bundle.contents import KINDS, PORTABILITY, columns
from policy.bundle.manifest import Manifest, Party
from policy.personal import Value

_STYLE: Final = (
    "body{font:16px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;font-size:14px;display:block;overflow-x:auto}"
    "th,td{border:1px solid #ccc;padding:.2em .5em;text-align:left;vertical-align:top}"
    "th{background:#f4f4f4}"
)


def readme(manifest: Manifest, told: Mapping[str, Sequence[Mapping[str, Value]]]) -> str:
    """told: values by the name of their kind, as `contents.sort` gives them."""
    return "".join(_lines(manifest, told))


def _lines(manifest: Manifest, told: Mapping[str, Sequence[Mapping[str, Value]]]) -> Iterator[str]:
    title = "Your data, to take with you" if manifest.right == PORTABILITY else "Your data"
    yield f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
    # the page comes from a file: nothing in it, data included, may fetch or run anything
    yield "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
    yield f"<style>{_STYLE}</style></head><body>\n<h1>{title}</h1>\n"
    yield f"<p>Request {escape(manifest.ticket)}, answered {escape(manifest.made_at)}.</p>\n"
    yield f"<p>{escape(manifest.completeness)}</p>\n<p>{escape(manifest.backups)}</p>\n"
    for note in manifest.left_out:
        yield f"<p>{escape(note)}</p>\n"
    yield "<h2>Who answers for it</h2>\n<ul>\n"
    for party in manifest.controllers:
        yield f"<li>Sender: {_party(party)}</li>\n"
    yield f"<li>Privacy officer: {_party(manifest.officer)}</li>\n</ul>\n"
    yield (
        "<p>You may have wrong data corrected, have it erased, object, restrict its use, and complain to the "
        "supervisory authority where you live (GDPR 15(1)(e), (f)): write to the privacy officer.</p>\n"
        "<p>The same records for programs: <code>data/*.jsonl</code> (JSON Lines, described by "
        "<code>schema/*.schema.json</code>) and <code>csv/*.csv</code> for spread-sheets, where an apostrophe in front "
        "of a cell marks it as text. <code>manifest.json</code> has the SHA-256 of each file. Instants are UTC.</p>\n"
    )
    for name, lines in told.items():
        kind = KINDS[name]
        yield f'<h2 id="{kind.file}">{kind.file.capitalize()} ({len(lines)})</h2>\n<p>{escape(kind.about)}</p>\n'
        if lines:
            names = columns(kind, lines)
            yield "<table><tr>" + "".join(f"<th>{escape(one)}</th>" for one in names) + "</tr>\n"
            for values in lines:
                yield "<tr>" + "".join(f"<td>{_value(values.get(one))}</td>" for one in names) + "</tr>\n"
            yield "</table>\n"
    yield "</body></html>\n"


def _party(party: Party) -> str:
    return ", ".join(escape(part) for part in (party.name, party.address, party.website, party.privacy_url) if part)


def _value(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return escape(str(value))
