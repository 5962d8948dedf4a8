"""Metrics for Prometheus, at `/metrics`."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)


class Metrics:
    """Counters and gauges of one server."""

    def __init__(self):
        self.registry = CollectorRegistry()

        def add(kind, name, text, labels=(), **kwargs):
            return kind(f"llamagen_{name}", text, labels, registry=self.registry, **kwargs)

        self.requests = add(Counter, "requests", "Requests that were answered.", ("route", "status"))
        self.seconds = add(Histogram, "request_seconds", "From request to answer.", ("route",), buckets=SECONDS)
        self.first_preview = add(
            Histogram, "first_preview_seconds", "From request to the first partial image.", buckets=SECONDS
        )
        self.images = add(Counter, "images", "Finished images, generated or from the cache.", ("source",))
        self.cancelled = add(Counter, "cancelled_images", "Images of requests that were cancelled or failed.")
        self.active = add(Gauge, "active_requests", "Requests that are being answered.")
        self.pending = add(Gauge, "pending_images", "Images that wait or are being generated.")
        self.cache_bytes = add(Gauge, "cache_bytes", "Size of the result cache.")
        self.url_bytes = add(Gauge, "url_store_bytes", "Size of the images that can be fetched.")
        self.ready = add(Gauge, "engine_ready", "1 if the engine takes requests.")
        self.engine = add(Gauge, "engine", "Statistics of the engine.", ("name",))
