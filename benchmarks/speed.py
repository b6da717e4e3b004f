"""How fast training and inspection are on this machine, as a share of what its matrix products reach: table and JSON.

    python benchmarks/speed.py --out benchmarks/results/speed/NAME [--device cpu] [--against OTHER/speed.json]

For each preset: a step of training (its own batch), beside it in plain eager fp32, and inspection from decoded photo to
verdict, one photo at a time and in batches: good ones, whole and where a region of interest leaves two fifths of them,
and defective ones; beside them the naive loop, which hides one patch, runs the network on its window in fp32, and takes
the next, and plain eager fp32. Weights are random: the time does not depend on them. FLOPs are those of matrix products
and convolutions, counted by torch; GB what all operations read and write, each as if nothing were cached. The peak is
that of a large matrix product in the same precision, measured in the same process just before, so that shares compare
between noisy machines. Each row has a process of its own; its memory is the highest resident size. Both files are
written after each row, and the same command goes on where it was stopped: rows that an unfinished run has left in OUT,
on the same machine and with the same code, are not measured again.
With --against, rows whose speed fell by more than a fifth, measured by the peak, are named, and the exit code is 1.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import intra
from intra.config import Config, preset
from intra.data.files import write_atomically
from intra.evaluation.evaluate import peak_memory_mib
from intra.geometry import covering_windows, patchify
from intra.inspection.anomaly import Reference, evidence_kinds
from intra.inspection.detector import Detector
from intra.inspection.device import autocast, pick_device, uses_bf16
from intra.inspection.distribution import GoodPatches, PatchDistribution
from intra.inspection.features import PatchFeatures
from intra.inspection.region import Region
from intra.inspection.setup import Setup
from intra.models import build
from intra.provenance import code_sha256, commit_of_the_code, processor
from intra.training.engine import _optimizer, _step
from intra.training.run import _fabric, _sampler

Measured = TypeVar("Measured")
SIDE = 256  # px
NUM_PHOTOS = 16
PEAK_SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices whose product says what the machine can do
NAIVE_WINDOWS = 4  # of the loop are timed; its time an image is theirs times the number of windows
WORST_FALL = 0.2
RING, DEFECT = "--roi, a ring", "a defect, repaired twice"
SHIPPED = ("as shipped", RING, DEFECT)  # in the preset's own precision
MOVE_NOTHING = ("_unsafe_view", "_reshape_alias", "empty", "empty_like", "empty_strided", "new_empty",
                "new_empty_strided")
WRITE_ONLY = ("copy_", "zero_", "fill_")  # of their first argument
ALL_GOOD, ALL_DEFECTIVE = 1e9, 0.0  # thresholds


@dataclass(frozen=True)
class Row:
    """One measurement; times in ms for one image (inspection) or one step (training)."""

    task: str  # "training" or "inspection"
    preset: str
    way: str  # one of SHIPPED, "fp32", "bf16", "naive loop"
    batch: int
    precision: str
    first_ms: float
    p50_ms: float
    p95_ms: float
    images_per_s: float  # windows for the preset paper's training
    gflop: float  # of one image or step
    peak_gflop_per_s: float
    share_of_peak: float
    memory_mib: float
    map_off: float | None = None  # of bf16: the largest difference of the map from that in fp32
    gbyte: float | None = None  # of one image or step; None: measured before it was counted

    @property
    def name(self) -> str:
        return f"{self.task} {self.preset} {self.way} {self.batch} {self.precision}"


def resolved(name: str, side: int = SIDE, channels: int = 3) -> Config:
    """The preset for square photos of `side` px."""
    config = preset(name)
    grid = side // config.model.patch_size
    return replace(config, model=replace(config.model, grid=(grid, grid), channels=channels))


def photos(config: Config, count: int = NUM_PHOTOS) -> np.ndarray:
    """Noise over a gradient, uint8 (N, H, W, C)."""
    rng = np.random.default_rng(0)
    height, width = config.model.image_size
    slope = np.linspace(0, 150, height)[:, None, None]
    return (slope + rng.uniform(0, 100, (count, height, width, config.model.channels))).astype(np.uint8)


def detector_of(config: Config, device: str, region: Region | None = None, threshold: float = ALL_GOOD) -> Detector:
    """A detector with random weights and everything that a trained one has."""
    torch.manual_seed(0)
    kinds = evidence_kinds(config.scoring, has_segmenter=config.model.segmenter_width > 0)
    size = config.model.image_size
    reference = Reference(torch.zeros(len(kinds), *size), torch.ones(*size),
                          torch.ones(len(kinds), 2) if len(kinds) > 1 else None)
    pixels = torch.from_numpy(photos(config)).permute(0, 3, 1, 2).float() / 255
    distribution = None
    if "distribution" in kinds:
        describe = PatchFeatures.of(pixels, scoring=config.scoring, seed=0, region=region)
        features = describe(pixels, pixels.roll(1, 0))
        few = GoodPatches(describe, features, num_modes=config.scoring.num_modes, places="own").fitted(features)
        # all modes, which take hundreds of photos: their number decides the time
        parts = [replace(part, modes=torch.linalg.qr(torch.randn(part.mean.numel(), config.scoring.num_modes))[0]
                         .unflatten(0, part.mean.shape)) for part in few.parts]
        distribution = PatchDistribution(describe, tuple(parts), few.fine)
    return Detector(build(config.model), config, reference=reference, held_out_scores=[threshold] * 20, provenance={},
                    distribution=distribution, setup=Setup.of(pixels), region=region, device=device)


def ring(config: Config) -> Region:
    """What `--roi` makes of a bottle's rim: two fifths of the photo."""
    height, width = config.model.image_size
    row, col = np.mgrid[:height, :width]
    radius = np.hypot((row + 0.5) / height - 0.5, (col + 0.5) / width - 0.5)
    pixels = torch.from_numpy(photos(config)).permute(0, 3, 1, 2).float() / 255
    return Region.of((radius > 0.35) & (radius < 0.5), pixels.mean(0))


def synchronised(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds that the work takes, the device's part included."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak(device: torch.device, precision: str) -> float:
    """GFLOP/s of a large matrix product: the best of several."""
    side = PEAK_SIDE[device.type]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * side**3 / min(synchronised(device, lambda: torch.mm(a, b)) for _ in range(20)) / 1e9


def counted(work: Callable[[], object]) -> float:
    """GFLOP of matrix products and convolutions. Fused attention counts as it would written out: torch knows no figure
    for that of a CPU.
    """
    def forwards(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backwards = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    known = {fused: forwards, backwards: lambda _, *shapes, **__: 2 * forwards(*shapes)}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        work()
    return counter.get_total_flops() / 1e9


class BytesMoved(TorchDispatchMode):
    """Sums the bytes that operations read and write. Views and allocations do neither."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in MOVE_NOTHING:
            read = tensors_in((args[1:] if name in WRITE_ONLY else args, kwargs))
            changed = [given for given, known in zip(args, func._schema.arguments, strict=False)
                       if known.alias_info and known.alias_info.is_write]
            written = {id(each): each for each in tensors_in((changed, out))}.values()
            self.total += sum(min(each.numel() * each.element_size(), each.untyped_storage().nbytes())
                              for each in (*read, *written))  # an expanded tensor is as large as what it repeats
        return out


def tensors_in(values: Any) -> list[Tensor]:
    """Of any nested lists, tuples and dicts."""
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


def copy_bandwidth(device_name: str) -> float:
    """GB/s that a copy of what no cache holds reads and writes: the best of several."""
    device = torch.device(device_name)
    source, target = torch.zeros(2**26, device=device), torch.empty(2**26, device=device)
    target.copy_(source)
    return 2 * source.nbytes / min(synchronised(device, lambda: target.copy_(source)) for _ in range(10)) / 1e9


def row(task: str, name: str, way: str, batch: int, device_name: str, repeats: int) -> Row:
    """Measured in this process."""
    device = pick_device(device_name)
    config = resolved(name)
    if way not in SHIPPED:
        precision = "bf16" if way == "bf16" else "fp32"
        config = replace(config, train=replace(config.train, precision=precision),
                         scoring=replace(config.scoring, precision=precision))
    part = config.train if task == "training" else config.scoring
    precision = "bf16" if uses_bf16(device, part.precision) else "fp32"
    best = peak(device, precision)
    map_off = None
    factor, items = 1.0, batch  # of the timed work: images for one call, and what one call stands for
    if task == "training":
        work, items = training_step(config, device)
    elif way == "naive loop":
        work, factor = naive(config, device)
    else:
        detector = detector_of(config, device_name, ring(config) if way == RING else None,
                               ALL_DEFECTIVE if way == DEFECT else ALL_GOOD)
        arrays = [*photos(config, batch)]
        work = lambda: detector.predict_batch(arrays)  # noqa: E731  one expression
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # without the matrices of the peak
    first = synchronised(device, work)
    times = sorted(synchronised(device, work) for _ in range(repeats))
    p50 = statistics.median(times)
    memory = (torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda"
              else peak_memory_mib() or math.nan)
    per = 1 if task == "training" else items
    gflop = counted(work) * factor / per
    with BytesMoved() as moved:
        work()
    if task == "inspection" and way in ("as shipped", "bf16") and precision == "bf16":
        map_off = off_by(detector, config, arrays[0])
    scale = 1000 * factor / per
    return Row(task, name, way, items if task == "training" else batch, precision, first * scale, p50 * scale,
               times[min(len(times) - 1, int(0.95 * len(times)))] * scale, items / (p50 * factor), gflop, best,
               gflop / (p50 * factor / per) / best, memory, map_off, moved.total * factor / per / 1e9)


def off_by(detector: Detector, config: Config, array: np.ndarray) -> float:
    """The largest difference of a map from that in fp32, with the same weights and statistics."""
    exact = Detector(detector.model, replace(config, scoring=replace(config.scoring, precision="fp32")),
                     reference=detector.reference, held_out_scores=[1.0], provenance={},
                     distribution=detector.distribution, device=str(detector.device))
    found, expected = (each.predict(array, repair_twice=False).anomaly_map for each in (detector, exact))
    return float(np.abs(found - expected).max())


def training_step(config: Config, device: torch.device) -> tuple[Callable[[], object], int]:
    """A step of the optimiser as `fit` makes it, and its windows."""
    pixels = torch.from_numpy(photos(config)).permute(0, 3, 1, 2).contiguous().to(device)
    sampler = _sampler(pixels, config, 0)
    model = build(config.model)
    fabric = _fabric(device, config)
    network, optimizer = fabric.setup(model, _optimizer(model, config.train))
    steps = iter(range(10**6))
    return lambda: _step(network, optimizer, sampler.batch(next(steps)), fabric=fabric, config=config.train,
                         model_config=config.model), sampler.batch_size


def naive(config: Config, device: torch.device) -> tuple[Callable[[], object], float]:
    """Some windows of the loop over all patches, one hidden in each; and how many times as many an image takes."""
    model = build(config.model).to(device).eval()
    size, grid = config.model.patch_size, config.model.grid
    pixels = torch.from_numpy(photos(config, 1)).permute(0, 3, 1, 2).float().to(device) / 255
    patches = patchify(pixels, size)
    # with the whole grid as its window, a lattice as wide as the grid hides one patch at a time
    positions, hidden = (part.to(device) for part in covering_windows(grid, config.model.window_size, max(grid)))

    @torch.no_grad()
    def work() -> None:
        with autocast(device, "fp32"):
            for index in range(NAIVE_WINDOWS):
                model(patches[:, positions[index]], positions[index : index + 1], hidden[index : index + 1])

    return work, len(positions) / NAIVE_WINDOWS


def table(rows: list[Row]) -> str:
    """What the documents show."""
    lines = ["| task | preset | way | batch | precision | first, ms | p50, ms | p95, ms | images/s | GFLOP | share of "
             "the peak | GB | memory, MiB | map off by |", "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"]
    lines += [f"| {each.task} | {each.preset} | {each.way} | {each.batch} | {each.precision} | {each.first_ms:,.0f} | "
              f"{each.p50_ms:,.0f} | {each.p95_ms:,.0f} | {each.images_per_s:.3g} | {each.gflop:,.1f} | "
              f"{each.share_of_peak:.0%} of {each.peak_gflop_per_s:,.0f} | "
              f"{'' if each.gbyte is None else f'{each.gbyte:.2g}'} | {each.memory_mib:,.0f} | "
              f"{'' if each.map_off is None else f'{each.map_off:.2g}'} |" for each in rows]
    return "\n".join(lines)


def hardware(device: str) -> dict[str, Any]:
    """The machine, and the code."""
    return {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "commit": commit_of_the_code(),
            "python": platform.python_version(), "torch": torch.__version__, "intra": intra.__version__}


def falls(rows: list[Row], before: dict[str, Any]) -> list[str]:
    """Rows whose images a second fell by more than WORST_FALL, both measured by the machine's peak. Their share of the
    peak would also fall where FLOPs are saved.
    """
    def speed(each: Row) -> float:
        return each.images_per_s / each.peak_gflop_per_s * 1000

    old = {Row(**each).name: speed(Row(**each)) for each in before["rows"]}
    return [f"{each.name}: {old[each.name]:.3g} images for each TFLOP that a matrix product could do before, "
            f"{speed(each):.3g} now"
            for each in rows if each.name in old and speed(each) < (1 - WORST_FALL) * old[each.name]]


def write(out: Path, content: dict[str, Any], rows: list[Row]) -> None:
    """Both files, as far as it has come."""
    whole = content | {"rows": [asdict(each) for each in rows]}
    write_atomically(out / "speed.json", json.dumps(whole, indent=2) + "\n")
    write_atomically(out / "table.md", table(rows) + "\n")


def measured_before(out: Path, content: dict[str, Any]) -> list[Row]:
    """The rows that a run which was stopped has left in OUT, if machine, code and settings are these."""
    file = out / "speed.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    return [Row(**each) for each in found["rows"]] if found.items() >= content.items() else []


def alone(work: Callable[..., Measured], *values: object) -> Measured:
    """What it measures in a process of its own, whose memory is its own. Raises BrokenProcessPool if that is killed."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *values).result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--presets", default="fast,quality,paper")
    parser.add_argument("--repeats", type=int, default=7,
                        help="of each row; on a CPU those of `paper` but the naive loop are timed once")
    parser.add_argument("--against", type=Path)
    arguments = parser.parse_args()
    batches = (1, 8) if arguments.device == "cpu" else (1, 8, 64)
    content = {"hardware": hardware(arguments.device), "side_px": SIDE, "repeats": arguments.repeats,
               "code_sha256": [code_sha256(), hashlib.sha256(Path(__file__).read_bytes()).hexdigest()],
               "is_finished": False}
    before = measured_before(arguments.out, content)
    content["copy_gb_per_s"] = alone(copy_bandwidth, arguments.device)
    rows: list[Row] = []
    for name in arguments.presets.split(","):
        slow = name == "paper" and arguments.device == "cpu"
        cases = [("training", "as shipped", 0), ("training", "fp32", 0), ("inspection", "naive loop", 1),
                 ("inspection", "fp32", 1), *(("inspection", way, batch) for way in SHIPPED for batch in batches)]
        if slow:  # a step of 256 windows takes nine seconds or more, an image as long
            cases = [("training", "as shipped", 0), ("inspection", "naive loop", 1), ("inspection", "as shipped", 1)]
            cases += [("inspection", "bf16", 1)] * uses_bf16(torch.device("cpu"), "auto")
        elif arguments.device != "cpu" and preset(name).scoring.precision == "fp32":
            cases += [("inspection", "bf16", batch) for batch in batches]
        for task, way, batch in cases:
            repeats = 1 if slow and way != "naive loop" else arguments.repeats
            asked = task, name, way
            rows += [each for each in before if (each.task, each.preset, each.way) == asked and batch in {0, each.batch}
                     ] or [alone(row, *asked, batch, arguments.device, repeats)]
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            write(arguments.out, content, rows)
    write(arguments.out, content | {"is_finished": True}, rows)
    print(content["hardware"])
    found = falls(rows, json.loads(arguments.against.read_text())) if arguments.against else []
    print("\n".join(found))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
