"""The pictures and the report: what is drawn where, in which order, and that nothing leaks in or out of the page."""

import base64
import io
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from intra.data.images import encode_png
from intra.errors import InTraError
from intra.evaluation import metrics, pictures
from intra.evaluation.report import Curves, Gallery, _histogram, write_report
from intra.inspection.detector import Defect, Prediction

THRESHOLD = 0.5


def _prediction(score: float, size: tuple[int, int] = (40, 30)) -> Prediction:
    """A flat map with one peak of that score."""
    anomaly_map = np.zeros(size, np.float32)
    anomaly_map[10:14, 5:9] = score
    mask = anomaly_map > THRESHOLD
    defects = (Defect(10, 5, 4, 4, 16, score),) if mask.any() else ()
    repaired = np.full((*size, 3), 90, np.uint8)
    return Prediction(score, score > THRESHOLD, THRESHOLD, anomaly_map, mask, repaired, defects)


def _report(
    path: Path, scored: list[tuple[str, str, float]], *, reasons: dict[str, str] | None = None,
    notes: list[str] | None = None,
) -> str:  # fmt: skip
    """The page for images (path, defect, score) with the metrics that they give."""
    gallery, image = Gallery(), np.full((40, 30, 3), 128, np.uint8)
    for name, defect, score in scored:
        gallery.add(image, _prediction(score), path=name, defect=defect, label=int(defect != "good"))
    scores = np.array([score for _, _, score in scored])
    labels = np.array([defect != "good" for _, defect, _ in scored])
    results: dict[str, Any] = {
        "category": "gear <&> box", "threshold": THRESHOLD, "num_train": 47, "seconds_per_image": 0.0421,
        "image_auroc": metrics.auroc(scores, labels), "image_ap": metrics.average_precision(scores, labels),
        "image_f1_max": metrics.f1_max(scores, labels), "recall": metrics.recall(scores, labels, THRESHOLD),
        "false_reject_rate": metrics.false_reject_rate(scores, labels, THRESHOLD),
        "pixel_auroc": None, "pixel_ap": None, "pixel_aupro": None, "per_defect": {}, "peak_memory_mib": 300.0,
        "reasons": reasons or {}, "notes": notes or [],
        "images": [{"path": name, "label": int(defect != "good"), "score": score, "is_anomalous": score > THRESHOLD}
                   for name, defect, score in scored],
        "model": {"config": {"preset": "fast", "model": {"grid": [16, 16]}}, "provenance": {"seed": 3},
                  "calibration": {"threshold": {"num_images": 21, "false_reject_rate": 1 / 22}}},
        "provenance": {"date": "2026-01-02T03:04:05+00:00", "hardware": {"device_name": "a <fast> computer"}},
    }  # fmt: skip
    write_report(path / "report.html", results, gallery, Curves(image_roc=metrics.roc_curve(scores, labels)))
    return (path / "report.html").read_text("utf-8")


class _Page(HTMLParser):
    """Checks that tags are balanced, and collects links and texts."""

    VOID = frozenset({"meta", "link", "img", "input", "br", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text = " ".join((self.text + data).split()) + " "


SCORED = [("test/good/0.png", "good", 0.1), ("test/good/1.png", "good", 0.9), ("test/crack/0.png", "crack", 0.45),
          ("test/crack/1.png", "crack", 3.0), ("test/crack/2.png", "crack", 0.05)]


def test_the_report_says_what_was_found_and_shows_the_worst_first(tmp_path: Path) -> None:
    page = _Page(_report(tmp_path, SCORED, reasons={"pixel_auroc": "none of the 3 anomalous test images has a mask"},
                         notes=["one thing to know"]))
    assert "Finds 1 of 3 defective parts ; rejects 1 of 2 good ones." in page.text.replace("parts;", "parts ;")
    assert "learned from 47 photos" in page.text
    assert "By the scores of 21 good photos that were not trained on, that rejects at most 4.5 %" in page.text
    assert "one thing to know" in page.text
    assert "Cannot be computed: none of the 3 anomalous test images has a mask." in page.text
    order = [page.text.index(name) for name in ("test/crack/2.png", "test/good/1.png", "test/crack/0.png",
                                                "test/good/0.png", "test/crack/1.png")]
    assert order == sorted(order)
    for word in ("Missed", "False alarm", "Found", "Passed", "row 10, column 5: 4 × 4 px, area 16 px", "42 ms"):
        assert word in page.text


def test_the_report_needs_nothing_else(tmp_path: Path) -> None:
    html = _report(tmp_path, SCORED)
    page = _Page(html)
    assert len(page.links) == 4 * len(SCORED)
    for link in page.links:
        kind, _, data = link.partition(",")
        assert kind == "data:image/webp;base64"
        assert PIL.Image.open(io.BytesIO(base64.b64decode(data))).size == (30, 40)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html
    assert not re.search(r"\b(nan|inf|None)\b", page.text)


def test_names_cannot_inject_anything(tmp_path: Path) -> None:
    evil = "test/\"><script>alert('x')</script>/a.png"
    html = _report(tmp_path, [*SCORED, (evil, "<b onclick=x>", 0.2)], reasons={"pixel_ap": "<i>"}, notes=["<u>"])
    page = _Page(html)
    assert not {"script", "i>", "u"} & set(page.tags)
    assert evil in page.text
    assert "<b onclick=x>" in page.text
    assert "gear <&> box" in page.text
    assert "a <fast> computer" in page.text


@pytest.mark.parametrize(("keep", "line"), [
    ("good", "Rejects 1 of 2 good parts; no defective part was tested."),
    ("crack", "Finds 1 of 3 defective parts; no good part was tested."),
])  # fmt: skip
def test_one_class_alone_gives_a_report(tmp_path: Path, keep: str, line: str) -> None:
    scored = [entry for entry in SCORED if entry[1] == keep]
    page = _Page(_report(tmp_path, scored, reasons={"image_auroc": "only one class"}))
    assert line in page.text
    assert "Cannot be computed: only one class." in page.text
    assert "Cannot be drawn" in page.text


def _names(gallery: Gallery) -> list[str]:
    return [example.path for example in gallery.examples]


def test_a_gallery_keeps_the_most_urgent_of_many() -> None:
    rng = np.random.default_rng(0)
    entries = [(f"{i}.png", int(rng.random() < 0.5), float(rng.exponential(0.5))) for i in range(40)]
    small, large = Gallery(size=7), Gallery(size=100)
    for name, label, score in entries:
        for gallery in (small, large):
            gallery.add(np.zeros((40, 30), np.uint8), _prediction(score), path=name, defect="d", label=label)
    assert small.num_added == 40
    assert len(small.examples) == 7
    assert _names(small) == _names(large)[:7]
    wrong = [bool(label) != (score > THRESHOLD) for _, label, score in entries]
    assert [e.verdict in ("missed", "false_alarm") for e in large.examples] == sorted(wrong, reverse=True)


def test_pictures_are_small_and_of_any_kind() -> None:
    size = 900, 500
    for image in (np.zeros(size, np.uint8), np.zeros((*size, 1), np.uint16), np.zeros((*size, 6), np.float32)):
        gallery = Gallery()
        prediction = _prediction(0.9, size)
        gallery.add(image, prediction, path="a", defect="d", label=1, truth=prediction.mask)
        (example,) = gallery.examples
        assert [caption for caption, _ in example.pictures] == ["Photo", "Repaired", "Heatmap", "Outline"]
        for _, uri in example.pictures:
            assert PIL.Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == (213, 384)


@given(st.lists(st.tuples(st.floats(-10, 1e4, allow_subnormal=False), st.booleans()), min_size=1, max_size=30),
       st.floats(-1, 100, allow_subnormal=False))
def test_a_histogram_counts_every_image_on_its_side_of_the_threshold(
    scored: list[tuple[float, bool]], threshold: float
) -> None:
    images = [{"score": score, "label": int(label)} for score, label in scored]
    histogram = _histogram(images, threshold)
    for name, wanted in (("good", False), ("anomalous", True)):
        bars = histogram["bars"][name]
        assert sum(bar["count"] for bar in bars) == sum(label == wanted for _, label in scored)
        assert all(0 <= bar["x"] <= bar["x"] + histogram["bar_width"] <= 1 + 1e-9 for bar in bars)
        right = sum(bar["count"] for bar in bars if bar["x"] + histogram["bar_width"] / 2 > histogram["threshold"])
        assert right == sum(label == wanted and score > threshold for score, label in scored)
    assert all(-1e-9 <= x <= 1 + 1e-9 for x, _ in histogram["ticks"])


def test_heat_is_the_same_in_every_picture() -> None:
    assert pictures.heat(np.array([-1.0, 0.0, 0.2, 0.6, 1e9]), 0.2) == pytest.approx([0, 0, 0.5, 0.75, 1])
    photo, calm, wild = np.full((4, 4), 200, np.uint8), *np.zeros((2, 4, 4), np.float32)
    calm[1, 1] = wild[1, 1] = 0.3
    wild[3, 3] = 50
    first, second = (pictures.heatmap_overlay(photo, m, 0.2) for m in (calm, wild))
    assert (first[1, 1] == second[1, 1]).all()
    assert (first[0, 0] == 200).all()  # what is far below the threshold stays grey
    assert len({tuple(pixel) for pixel in (second[0, 0], second[1, 1], second[3, 3])}) == 3
    tall = np.random.default_rng(0).random((2, 601, 3)).astype(np.float32)  # painted in portions of rows
    rows = [pictures.heatmap_overlay(*tall[:, row : row + 1], 0.2) for row in range(601)]
    assert (pictures.heatmap_overlay(*tall, 0.2) == np.concatenate(rows)).all()


def test_the_colours_rise_in_lightness() -> None:
    colors = pictures.heat_colors(np.linspace(0, 1, 50))
    assert colors.shape == (50, 3)
    assert (np.diff(colors @ [0.299, 0.587, 0.114]) > 0).all()


def test_rgb8_of_any_image() -> None:
    grey = np.array([[0, 255]], np.uint8)
    assert pictures.to_rgb8(grey).tolist() == [[[0] * 3, [255] * 3]]
    assert pictures.to_rgb8(grey[..., None]).tolist() == pictures.to_rgb8(grey).tolist()
    assert pictures.to_rgb8(np.array([[0, 65535, 32896]], np.uint16))[0, :, 0].tolist() == [0, 255, 128]
    assert pictures.to_rgb8(np.array([[-0.5, 0.5, 7]], np.float64))[0, :, 0].tolist() == [0, 128, 255]
    assert pictures.to_rgb8(np.array([[False, True]]))[0, :, 0].tolist() == [0, 255]
    many = np.arange(6, dtype=np.uint8).reshape(1, 1, 6)
    assert pictures.to_rgb8(many).tolist() == [[[0, 1, 2]]]
    assert pictures.to_rgb8(many[..., 2:4] * 20).tolist() == [[[50, 50, 50]]]
    for wrong in (np.zeros((2, 2), complex), np.zeros(3, np.uint8), np.zeros((2, 2, 0), np.uint8)):
        with pytest.raises(InTraError, match="expected"):
            pictures.to_rgb8(wrong)


def test_an_outline_lies_around_a_defect_of_one_pixel() -> None:
    photo, mask = np.full((9, 9, 3), 7, np.uint8), np.zeros((9, 9), bool)
    mask[4, 4] = True
    picture = pictures.outline(photo, mask)
    ring = (picture == pictures.PREDICTED).all(axis=2)
    assert ring.sum() == 8
    assert ring[3:6, 3:6].sum() == 8
    assert (picture[4, 4] == 7).all()
    assert (photo == 7).all()


def test_the_outline_of_a_narrow_picture_is_no_wider_than_the_picture() -> None:
    """Else its filters, as wide as the line, take minutes for a photo that the server accepts."""
    photo, mask = np.zeros((10, 200_000, 3), np.uint8), np.zeros((10, 200_000), bool)
    mask[:, 100_000] = True
    begun = time.perf_counter()
    ring = (pictures.outline(photo, mask) == pictures.PREDICTED).all(axis=2)
    assert time.perf_counter() - begun < 10
    assert np.flatnonzero(ring.any(axis=0)).tolist() == [99_999, 100_000, 100_001]
    assert not ring[1:-1, 100_000].any()  # the defect stays visible


def test_outlines_of_truth_and_prediction_differ() -> None:
    photo, mask, truth = np.zeros((20, 20), np.uint8), *np.zeros((2, 20, 20), bool)
    mask[2:5, 2:5] = True
    truth[12:16, 12:16] = True
    picture = pictures.outline(photo, mask, truth)
    assert tuple(picture[1, 1]) == pictures.PREDICTED
    assert tuple(picture[11, 11]) == pictures.TRUTH
    assert not pictures.outline(photo, np.zeros((20, 20), bool)).any()
    whole = (pictures.outline(photo, np.ones((20, 20), bool)) == pictures.PREDICTED).all(axis=2)
    assert whole[0].all()
    assert whole[:, -1].all()
    assert not whole[1:-1, 1:-1].any()


def test_shrinking_keeps_the_smallest_defect() -> None:
    mask = np.zeros((1000, 700), bool)
    mask[613, 207] = True
    small = pictures.shrink(mask, 100)
    assert small.shape == (100, 70)
    assert small.dtype == bool
    assert small[61, 20]
    picture = np.zeros((50, 40, 3), np.uint8)
    assert pictures.shrink(picture, 100) is picture
    assert pictures.shrink(np.ones((300, 200), np.float32), 100) == pytest.approx(np.ones((100, 67)))


def test_png_keeps_every_pixel() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for array in (picture, picture[..., 0]):
        assert (np.asarray(PIL.Image.open(io.BytesIO(encode_png(array)))) == array).all()
