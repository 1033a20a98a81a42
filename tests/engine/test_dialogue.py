"""The dialogue: every golden file, played whole and in pieces, and what the files cannot say."""

from __future__ import annotations

import pytest

from engine.smtp.dialogue import SLICE, Dialogue
from engine.smtp.lines import LocalError
from engine.smtp.words import Fate, Outbound, Settled, Step, Tls, Trouble
from tests.world import dialogue_player
from tests.world.dialogue_player import DATA, DialogueError, Player


def test_there_are_golden_dialogues() -> None:
    assert len(dialogue_player.names()) >= 50


@pytest.mark.parametrize("cut", [0, 1, 3], ids=["lines", "bytes", "threes"])
@pytest.mark.parametrize("name", dialogue_player.names())
def test_golden(name: str, cut: int) -> None:
    golden = dialogue_player.read(name)
    assert golden.about, "the first line says what the file is about"
    Player(golden, cut=cut).play()


def test_the_player_sees_a_client_that_says_too_much() -> None:
    golden = dialogue_player.read("plain_lockstep")
    golden.moves = [move for move in golden.moves if move[:2] != ("C:", "RCPT TO:<x@them>")]
    with pytest.raises(DialogueError, match="also said"):
        Player(golden).play()


def test_the_player_sees_another_fate() -> None:
    golden = dialogue_player.read("lost_after_dot")
    golden.expected[0] = golden.expected[0].replace("UNKNOWN", "DEFERRED")
    with pytest.raises(DialogueError, match="instead of"):
        Player(golden).play()


def ready(**options: object) -> Dialogue:
    dialogue = Dialogue("us.example", Tls.NEVER, **options)  # type: ignore[arg-type]  # options of the one under test
    dialogue.receive(b"220 mx\r\n")
    dialogue.outgoing()
    dialogue.receive(b"250-mx\r\n250 PIPELINING\r\n")
    dialogue.outgoing()
    return dialogue


def message(data: bytes = DATA) -> Outbound:
    return Outbound(None, "a@us", "x@them", data)


def test_the_dot_of_a_large_body_leaves_last_and_is_announced_before() -> None:
    announced: list[Outbound] = []
    dialogue = ready(on_commit=announced.append)
    large = message(b"x" * 900 + b"\r\n" + b"y" * (3 * SLICE) + b"\r\n")
    dialogue.deliver(large)
    dialogue.outgoing()
    dialogue.receive(b"250 ok\r\n250 ok\r\n354 go\r\n")
    assert not dialogue.wants, "nothing is said ahead of a body that waits for its socket"

    pieces = []
    while dialogue.speaking:
        assert announced == []
        pieces.append(b"".join(dialogue.outgoing(SLICE)))

    assert b"".join(pieces) == large.data + b".\r\n"
    assert announced == [large]
    assert max(map(len, pieces)) <= 2 * SLICE
    assert len(pieces) > 2


def test_what_on_commit_raises_keeps_the_dot_in() -> None:
    def refuse(_: Outbound) -> None:
        raise OSError("the journal is full")

    dialogue = ready(on_commit=refuse)
    dialogue.deliver(message())
    dialogue.outgoing()
    dialogue.receive(b"250 ok\r\n250 ok\r\n354 go\r\n")
    with pytest.raises(OSError, match="journal"):
        dialogue.outgoing()
    settled = [event for event in dialogue.lost(Trouble.ABORTED) if isinstance(event, Settled)]
    assert [event.verdict.fate for event in settled] == [Fate.DEFERRED]


def test_a_reply_before_the_dot_left_is_never_a_delivery() -> None:
    dialogue = ready()
    dialogue.deliver(message())
    dialogue.outgoing()
    events = dialogue.receive(b"250 ok\r\n250 ok\r\n354 go\r\n250 thanks\r\n")
    assert [event.verdict.fate for event in events if isinstance(event, Settled)] == [Fate.DEFERRED]
    assert dialogue.closed


def test_a_refusal_before_the_dot_left_is_kept_and_ends_the_connection() -> None:
    dialogue = ready()
    dialogue.deliver(message())
    dialogue.outgoing()
    events = dialogue.receive(b"250 ok\r\n250 ok\r\n354 go\r\n552 5.3.4 too big\r\n")
    verdicts = [event.verdict for event in events if isinstance(event, Settled)]
    assert [(verdict.fate, verdict.step) for verdict in verdicts] == [(Fate.REJECTED, Step.BODY)]
    assert dialogue.closed


def test_misuse_raises() -> None:
    fresh = Dialogue("us.example")
    with pytest.raises(LocalError):
        fresh.deliver(message())
    with pytest.raises(LocalError):
        fresh.tls_started()
    with pytest.raises(LocalError):
        fresh.renew(message())
    for hello in ("us\r\nRSET", "", "us example", "a" * 300):
        with pytest.raises(LocalError):
            Dialogue(hello)


def test_losing_a_closed_dialogue_changes_nothing() -> None:
    dialogue = ready()
    assert len(dialogue.lost(Trouble.LOST)) == 1
    assert dialogue.lost(Trouble.TIMEOUT) == []
    assert dialogue.receive(b"250 ok\r\n") == []
    assert dialogue.outgoing() == []
