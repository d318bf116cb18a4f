"""What /metrics says, in Prometheus' text form, from a registry of this server's own."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)  # bounds of the histograms' buckets


class Metrics:
    """Counters of one server; all names begin with fp8kernels_, those of the process with process_."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "fp8kernels", "registry": self.registry}
        self.requests = Counter("requests", "HTTP requests that were answered", ["route", "status"], **own)
        self.in_flight = Gauge("requests_in_flight", "HTTP requests begun and not yet answered in full", **own)
        self.running = Gauge("generations_running", "generations that the model works on", **own)
        self.waiting = Gauge("generations_waiting", "accepted requests that wait for the model", **own)
        self.abandoned = Counter("generations_abandoned", "generations that the client left before the end", **own)
        self.failed = Counter("generations_failed", "generations that ended in an error", **own)
        self.prompt_tokens = Counter("prompt_tokens", "tokens of accepted prompts", **own)
        self.generated_tokens = Counter("generated_tokens", "tokens that the model generated", **own)
        self.first_token = Histogram(
            "time_to_first_token_seconds", "from accepted to first token, waiting included", buckets=SECONDS, **own
        )
        self.duration = Histogram(
            "request_duration_seconds", "of HTTP requests, from first byte to last", ["route"], buckets=SECONDS, **own
        )
        self.model_bytes = Gauge("model_bytes", "parameters and buffers of the model in memory", **own)
        self.layers = Gauge("eight_bit_layers", "linear layers that hold 8-bit codes", **own)
        ProcessCollector(registry=self.registry)  # process_resident_memory_bytes among others, on Linux

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)
