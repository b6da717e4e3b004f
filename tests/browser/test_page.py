"""The page in a real browser, as a person uses it: one Chromium, and a server of the small model."""

import csv
import io
import itertools
import shutil
from pathlib import Path

import PIL.Image
import pytest
from serving import served

from intra.deploy.serve.app import create_app
from intra.inspection.calibration import given_threshold
from intra.inspection.detector import Detector

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium here; install Debian's: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)  # in a fresh profile
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def detector(run) -> Detector:
    return Detector.load(run.path)


@pytest.fixture(scope="module")
def address(browser, detector):  # no server where there is no browser
    with served(create_app(detector, name="gear")) as (host, port):
        yield f"http://{host}:{port}"


@pytest.fixture(scope="module")
def parts(photos, detector) -> list[Path]:
    """Ten photos, good ones first, and of these first what the model calls good: its threshold is of few photos."""
    tests = photos / "gear" / "test"
    good = sorted((tests / "good").iterdir())[:4]
    return [*sorted(good, key=lambda path: detector.predict(path).is_anomalous),
            *(path for defect in sorted(tests.iterdir()) if defect.name != "good" for path in sorted(defect.iterdir()))]


@pytest.fixture
def page(browser, address):
    """The page, as a desk's screen sees it; no error may be left in its console, nothing may come from elsewhere."""
    page = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True).new_page()
    page.set_default_timeout(60_000)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith(
        (address, "blob:", "data:")) else None)
    page.goto(address)
    page.wait_for_selector("body.ready")
    yield page
    page.context.close()
    assert [line for line in wrong if "422" not in line and "503" not in line] == []


def add(page, files: list[Path]) -> None:
    """Chooses photos, and waits for their verdicts."""
    page.set_input_files("#photos", [{"name": f"{path.parent.name}_{path.name}", "mimeType": "", "buffer":
                                      path.read_bytes()} for path in files])
    page.wait_for_selector("#progress[hidden]", state="attached")


def column(page, index: int) -> list[str]:
    return page.locator(f"tbody tr td:nth-child({index})").all_text_contents()


def chosen(page) -> str:
    return page.text_content("#name")


def move_threshold(page, place: float) -> float:
    """Along the slider, from 0 to 1; the threshold that is shown then."""
    page.locator("#threshold").fill(str(round(1000 * place)))
    page.wait_for_timeout(100)
    return float(page.text_content("#threshold-value"))


def test_a_photo_gets_a_verdict_that_can_be_read_from_afar(page, parts, detector):
    assert page.is_visible("text=Drop photos or a folder here")
    add(page, [parts[-1]])
    expected = detector.predict(parts[-1])
    assert page.text_content("#word") == ("DEFECT" if expected.is_anomalous else "GOOD")
    assert f"score {expected.score:#.4g}" in page.text_content("#why")
    size = page.evaluate("parseFloat(getComputedStyle(document.getElementById('word')).fontSize)")
    assert size > 100
    assert page.locator("#defects li:not(.none)").count() == len(expected.defects)
    assert chosen(page) in page.title()


def test_a_batch_sorts_and_downloads(page, parts, detector):
    add(page, parts)
    scores = [prediction.score for prediction in detector.predict_batch(parts)]
    bad = sum(score > detector.threshold for score in scores)
    assert page.text_content("#counts").startswith(f"{bad} defect")
    page.click("th button[data-key=score]")
    shown = [float(text) for text in column(page, 4)]
    assert shown == sorted(shown, reverse=True)
    assert page.get_attribute("th:nth-child(4)", "aria-sort") == "descending"
    page.click("th button[data-key=score]")
    assert [float(text) for text in column(page, 4)] == sorted(shown)
    page.click("th button[data-key=name]")
    assert column(page, 2) == sorted(column(page, 2))
    page.click("tbody tr:nth-child(3)")
    assert chosen(page) == column(page, 2)[2]
    with page.expect_download() as download:
        page.click("#download")
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text())))
    assert [row["photo"] for row in rows] == column(page, 2)
    assert sorted(float(row["score"]) for row in rows) == pytest.approx(sorted(scores), rel=1e-5)
    assert {row["verdict"] for row in rows} <= {"good", "defect"}


def test_the_threshold_moves_verdicts_and_promise(page, parts, detector):
    add(page, parts)
    rejected = []
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    for place in (0.02, 0.3, 0.5, 0.98):
        value = move_threshold(page, place)
        scores = [float(text) for text in column(page, 4)]
        steps = itertools.count(1)
        while value in scores:  # by the four digits that are shown, neither above nor below
            value = move_threshold(page, place + 0.001 * next(steps))
        words = column(page, 3)
        assert words == ["defect" if score > value else "good" for score in scores]
        promise = given_threshold(detector.held_out_scores, value).false_reject_rate
        share = f"{100 * promise:.{0 if promise >= 0.1 else 1}f} %"
        assert f"at most {share} of good parts" in page.text_content("#promise")
        rejected.append(words.count("defect"))
    assert rejected == sorted(rejected, reverse=True)
    assert (rejected[0], rejected[-1]) == (len(parts), 0)
    assert not [url for url in requests if "inspect" in url]  # no photo is inspected again
    page.click("#reset")
    page.wait_for_timeout(100)
    assert float(page.text_content("#threshold-value")) == pytest.approx(detector.threshold, rel=1e-3)


def drawn(page, canvas: str) -> int:
    """Pixels of a canvas that are not clear."""
    return page.locator(canvas).evaluate("""canvas => {
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        let count = 0;
        for (let i = 3; i < data.length; i += 4) count += data[i] > 0;
        return count;
    }""")


def test_marks_and_comparison(page, parts, detector):
    worst = max(parts, key=lambda path: detector.predict(path).score)
    add(page, [worst])
    page.wait_for_timeout(300)
    at_first = drawn(page, "#outlines")
    assert at_first > 0
    assert drawn(page, "#heat") > 0
    page.uncheck("#show-outlines")
    assert drawn(page, "#outlines") == 0
    page.check("#show-outlines")
    move_threshold(page, 0.98)  # above every score
    assert drawn(page, "#outlines") == 0
    move_threshold(page, 0.1)  # found anew and counted in the browser
    assert drawn(page, "#outlines") > 0
    assert page.locator("#defects li:not(.none)").count() >= 1
    box = page.locator("#frame").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    assert abs(int(page.get_attribute("#stage", "aria-valuenow")) - 25) <= 1
    assert page.locator("#repaired").evaluate("image => image.naturalWidth") == 64


def test_all_of_it_by_keyboard(page, parts):
    add(page, parts[:3])
    first = column(page, 2)[0]
    assert chosen(page) == first
    page.keyboard.press("ArrowDown")
    assert chosen(page) == column(page, 2)[1]
    page.keyboard.press("ArrowUp")
    assert chosen(page) == first
    page.keyboard.press("ArrowRight")
    assert page.get_attribute("#stage", "aria-valuenow") == "55"
    page.keyboard.press("r")
    assert page.get_attribute("#stage", "aria-valuenow") == "0"
    page.keyboard.press("h")
    assert page.input_value("#opacity") == "0"
    page.keyboard.press("o")
    assert not page.is_checked("#show-outlines")
    before = float(page.text_content("#threshold-value"))
    page.keyboard.press("]")
    page.wait_for_timeout(100)
    assert float(page.text_content("#threshold-value")) > before
    page.keyboard.press("0")
    page.wait_for_timeout(100)
    assert float(page.text_content("#threshold-value")) == before
    page.evaluate("document.getElementById('photos').addEventListener('click', () => { window.asked = true; })")
    page.keyboard.press("a")  # the dialog itself is the browser's, and does not come up in every headless one
    assert page.evaluate("window.asked")
    page.keyboard.press("Escape")
    with page.expect_download():
        page.keyboard.press("d")


def test_what_cannot_be_read_is_said(page, parts, tmp_path):
    page.set_input_files("#photos", [{"name": "scan.jpg", "mimeType": "image/jpeg", "buffer": b"no picture"}])
    page.wait_for_selector("#verdict.failed")
    assert page.text_content("#word") == "NOT READ"
    assert page.text_content("#why") == "it is no image, or is damaged at its beginning"
    PIL.Image.open(parts[0]).save(tmp_path / "scan.tiff")  # no browser shows one: the server makes its picture
    page.set_input_files("#photos", tmp_path / "scan.tiff")
    page.wait_for_selector("#verdict:is(.good, .bad)")
    page.wait_for_selector("#photo[src^='/pictures/']")
    assert page.text_content("#counts").endswith("1 not read")


def test_a_setup_alarm_is_the_verdict(page, parts, detector, tmp_path):
    dark = tmp_path / "dark.png"
    PIL.Image.open(parts[0]).point(lambda value: value // 3).save(dark)
    expected = detector.predict(dark)
    assert expected.setup_alarm
    add(page, [parts[0]])
    assert page.is_hidden("#setup")
    add(page, [dark])
    assert page.text_content("#word") == "SETUP"
    assert page.text_content("#setup").startswith(f"{expected.setup_reason} – ")
    assert page.text_content("#counts") == "1 good · 1 setup"
    assert page.text_content("#rejected") == "rejects 0 of 1"
    assert page.locator("tbody .badge").all_text_contents() == ["good", "setup"]
    assert page.locator("tbody .reason").all_text_contents() == ["", expected.setup_reason]
    page.fill("#threshold", "0")  # however low the threshold, it remains what it is; its regions are shown
    page.wait_for_selector("#rejected:text-is('rejects 1 of 1')")  # drawn with the next frame
    assert page.text_content("#word") == "SETUP"
    assert page.locator("#defects li:not(.none)").count()
    page.click("#reset")
    with page.expect_download() as download:
        page.click("#download")
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text())))
    assert [(row["setup_alarm"], row["setup_reason"]) for row in rows] == [("false", ""), (
        "true", expected.setup_reason)]
    assert float(rows[1]["p_value"]) == pytest.approx(expected.p_value)
    page.set_viewport_size({"width": 320, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    assert contrast(page, "tbody tr:last-child .reason", ".card") >= 4.5
    assert contrast(page, "#word", "#verdict") >= 4.5


@pytest.mark.parametrize(("headers", "tries"), [({"Retry-After": "0.1"}, 5), ({}, 1)])
def test_a_busy_server_is_not_asked_for_ever(page, parts, headers, tries):
    asked = []

    def refuse(route):
        asked.append(route.request.url)
        route.fulfill(status=503, headers=headers, json={"detail": "64 photos wait already; try again"})

    page.route("**/inspect?*", refuse)
    add(page, [parts[0]])
    assert page.text_content("#word") == "NOT READ"
    assert page.text_content("#why") == "64 photos wait already; try again"
    page.wait_for_timeout(500)
    assert len(asked) == tries


def test_names_are_text(page, parts):
    name = "<img src=x onerror=alert(1)>.png"
    page.set_input_files("#photos", [{"name": name, "mimeType": "image/png", "buffer": parts[0].read_bytes()},
                                     {"name": "=1+1.png", "mimeType": "image/png", "buffer": parts[1].read_bytes()}])
    page.wait_for_selector("#progress[hidden]", state="attached")
    assert sorted(column(page, 2)) == sorted([name, "=1+1.png"])
    assert page.locator("tbody img").count() == 0
    with page.expect_download() as download:
        page.click("#download")
    assert "'=1+1.png," in Path(download.value.path()).read_text()  # no formula for a spreadsheet


def test_a_dropped_photo(page, parts):
    page.evaluate("""bytes => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([Uint8Array.from(bytes)], "dropped.png", { type: "image/png" }));
        document.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
    }""", list(parts[0].read_bytes()))
    page.wait_for_selector("#verdict:is(.good, .bad)")
    assert chosen(page) == "dropped.png"


def test_a_folder(page, photos):
    page.set_input_files("#folder", photos / "gear" / "test" / "dent")
    page.wait_for_selector("tbody tr")
    page.wait_for_selector("#progress[hidden]", state="attached")
    assert column(page, 2) == ["dent/000.png", "dent/001.png"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_every_width_in_light_and_dark(page, parts, width, scheme):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    add(page, parts[:2])
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    box = page.locator("#word").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    # WCAG: text against its background, here the largest word and the smallest text
    for selector, against, least in (("#word", "#verdict", 3), ("#promise", ".card", 4.5), (".badge", ".badge", 4.5)):
        assert contrast(page, selector, against) >= least, selector


def contrast(page, selector: str, against: str) -> float:
    """The contrast ratio of WCAG 2 between a text's colour and a background."""
    colours = [page.locator(each).first.evaluate(f"node => getComputedStyle(node).{name}")
               for each, name in ((selector, "color"), (against, "backgroundColor"))]
    light, dark = sorted((luminance(colour) for colour in colours), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_the_description_of_the_api(page, address):
    page.goto(f"{address}/docs")
    page.wait_for_selector("body.ready")
    assert page.locator("section.card h2 code").all_text_contents()[0] == "/inspect"
    assert page.is_visible("text=VerdictAnswer >> nth=0")
