"""The ground floor: whose data, may we, what happened, how long.

Promise: before anything is sent or remembered four questions are asked, and this floor answers them where the data is:

1. *Who is this person?*        `address` spells, `vault` knows, everybody else holds a keyed tag or a weekly pseudonym.
2. *May we write to them?*      `suppression`, `consent`, `accounts` keep the facts, `gate` turns facts into
                                ``Permit | Refusal``; nothing is composed without a Permit, and it fails closed.
3. *What happened?*             `events` are the words, `ledger` the memory: every recipient ends in one terminal state.
4. *How long may we know it?*   `keyspace` and `schema` name every Redis key and SQL column with its class and its end.

The path of one recipient through this floor:

1. `address.parse` takes the address from the job, `address.normalise` gives it its one spelling;
2. `address.tag_of` (pepper) and `address.mref_of` (the job's key) make the references everybody else works with;
3. `suppression` and the job's state, read in Redis by scripts, become facts; `gate.decide_entry` judges them;
4. `vault.resolve` gives the person a subject number and this week's pseudonym; `consent.record` enters the evidence;
5. `gate.decide` judges again on the ready connection: a Permit is void half a second after the question was sent;
6. `events` of the outcome go through a Redis stream into `ledger`, written by `writer`, the one SQL writer;
7. an opt-out: `suppression.add` and `consent.withdraw` in SQL, `suppression.push` and `negative.announce` in Redis, and
   only then the answer to the reader.

Beside that path stand the duties: `classes` and `retention` say when things end, `sweeping` ends them, `holds` keep
what must stay; `personal` is how every floor is asked about one person, `erasing` and `rights` ask, `bundle` answers;
`audit`, `checkpoints`, `readings` and `disclosures` prove it; `tombstones`, `backup` and `quarantine` bring it through
a restore. Their order is in the import contract.

Rooms of the path, lowest first: address, events, instants · keys, keyspace, settings, logs, valkey · gate · schema,
migrations · statements, wire · negative, vault, suppression, consent, accounts, hosts · streams, drains, ledger ·
writer · cli.

What this floor never does: it imports nothing of `engine` or `tracker` (their places come by entry point), talks to
nobody but the stores and, where an officer set it up, the relay of `rights` and the commands for keys and checkpoints
(`outlets`, each declared in the registry of `subprocessors`), and puts no address into a log, an error text, a metric,
a URL or a Redis key. A helper that no data-protection officer would ask about does not belong here.

Sources: design decisions 7, 12 to 15 and 19; requirements P-01, P-07, P-08, P-10, P-22, P-54; promises T9 to T12.
"""
