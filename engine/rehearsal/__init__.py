"""Rehearsal: the whole house at work on one machine, before simulated providers and readers, with proof afterwards.

Promise: what a rehearsal claims is checked against somebody else's count: recipients submitted against the audience
itself (`campaigns.census`), deliveries against the sink's own count, signatures by dkimpy, privacy by a scan of the
files' bytes. Where a claim and a count differ, it says so and ends with exit code 1. It is bounded in time, it reaches
nobody (every domain ends in .test or .example and is routed to loopback) and leaves nothing running.

`sales-push demo`, in order:

1. `stage` makes an installation of its own in one folder, starts the sink (`server`, `providers`) and `up`;
2. `campaigns` hands the `newsletter` to an `audience` of 20,000 in through Redis, sealed;
3. `screen` shows the ledger (`findings`) until every recipient has ended;
4. `readers` open, click and opt out over HTTP; a second campaign shows those who opted out refused;
5. `proof` verifies what the sink stored and scans the data folder; `why` tells four people's stories;
6. `report` writes report.html; the last line is JSON.

`sales-push bench` (`bench`) sends the same newsletter to one provider, ours or a `strangers` sink, and ends with
figures: `machine` says what cores sign and processes use, `samples` what was seen on the way, `latency` how long a
message took, `verdicts` is the table and `chart` the picture.

Known limits: one host; the providers take their share of its CPU, which the benchmark counts apart.
"""
