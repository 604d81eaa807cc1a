"""What `/metrics` tells, in Prometheus' text."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one server, in a registry of its own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter("gem_st_requests", "Requests that were answered.", ["route", "status"], registry=own)
        self.seconds = Histogram(
            "gem_st_request_seconds", "Until the last byte.", ["route"], buckets=SECONDS, registry=own
        )
        self.tokens = Counter("gem_st_tokens", "Tokens: of prompts, written, embedded, reused.", ["kind"], registry=own)
        self.queue = Gauge("gem_st_queue", "Requests that are being answered or wait.", registry=own)
        self.cache = Counter("gem_st_cache_lookups", "Conversations that were looked up.", ["result"], registry=own)

    def count_tokens(self, **tokens: int) -> None:
        """Add tokens by kind."""
        for kind, number in tokens.items():
            self.tokens.labels(kind).inc(number)

    def count_lookup(self, num_reused: int | None) -> None:
        """Count whether something was found; None where nothing was looked up."""
        if num_reused is not None:
            self.cache.labels("hit" if num_reused else "miss").inc()

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self.registry)
