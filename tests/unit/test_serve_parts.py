"""The server's parts, one by one, without a model."""

import asyncio
import gc
import struct
import threading
import zlib
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import python_multipart
from fastapi import HTTPException, Request
from hypothesis import given
from hypothesis import strategies as st

from intra.data.images import UnreadableError, encode_png, read_bytes, read_image
from intra.deploy.serve.drawing import KINDS, draw
from intra.deploy.serve.guard import check_token, is_loopback
from intra.deploy.serve.intake import MOST_FIELDS, Intake, plain_name
from intra.deploy.serve.limits import Limits
from intra.deploy.serve.metrics import Histogram, Metrics
from intra.deploy.serve.server import bound_socket
from intra.deploy.serve.store import PictureStore
from intra.deploy.serve.worker import BusyError, Inspector
from intra.errors import InTraError
from intra.inspection.detector import Detector, Prediction


def png(height: int, width: int) -> bytes:
    """A PNG that claims a size, and has nothing of its pixels."""
    chunks = (b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"")[:4])
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)


@given(st.text(max_size=400))
def test_a_name_never_is_a_path(name):
    plain = plain_name(name)
    assert plain
    assert not set("/\\\0\r\n") & set(plain)
    assert plain not in {".", ".."}
    assert len(plain) <= 200
    assert plain.isprintable()


def test_bytes_are_read_as_the_file_is(tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    for suffix in ("png", "tiff", "bmp", "ppm", "webp", "jpg"):
        path = tmp_path / f"photo.{suffix}"
        PIL.Image.fromarray(photo).save(path)
        sent = read_bytes(path.read_bytes(), name="photo", max_pixels=63)
        assert np.array_equal(sent, read_image(path))
        with pytest.raises(UnreadableError, match="9x7 px; at most"):
            read_bytes(path.read_bytes(), name="photo", max_pixels=62)


@pytest.mark.parametrize(("data", "reason"), [
    (b"", "empty"),
    (b"GET / HTTP/1.1", "no image"),
    (png(60000, 60000), "too many pixels|60000x60000"),
    (png(8, 8), "damaged or truncated"),
    (png(4000, 4000), "4000x4000 px; at most 10 megapixels"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),  # opening one starts Ghostscript
])  # fmt: skip
def test_what_is_no_photo_is_refused(data, reason):
    with pytest.raises(UnreadableError, match=reason):
        read_bytes(data, name="photo", max_pixels=10**7)


def test_a_tiff_of_countless_pages_is_refused(tmp_path):
    path = tmp_path / "pages.tiff"
    page = PIL.Image.new("L", (4, 4))
    page.save(path, save_all=True, append_images=[page] * 100)
    with pytest.raises(UnreadableError, match="more than 64 pages"):
        read_bytes(path.read_bytes(), name="pages", max_pixels=10**6)
    page.save(path, save_all=True, append_images=[page] * 4)
    assert read_bytes(path.read_bytes(), name="pages", max_pixels=80).shape == (4, 4, 5)
    with pytest.raises(UnreadableError, match="5 pages of 4x4"):
        read_bytes(path.read_bytes(), name="pages", max_pixels=79)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_three_grey_pages_are_no_colours(tmp_path, mode):
    path = tmp_path / "pages.tiff"
    page = PIL.Image.new(mode, (4, 4))
    page.save(path, save_all=True, append_images=[page] * 2)
    assert read_bytes(path.read_bytes(), name="pages", max_pixels=48).shape == (4, 4, 3)
    if mode == "RGB":  # its first page alone is decoded
        assert read_bytes(path.read_bytes(), name="pages", max_pixels=16).shape == (4, 4, 3)
    else:
        with pytest.raises(UnreadableError, match="3 pages of 4x4"):
            read_bytes(path.read_bytes(), name="pages", max_pixels=47)


def form(part: bytes, count: int) -> Request:
    """A multipart form of that many parts."""
    body = (b"--x\r\nContent-Disposition: form-data; " + part + b"\r\n\r\n1\r\n") * count + b"--x--\r\n"

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    return Request({"type": "http", "method": "POST", "headers": headers, "query_string": b""}, receive)


@pytest.mark.parametrize(("part", "kind", "most"), [(b'name="f"; filename="a.png"', "File", 2),
                                                    (b'name="f"', "Field", MOST_FIELDS + 1)])
def test_a_form_of_many_parts_is_not_read_to_its_end(monkeypatch, part, kind, most):
    made = []
    whole = getattr(python_multipart.multipart, kind)

    class Counted(whole):
        def __init__(self, *args, **kwargs):
            made.append(kind)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(python_multipart.multipart, kind, Counted)
    intake = Intake(Limits())
    with pytest.raises(HTTPException, match=r"400: .*more"), intake.held() as held:
        asyncio.run(intake.read(form(part, 10_000), held))
    assert len(made) == most


def test_pictures_that_cannot_be_drawn_are_one_photos_failure(monkeypatch):
    """Of two photos that are inspected together."""
    inspector = Inspector(Pair(), max_waiting=3, max_pixels=100)
    small, large = (encode_png(np.zeros((side, 2, 3), np.uint8), compress_level=1) for side in (2, 3))

    def draw(photo, prediction, kinds):
        if len(photo) == 3:
            raise ValueError("no picture")
        return {}

    async def both():
        waiting = [asyncio.create_task(inspector.inspect(data, name="", kinds=())) for data in (small, large, small)]
        await asyncio.sleep(0)  # all three wait, for one batch
        inspector.start()
        return await asyncio.gather(*waiting, return_exceptions=True)

    monkeypatch.setattr("intra.deploy.serve.worker.draw", draw)
    first, second, third = asyncio.run(both())
    assert first.prediction.score == third.prediction.score == 1.0
    assert isinstance(second, RuntimeError)


class Pair(Detector):
    """Inspects without a network."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(model=SimpleNamespace(channels=3))

    def predict_batch(self, images, *, repair_twice):
        nothing = np.zeros((2, 2), np.float32)
        return [Prediction(1.0, False, 2.0, nothing, nothing > 0, nothing, ()) for _ in images]


class Stuck(Detector):
    """Inspects until it is freed, and then fails."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(model=SimpleNamespace(channels=3))
        self.entered, self.free = threading.Event(), threading.Event()

    def predict_batch(self, images, *, repair_twice):
        self.entered.set()
        self.free.wait(30)
        raise RuntimeError("enough")


def test_who_leaves_takes_bytes_and_place_along():
    inspector = Inspector(detector := Stuck(), max_waiting=3, max_pixels=100)
    photo = encode_png(np.zeros((2, 2, 3), np.uint8), compress_level=1)
    sent = [bytes(1000) for _ in range(3)]

    async def leave():
        first = asyncio.create_task(inspector.inspect(photo, name="", kinds=()))
        assert await asyncio.to_thread(detector.entered.wait, 30)
        tasks = [asyncio.create_task(inspector.inspect(data, name="", kinds=())) for data in sent]
        await asyncio.sleep(0)
        assert inspector.num_waiting == 3
        with pytest.raises(BusyError):
            inspector.refuse_if_busy()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert inspector.num_waiting == 0
        inspector.refuse_if_busy()
        del task, tasks
        assert [gc.get_referrers(data) for data in sent] == [[sent]] * 3
        detector.free.set()
        with pytest.raises(RuntimeError):
            await first

    inspector.start()
    asyncio.run(leave())
    inspector.close()
    with pytest.raises(BusyError, match="the server stops"):
        inspector.refuse_if_busy()


def test_the_store_forgets_the_oldest():
    store = PictureStore(max_bytes=100)
    keys = [store.add({"map": bytes(40)}) for _ in range(3)]
    assert store.get(keys[0], "map") is None
    assert store.get(keys[2], "map") == bytes(40)
    assert store.get(keys[2], "mask") is None
    assert (len(store), store.num_bytes) == (2, 80)
    assert len({*keys}) == 3
    store.add({"map": bytes(200)})  # larger than all that may be kept
    assert (len(store), store.num_bytes) == (0, 0)


def test_pictures_say_what_the_map_says():
    values = np.linspace(-0.5, 8, 30 * 20, dtype=np.float32).reshape(30, 20)
    photo = np.zeros((30, 20, 3), np.uint8)
    drawn = draw(photo, Prediction(8.0, True, 2.0, values, values > 2, photo, ()), tuple(KINDS))
    pictures = {kind: read_bytes(data, name=kind, max_pixels=10**4) for kind, data in drawn.files.items()}
    assert all(picture.shape[:2] == (30, 20) for picture in pictures.values())
    assert pictures["map"].dtype == np.uint16
    assert np.abs(drawn.scale.offset + drawn.scale.step * pictures["map"][..., 0] - values).max() <= drawn.scale.step
    assert np.array_equal(pictures["mask"][..., 0] == 255, values > 2)
    assert np.array_equal(pictures["heat"][..., 0] > 127, values > 2)
    flat = np.full((3, 3), 1.5, np.float32)
    scale = draw(photo[:3, :3], Prediction(1.5, False, 2.0, flat, flat > 2, photo[:3, :3], ()), ("map",)).scale
    assert scale == (1.5, 0.0)
    assert read_bytes(encode_png(np.zeros((2, 2), np.uint16), compress_level=1), name="", max_pixels=4).max() == 0


def test_a_histogram_counts_up():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 99.0):
        histogram.add(value)
    assert histogram.lines("x") == ['x_bucket{le="1"} 2', 'x_bucket{le="2"} 3', 'x_bucket{le="+Inf"} 4', "x_sum 102",
                                    "x_count 4"]


def test_metrics_are_in_prometheus_text_format():
    metrics = Metrics()
    metrics.requests["/inspect", 200] += 2
    metrics.verdicts["good"] += 1
    metrics.add_batch(3, 0.5)
    metrics.gauge("intra_waiting_photos", "Photos in the queue.", lambda: 4)
    text = metrics.render()
    assert 'intra_requests_total{route="/inspect",status="200"} 2\n' in text
    assert "intra_waiting_photos 4\n" in text
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))
    assert all(line.startswith(("# HELP ", "# TYPE ")) or len(line.rsplit(" ", 1)) == 2 for line in text.splitlines())


@pytest.mark.parametrize("token", ["", "short", "with a space in it", "ümlaut-ümlaut-ümlaut", "line\nline-line-line"])
def test_a_token_that_could_be_guessed_is_refused(token):
    with pytest.raises(InTraError, match="at least 16"):
        check_token(token)
    assert check_token(" 0123456789abcdef\n") == "0123456789abcdef"


def test_loopback_is_this_machine_alone():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost", "LOCALHOST", "a.localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "", "::", "10.0.0.1", "evil.com", "localhost.evil.com", "127.0.0.1.x")))


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_others_may_not_reach_it_without_a_token(host):
    with pytest.raises(InTraError, match="token"), bound_socket(host, 0, may_be_reached=False):
        pass


def test_a_port_in_use_is_named():
    with bound_socket("127.0.0.1", 0, may_be_reached=False) as first:
        port = first.getsockname()[1]
        with pytest.raises(InTraError, match=f"port {port} of 127.0.0.1 is in use"), \
                bound_socket("127.0.0.1", port, may_be_reached=False):  # fmt: skip
            pass
    with pytest.raises(InTraError, match="no host of this machine"), \
            bound_socket("no.such.host.invalid", 0, may_be_reached=True):  # fmt: skip
        pass


def test_limits_are_positive():
    with pytest.raises(InTraError, match="limit waiting is 0"):
        Limits(waiting=0)
