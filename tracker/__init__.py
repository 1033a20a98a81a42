"""The tracker: hears opens, clicks and opt-outs, and remembers no more than was agreed to.

Promise (promises.md T10, T11; tracking.md; mail-standards.md 2.4):
  - GET and HEAD never change state. Opt-outs are POST, durable in both stores before the 200, else 503.
  - The pixel is the same 43 bytes with the same headers whatever the token says, even when nothing behind it works.
  - Consent is asked when the hit arrives: a person on the negative list leaves nothing behind, links keep working.
  - Answer first: under overload events are dropped, never responses.
  - No cookie is set or read, no validator sent, no peer address or User-Agent kept, logged or passed on.

The way of a visit, in steps:
  1  app          one connection: limits, patience, no access log, no body decompression
  2  links.open   the token says job, message, person and mode, or it is nothing
  3  tables       in process: link tables (from read-only SQL) and the negative list (from SQL, then followed live)
  4  visitors     person, mail proxy or machine: one small number, and the User-Agent is forgotten
  5  answers      the response goes out, with the headers every page has
  6  recorder     the hit waits at most a second in memory, is asked about again, and goes to Redis in a batch
  7  policy       drains it into the ledger; opt-outs and preferences go there directly (policy.wire) and are waited for

Known limits: what needs the peer's network (scanner farms by /24) is not judged, because the address is never looked
at; several tracker processes count a replayed anonymous token once each.
"""
