"""P-23: visits and people have no key in common, no network address is kept, and a role without leave joins nothing."""

from __future__ import annotations

import re

from sqlalchemy import BigInteger, Column, Connection, MetaData, Table, Text, select

from policy import audit, keyspace, purposes, readings, schema
from policy.events import Hit
from policy.readings import Asked
from tests.promises.marks import promise

NOW = 1_795_376_640_000_000
NETWORK = re.compile(r"(^|_)(ip|ips|ipv4|ipv6|addr|remote|peer|agent|user_agent|fingerprint|cookie)($|_)")


@promise("P-23", off={"policy.readings._is_over": lambda *_: False})
def test_p23_an_analyst_cannot_join_visits_with_people(conn: Connection) -> None:
    """A role that nobody gave a limit reads nothing of anybody; each try is a line of the chain."""
    for what, field_class in (("visits", "C1"), ("visits with addresses", "C2")):
        asked = Asked("analyst/00ff00ff00ff00ff", "reporting" if field_class == "C1" else "support", what, field_class)
        assert readings.enter(conn, asked, readings.LIMITS, purposes.registry(), NOW).denied == "over-limit"
    chain = schema.audit
    lines = conn.execute(select(chain.c.action, chain.c.object_ref, chain.c.result).order_by(chain.c.seq)).all()
    assert [tuple(line) for line in lines] == [
        ("read-denied", "reading/visits", "over-limit"),
        ("read-denied", "reading/visits with addresses", "over-limit"),
    ]
    assert audit.verify(conn) is None
    assert conn.execute(select(schema.reading)).all() == []


def _widened() -> Table:
    """Visits as an access log has them: with the peer's address, and the person's number to join on."""
    made = schema.hit.to_metadata(MetaData())
    made.append_column(Column("ip", Text))
    made.append_column(Column("number", BigInteger))
    return made


@promise("P-23", off={"policy.schema.hit": _widened()})
def test_p23_no_network_address_is_kept_and_visits_share_no_column_with_people() -> None:
    """There is no access log: a visit is (job, reference, hour, family of agents), a person (number, tag, sealed)."""
    for visits in (schema.hit, schema.hit_counter, schema.last_open):
        assert set(visits.c.keys()) & set(schema.subject.c.keys()) == set(), visits.name
    for table in (schema.hit, *schema.metadata.tables.values()):
        assert [name for name in table.c.keys() if NETWORK.search(name)] == [], table.name  # noqa: SIM118  # of columns
    assert [name for name in Hit.__struct_fields__ if NETWORK.search(name)] == []
    assert [entry.name for entry in keyspace.CATALOGUE if "network" in entry.personal] == []
