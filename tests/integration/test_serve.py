"""The API and its security, with a model that was really trained and, where it matters, real sockets."""

import base64
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from serving import exchange, served
from starlette.testclient import TestClient

import intra
from intra.data.images import read_bytes
from intra.deploy.serve.app import create_app
from intra.deploy.serve.limits import Limits
from intra.inspection.calibration import choose_threshold, given_threshold
from intra.inspection.detector import Detector

TOKEN = "a-token-of-thirty-two-characters"
ROUTES = ["/", "/docs", "/page/main.js", "/openapi.json", "/health", "/model", "/threshold", "/metrics",
          "/pictures/x/map.png", "/nothing"]


@pytest.fixture(scope="module")
def detector(run) -> Detector:
    return Detector.load(run.path)


@pytest.fixture(scope="module")
def photo(photos) -> Path:
    return photos / "gear" / "test" / "dent" / "000.png"


@pytest.fixture(scope="module")
def client(detector):
    with TestClient(create_app(detector, name="gear"), base_url="http://localhost") as client:
        yield client


def picture(client, link: str) -> np.ndarray:
    answer = client.get(link)
    assert answer.headers["content-type"] == "image/png"
    return read_bytes(answer.content, name=link, max_pixels=10**6)


def test_the_verdict_is_the_detectors(client, detector, photo):
    expected = detector.predict(photo)
    said = client.post("/inspect", content=photo.read_bytes(), params={"name": "part 7.png"}).json()
    assert said["score"] == pytest.approx(expected.score, rel=1e-5)
    assert (said["name"], said["height"], said["width"]) == ("part 7.png", 64, 64)
    assert said["is_anomalous"] == expected.is_anomalous
    assert said["threshold"] == expected.threshold
    assert said["false_reject_rate"] == detector.calibration.false_reject_rate
    assert said["p_value"] == expected.p_value
    assert (said["setup_alarm"], said["setup_reason"]) == (expected.setup_alarm, expected.setup_reason) == (False, "")
    assert said["verdict"] == expected.verdict == ("defect" if expected.is_anomalous else "good")
    assert [defect["area_px"] for defect in said["defects"]] == [defect.area_px for defect in expected.defects]
    assert np.array_equal(picture(client, said["pictures"]["mask"])[..., 0] > 0, expected.mask)
    assert np.array_equal(picture(client, said["pictures"]["repaired"]), expected.repaired)
    scale = said["map_scale"]
    values = scale["offset"] + scale["step"] * picture(client, said["pictures"]["map"])[..., 0]
    assert np.allclose(values, expected.anomaly_map, atol=2 * scale["step"])


def test_a_setup_alarm_is_told_and_counted(client, detector, photo, tmp_path):
    dark = tmp_path / "dark.png"
    PIL.Image.open(photo).point(lambda value: value // 3).save(dark)
    expected = detector.predict(dark)
    before = setup_alarms(client)
    said = client.post("/inspect?pictures=", content=dark.read_bytes()).json()
    assert (said["verdict"], said["setup_alarm"], said["setup_reason"]) == ("setup", True, expected.setup_reason)
    client.post("/inspect?pictures=", content=photo.read_bytes())
    assert setup_alarms(client) == before + 1


def setup_alarms(client) -> int:
    return int(re.search(r'^intra_verdicts_total\{verdict="setup"\} (\d+)$', client.get("/metrics").text, re.M)[1])


def test_a_form_and_inline_pictures(client, photo):
    plain = client.post("/inspect?pictures=", content=photo.read_bytes()).json()
    said = client.post("/inspect?pictures=repaired,photo&inline=true", files={
        "file": ("../../etc/passwd.png", photo.read_bytes(), "image/png")}).json()
    assert said["name"] == "passwd.png"
    assert said["score"] == pytest.approx(plain["score"], rel=1e-6)
    assert plain["pictures"] == {}
    head, data = said["pictures"]["photo"].split(",")
    assert head == "data:image/png;base64"
    assert np.array_equal(read_bytes(base64.b64decode(data), name="", max_pixels=10**6),
                          np.asarray(PIL.Image.open(photo)))


def test_the_model_tells_all_that_a_threshold_needs(client, detector):
    said = client.get("/model").json()
    scores = said["held_out_scores"]
    assert scores == sorted(detector.held_out_scores)
    assert said["threshold"] == asdict(detector.calibration) | {"promise": detector.calibration.promise}
    assert client.get("/threshold").json() == said["threshold"]
    moved = given_threshold(scores, 3.0)
    assert client.get("/threshold?value=3").json() == asdict(moved) | {"promise": moved.promise}
    chosen = choose_threshold(scores, 0.3)
    assert client.get("/threshold?false_reject_rate=0.3").json() == asdict(chosen) | {"promise": chosen.promise}
    for wrong in ("value=nan", "value=x", "false_reject_rate=2", "value=1&false_reject_rate=0.1"):
        assert client.get(f"/threshold?{wrong}").status_code == 422


def test_health_metrics_and_openapi(client, photo):
    client.post("/inspect", content=photo.read_bytes())
    assert client.get("/health").json() == {"status": "ok", "waiting": 0}
    text = client.get("/metrics").text
    assert re.search(r'intra_requests_total\{route="/inspect",status="200"\} [1-9]', text)
    assert re.search(r"intra_answer_seconds_count [1-9]", text)
    assert float(re.search(r"^process_resident_memory_bytes (\S+)", text, re.M)[1]) > 1e7
    spec = client.get("/openapi.json").json()
    assert set(spec["paths"]) == {"/inspect", "/pictures/{key}/{kind}.png", "/model", "/threshold", "/health",
                                  "/metrics"}
    assert {"image/*", "multipart/form-data"} == set(spec["paths"]["/inspect"]["post"]["requestBody"]["content"])
    assert "503" in spec["paths"]["/inspect"]["post"]["responses"]


def test_pages_bring_everything_themselves(client):
    for path in ("/", "/docs", "/page/page.css", "/page/main.js", "/page/stage.js", "/page/docs.js"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert not re.search(r"(src|href|import|url)\W{1,3}https?:|@import|//cdn", answer.text), path
        assert "<script>" not in answer.text
        assert " style=" not in answer.text


@pytest.mark.parametrize(("content", "status", "said"), [
    (b"", 422, "empty"),
    (b"#!/bin/sh", 422, "no image"),
    ("truncated", 422, "damaged or truncated"),
    ("five channels", 422, "expected an image of 3 channels"),
])  # fmt: skip
def test_unfit_photos_are_refused_in_one_sentence(client, photo, tmp_path, content, status, said):
    if content == "truncated":
        content = photo.read_bytes()[:2000]
    elif content == "five channels":
        page = PIL.Image.new("L", (8, 8))
        page.save(tmp_path / "five.tiff", save_all=True, append_images=[page] * 4)
        content = (tmp_path / "five.tiff").read_bytes()
    answer = client.post("/inspect?name=/etc/part.png", content=content)
    assert answer.status_code == status
    assert re.fullmatch(rf"cannot inspect part\.png: [^\n]*{said}[^\n]*", answer.json()["detail"])
    assert not re.search(r"Traceback|File \"|0x[0-9a-f]{6}|site-packages|/etc", answer.text)


def test_wrong_questions(client, photo):
    for query in ("pictures=secrets", "inline=perhaps"):
        assert client.post(f"/inspect?{query}", content=photo.read_bytes()).status_code == 422
    data = photo.read_bytes()
    assert client.post("/inspect", files=[("a", ("a.png", data)), ("b", ("b.png", data))]).status_code == 400
    damaged = client.post("/inspect", content=b"no form", headers={"content-type": "multipart/form-data; boundary=x"})
    assert damaged.status_code == 400
    assert client.get("/inspect").status_code == 405
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/pictures/..%2f..%2f/map.png", "/page/"):
        assert client.get(path).status_code == 404


def test_every_answer_carries_the_security_headers(client, photo):
    for answer in (client.get("/"), client.get("/nothing"), client.post("/inspect", content=b""),
                   client.post("/inspect", content=photo.read_bytes())):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "server" not in answer.headers
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_other_pages_may_not_ask(client, photo):
    for origin in ("http://evil.com", "null", "http://localhost:9999", "http://localhost.evil.com", "http://["):
        refused = client.post("/inspect", content=photo.read_bytes(), headers={"origin": origin})
        assert refused.status_code == 403
        assert "content-security-policy" in refused.headers
    assert client.get("/health", headers={"origin": "http://localhost"}).status_code == 200
    for host in ("evil.com", "localhost.evil.com", "evil.com:80@localhost", "localhost:x", ""):  # DNS rebinding
        assert client.get("/model", headers={"host": host}).status_code == 421
    for host in ("127.0.0.1:8000", "[::1]:8000", "localhost"):
        assert client.get("/model", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("route", ROUTES)
def test_with_a_token_every_route_needs_it(detector, route):
    client = TestClient(create_app(detector, name="gear", token=TOKEN), base_url="http://inspection.example")
    expected = 404 if route in {"/nothing", "/pictures/x/map.png"} else {200, 503}  # no thread runs: not healthy
    for wrong in ({}, {"authorization": "Bearer "}, {"authorization": f"Bearer {TOKEN[:-1]}"},
                  {"authorization": f"Bearer {TOKEN}x"}, {"authorization": f"Digest {TOKEN}"},
                  {"authorization": "Basic !"}, {"authorization": f"Bearer {TOKEN}ü".encode("latin-1")}):
        refused = client.get(route, headers=wrong)
        assert refused.status_code == 401
        assert "Basic" in refused.headers["www-authenticate"]
        assert "content-security-policy" in refused.headers
    password = base64.b64encode(f"anybody:{TOKEN}".encode()).decode()
    for right in (f"Bearer {TOKEN}", f"Basic {password}"):
        status = client.get(route, headers={"authorization": right}).status_code
        assert status == expected or status in (expected if isinstance(expected, set) else ())
    assert client.post("/inspect", content=b"x").status_code == 401


def test_what_goes_wrong_inside_stays_inside(detector, photo, monkeypatch, caplog):
    def fail(images, **_):
        raise RuntimeError("a secret")

    monkeypatch.setattr(detector, "predict_batch", fail)
    with TestClient(create_app(detector, name="gear"), base_url="http://localhost") as client:
        for _ in range(2):  # the thread lives on
            answer = client.post("/inspect", content=photo.read_bytes())
            assert answer.status_code == 500
            assert answer.json() == {"detail": "the server failed; its log says why"}
    assert "a secret" in caplog.text


@pytest.mark.parametrize("where", ["intra.data.decode._plane", "intra.deploy.serve.worker.draw"])
def test_too_little_memory_says_nothing_of_the_photo(client, photo, monkeypatch, where):
    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(where, fail)
    answer = client.post("/inspect", content=photo.read_bytes())
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert "memory does not suffice" in answer.json()["detail"]
    monkeypatch.undo()
    assert client.post("/inspect", content=photo.read_bytes()).status_code == 200


def post(address, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(*address, timeout=30)
    connection.request("POST", "/inspect?pictures=", body, headers or {})
    answer = connection.getresponse()
    return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def head_of(length: int) -> bytes:
    """The head of a request with a body of that length."""
    return b"POST /inspect HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % length


def test_uploads_are_bounded(detector, photo):
    limits = Limits(body_bytes=100_000, pixels=64 * 64, upload_s=1.0, header_s=1.0, received_bytes=150_000)
    with served(create_app(detector, name="gear", limits=limits), limits) as address:
        assert post(address, photo.read_bytes())[0] == 200
        assert post(address, bytes(100_001))[0] == 413
        chunked = (b"%x\r\n" % 9000 + bytes(9000) + b"\r\n") * 12 + b"0\r\n\r\n"
        head = b"POST /inspect HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        assert b" 413 " in exchange(address, head + chunked)  # no length is stated
        large = Path(photo).parent.parent / "large.png"
        PIL.Image.new("RGB", (65, 64)).save(large)
        status, _, said = post(address, large.read_bytes())
        large.unlink()
        assert status == 422
        assert b"64x65 px" in said
        # A client that is slow with its body is told so, one that is slow with its head is dropped, and so is one that
        # holds memory which others need.
        start = time.monotonic()
        assert b" 408 " in exchange(address, head_of(99) + b"ab")
        assert exchange(address, b"GET / HTTP/1.1\r\nHost: loc") == b""
        assert time.monotonic() - start < 8
        with socket.create_connection(address) as slow:
            slow.sendall(head_of(99_000) + bytes(90_000))
            time.sleep(0.3)
            status, headers, _ = post(address, bytes(80_000))
            assert (status, headers["retry-after"]) == (503, "2")
        assert post(address, photo.read_bytes())[0] == 200


def test_a_full_queue_says_when_to_come_back(detector, photo, monkeypatch):
    entered, free = threading.Event(), threading.Event()
    predict = detector.predict_batch

    def wait(images, **options):
        entered.set()
        assert free.wait(30)
        return predict(images, **options)

    monkeypatch.setattr(detector, "predict_batch", wait)
    limits = Limits(waiting=3)
    data = photo.read_bytes()
    with served(create_app(detector, name="gear", limits=limits), limits) as address, ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(post, address, data)]
        assert entered.wait(30)
        answers += [pool.submit(post, address, data) for _ in range(3)]
        waiting = 0
        while waiting < 3:
            connection = http.client.HTTPConnection(*address)
            connection.request("GET", "/health")  # the event loop is not blocked
            waiting = json.loads(connection.getresponse().read())["waiting"]
        status, headers, said = post(address, data)
        free.set()
        assert status == 503
        assert int(headers["retry-after"]) >= 1
        assert b"wait already" in said
        assert [answer.result()[0] for answer in answers] == [200] * 4
        assert post(address, data)[0] == 200


def test_a_slow_verdict_is_not_to_be_tried_again(detector, photo, monkeypatch):
    free, predict = threading.Event(), detector.predict_batch
    monkeypatch.setattr(detector, "predict_batch",
                        lambda images, **options: free.wait(30) and predict(images, **options))
    limits = Limits(answer_s=0.2)
    with served(create_app(detector, name="gear", limits=limits), limits) as address:
        status, headers, said = post(address, photo.read_bytes())
        free.set()
    assert (status, "retry-after" in headers) == (503, False)
    assert b"no verdict within 0.2 s" in said


def test_who_leaves_is_not_inspected(detector, photo, monkeypatch):
    entered, free, seen = threading.Event(), threading.Event(), []
    predict = detector.predict_batch

    def wait(images, **options):
        seen.append(len(images))
        entered.set()
        assert free.wait(30)
        return predict(images, **options)

    monkeypatch.setattr(detector, "predict_batch", wait)
    data = photo.read_bytes()
    limits = Limits(waiting=1)
    with served(create_app(detector, name="gear", limits=limits), limits) as address, ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, address, data)
        assert entered.wait(30)
        with socket.create_connection(address) as leaver:
            leaver.sendall(head_of(len(data)) + data)
            time.sleep(0.3)
        time.sleep(0.3)
        second = pool.submit(post, address, data)  # there is room for it
        time.sleep(0.3)
        free.set()
        assert first.result()[0] == second.result()[0] == 200
    assert seen == [1, 1]


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_told_to_stop(run, photo, end):
    command = [sys.executable, "-m", "intra.cli", "serve", str(run.path), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        said = server.stdout.readline()
        port = int(re.match(r"http://127\.0\.0\.1:(\d+) inspects", said)[1])
        assert post(("127.0.0.1", port), photo.read_bytes())[0] == 200
        if end == signal.SIGINT:
            taken = subprocess.run([*command[:-1], str(port)], capture_output=True, text=True, check=False)
            assert taken.returncode == 2
            assert "is in use; pass another --port" in taken.stderr
            assert "Traceback" not in taken.stderr
        server.send_signal(end)
        assert server.wait(100) == 0
        assert "Traceback" not in server.stderr.read()


@pytest.mark.parametrize("missing", ["fastapi", "h11", "fastapi h11 python_multipart starlette uvicorn"])
def test_without_the_extra_one_line_says_what_to_install(tmp_path, missing):
    code = (f"import sys; sys.modules.update(dict.fromkeys({missing.split()!r})); sys.argv = ['intra', 'serve', '.']\n"
            "from intra.cli import main; main()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "pip install 'intra-ad[serve]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert intra.__version__
