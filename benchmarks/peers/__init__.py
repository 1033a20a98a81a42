"""Peers: other programs send the same signed messages to the same sink, in turn with ours, in one run.

    python -m benchmarks.peers [--recipients N] [--rounds N] [--only NAME] [--install] [--chart FILE] [--results DIR]

Promise: nobody is crippled. Every peer gets messages that are rendered and encoded already (ours starts from template
and recipients), signs with one RSA-2048 key where ours signs the same, is tried with several settings, and is timed
with the best of them; what each was configured with is written beside the figures. A peer whose signature dkimpy does
not verify is not timed.

    1 corpus    the messages: the rehearsal's newsletter through our own composer, unsigned, in one file
    2 sink      our own sink, a new process for each run; its clock says when the last message was taken
    3 check     a few messages; the sample's body is compared with the corpus, its signature verified
    4 probe     each setting of the peer once, the best is kept
    5 contest   rounds of pairs: ours, peer, ours, next peer, ...; a ratio is always that of neighbours in time
    6 figures   medians, ratios by pairs, table, chart, one line of JSON

Peers: `postfix` (Postfix + OpenDKIM, intake to sink, queue on disk), `postfix_drain` (a full queue let go),
the same with `_tmpfs`; `nodemailer`; `aiosmtplib_dkimpy`; `aiosmtplib_cryptography`. The last three hold no queue.

Known limits: one destination on 127.0.0.1 without latency, refusals, TLS or DNS; ours is measured by its ledger from
the first to the last outcome, peers from the first byte or call to the last message at the sink, so a run should be
long enough (ten seconds) for a start of some milliseconds not to matter. Linux only.
"""
