"""Nothing is unpickled, no header is believed, no bomb goes off."""

import json
import pickle
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import intra
from intra.data.images import UnreadableError, read_image, read_info
from intra.errors import InTraError
from intra.inspection.detector import Detector
from intra.training.checkpoint import read_header

SOURCE = Path(intra.__file__).parent
ROOT = Path(__file__).parents[2]
# What runs the content of a file, or gives it to a shell. Processes of a benchmark talk to each other by
# multiprocessing, which pickles between parent and child; no file and no network is read that way.
FORBIDDEN = (r"\bpickle\b", r"\btorch\.load\b", r"\bjoblib\b", r"\bmarshal\b", r"\bshelve\b", r"\bdill\b",
             r"allow_pickle\s*=\s*True", r"\byaml\b", r"(?<![\w.])eval\(", r"(?<![\w.])exec\(", r"shell\s*=\s*True",
             r"\bos\.system\b", r"np\.load\b", r"weights_only", r"extractall")  # fmt: skip


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return Path.touch, (self.place,)


def test_no_code_unpickles_or_runs_a_files_content():
    for path in SOURCE.rglob("*.py"):
        for pattern in FORBIDDEN:
            assert not re.search(pattern, path.read_text()), f"{path}: {pattern}"


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_in_place_of_any_file_is_refused_and_not_run(tmp_path, how):
    place = tmp_path / "it-ran"
    for name in ("model.safetensors", "last.ckpt", "photo.png", "photo.tiff"):
        if how == "pickle":
            (tmp_path / name).write_bytes(pickle.dumps(Bomb(place)))
        else:
            torch.save(Bomb(place), tmp_path / name)
    for read in (lambda: Detector.load(tmp_path), lambda: read_header(tmp_path / "last.ckpt"),
                 lambda: read_image(tmp_path / "photo.png"), lambda: read_info(tmp_path / "photo.tiff")):  # fmt: skip
        with pytest.raises(InTraError):
            read()
    assert not place.exists()
    pickle.loads(pickle.dumps(Bomb(place)))
    assert place.exists()  # the bomb is one


def safetensors(header: bytes, *, length: int | None = None, rest: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + rest


def tensor(**changes: object) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes}).encode()


@pytest.mark.parametrize("content", [
    safetensors(b"{}", length=2**63),
    safetensors(b"{}", length=2**64 - 1),
    safetensors(b"{}", length=10**9),
    safetensors(b"[" * 100_000),
    safetensors(b'{"a":' * 100_000),
    safetensors(b"\xff\xfe"),
    safetensors(tensor(shape=[2**62, 2**62]), rest=bytes(4)),
    safetensors(tensor(shape=[-1]), rest=bytes(4)),
    safetensors(tensor(data_offsets=[0, 2**62]), rest=bytes(4)),
    safetensors(tensor(data_offsets=[4, 0]), rest=bytes(4)),
    safetensors(tensor(dtype="OBJECT"), rest=bytes(4)),
    safetensors(json.dumps({"__metadata__": {"intra": "[" * 100_000}}).encode()),
    safetensors(json.dumps({"__metadata__": {"intra": "3"}}).encode()),
    safetensors(json.dumps({"__metadata__": {"intra": '{"format_version": 2, "header": "1e999"}'}}).encode()),
    safetensors(json.dumps({"__metadata__": {"intra_checkpoint": "[" * 100_000}}).encode()),
    safetensors(json.dumps({"__metadata__": {"intra_checkpoint": "[]"}}).encode()),
], ids=range(16))  # fmt: skip
def test_malicious_safetensors_headers_are_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    for read in (Detector.load, read_header):
        with pytest.raises(InTraError, match=r"model\.safetensors"):
            read(path)


def claimed(form: str, tmp_path: Path) -> bytes:
    """A small file whose header claims as many pixels as the format allows, 100,000 x 100,000 at most."""
    path = tmp_path / "small"
    PIL.Image.fromarray(np.zeros((24, 17, 3), np.uint8)).save(path, form)
    content = bytearray(path.read_bytes())
    many, short = 100_000, 65_000
    if form == "PNG":
        content[16:24] = struct.pack(">II", many, many)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    elif form == "BMP":
        content[18:26] = struct.pack("<ii", many, many)
    elif form == "GIF":
        content[6:10] = struct.pack("<HH", short, short)
    elif form == "TGA":
        content[12:16] = struct.pack("<HH", short, short)
    elif form == "QOI":
        content[4:12] = struct.pack(">II", many, many)
    elif form == "SGI":
        content[6:10] = struct.pack(">HH", short, short)
    elif form == "JPEG":
        at = content.index(b"\xff\xc0")
        content[at + 5 : at + 9] = struct.pack(">HH", short, short)
    elif form == "PPM":
        content = bytearray(content.replace(b"17 24", b"100000 100000"))
    elif form == "JPEG2000":
        at = content.index(b"ihdr")
        content[at + 4 : at + 12] = struct.pack(">II", many, many)
    elif form == "TIFF":
        for tag, side in ((256, 17), (257, 24)):  # width and height, as 16-bit and then as 32-bit numbers
            short_entry, long_entry = struct.pack("<HHIHH", tag, 3, 1, side, 0), struct.pack("<HHII", tag, 4, 1, many)
            as_long = struct.pack("<HHII", tag, 4, 1, side)
            assert short_entry in content or as_long in content
            content = content.replace(short_entry, long_entry).replace(as_long, long_entry)
    else:
        raise ValueError(form)
    return bytes(content)


@pytest.mark.parametrize("form", ["PNG", "BMP", "GIF", "TGA", "QOI", "SGI", "JPEG", "PPM", "JPEG2000", "TIFF"])
def test_a_header_of_100000_pixels_a_side_is_refused_before_any_room_is_made(tmp_path, form):
    path = tmp_path / "bomb"
    path.write_bytes(claimed(form, tmp_path))
    for read in (read_image, read_info):
        with pytest.raises(UnreadableError, match="too many pixels"):
            read(path)


def test_text_that_unpacks_to_gigabytes(tmp_path):
    """A PNG's comment of 300 MB in 300 kB."""
    PIL.Image.new("L", (4, 4)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    packed = b"k\0\0" + zlib.compress(bytes(300_000_000), 9)
    chunk = struct.pack(">I", len(packed)) + b"zTXt" + packed + struct.pack(">I", zlib.crc32(b"zTXt" + packed))
    (tmp_path / "a.png").write_bytes(content[:33] + chunk + content[33:])
    with pytest.raises(UnreadableError):
        read_image(tmp_path / "a.png")


def test_fuzzed_files(tmp_path):
    """Some of the 20,000 of benchmarks/fuzz.py: each kind about ten times."""
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "fuzz.py", "--inputs", "500", "--seed", "1", "--out",
                           tmp_path / "found.json"], capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["read"] + found["refused"] == 500
    assert found["read"] > 20
    assert found["kinds"] > 40
