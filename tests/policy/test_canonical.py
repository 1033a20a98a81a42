"""Several spellings, one mailbox: the opt-out of one holds for the others where the provider says that they are one."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import Connection

from engine.campaign import expand
from engine.campaign.expand import Terms
from engine.campaign.job import Recipient
from engine.queue.lanes import Lanes
from policy import accounts, suppression, vault
from policy.address import normalise, parse, parse_leniently, provider_canonical, tag_of
from policy.events import Reason, decode_batch
from policy.instants import SECOND_US
from policy.keys import Keyring
from policy.keyspace import partition_of
from policy.suppression import Entry, Scope
from tests.policy.people import row_of

NOW = 1_795_376_640_000_000


def terms(**changes: Any) -> Terms:
    base = Terms(job=7, account=1, list_number=2, topic_number=0, job_key=b"k" * 32, expires_at=NOW + 3600 * SECOND_US)
    return replace(base, **changes)


@pytest.mark.parametrize(
    ("address", "filed"),
    [
        ("B.O.B+shop@Gmail.com", "bob@gmail.com"),
        ("bo.b@googlemail.com", "bob@googlemail.com"),
        ("bob@gmail.com", None),
        ("b.o.b+shop@one.example", None),
    ],
)
def test_the_vault_knows_under_which_tag_a_provider_files_somebody(
    conn: Connection, keyring: Keyring, address: str, filed: str | None
) -> None:
    number = accounts.add(conn, "acme", display_name="Acme", now=NOW).number
    row = row_of(keyring.pepper, address)
    assert vault.canonical_tag(conn, keyring, row[0], row[1]) is None  # nobody we know
    vault.resolve(conn, keyring, number, [row], 2967, NOW)
    told = vault.canonical_tag(conn, keyring, row[0], row[1])
    assert told == (None if filed is None else row_of(keyring.pepper, filed)[0])


def test_an_opt_out_is_heard_though_no_key_opens_who_it_is(conn: Connection, keyring: Keyring) -> None:
    number = accounts.add(conn, "acme", display_name="Acme", now=NOW).number
    row = row_of(keyring.pepper, "b.ob@gmail.com")
    vault.resolve(conn, keyring, number, [row], 2967, NOW)
    assert vault.canonical_tag(conn, replace(keyring, kek={1: bytes(32)}), row[0], row[1]) is None


def test_only_people_filed_elsewhere_are_asked_about_twice(keyring: Keyring) -> None:
    """The hot path pays for nobody else: one row each, no canonical tag."""
    rows: list[Recipient | None] = [
        Recipient(address)
        for address in ("bob@gmail.com", "b.o.b@gmail.com", "b.o.b@one.example", "eve+x@gmail.com", "b.o.b@gmail.com")
    ]
    prepared = expand.prepare(terms(), keyring, 0, rows, 0, NOW)
    asked = {question.partition: question for question in expand.questions(terms(), keyring, prepared)}
    ours = asked[partition_of("gmail.com")]
    bob, eve = (row_of(keyring.pepper, address)[0] for address in ("bob@gmail.com", "eve@gmail.com"))
    assert [tag for _, tag in ours.rows[4:]] == [bob, eve, bob]
    assert len(ours.rows) == len(ours.domain_tags) == 7
    assert len({mref for mref, _ in ours.rows[4:]} | {mref for mref, _ in ours.rows[:4]}) == 5  # one address twice
    assert len(asked[partition_of("one.example")].rows) == 1


async def refused(
    redis: Redis, keyring: Keyring, conn: Connection, rows: list[str], chunk: int = 0
) -> dict[str, Reason]:
    """By the real script over what SQL says: who of the audience is refused, and why."""
    await suppression.rebuild(redis, conn, NOW)
    recipients: list[Recipient | None] = [Recipient(address) for address in rows]
    prepared = expand.prepare(terms(), keyring, chunk, recipients, 0, NOW)
    people = [person for some in prepared.people.values() for person in some]
    questions = expand.questions(terms(), keyring, prepared)
    answers = await Lanes(redis, "test").facts(questions)
    facts = {question.partition: answer for question, answer in zip(questions, answers, strict=True)}
    expand.decide(terms(), prepared, facts, {}, 1.0)
    events = [
        event
        for share in expand.shares(terms(), keyring, prepared)
        for batch in share.events
        for event in decode_batch(batch).events
    ]
    spelled = {person.mref: person.wire for person in people}
    return {spelled[event.mref]: Reason(event.reason) for event in events}


def against(keyring: Keyring, address: str, reason: str) -> Entry:
    tag, partition, _ = row_of(keyring.pepper, address)
    return Entry(tag, partition, Scope.LIST, 2, reason, NOW)


async def test_who_opted_out_in_one_spelling_is_refused_in_every_other(
    redis: Redis, conn: Connection, keyring: Keyring
) -> None:
    suppression.add(conn, [against(keyring, "bob@gmail.com", "opt-out")])
    rows = ["bob@gmail.com", "b.ob@gmail.com", "b.o.b+x@gmail.com", "bobb@gmail.com", "b.ob@one.example"]
    expected = dict.fromkeys(rows[:3], Reason.SUPPRESSED)
    assert await refused(redis, keyring, conn, rows) == expected
    assert await refused(redis, keyring, conn, rows) == expected  # a repeat of the chunk is told the same


async def test_an_erasure_or_restriction_holds_for_its_own_spelling(
    redis: Redis, conn: Connection, keyring: Keyring
) -> None:
    suppression.add(
        conn, [against(keyring, "bob@gmail.com", "erasure"), against(keyring, "eve@gmail.com", "restriction")]
    )
    rows = ["bob@gmail.com", "b.ob@gmail.com", "eve@gmail.com", "e.ve@gmail.com"]
    assert await refused(redis, keyring, conn, rows) == {
        "bob@gmail.com": Reason.ERASED, "eve@gmail.com": Reason.RESTRICTED,
    }  # fmt: skip


async def test_what_is_known_of_the_spelling_itself_says_more(redis: Redis, conn: Connection, keyring: Keyring) -> None:
    suppression.add(conn, [against(keyring, "bob@gmail.com", "opt-out"), against(keyring, "b.ob@gmail.com", "erasure")])
    assert await refused(redis, keyring, conn, ["b.ob@gmail.com"]) == {"b.ob@gmail.com": Reason.ERASED}


def test_facts_of_another_number_are_our_mistake(keyring: Keyring) -> None:
    prepared = expand.prepare(terms(), keyring, 0, [Recipient("b.ob@gmail.com")], 0, NOW)
    with pytest.raises(ValueError, match="another number"):
        expand.decide(terms(), prepared, {partition_of("gmail.com"): bytes(3)}, {}, 1.0)


def test_a_hundred_thousand_spellings_are_found_and_no_stranger_is() -> None:
    """What `normalise` promises, in bulk: case, width, ligatures, invisible characters and needless quotes."""
    dice, pepper = random.Random(11), b"p" * 32
    tags: dict[bytes, str] = {}
    for n in range(1000):
        local = "".join(dice.choice("abcdefijlnorstxyz0123456789-_+.") for _ in range(dice.randint(3, 12)))
        local = f"f{local.replace('.', 'fi')}i{n}"
        address = f"{local}@Domain{n % 50}.example"
        mailbox = parse(address)
        tag = tag_of(pepper, normalise(mailbox.local, mailbox.domain))
        assert tags.setdefault(tag, local) == local  # no stranger is met
        for _ in range(100):
            other = parse_leniently(_spelled(local, dice) + f"@dOmain{n % 50}.EXAMPLE")
            assert tag_of(pepper, normalise(other.local, other.domain)) == tag, ascii(other.wire)
    assert len(tags) == 1000


def _spelled(local: str, dice: random.Random) -> str:
    letters = []
    for letter in local.replace("fi", "\ufb01") if dice.random() < 0.3 else local:
        turn = dice.random()
        if turn < 0.3:
            letter = letter.upper()
        elif turn < 0.5 and letter.isascii() and letter.isalnum():
            letter = chr(ord(letter) + 0xFEE0)
        letters.append(letter + ("\u200b" if dice.random() < 0.05 else ""))
    text = "".join(letters)
    return f'"{text}"' if dice.random() < 0.2 else text


def test_the_canonical_spelling_reaches_no_further_than_its_provider() -> None:
    dice = random.Random(12)
    for _ in range(20_000):
        local = "".join(dice.choice("ab.+") for _ in range(8)).strip(".") or "a"
        while ".." in local:
            local = local.replace("..", ".")
        domain = dice.choice(["gmail.com", "googlemail.com", "one.example", "mail.gmail.com"])
        spelled = normalise(local, domain)
        filed = provider_canonical(spelled)
        assert filed.endswith("@" + domain)
        assert provider_canonical(filed) == filed
        assert filed == spelled or domain in ("gmail.com", "googlemail.com")
