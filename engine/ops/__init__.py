"""Ops: what an operator asks of a running host, on a loopback listener. No personal data passes through here.

Rooms: `metrics` turns what processes say about themselves (`policy.vitals`) and a few facts of Redis into Prometheus
text; `api` is the listener: ``/metrics``, ``/healthz`` (this process lives), ``/readyz`` (the whole host works).

One exporter a host: workers publish, only the ops process is scraped. Ops is never in the way of mail: nothing waits
for it, and it may die and come back at any time.
"""
