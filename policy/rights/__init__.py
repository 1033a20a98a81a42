"""Rights of the people concerned: one engine for every right, for contacts and account holders (P-14, P-45, P-51).

Promise: a request that came in, whatever the way, has a ticket, a due date by the law that applies, and an end before
that date: done, refused with a ground and where to complain, or taken back. What protects a person (restriction,
objection, withdrawal, the report of a child) is in force when the request is answered; what shows or destroys data
waits for proof that the mailbox is theirs.

    states      which act leads from which state to which, and what is next to do: pure
    due         due dates by jurisdiction: pure
    settings    what the operator decides: calendar, texts, ways in and out
    requests    requests and their steps in SQL
    proof       one-time tokens that prove a mailbox
    letters     what is written to people: plain text, untracked
    outbox      letters on their way: as files, by a smarthost
    carrying    each right carried out, through the seams of the other rooms
    mailbox     requests that come by mail
    casework    the transactions all of it is made of
    rounds      whatever is next for every open request, so that dates are kept
    operations  what the writer does when asked
    joining     the seams as this installation has them
    stores      letters and unsorted mail as places of personal data

Known limits: accounts have no page of their own yet, so a request that concerns an account is told to its holder by
the operator (`sales-push rights list --account`); deletion of an account and its year of grace come with accounts.
"""
