"""Bounces: what a refusal means, and whose message it was.

Promise: a mailbox is called dead (`Judgement.hard`) only when the reply says so beyond doubt: a false hard silences a
living person, a missed one costs a few more refused messages. Judgement is data (``rules.toml``), each rule with a
real reply it must match (design decision 10).

1. `classify` turns (code, enhanced code, text) into one `policy.events.Reason` and the hard flag.
2. `verp` makes the return path of every message and reads it back from a bounce: job and mref, no address, 80-bit MAC,
   so that forged bounces suppress nobody (mail-standards 2.6).

Later rooms: ``report`` (RFC 3464, 5965) and ``inbox`` (aiosmtpd) for bounces that arrive as mail.

Standards: RFC 5321 4.2.1 (first digit decides retry), 3463 and 5248 (enhanced code explains), 7505 (null MX).
Pure: no clock, no socket. It never decides whether to try again; `engine.delivery.outcome` does.
"""
