"""What the tombstones are told of a transaction, and what a restored system does with their lines.

Laws:
- a line says how a tag stands after the commit, all of it; so lines told twice, or lines that the backup knows already,
  change nothing, and the last line of a tag is the truth;
- carried out in order from the backup's instant on, they bring suppressions and negative list to where they were, and
  every erasure begins again (`policy.erasing` goes on with it).

    lines_of     in the transaction: `policy.enforcement` hands over what it is about to tell Redis
    carry_out    one line, in a transaction through Enforcement, so that gate and trackers hear of it

A withdrawal is known here by what it does: the negative list (tracking) and the opt-out (mail). Brought back, it counts
for every kind of tracking, the strictest reading (`policy.negative`).

Known limits: consent that was given since the backup is not brought back: nobody is tracked or written to without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import Connection, delete, select

from policy import consent, erasure, negative, suppression
from policy.schema import subject as subject_table
from policy.schema import suppression as reasons
from policy.tombstones import Line, standing_lines

if TYPE_CHECKING:
    from policy.enforcement import Effects

SOURCE = "replay"


def lines_of(conn: Connection, effects: Effects, now: int) -> tuple[list[Line], list[Line]]:
    """What must outlive a backup of a transaction with these effects: what is told before its commit, and what only
    after it, because it takes something back."""
    told: list[Line] = []
    lifted: list[Line] = []
    for tag, partition in sorted(effects.tags):
        lines = lifted if tag in effects.lifted else told
        lines += standing_lines([(tag, partition, suppression.check(conn, tag))], now)
    for subject, cause, seq in effects.negative:
        lines = lifted if cause == negative.LIFTED else told
        lines.append(Line("negative", now, {"subject": subject, "cause": cause, "seq": seq}))
    return told, lifted


def carry_out(conn: Connection, effects: Effects, line: Line, now: int) -> None:
    """Raises LookupError for a kind that nobody carries out."""
    if line.what == "erasure":
        _erase(conn, effects, line, now)
    elif line.what == "standing":
        _stand(conn, effects, line)
    elif line.what == "negative":
        _list(conn, effects, line)
    else:
        raise LookupError(f"nobody carries out a line of kind {line.what}")


def _erase(conn: Connection, effects: Effects, line: Line, now: int) -> None:
    """Subjects that the backup does not know are put on the negative list too: mail that was sent since names them."""
    values = line.values
    for number in values["subjects"]:
        if negative.standing(conn, number) != "erased":
            effects.negative.append((number, "erased", negative.add(conn, number, "erased", now)))
    erasure.begin(
        conn, effects, account=values["account"], tag=bytes.fromhex(values["tag"]), partition=values["partition"],
        lane=values["lane"], cause="replay", request=None, now=now, ledger=None,
    )  # fmt: skip


def _stand(conn: Connection, effects: Effects, line: Line) -> None:
    tag, partition = bytes.fromhex(line.values["tag"]), int(line.values["partition"])
    before = {(int(e.scope), e.scope_id, e.reason): e for e in suppression.check(conn, tag)}
    entries = [
        suppression.Entry(
            tag, partition, suppression.Scope(scope), scope_id, reason, created,
            before[scope, scope_id, reason].source if (scope, scope_id, reason) in before else SOURCE, expires,
        )
        for scope, scope_id, reason, created, expires in line.values["entries"]
    ]  # fmt: skip
    conn.execute(delete(reasons).where(reasons.c.tag == tag))
    suppression.add(conn, entries)
    effects.tags.add((tag, partition))


def _list(conn: Connection, effects: Effects, line: Line) -> None:
    subject, cause = int(line.values["subject"]), str(line.values["cause"])
    stands = negative.standing(conn, subject)
    if cause == negative.LIFTED:
        if stands is not None:
            effects.negative.append((subject, cause, negative.lift(conn, subject, line.at)))
        return
    if stands != cause:
        effects.negative.append((subject, cause, negative.add(conn, subject, cause, line.at)))
    is_known = conn.execute(select(subject_table.c.number).where(subject_table.c.number == subject)).scalar()
    if cause == "withdrawn" and is_known is not None:
        already = [purpose for purpose in consent.TRACKING if consent.withdrawn(conn, [subject], purpose)]
        for purpose in sorted(consent.TRACKING.difference(already)):
            consent.withdraw(conn, subject, purpose, SOURCE, line.at)
