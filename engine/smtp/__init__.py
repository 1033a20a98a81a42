"""The SMTP client's conversation, without a socket: what to say next, and what the answer means.

Promise: every message taken is settled exactly once, whatever the peer says and however its bytes are cut; nothing
leaves that is not SMTP grammar; a message is ``UNKNOWN`` only when its final dot was handed out and no reply came.

1. A driver (``engine.delivery.connection``) feeds bytes to `dialogue.Dialogue.receive` and writes what
   `dialogue.Dialogue.outgoing` hands out; it reads with the patience of `words.PATIENCE` for ``waiting_for``.
2. `parser.ReplyParser` cuts the bytes into replies, one at a time, on demand (h11's pull: what follows a STARTTLS reply
   in the same segment must still be in the buffer when emptiness is checked).
3. `lines` makes every byte that is written.
4. `opening` is how it begins: greeting, EHLO or HELO, STARTTLS and EHLO again, AUTH for a smarthost.
5. `script` is the rest: one transaction a message, then QUIT.
   With PIPELINING (RFC 2920) MAIL, RCPT and DATA are one flight, and the body of message n shares its flight with
   MAIL, RCPT and DATA of message n+1: one round trip a message.
6. What happened comes back as values of `words`: ``Ready``, ``Upgrade``, ``Parked``, ``Settled``, ``Closed``.

Standards: RFC 5321 (S-01 to S-08, S-12), 2920, 1870 (SIZE), 3207 (STARTTLS), 6152, 6531, 3463 and 5248.

It never imports asyncio, socket, ssl or time, never raises for what a peer did, never sends RSET first, never resends.

Known limits: one recipient a message, always (the return path and every link are the recipient's own), so the mixed
RCPT replies of S-05 cannot arise. No BDAT: it was measured, and is not faster. DATA has one flight a message, too;
towards Postfix's smtpd a connection makes 22 messages a second by BDAT and 343 by DATA, because its replies come in two
segments and the second waits for our delayed acknowledgement (``python -m benchmarks.stalls``); towards a server that
answers at once the client's CPU is the same. And a flight with BDAT sends the body even when the recipient is refused,
and leaves that transaction open to the flight behind it, so that each would have to begin with RSET.
A server that says one reply too many behind a body's is found out when the count no longer fits (before any further
body leaves); until then an extra *refusal* in that place is taken for the next message's.
"""
