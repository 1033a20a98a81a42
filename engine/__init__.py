"""The engine: makes mail and delivers it. The journey of a message in ten steps, each with its room:

    producer ── XADD ──►
     1 campaign.intake    claims an entry, opens and validates it; every mistake at once, or a job in SQL
     2 campaign.expand    the audience chunk by chunk, cut deterministically: a repeat is a no-op
     3 policy.gate        facts for the whole chunk in one round trip: Permit | Refusal(reason), refusals are recorded
     4 queue.lanes        permitted recipients, sealed, as slices on the lane of their domain
     5 delivery.courier   leases due slices of the sites that have permits
     6 policy.gate        asked again when the connection is ready; a Permit is void after 500 ms; fails closed
     7 message.compose    Permit + compiled campaign + recipient: bytes, signed in batches
     8 smtp.dialogue      pipelined on a reused connection; the intent is journalled before the final dot leaves
     9 delivery.outcome   delivered | retry later | given up | unknown, and whom it concerns: site, message, recipient
    10 queue.lanes        settle: done bits, counters, events in one script; from there policy.ledger has it
    late: bounce (what comes back) · tracker (what readers do) · policy.retention (when it is forgotten)

Promises: nothing is composed or written without a Permit, and mypy proves it (step 7 takes one); whatever dies at any
point, every recipient ends in exactly one terminal state (/design: promises T0 to T12); no address in clear outside the
intake stream and the wire.

`compiled` decides whether the rooms on that way are imported as text or as what `sales-push compile` made of them.

Ways in: `cli` (the console script), `client` (what producers import, the lowest room beside `settings`), `supervisor`
(`sales-push up`), `ops` (metrics and health), `rehearsal` (demo and bench: shipped, never used by delivery).
The rooms and who may import whom: pyproject.toml, [tool.importlinter].

Standards kept: RFC 5321, 5322, 2045-2047, 2369, 2919, 2920, 3207, 3463, 6376, 7505, 8058, 8463.
"""

from engine.compiled import install as _install

_install()
