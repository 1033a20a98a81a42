"""Settings of the tracker, each with unit, range and reason. How the world reaches it is policy's (public_url)."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class TrackerSettings(BaseSettings):
    """Table [tracker] of the configuration; environment SALES_PUSH_TRACKER_*."""

    model_config = SettingsConfigDict(env_prefix="SALES_PUSH_TRACKER_", env_nested_delimiter="__", extra="forbid")

    host: str = Field(
        default="127.0.0.1",
        description="address to listen on; loopback by default because TLS belongs to a proxy in front",
    )
    port: int = Field(
        default=8080,
        ge=0,
        le=65535,
        description="TCP port; 0 lets the system choose",
    )
    workers: int = Field(
        default=1,
        ge=1,
        le=64,
        description="processes sharing the port (SO_REUSEPORT); one answers about 10,000 hits/s of one core",
    )
    backlog: int = Field(default=2048, ge=16, le=65535, description="connections waiting to be accepted, listen(2)")
    connections: int = Field(
        default=4000,
        ge=16,
        le=100_000,
        description="connections at once; over it the oldest that is not being served is closed",
    )
    keepalive_seconds: float = Field(
        default=15.0, gt=0, le=3600, description="s an idle or still silent connection is kept; bounds slow headers too"
    )
    body_bytes: int = Field(
        default=16_384,
        ge=1024,
        le=1_048_576,
        description="largest POST body read; an opt-out needs 26 bytes, forms about 100",
    )
    body_seconds: float = Field(
        default=5.0, gt=0, le=60, description="s a POST body may take; the body never decides whether an opt-out counts"
    )
    header_bytes: int = Field(
        default=8190, ge=1024, le=65_536, description="longest request line or header field in bytes"
    )
    headers: int = Field(default=100, ge=16, le=1000, description="header fields a request")
    writer_seconds: float = Field(
        default=5.0, gt=0, le=60, description="s to wait for a durable opt-out before 503 (usual: milliseconds; T11)"
    )
    retry_after_seconds: int = Field(default=30, ge=1, le=3600, description="s named in Retry-After when answering 503")
    flush_seconds: float = Field(
        default=0.25, gt=0, le=0.9, description="s hits wait for company; a crash loses at most 1 s of them (T10)"
    )
    buffer_hits: int = Field(
        default=50_000,
        ge=100,
        le=10_000_000,
        description="hits held while Redis is away, 300 B each; then they are dropped",
    )
    stream_hits: int = Field(
        default=100_000,
        ge=1000,
        le=10_000_000,
        description="batches kept in Redis while policy is away; then the oldest go",
    )
    tables: int = Field(
        default=2000, ge=1, le=1_000_000, description="jobs whose link table is held in process, 5 kB each"
    )
    table_seconds: float = Field(
        default=300.0,
        ge=1,
        le=86_400,
        description="s until a table is read again: how long a deleted job's links may live on",
    )
    negative_reload_seconds: float = Field(
        default=600.0,
        ge=1,
        le=86_400,
        description="s until the negative list is read from SQL afresh: lifts and missed news",
    )
    negative_stale_seconds: float = Field(
        default=1.0, gt=0, le=60, description="s without news of the negative list after which hits wait unstored"
    )
