"""The report: one self-contained HTML file that shows the figures, and the images, worst mistakes first."""

import heapq
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Bool

from intra.data.files import write_atomically
from intra.evaluation import pictures
from intra.evaluation.metrics import MAX_FALSE_POSITIVE_RATE, Points
from intra.inspection.detector import Defect, Prediction

__all__ = ["MAX_SIDE_PX", "Curves", "Example", "Gallery", "page", "write_report"]

MAX_EXAMPLES = 60  # about 90 KB each: the file stays below 10 MB
MAX_SIDE_PX = 384  # of a picture
NUM_BINS = 28  # of the histogram, about
LOG_FROM = 30  # a score axis that spans more than this factor is logarithmic
LEGEND_RATIOS = (0.5, 1.0, 2.0, 5.0)  # times the threshold, marked on the colour scale


@dataclass(frozen=True)
class Curves:
    """What the report plots: rows of false positive rate and rate found; None where the data cannot give it."""

    image_roc: Points | None = None
    pixel_roc: Points | None = None
    pro: Points | None = None


@dataclass(frozen=True)
class Example:
    """One image of the report."""

    path: str
    defect: str
    verdict: str  # a key of the template's words: missed, false_alarm, found, passed
    score: float
    threshold: float
    heat: float  # the score on the report's colour scale
    defects: tuple[Defect, ...]
    pictures: tuple[tuple[str, str], ...]  # caption, data URI
    has_truth: bool
    p_value: float
    setup_reason: str  # of a setup alarm; "" without one


@dataclass
class Gallery:
    """The images that the report shows: the worst mistakes, then those nearest to the threshold.

    It keeps no more than `size` of them at any time, as thumbnails, however many are added.
    """

    size: int = MAX_EXAMPLES
    predict: Callable[[np.ndarray], Prediction] | None = None  # repairs an anomalous image anew, to be shown
    num_added: int = 0
    _kept: list[tuple[tuple[bool, float], int, Example]] = field(default_factory=list)  # a heap, the least urgent first

    def add(
        self, image: np.ndarray, prediction: Prediction, *, path: str, defect: str, label: int,
        truth: Bool[np.ndarray, "h w"] | None = None,
    ) -> None:  # fmt: skip
        """Offers one test image, its verdict, its label (1: anomalous) and, if known, the mask of its defects."""
        self.num_added += 1
        margin = abs(_heat(prediction.score, prediction.threshold) - 0.5)
        is_mistake = prediction.is_anomalous != bool(label)
        urgency = is_mistake, margin if is_mistake else -margin
        if len(self._kept) >= self.size and urgency <= self._kept[0][0]:
            return
        if self.predict and prediction.is_anomalous:
            prediction = replace(prediction, repaired=self.predict(image).repaired)
        example = _example(image, prediction, path=path, defect=defect, label=label, truth=truth)
        entry = urgency, -self.num_added, example
        (heapq.heappush if len(self._kept) < self.size else heapq.heapreplace)(self._kept, entry)

    @property
    def examples(self) -> list[Example]:
        """What was kept, most urgent first."""
        return [example for _, _, example in sorted(self._kept, key=lambda entry: entry[:2], reverse=True)]


def write_report(path: Path, results: Mapping[str, Any], gallery: Gallery, curves: Curves) -> None:
    """Writes one HTML file that needs no other file and no network. `results` is what results.json holds."""
    write_atomically(path, page("report.html.j2", {
        "results": results,
        "counts": _counts(results["images"]),
        "examples": gallery.examples,
        "num_images": gallery.num_added,
        "histogram": _histogram(results["images"], results["threshold"]),
        "curves": curves,
        "pro_limit": MAX_FALSE_POSITIVE_RATE,
        "legend": _legend(),
        "facts": _facts(results),
        "colors": {"predicted": pictures.PREDICTED, "truth": pictures.TRUTH},
    }))  # fmt: skip


def page(template: str, values: Mapping[str, Any]) -> str:
    """The HTML that one of the templates beside this module makes of these values."""
    source = files("intra.evaluation").joinpath(template).read_text("utf-8")
    return _environment().from_string(source).render(values)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "number": _number, "rgb": lambda color: f"rgb{tuple(color)}"}
    return environment


def _example(
    image: np.ndarray, prediction: Prediction, *, path: str, defect: str, label: int, truth: np.ndarray | None
) -> Example:
    photo, repaired, anomaly_map, mask = (pictures.shrink(array, MAX_SIDE_PX) for array in (
        pictures.to_rgb8(image), pictures.to_rgb8(prediction.repaired), prediction.anomaly_map, prediction.mask))
    small_truth = None if truth is None else pictures.shrink(truth, MAX_SIDE_PX)
    verdict = {(True, True): "found", (True, False): "missed", (False, True): "false_alarm", (False, False): "passed"}
    return Example(
        path=path, defect=defect, verdict=verdict[bool(label), prediction.is_anomalous], score=prediction.score,
        threshold=prediction.threshold, defects=prediction.defects, has_truth=truth is not None and bool(truth.any()),
        heat=_heat(prediction.score, prediction.threshold), p_value=prediction.p_value,
        setup_reason=prediction.setup_reason,
        pictures=tuple((caption, pictures.data_uri(picture)) for caption, picture in (
            ("Photo", photo), ("Repaired", repaired),
            ("Heatmap", pictures.heatmap_overlay(photo, anomaly_map, prediction.threshold)),
            ("Outline", pictures.outline(photo, mask, small_truth)))),
    )  # fmt: skip


def _heat(score: float, threshold: float) -> float:
    """A score on the colour scale: 0.5 at the threshold."""
    return float(pictures.heat(np.array([score], dtype=float), threshold)[0])


def _counts(images: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many good and anomalous images there are, and how many of each were called anomalous."""
    bad = [image for image in images if image["label"]]
    good = [image for image in images if not image["label"]]
    return {"good": len(good), "anomalous": len(bad), "rejected": sum(image["is_anomalous"] for image in good),
            "found": sum(image["is_anomalous"] for image in bad)}


def _histogram(images: Sequence[Mapping[str, Any]], threshold: float) -> dict[str, Any]:
    """Bars, ticks and threshold of the score histogram, in fractions of its width and of its highest bar."""
    scores = np.array([image["score"] for image in images], dtype=float)
    labels = np.array([bool(image["label"]) for image in images])
    low, high = min(float(scores.min()), threshold), max(float(scores.max()), threshold)
    logarithmic = low > 0 and high / low > LOG_FROM
    largest = max(abs(low), abs(high)) or 1.0
    if high - low < 1e-6 * largest:  # all but equal
        low, high = low - largest / 2, high + largest / 2
    scale = np.log10 if logarithmic else np.asarray
    # The threshold is an edge, so that no bar stands on both sides of it; a score at an edge lies below it.
    start, end, at = float(scale(low)), float(scale(high)), float(scale(threshold))
    width = (end - start) / NUM_BINS
    edges = at + width * np.arange(math.ceil((start - at) / width) - 1, math.ceil((end - at) / width) + 1)

    def place(value: float) -> float:
        return (float(scale(value)) - float(edges[0])) / float(edges[-1] - edges[0])

    num_bins = len(edges) - 1
    bins = np.clip(np.searchsorted(edges, scale(scores), side="left") - 1, 0, num_bins - 1)
    bars = {name: np.bincount(bins[labels == label], minlength=num_bins)
            for name, label in (("good", False), ("anomalous", True))}
    highest = max(int(counts.max()) for counts in bars.values())
    ticks = _log_ticks(low, high) if logarithmic else _linear_ticks(low, high)
    return {
        "bars": {name: [{"x": i / num_bins, "height": int(n) / highest, "count": int(n)}
                        for i, n in enumerate(counts) if n] for name, counts in bars.items()},
        "bar_width": 1 / num_bins, "highest": highest, "threshold": place(threshold),
        "ticks": [(place(tick), _number(tick)) for tick in ticks], "logarithmic": logarithmic,
    }  # fmt: skip


def _linear_ticks(low: float, high: float) -> list[float]:
    """Three to six round values between two values."""
    power = 10.0 ** np.floor(np.log10((high - low) / 3))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) < 6)
    return [float(tick) for tick in np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step]


def _log_ticks(low: float, high: float) -> list[float]:
    """At most about six powers of ten between two positive values; 1, 3, 10 … where they span less than three."""
    powers = np.arange(np.floor(np.log10(low)), np.floor(np.log10(high)) + 1)
    factors = (1, 3) if high / low < 1000 else (1,)
    ticks = [float(factor * 10.0**power) for power in powers[:: int(np.ceil(len(powers) / 7))] for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


def _legend() -> dict[str, Any]:
    """The colour scale: CSS colour stops, and ticks at multiples of the threshold."""
    heats = np.linspace(0, 1, 21)
    stops = zip(heats, pictures.heat_colors(heats), pictures.paint_opacity(heats), strict=True)
    return {
        "stops": [f"rgb({r:.0f} {g:.0f} {b:.0f} / {opacity:.2f}) {at:.0%}" for at, (r, g, b), opacity in stops],
        "ticks": [(_heat(ratio, 1.0), "threshold" if ratio == 1 else f"{ratio:g}×")
                  for ratio in LEGEND_RATIOS],
    }


def _facts(results: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The small print, in named groups: all plain values of the model's and of the evaluation's own records."""
    model = results["model"]
    config = model.get("config", {})
    groups: list[tuple[str, Mapping[str, Any]]] = [
        ("Model", {"preset": config.get("preset", ""), **_flat(model.get("provenance", {}))}),
        ("Preprocessing and calibration", {**_flat(model.get("preprocessing", {})),
                                           **_flat(model.get("calibration", {}))}),
        ("Evaluation", {**_flat(results["provenance"]), "seconds_per_image": results["seconds_per_image"],
                        "peak_memory_mib": results["peak_memory_mib"]}),
        *((f"Settings: {part}", _flat(values)) for part, values in config.items() if isinstance(values, Mapping)),
    ]
    return [(title, [(name.replace("_", " "), _text(value)) for name, value in values.items() if value is not None])
            for title, values in groups if values]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """All plain values of nested records, named by their way: `{"torch": {"major": 2}}` gives `{"torch major": 2}`."""
    parts = ({f"{prefix}{name}": value} if not isinstance(value, Mapping) else _flat(value, f"{prefix}{name} ")
             for name, value in values.items())
    return dict(itertools.chain.from_iterable(part.items() for part in parts))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, list | tuple):
        is_short = len(value) <= 4 and not any(isinstance(item, list | tuple) for item in value)
        return ", ".join(map(_text, value)) if is_short else f"{len(value)} values"
    return str(value)


def _percent(value: float) -> str:
    """A share in percent, whole where it is."""
    return f"{100 * value:.1f}".removesuffix(".0") + " %"


def _number(value: float) -> str:
    """Three significant digits, without needless zeros or exponents."""
    return f"{value:.3g}" if not 0 < abs(value) < 1e-4 else f"{value:.2g}"
