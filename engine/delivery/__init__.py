"""Delivery: leased slices become transactions, transactions become outcomes (steps 5 to 10 of the journey).

Promise: a message reaches the wire only under a Permit that is good, on a connection to an address that may be dialled,
and every attempt ends in one outcome with a scope that says who backs off: the site, the message or the recipient.

    0 arrival      Redis is reached and cleared, dead workers' journals are carried out: `replay`; after Redis came back
                   older they are told again: `retelling` (T12)
    1 leasing      due slices for the sites with room; each one opened, its domain looked up, its lane assigned
    2 site         where a domain's mail goes: routes, else MX, else A and AAAA (RFC 5321 5.1, S-09), null MX (S-10);
      lookup       DNS; `dialable`: which addresses are never dialled (faults 3.2)
    3 desk         one site here: who waits (`stock`), its connections (`pool`), its pace (engine.queue.pace)
    4 press        asks the gate (`gatekeeper`) for those who are next, composes (`campaigns`) and signs in batches
    5 connection   drives the SMTP dialogue over one socket (`tls`); the intent is journalled before a final dot (T6)
    6 outcome      judges each verdict by class (engine.bounce) and scope
    7 conclusions  what it comes to: an end, or another attempt in time
    8 settling     journal first, then one settle a slice (T7)
    9 hastening    what was cancelled ends at once, what was resumed goes on · resealing: old queue keys are left behind
   10 departure    SIGTERM and `host drain`: the wire is finished, the rest goes back at once, nothing of ours is left
      presence     this worker in the registry of hosts · reclaiming: leases of dead holders of this host go back
      hand         a leased slice and where each of its recipients is · courier: all of this, put together

It never decides whether somebody may be written to (policy.gate does) and never forgets a 250.

Known limits: no DANE, no MTA-STS, no warm-up of a new source, one source address a worker; leases of another host's
dead worker come back when that host is up again, or when somebody declares it dead (`sales-push host forget`).
"""
