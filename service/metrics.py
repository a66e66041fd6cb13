"""Everything that Prometheus sees. Base units; every label comes from a closed set, so that no request can add series without bound.

The rejection rate of a guard:
    sum by (guard) (rate(badexpert_verdicts_total{verdict="rejected"}[5m])) / sum by (guard) (rate(badexpert_verdicts_total[5m]))
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

MOST_CLASSES = 100  # rejections are counted by predicted class up to here; classes beyond share the label "other"
# What becomes of an image that is here completely: a verdict, the code of the problem that ended it, or nothing, since its sender has left.
IMAGE_OUTCOMES = (
    *("accepted", "rejected"),
    *("image_format", "image_mode", "image_too_complex", "image_too_large", "image_too_small", "image_undecodable"),
    *("overloaded", "deadline_exceeded", "device_failed", "score_not_finite", "draining", "internal", "abandoned"),
)
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_MARGINS = (-20, -10, -5, -3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 5, 10, 20)


class Metrics:
    """One registry of metrics; tests make their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.verdicts = Counter("badexpert_verdicts", "Images judged.", ["guard", "verdict"], registry=r)
        self.rejections = Counter("badexpert_rejections", "Images rejected, by the class they would have got.", ["guard", "predicted_class"], registry=r)
        self.score = Histogram("badexpert_score", "Score minus threshold; below 0 is rejected.", ["guard"], buckets=_MARGINS, registry=r)
        self.threshold = Gauge("badexpert_threshold", "Threshold in force.", ["guard"], registry=r)
        self.target_fpr = Gauge("badexpert_target_fpr_ratio", "Promised share of clean images that are rejected.", ["guard"], registry=r)
        self.guard_info = Gauge("badexpert_guard_info", "1 for the version being served.", ["guard", "version", "bundle_id", "mode"], registry=r)
        images = Counter("badexpert_images", "Images received, by what became of each.", ["outcome"], registry=r)
        self._image_outcomes = {outcome: images.labels(outcome) for outcome in IMAGE_OUTCOMES}
        self.requests = Counter("badexpert_http_requests", "Requests answered.", ["method", "route", "status"], registry=r)
        self.request_seconds = Histogram(
            "badexpert_http_request_seconds", "From the request's head to the end of the answer.", ["method", "route"], buckets=_SECONDS, registry=r
        )
        self.stage_seconds = Histogram(
            "badexpert_stage_seconds", "Time of an image in each stage: decode, queue, forward.", ["stage"], buckets=_SECONDS, registry=r
        )
        self.connections_abandoned = Counter(
            "badexpert_connections_abandoned", "Connections whose callers had left before the server could turn to them.", registry=r
        )
        # One by one: a label is looked up under a lock.
        self.decode_seconds, self.queue_seconds, self.forward_seconds = map(self.stage_seconds.labels, ("decode", "queue", "forward"))
        self.batch_images = Histogram("badexpert_batch_images", "Images in a forward pass.", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512), registry=r)
        self.batches = Counter("badexpert_batches", "Forward passes, by why they were started with what they had.", ["released"], registry=r)
        self.queue_images = Gauge("badexpert_queue_images", "Images waiting for the device.", registry=r)
        self.queue_capacity = Gauge("badexpert_queue_capacity_images", "Images that may wait.", registry=r)
        self.body_bytes = Gauge("badexpert_body_bytes", "Bytes of images in memory as they were sent, until they are answered.", registry=r)
        self.body_capacity = Gauge("badexpert_body_capacity_bytes", "Bytes of images that may be in memory.", registry=r)
        self.calibrations = Counter("badexpert_calibrations", "Calibrations ended.", ["outcome"], registry=r)
        self.calibrations_running = Gauge("badexpert_calibrations_running", "Calibrations running.", registry=r)
        for outcome in ("succeeded", "failed", "cancelled"):
            self.calibrations.labels(outcome)  # a series from the start: increase() sees the first
        self.guard_unavailable = Gauge("badexpert_guard_unavailable", "1 for a guard whose active version could not be loaded.", ["guard"], registry=r)
        self.jobs_available = Gauge("badexpert_jobs_available", "1 while the job database can be used.", registry=r)
        self.ready = Gauge("badexpert_ready", "1 when ready for traffic.", registry=r)

    def count_image(self, outcome: str) -> None:
        """One of IMAGE_OUTCOMES; any other makes no series of its own."""
        self._image_outcomes.get(outcome, self._image_outcomes["internal"]).inc()

    def render(self) -> bytes:
        """The exposition, text format 0.0.4."""
        return generate_latest(self.registry)


def _names() -> frozenset[str]:
    found = set()
    for family in Metrics().registry.collect():
        found.add(f"{family.name}_total" if family.type == "counter" else family.name)
    return frozenset(found)


NAMES = _names()
