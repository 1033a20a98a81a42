"""Delivery: leased slices become transactions, transactions become outcomes.

Promise: a message reaches the wire only with a Permit that is good, on a connection to an address that may be dialled,
and every attempt ends in one outcome with a scope that says who backs off: the site, the message or the recipient.

1. `site` finds where a domain's mail goes: routes of the configuration, else MX, else A and AAAA (RFC 5321 5.1, S-09),
   null MX (S-10), and which addresses are never dialled (faults 3.2).
2. `pool` decides which sites get connections and `courier` leases their slices, asks the gate, composes and signs.
3. `connection` drives the SMTP dialogue over one socket (`tls` has the contexts); it journals intents through its
   owner before a final dot leaves (T6).
4. `outcome` judges each verdict by class (`engine.bounce`) and scope; `courier` journals and settles it (T7).
5. `warmup` is a ceiling on the pace of a new source; `worker` is the process that runs all this.

It never decides whether somebody may be written to (policy.gate does) and never forgets a 250.

Known limits: no DANE, no MTA-STS, one source address a worker.
"""
