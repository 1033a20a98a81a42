"""Campaign: how a job gets in. From an entry of a stream to sealed slices on lanes, and every refusal with its reason.

Promise: every entry ends accepted, rejected with all its errors, or dead after five deliveries; every row of an
accepted job ends in exactly one place; nothing here ends a worker (T0 to T2 of promises.md). Several workers share it.

    1 job          the contract: one declaration for decoder, checks, schema and manual (docs/jobs.md)
    2 strict       JSON as no two readers read it differently     problems   the second pass: every mistake at once
    3 canonical    RFC 8785: the hash that knows a repeat from a conflict
    4 validation   what fields say of one another; `read`: any bytes in, a job or its problems out
    5 acceptance   review with templates, sender and account; the record; the terms of expansion
    6 expand       the pure part: rows -> questions -> permitted people and refusals -> slices and events; people
    7 filling      an entry of the audience, whole; when the last one is in
    8 claims       entries in hand: take, park, finish           intake      the loop: accept, fill, hold, reject
      standing     what expansion asks of SQL            asking      those of a moment in one transaction
      gathering    calls of a turn of the loop as one    audience    CSV and NDJSON files, streamed
      preview      the exact message of one recipient    commands    schema, submit, render

Kept: RFC 8259 and 7493 (strict JSON), RFC 8785, RFC 3339, RFC 4180. Producers import `engine.client`, nothing of this.

Never: an address in a log, an error text or a Redis key; a payload trusted because it was sealed; a row dropped in
silence.

Known limits: chunks have 1,000 rows, fixed, because their numbers are in lanes and ledger (`engine.client.CHUNK_ROWS`).
"""
