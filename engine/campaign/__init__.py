"""Campaign: how a job gets in. From an entry of a stream to sealed slices on lanes, and every refusal with its reason.

Promise: every entry ends accepted, rejected with all its errors, or dead after five deliveries; every row of an accepted
job ends in exactly one place; nothing here ends a worker (T0 to T2 of promises.md). Several workers share the work.

    1 job          the contract: one declaration for decoder, checks, schema and manual (docs/jobs.md)
    2 problems     strict JSON, and the second pass that finds every mistake     3 canonical   RFC 8785, the hash
    4 validation   what fields say of one another; `read`: any bytes in, a job or its problems out
    5 acceptance   review with templates, sender and account; the record; the terms of expansion
    6 expand       the pure part: rows -> questions -> permitted people and refusals -> slices and events
    7 intake       the loop: claim, accept, expand, complete, hold, reject
      standing     what expansion asks of SQL            audience    CSV and NDJSON files, streamed
      preview      the exact message of one recipient    commands    schema, submit, render

Kept: RFC 8259 and 7493 (strict JSON), RFC 8785, RFC 3339, RFC 4180. Producers import `engine.client`, nothing of this.

Never: an address in a log, an error text or a Redis key; a payload trusted because it was sealed; a row dropped in
silence.

Known limits: chunks have 1,000 rows, fixed: their numbers are in the lanes and in the ledger (`engine.client.CHUNK_ROWS`).
"""
