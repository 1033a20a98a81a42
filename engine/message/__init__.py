"""Message: a campaign becomes bytes that any mail reader opens, signed, one recipient at a time.

Promise: valid MIME for any input, no line break where none was meant, nothing tracked that was not agreed to, and what
is hashed is what a receiver canonicalises. A recipient costs joins and one hash beside the signature
(design decisions 1 and 2).

    1 template   the language: what is allowed, cut into tokens
    2 rewrite    the HTML read place by place: links, contexts, escapes, byte-exact splice
    3 derive     a text part for campaigns that bring none
    4 headers    the one writer of header fields          5 mime    the one writer of bodies; attachment
    6 slots      static text and values, one join     6a sevenbit a part that travels as its author wrote it
                                                      6b recall   forms of values that recipients share, looked up
    7 contents   compiled once for all jobs that share it   7a program one job's view of it: `Program`
    8 acceptance `compile_campaign(campaign) -> Program | list[Problem]`
    9 compose    `compose(permit, program, person, date_us) -> Unsigned`
   10 dkim       `sign_batch(unsigned, signers) -> list[Message]`

Kept: RFC 5322, 2045 to 2047, 2231, 2046, 2387, 2392, 2369, 2919, 8058, 6376, 8301, 8463. Pure: no clock, no I/O; it
enters the tracker by its links only.

Known limits: headers are UTF-8 only where an address has no ASCII form (RFC 6532); text of the footer is English; the
links of the text part are not tracked.
"""

from __future__ import annotations

from engine.message.acceptance import Problem, compile_campaign, reserved
from engine.message.attachment import Attachment
from engine.message.compose import Message, PermitMismatch, Person, Unsigned, Unwritable, compose, person
from engine.message.dkim import OpenSSLSigner, Signer, load_signer, sign_batch
from engine.message.program import Campaign, Program

__all__ = [
    "Attachment",
    "Campaign",
    "Message",
    "OpenSSLSigner",
    "PermitMismatch",
    "Person",
    "Problem",
    "Program",
    "Signer",
    "Unsigned",
    "Unwritable",
    "compile_campaign",
    "compose",
    "load_signer",
    "person",
    "reserved",
    "sign_batch",
]
