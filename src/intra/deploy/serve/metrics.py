"""What the server counts, in the text format of Prometheus 0.0.4."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

__all__ = ["Histogram", "Metrics", "resident_bytes"]

SECONDS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1.0, 2.0, 4.0, 8.0)


class Histogram:
    """How many values lie at or below each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str) -> list[str]:
        running = list(accumulate(self.counts))
        bounds = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
        rows = [f'{name}_bucket{{le="{bound}"}} {count}' for bound, count in zip(bounds, running, strict=True)]
        return [*rows, f"{name}_sum {self.total:g}", f"{name}_count {running[-1]}"]


class Metrics:
    """Counters and histograms of one server; gauges are read when asked for."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # (route, status)
        # all from 0, or an increase to the first would not be seen
        self.verdicts = Counter(dict.fromkeys(("good", "defect", "setup", "unreadable"), 0))
        self.answer_s = Histogram(SECONDS)  # POST /inspect with a verdict: all that the client waited
        self.batch_sizes = Histogram(SIZES)
        self.batch_s = Histogram(SECONDS)
        self._gauges: dict[str, tuple[str, Callable[[], float | int]]] = {}

    def gauge(self, name: str, meaning: str, read: Callable[[], float | int]) -> None:
        self._gauges[name] = meaning, read

    def add_batch(self, size: int, elapsed_s: float) -> None:
        self.batch_sizes.add(float(size))
        self.batch_s.add(elapsed_s)

    def render(self) -> str:
        """All of it as text."""
        lines = _head("intra_requests_total", "Answers by route and status.", "counter")
        lines += [f'intra_requests_total{{route="{route}",status="{status}"}} {count}'
                  for (route, status), count in sorted(self.requests.items())]
        lines += _head("intra_verdicts_total", "Inspected photos by verdict.", "counter")
        lines += [f'intra_verdicts_total{{verdict="{verdict}"}} {count}'
                  for verdict, count in sorted(self.verdicts.items())]
        for name, meaning, histogram in (
            ("intra_answer_seconds", "From the first byte of the request to the verdict.", self.answer_s),
            ("intra_batch_seconds", "Decoding, inspection and drawing of one batch.", self.batch_s),
            ("intra_batch_photos", "Photos that were inspected together.", self.batch_sizes),
        ):
            lines += [*_head(name, meaning, "histogram"), *histogram.lines(name)]
        for name, (meaning, read) in self._gauges.items():
            lines += [*_head(name, meaning, "gauge"), f"{name} {read():.10g}"]
        return "\n".join(lines) + "\n"


def resident_bytes() -> float:
    """Memory of this process that is in RAM; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    import resource

    return pages * float(resource.getpagesize())


def _head(name: str, meaning: str, kind: str) -> list[str]:
    return [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
