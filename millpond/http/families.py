"""Numbers as Prometheus metric families, each with the model's name as a label."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from millpond.types import Distribution

Values = Iterable[tuple[str | tuple[str, ...], float]]
"""What the labels say, one text or as many as there are labels, and the value."""


class Families:
    """Collects the families of one moment, in the order of the calls. Counters are named without their ``_total``."""

    def __init__(self, model: str) -> None:
        self._model = model
        self.made: list[Metric] = []

    def gauge(self, name: str, text: str, value: float) -> None:
        self.gauges(name, text, (), [((), value)])

    def gauges(self, name: str, text: str, labels: tuple[str, ...], values: Values) -> None:
        """One family with labels of its own."""
        family = GaugeMetricFamily(name, text, labels=("model_name", *labels))
        for said, value in values:
            family.add_metric(self._said(said), value)
        self.made.append(family)

    def counter(self, name: str, text: str, value: float) -> None:
        self.counters(name, text, (), [((), value)])

    def counters(self, name: str, text: str, labels: tuple[str, ...], values: Values) -> None:
        """One family with labels of its own."""
        family = CounterMetricFamily(name, text, labels=("model_name", *labels))
        for said, value in values:
            family.add_metric(self._said(said), value)
        self.made.append(family)

    def histogram(self, name: str, text: str, seen: Distribution) -> None:
        bounds = (*(str(float(bound)) for bound in seen.bounds), "+Inf")
        family = HistogramMetricFamily(name, text, labels=("model_name",))
        buckets = list(zip(bounds, accumulate(seen.counts), strict=True))
        family.add_metric((self._model,), buckets, seen.total)
        self.made.append(family)

    def _said(self, labels: str | tuple[str, ...]) -> tuple[str, ...]:
        return (self._model, *((labels,) if isinstance(labels, str) else labels))
