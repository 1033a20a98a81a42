"""Metrics: from `policy.vitals` files and the facts of Redis to the Prometheus text format.

Naming: ``sales_push_<role>_<name>`` with label ``index`` (worker number) and, for counted kinds, ``of``; names ending
in ``_total`` are counters, all others gauges. Of the store: ``sales_push_redis_*``, ``sales_push_stream_entries``,
and ``sales_push_intake_oldest_seconds``: how long the oldest job has been lying in the intake stream, the only place
where an address may be in clear (decision 18).

Law: a scrape never fails because a part is away; what is away is missing from it and ``/readyz`` says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from redis.asyncio import Redis

from policy import keyspace
from policy.vitals import Sign

_STREAMS = {"jobs": keyspace.INTAKE, "rejected": keyspace.REJECTED, "dead": keyspace.DEAD, "hits": keyspace.HITS}


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """What Redis says about itself. streams: entries by short name; oldest_age: seconds, 0 when nothing waits."""

    memory_bytes: int = 0
    clients: int = 0
    append_only_bytes: int = 0
    oldest_age: float = 0.0
    streams: dict[str, int] = field(default_factory=dict)


async def store_facts(redis: Redis) -> StoreFacts:
    """One pipeline for all of it. Raises redis.exceptions.RedisError or OSError when Redis is away."""
    pipe = redis.pipeline(transaction=False)
    pipe.info()
    pipe.time()
    pipe.xrange(keyspace.INTAKE, "-", "+", 1)
    for key in _STREAMS.values():
        pipe.xlen(key)
    for partition in range(keyspace.PARTITIONS):
        pipe.xlen(keyspace.events(partition))
    info, now, oldest, *lengths = await pipe.execute()
    streams = dict(zip(_STREAMS, lengths, strict=False))
    streams["events"] = sum(lengths[len(_STREAMS) :])
    age = 0.0
    if oldest:
        # A stream id begins with Redis's own milliseconds: comparing with Redis TIME needs no second clock.
        age = max(0.0, now[0] + now[1] / 1e6 - int(oldest[0][0].split(b"-")[0]) / 1000)
    return StoreFacts(
        memory_bytes=int(info.get("used_memory", 0)),
        clients=int(info.get("connected_clients", 0)),
        append_only_bytes=int(info.get("aof_current_size", 0)),
        oldest_age=age,
        streams={name: int(length) for name, length in streams.items()},
    )


_Families = dict[tuple[str, bool], GaugeMetricFamily | CounterMetricFamily]


class _Snapshot(Collector):
    """One scrape's worth of metrics: built from values, forgotten after it."""

    def __init__(self, signs: Iterable[Sign], store: StoreFacts | None, now: float) -> None:
        self._signs = list(signs)
        self._store = store
        self._now = now

    def collect(self) -> Iterator[Metric]:
        age = GaugeMetricFamily(
            "sales_push_process_silent_seconds", "Since the process last spoke", labels=["role", "index"]
        )
        families: _Families = {}
        for sign in self._signs:
            age.add_metric([sign.role, str(sign.index)], max(0.0, self._now - sign.at))
            for name, value in sign.numbers.items():
                family = _family(families, f"sales_push_{sign.role}_{name}", isinstance(value, dict))
                if isinstance(value, dict):
                    for label, number in value.items():
                        family.add_metric([str(sign.index), label], number)
                else:
                    family.add_metric([str(sign.index)], value)
        yield age
        yield from families.values()
        if self._store is not None:
            yield from _of_store(self._store)


def _family(families: _Families, name: str, labelled: bool) -> GaugeMetricFamily | CounterMetricFamily:
    if (name, labelled) not in families:
        kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
        labels = ["index", "of"] if labelled else ["index"]
        families[name, labelled] = kind(name, name.removeprefix("sales_push_").replace("_", " "), labels=labels)
    return families[name, labelled]


def _of_store(store: StoreFacts) -> Iterator[Metric]:
    yield GaugeMetricFamily("sales_push_redis_memory_bytes", "used_memory", value=store.memory_bytes)
    yield GaugeMetricFamily("sales_push_redis_clients", "connected_clients", value=store.clients)
    yield GaugeMetricFamily("sales_push_redis_append_only_bytes", "aof_current_size", value=store.append_only_bytes)
    yield GaugeMetricFamily(
        "sales_push_intake_oldest_seconds", "Age of the oldest entry of the intake stream", value=store.oldest_age
    )
    streams = GaugeMetricFamily("sales_push_stream_entries", "Entries waiting in a stream", labels=["stream"])
    for name, length in store.streams.items():
        streams.add_metric([name], length)
    yield streams


def exposition(signs: Iterable[Sign], store: StoreFacts | None, now: float) -> bytes:
    """The Prometheus text format (version 0.0.4). now: seconds since the epoch; store None: Redis is away."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(signs, store, now))
    return generate_latest(registry)
