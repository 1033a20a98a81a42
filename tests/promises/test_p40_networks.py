"""P-40: how a message went over networks not ours is recorded, and where TLS is required nothing goes in clear."""

from __future__ import annotations

from typing import Any

from engine.delivery.outcome import judge_connection
from engine.smtp.dialogue import Dialogue
from engine.smtp.opening import Opening, hear
from engine.smtp.words import Closed, Step, Tls
from policy.events import Kind, Reason
from tests.promises.floor import Floor, floor
from tests.promises.marks import promise

__all__ = ["floor"]


def _without_asking(self: Opening) -> Any:
    """The beginning of a conversation, with no look at what is required."""
    yield from hear(Step.GREETING)
    yield from self._greet()


@promise("P-40", off={"engine.smtp.opening.Opening.run": _without_asking})
def test_p40_require_tls_and_no_starttls_nothing_is_delivered_and_it_is_deferred() -> None:
    """Also when somebody between took STARTTLS out of the answer. It waits until its job expires."""
    dialogue = Dialogue("us.example", Tls.MUST)
    dialogue.receive(b"220 mx\r\n")
    said = b"".join(dialogue.outgoing())
    heard = dialogue.receive(b"250-mx\r\n250 PIPELINING\r\n")
    said += b"".join(dialogue.outgoing())
    assert said.startswith(b"EHLO")
    assert b"MAIL" not in said
    closed = next((event for event in heard if isinstance(event, Closed)), None)
    assert closed is not None
    told = judge_connection(closed)
    assert (told.kind, told.reason) == (Kind.DEFERRED, Reason.TLS)


@promise("P-40", off={"policy.records.TLS": {}})
async def test_p40_the_record_of_a_delivery_says_how_it_was_encrypted(floor: Floor) -> None:
    told = {record.values["job"]: record.values["tls"] for record in await floor.told() if record.kind == "message"}
    assert told == {"job-0": "TLS 1.3", "job-1": "TLS 1.2", "job-2": "TLS 1.3"}
