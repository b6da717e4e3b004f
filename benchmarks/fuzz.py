"""Damaged, truncated and forged files by the thousand: each must be read, or refused with our own error.

    python benchmarks/fuzz.py [--inputs 20000] [--seed 0] [--out FILE] [--keep DIR]

Image files of every format that intra takes, model files, and checkpoints are mutated: bytes, lengths and numbers
replaced by extreme ones, parts cut off, doubled or exchanged; model files also under a right checksum. Another process
reads them, with 2 GiB of memory beyond what it needs to start (RLIMIT_AS) and 10 s of processor time an input. Any
other exception, death or hang is a failure; --keep writes the inputs that failed to a folder. Exit 1 if there is one.
Linux only.
"""

import argparse
import io
import json
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from intra.provenance import measured_on

MEMORY_BYTES = 2 * 2**30  # beyond the start; Pillow's limit of 179 million pixels takes about 1.3 GB as RGB
CPU_LIMIT_S = 10.0
EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 100_000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
VALUES: tuple[Any, ...] = (None, True, -1, 0, 1, 2, 3, 7, 10**6, 10**12, -(10**12), 0.5, 1e308, float("nan"),
                           float("inf"), "", "../../x", "intra", [], [1], [10**9, 10**9], {}, {"a": 1})  # fmt: skip
TINY = {"model.patch_size": "8", "model.embed_dim": "16", "model.depth": "1", "model.num_heads": "2",
        "model.segmenter_width": "2", "scoring.scales": "1,2", "scoring.blur_size": "3"}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the outcome as JSON")
    parser.add_argument("--keep", type=Path, help="inputs that failed go there")
    parser.add_argument("--from", dest="start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        _work(options.work, options.seed, options.start, options.inputs)
        return 0
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        _write_seeds(Path(folder))
        outcomes, failures, growth = _supervise(Path(folder), options)
    found = {
        "inputs": options.inputs, "seed": options.seed, "kinds": len({kind for kind, _ in outcomes}),
        "read": sum(count for (_, what), count in outcomes.items() if what == "read"),
        "refused": sum(count for (_, what), count in outcomes.items() if what == "refused"),
        "failures": failures, "most_memory_mib": round(growth / 2**20, 1), "elapsed_s": round(
            time.perf_counter() - started, 1),
        "by_kind": {kind: {what: count for (other, what), count in sorted(outcomes.items()) if other == kind}
                    for kind in sorted({kind for kind, _ in outcomes})},
        **measured_on(),
    }  # fmt: skip
    text = json.dumps(found, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return bool(failures)


def _supervise(folder: Path, options: argparse.Namespace) -> tuple[Counter[tuple[str, str]], list[dict[str, Any]], int]:
    """Runs workers until each input has its outcome: a worker that dies or hangs is followed by another."""
    outcomes: Counter[tuple[str, str]] = Counter()
    failures: list[dict[str, Any]] = []
    growth, at = 0, 0
    while at < options.inputs:
        worker = subprocess.Popen([sys.executable, __file__, "--work", folder, "--seed", str(options.seed), "--from",
                                   str(at), "--inputs", str(options.inputs)], stdout=subprocess.PIPE, text=True)
        watchdog = _Watchdog(worker)
        assert worker.stdout is not None
        for line in worker.stdout:
            event = json.loads(line)
            watchdog.begun = _cpu_s(worker.pid) if event["what"] == "begin" else None
            if event["what"] == "begin":
                at, kind = event["index"], event["kind"]
                continue
            growth = max(growth, event["growth"])
            outcomes[kind, event["what"]] += 1
            if event["what"] not in ("read", "refused"):
                failures.append({"index": at, "kind": kind, "what": event["what"]})
            at += 1
        watchdog.stop()
        code = worker.wait()
        if code or at < options.inputs:
            what = "hang" if watchdog.has_killed else f"died with code {code}"
            outcomes[kind, "died"] += 1
            failures.append({"index": at, "kind": kind, "what": what})
            at += 1
    for failure in failures if options.keep else ():
        options.keep.mkdir(parents=True, exist_ok=True)
        seeds = _read_seeds(folder)
        (options.keep / f"{failure['index']}-{failure['kind']}").write_bytes(
            _input(seeds, options.seed, failure["index"])[1])
    return outcomes, failures, growth


class _Watchdog(threading.Thread):
    """Kills a worker whose input takes too much processor time: the wall's clock also counts what others do."""

    def __init__(self, worker: "subprocess.Popen[str]") -> None:
        super().__init__(daemon=True)
        self.worker = worker
        self.begun: float | None = None  # processor time at the begin of the input
        self.has_killed = False
        self.is_over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.is_over.wait(0.5):
            begun = self.begun
            if begun is not None and _cpu_s(self.worker.pid) - begun > CPU_LIMIT_S:
                self.has_killed = True
                self.worker.kill()
                return

    def stop(self) -> None:
        self.is_over.set()
        self.join()


def _work(folder: Path, seed: int, start: int, stop: int) -> None:
    """Reads one input after the other, and says so before and after."""
    import torch

    from intra.errors import InTraError

    torch.set_num_threads(1)
    seeds = _read_seeds(folder)
    readers = _readers(folder)
    for kind, content in seeds.items():  # whatever is loaded once is loaded before memory is counted
        what = _try(readers[_reader_of(kind)], folder / "input", content, InTraError)
        if what != "read":
            print(f"the whole file of {kind} is not read: {what}", file=sys.stderr)
    base = _memory()
    resource.setrlimit(resource.RLIMIT_AS, (_memory(virtual=True) + MEMORY_BYTES,) * 2)
    for index in range(start, stop):
        kind, content = _input(seeds, seed, index)
        print(json.dumps({"what": "begin", "index": index, "kind": kind}), flush=True)
        what = _try(readers[_reader_of(kind)], folder / "input", content, InTraError)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"what": what, "growth": max(0, peak - base)}), flush=True)


def _reader_of(kind: str) -> str:
    return kind.partition(" ")[0] if kind.startswith(("model", "checkpoint")) else "image"


def _try(read: Any, path: Path, content: bytes, ours: type[Exception]) -> str:
    path.write_bytes(content)
    try:
        read(path)
    except ours:
        return "refused"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "read"


def _readers(folder: Path) -> dict[str, Any]:
    """What reads each kind, as the program would."""
    import torch

    from intra.data.images import read_image, read_info
    from intra.errors import InTraError
    from intra.inspection.detector import Detector
    from intra.training.checkpoint import load_checkpoint, read_header

    def image(path: Path) -> None:
        with suppress(InTraError):
            read_info(path)
        with suppress(InTraError):
            read_image(path, least=(8, 8))
        read_image(path)

    model = Detector.load(folder / "seeds" / "model", device="cpu").model

    def checkpoint(path: Path) -> None:
        read_header(path)
        load_checkpoint(path, model=model, optimizer=torch.optim.AdamW(model.parameters()))

    return {"image": image, "model": lambda path: Detector.load(path, device="cpu"), "checkpoint": checkpoint}


def _input(seeds: dict[str, bytes], seed: int, index: int) -> tuple[str, bytes]:
    """The kind and the content of an input: the same for the same seed and index."""
    rng = random.Random(f"{seed} {index}")
    names = sorted(seeds)
    kind = names[index % len(names)]
    content = bytearray(seeds[kind])
    if kind == "model forged":
        return kind, _forged(bytes(content), rng)
    changes = (_flip, _number, _digits, _cut, _double, _exchange, _insert)
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        rng.choice(changes)(content, rng, seeds)
    return kind, bytes(content)


def _place(content: bytearray, rng: random.Random) -> int:
    """Most of what a decoder trusts stands at the beginning."""
    return rng.randrange(max(1, min(len(content), 128) if rng.random() < 0.6 else len(content)))


def _flip(content: bytearray, rng: random.Random, _: dict[str, bytes]) -> None:
    if content:
        content[_place(content, rng)] = rng.randrange(256)


def _number(content: bytearray, rng: random.Random, _: dict[str, bytes]) -> None:
    at, form = _place(content, rng), rng.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
    most = 256 ** struct.calcsize(form) - 1
    content[at : at + struct.calcsize(form)] = struct.pack(form, min(rng.choice(EXTREMES), most))


def _digits(content: bytearray, rng: random.Random, _: dict[str, bytes]) -> None:
    """A number that is written out, as in the headers of PPM, XPM, FITS and safetensors."""
    places = [at for at, byte in enumerate(content[:4096]) if 48 <= byte <= 57]
    if places:
        at = rng.choice(places)
        end = at
        while end < len(content) and 48 <= content[end] <= 57:
            end += 1
        content[at:end] = str(rng.choice((*EXTREMES, 10**20, -1))).encode()


def _cut(content: bytearray, rng: random.Random, _: dict[str, bytes]) -> None:
    del content[rng.randrange(len(content) + 1) :]


def _double(content: bytearray, rng: random.Random, _: dict[str, bytes]) -> None:
    at = rng.randrange(len(content) + 1)
    part = content[at : at + rng.randrange(1, 64)]
    content[at:at] = part * rng.choice((1, 2, 100))


def _exchange(content: bytearray, rng: random.Random, seeds: dict[str, bytes]) -> None:
    """The end of another file."""
    other = seeds[rng.choice(sorted(seeds))]
    content[rng.randrange(len(content) + 1) :] = other[rng.randrange(len(other)) :]


def _insert(content: bytearray, rng: random.Random, _: dict[str, bytes]) -> None:
    at = _place(content, rng)
    content[at:at] = rng.randbytes(rng.randrange(1, 16))


def _forged(content: bytes, rng: random.Random) -> bytes:
    """A model file whose header, or one of whose tensors, was changed by somebody who can make a checksum."""
    from safetensors.torch import load, save

    from intra.inspection.model_file import content_digest

    (length,) = struct.unpack("<Q", content[:8])
    envelope = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["intra"])
    info, tensors = json.loads(envelope["header"]), load(content)
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.15:
            name = rng.choice(sorted(tensors))
            change = rng.choice(("drop", "double", "flat", "empty"))
            tensor = tensors.pop(name)
            if change != "drop":
                flat = tensor.flatten()
                tensors[name] = {"double": tensor.double(), "flat": flat, "empty": flat[:0]}[change]
        else:
            place = info
            while True:
                key = rng.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
                if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.9:
                    place = place[key]
                else:
                    break
            place[key] = rng.choice(VALUES)
    header = json.dumps(info, sort_keys=True)
    signed = {"header": header, "sha256": content_digest(header, tensors), "format_version": envelope["format_version"]}
    return save(tensors, metadata={"intra": json.dumps(signed)})


def _write_seeds(folder: Path) -> None:
    """One whole file of each kind."""
    (folder / "seeds").mkdir()
    for name, content in (_images() | _models(folder)).items():
        (folder / "seeds" / name).write_bytes(content)


def _read_seeds(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "seeds").iterdir()}


def _images() -> dict[str, bytes]:
    """Of every format that Pillow writes; the rest by hand, or by their first bytes."""
    import numpy as np
    import PIL.Image

    from intra.data.decode import _FORMATS

    rng = np.random.default_rng(0)
    rgb = PIL.Image.fromarray(rng.integers(0, 256, (24, 17, 3), dtype=np.uint8))
    grey, deep = rgb.convert("L"), PIL.Image.fromarray(rng.integers(0, 65536, (24, 17), dtype=np.uint16))
    unit = grey.convert("F").point(lambda value: value / 256)
    found: dict[str, bytes] = {}

    def add(name: str, image: PIL.Image.Image, form: str, **options: Any) -> None:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        found[name] = buffer.getvalue()

    for form in sorted({*_FORMATS, "MPO"} & set(PIL.Image.SAVE)):
        image = {"BLP": rgb.quantize(), "MSP": grey.convert("1"), "XBM": grey.convert("1"), "SPIDER": unit,
                 "ICNS": rgb.resize((16, 16))}.get(form, rgb)
        add(form, image, form, **({"save_all": True, "append_images": [rgb]} if form == "MPO" else {}))
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        add(f"TIFF {compression}", rgb, "TIFF", compression=compression)
    add("TIFF group4", grey.convert("1"), "TIFF", compression="group4")
    add("TIFF pages", deep, "TIFF", save_all=True, append_images=[deep, deep])
    add("PNG deep", deep, "PNG")
    add("PNG film", rgb, "PNG", save_all=True, append_images=[rgb.rotate(90)])
    add("PNG palette", rgb.quantize(), "PNG")
    add("GIF film", rgb, "GIF", save_all=True, append_images=[rgb.rotate(90)])
    add("WEBP film", rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90)])
    add("JPEG cmyk", rgb.convert("CMYK"), "JPEG", progressive=True, exif=b"Exif\0\0II*\0\10\0\0\0\0\0")
    found |= {name: content for name, content in _by_hand(found).items() if name in _FORMATS}
    return found


def _by_hand(written: dict[str, bytes]) -> dict[str, bytes]:
    """Formats that Pillow only reads: as small as they can be, or their first bytes and noise."""
    noise = random.Random(0).randbytes(2000)
    pixels = noise[:408]

    def fits_line(text: str) -> bytes:
        return text.ljust(80).encode()

    header = b"".join(map(fits_line, ("SIMPLE  =                    T", "BITPIX  =                    8",
                                      "NAXIS   =                    2", "NAXIS1  =                   17",
                                      "NAXIS2  =                   24", "END")))  # fmt: skip
    return {
        "CUR": b"\0\0\2\0" + written["ICO"][4:],
        "DCX": struct.pack("<III", 987654321, 12, 0) + written["PCX"],
        "FITS": header.ljust(2880) + pixels.ljust(2880, b"\0"),
        "PSD": b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 24, 17, 8, 3) + struct.pack(">III", 0, 0, 0) + b"\0\0" + noise,
        "SUN": struct.pack(">IIIIIIII", 0x59A66A95, 17, 24, 8, 432, 1, 0, 0) + noise,
        "XPM": b'/* XPM */\nstatic char *a[] = {\n"4 2 2 1",\n"a c #ff0000",\n"b c #00ff00",\n"abab",\n"baba"\n};\n',
        "GBR": struct.pack(">IIIII4sI", 28 + 5, 2, 17, 24, 1, b"GIMP", 10) + b"name\0" + pixels,
        "PIXAR": b"\200\350\0\0".ljust(416, b"\0") + struct.pack("<HH", 24, 17).ljust(8, b"\0")
                 + struct.pack("<HH", 14, 2).ljust(600, b"\0") + noise,
        "FLI": struct.pack("<IHHHHHH", 128 + 6, 0xAF12, 1, 17, 24, 8, 0).ljust(128, b"\0")
               + struct.pack("<IHH", 16 + 408, 0xF1FA, 1).ljust(16, b"\0") + struct.pack("<IH", 408, 16) + pixels,
        "FTEX": b"FTEX" + struct.pack("<8i", 1, 17, 24, 1, 1, 1, 32, 3 * 408) + noise,
        "IMT": b"width 17\nheight 24\npixel n8\n\x0c" + pixels,
        "MCIDAS": struct.pack(">64i", *([0, 4] + [0] * 6 + [24, 17, 1, 0, 0, 1, 0] + [0] * 18 + [256] + [0] * 30))
                  + noise,
        "PCD": bytes(2048) + b"PCD_" + noise,
        "XVTHUMB": b"P7 332\n#END_OF_COMMENTS\n17 24 255\n" + pixels,
    }  # fmt: skip


def _models(folder: Path) -> dict[str, bytes]:
    """A model file, and a checkpoint after one step."""
    import torch

    from intra.config import preset
    from intra.inspection.anomaly import Reference, evidence_kinds
    from intra.inspection.detector import Detector
    from intra.inspection.distribution import GoodPatches
    from intra.inspection.features import PatchFeatures
    from intra.models import build
    from intra.training.checkpoint import Progress, save_checkpoint

    config = preset("fast").with_settings(TINY)
    config = replace(config, model=replace(config.model, grid=(3, 3), channels=3))
    torch.manual_seed(0)
    model = build(config.model)
    kinds = evidence_kinds(config.scoring, has_segmenter=config.model.segmenter_width > 0)
    reference = Reference(torch.rand(len(kinds), 24, 24), None, torch.ones(len(kinds), 2) if len(kinds) > 1 else None)
    photos = torch.rand(4, 3, 24, 24)
    describe = PatchFeatures.of(photos, scoring=config.scoring, seed=0)
    features = describe(photos, photos)
    good = GoodPatches(describe, features, num_modes=config.scoring.num_modes, places="shared")
    Detector(model, config, reference=reference, distribution=good.fitted(features),
             held_out_scores=[0.5, 1.5, 2.5], device="cpu",
             provenance={"seed": 0, "training_images": {"a.png": "0" * 64}, "pretrained_weights": None}
             ).save(folder / "model")  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    identity = {"config": config.to_dict(), "seed": 0, "budget": {"steps": 1, "seconds": None},
                "training_images": {"a.png": "0" * 64}}  # fmt: skip
    save_checkpoint(folder / "checkpoint", model=model, best=model.state_dict(), optimizer=optimizer,
                    progress=Progress(step=1), identity=identity)
    content = (folder / "model").read_bytes()
    return {"model": content, "model forged": content, "checkpoint": (folder / "checkpoint").read_bytes()}


def _memory(*, virtual: bool = False) -> int:
    pages = Path("/proc/self/statm").read_text().split()[0 if virtual else 1]
    return int(pages) * resource.getpagesize()


def _cpu_s(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
