"""Delivery: leased slices become transactions, transactions become outcomes.

Promise: a message reaches the wire only with a Permit that is good, on a connection to an address that may be dialled,
and every attempt ends in one outcome with a scope that says who backs off: the site, the message or the recipient.

1. `courier` leases due slices (each a `hand`) for the sites that can take them; `site` finds where a domain's mail
   goes: route, smarthost, else MX, else A and AAAA (RFC 5321 5.1, S-09), null MX (S-10); `lookup` is DNS, `dialable`
   says which addresses are never dialled (faults 3.2).
2. `desk` is one site in one worker: its waiting recipients, its connections by `pool.plan`, its pace.
3. `press` asks the gate for those who are next (`gatekeeper`, decision 7) and has their messages written and signed by
   the compiled campaign (`campaigns`).
4. `connection` drives the SMTP dialogue over one socket (`tls` has the contexts) and tells the desk of every final dot
   before it leaves: the intent is journalled first (T6).
5. `outcome` judges each verdict by class (`engine.bounce`) and scope.
6. `settling` journals outcomes and settles slices (T7); `replay` does it for a worker that died (T8).

It never decides whether somebody may be written to (policy.gate does) and never forgets a 250.

Known limits: no DANE, no MTA-STS, one source address a worker.
"""
