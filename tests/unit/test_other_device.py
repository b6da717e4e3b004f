"""No GPU is at hand for tests, so one is pretended: tensors with real values that say they lie on another device, and
may meet no tensor of the CPU. Training, calibration and inspection then take the branches of a GPU, and must give the
CPU's verdicts. What it cannot tell: whether kernels differ, bf16, and what CUDA itself refuses.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import intra.training.run as training_run
from intra.config import PRESETS, Config
from intra.inspection.detector import Detector
from intra.inspection.distribution import GoodPatches, PatchDistribution
from intra.training import engine
from intra.training.run import Run, recalibrate, train
from intra.training.sampler import WindowSampler

THERE = torch.device("meta")  # of all devices that torch knows, the one that every build lets tensors claim
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index"}  # whose indices may lie on the CPU
# operations for which the CPU waits until the device has come so far: they give it a value, or a shape by values
WAITING = {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "_unique2",
           "unique_dim", "unique_consecutive", "repeat_interleave", "bincount"}


class OnDevice(Tensor):
    """A tensor that holds another, on the CPU, and says that it lies elsewhere."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # only what reaches the dispatcher is of interest

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        made = Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype, device=THERE,
                                             storage_offset=held.storage_offset())
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Machine.current.compute(func, args, kwargs or {})

    is_meta = False  # torch leaves what holds no values out

    # torch's own methods below read or write memory without the dispatcher
    def __getitem__(self, key: Any) -> Tensor:
        return Tensor.__getitem__(self, _with_tensors(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        Tensor.__setitem__(self, _with_tensors(key), value)

    def new_tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=self.dtype).to(THERE)

    def tolist(self) -> Any:
        Machine.current.waits.append("tolist")
        return self.held.tolist()

    def __deepcopy__(self, memo: Any) -> "OnDevice":
        return OnDevice(self.held.clone())


class Machine(TorchDispatchMode):
    """While it is entered the other device is there."""

    current: "Machine"

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []  # each time that the CPU had to wait for the device

    def __enter__(self) -> "Machine":
        Machine.current = self
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.compute(func, args, kwargs or {})

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operation on the CPU; what it gives lies where its operands lie. Fails where these lie on two."""
        name = func.overloadpacket.__name__
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        there = [each for each in given if isinstance(each, OnDevice)]
        here = [each for each in given if _is_here(each)]
        asked = kwargs.get("device")
        is_copy = name in {"_to_copy", "copy_"}
        if there:
            assert not any(each.is_meta for each in here), f"{name} of a tensor without values"
            apart = here if name not in INDEXING else [each for each in (args[0], *args[2:]) if _is_here(each)]
            is_pointwise = torch.Tag.pointwise in func.tags  # takes single numbers of the CPU
            assert is_copy or all(each.dim() == 0 and is_pointwise for each in apart), (
                f"{name} of tensors on two devices")
        if there or asked == THERE:
            assert kwargs.get("generator") is None, f"{name} by a generator of the CPU"
        is_masked = name in INDEXING and any(each.dtype == torch.bool for each in there[1:])
        to_the_cpu = is_copy and (asked == torch.device("cpu") or _is_here(args[0])) and asked != THERE
        may_come_later = bool(kwargs.get("non_blocking")) or any(each is True for each in args[2:3])
        to_the_device = is_copy and here and not to_the_cpu and not may_come_later and (there or asked == THERE)
        indices = name in INDEXING and any(map(_is_here, args[1]))
        if to_the_device or (there and (name in WAITING or is_masked or to_the_cpu or indices)):
            self.waits.append(name)
        out = func(*tree_map(_held, args), **tree_map(_held, kwargs | ({"device": "cpu"} if asked else {})))
        if asked == THERE or (there and asked is None):
            known = {id(each.held): each for each in there}  # in place, the very tensor comes back
            return tree_map(lambda each: known[id(each)] if id(each) in known else _there(each), out)
        return out


class OneDevice(Fabric):
    """What `fit` asks of Fabric, which knows no such device: to move the weights there."""

    where: torch.device

    def setup(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        old = list(model.parameters())
        model.to(self.where)
        moved = dict(zip(map(id, old), model.parameters(), strict=True))
        for group in optimizer.param_groups:
            group["params"] = [moved[id(each)] for each in group["params"]]
        return model, optimizer

    def autocast(self) -> Any:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_gradients(self, model: nn.Module, optimizer: Any, *, max_norm: float, error_if_nonfinite: bool) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm, error_if_nonfinite=error_if_nonfinite)


def one_device(device: torch.device, config: Config) -> OneDevice:
    made = OneDevice(accelerator="cpu")
    made.where = device
    return made


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """The other device, and what torch and Fabric would have to know of it."""
    cast, made = torch.autocast, torch.tensor
    monkeypatch.setattr(torch, "tensor",
                        lambda values, *, dtype=None, device=None: made(values, dtype=dtype).to(device))
    monkeypatch.setattr(torch, "autocast",
                        lambda kind, **asked: nullcontext() if kind == THERE.type else cast(kind, **asked))
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_, **__: None)
    monkeypatch.setattr(training_run, "_fabric", one_device)
    with Machine() as entered:
        yield entered


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnDevice) else value


def _is_here(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, OnDevice)


def _there(value: Any) -> Any:
    return OnDevice(value) if isinstance(value, Tensor) else value


def _with_tensors(key: Any) -> Any:
    if isinstance(key, tuple):
        return tuple(map(_with_tensors, key))
    return torch.tensor(key) if isinstance(key, list) else key


def test_a_gpu_takes_no_tensor_of_the_cpu(machine: Machine) -> None:
    there = torch.ones(3).to(THERE)
    with pytest.raises(AssertionError, match="two devices"):
        there + torch.ones(3)
    with pytest.raises(AssertionError, match="two devices"):
        torch.ones(3)[torch.tensor([0]).to(THERE)]
    with pytest.raises(AssertionError, match="two devices"):
        torch.stack([there[0], torch.tensor(1.0)])
    with pytest.raises(AssertionError, match="generator"):
        torch.rand(3, device=THERE, generator=torch.Generator())
    machine.waits.clear()
    places = torch.tensor([0, 2]).to(THERE, non_blocking=True)
    assert not machine.waits
    assert torch.equal((there[places] + torch.tensor(1.0)).cpu(), torch.full((2,), 2.0))
    machine.waits.clear()
    for wait in (lambda: float(there.sum()), lambda: bool(there.any()), lambda: there[there > 0], there.tolist,
                 there.unique, there.nonzero, lambda: torch.zeros(3).copy_(there), there.cpu,
                 lambda: torch.zeros(3).to(THERE), lambda: there.copy_(torch.zeros(3)), lambda: there[[0, 2]]):
        assert not machine.waits
        wait()
        assert len(machine.waits) == 1
        machine.waits.clear()


CASES = {
    "fast": TINY,
    "many tokens": TINY | {"model.patch_size": "2", "model.depth": "1", "model.segmenter_width": "0",
                           "train.batch_size": "1"},
    "paper": {"model.window_size": "3", "model.embed_dim": "32", "model.depth": "3", "model.patch_size": "8",
              "train.batch_size": "16"},
    "autoencoder_ssim": {"train.precision": "fp32", "scoring.precision": "fp32"},
    "riad": {"model.base_width": "4", "train.precision": "fp32", "scoring.precision": "fp32"},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_trains_and_inspects_there_as_on_the_cpu(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, name: str, photos: Path, tmp_path: Path
) -> None:  # fmt: skip
    waits = count_waits(monkeypatch, machine)
    asked: Any = {"preset": name if name in PRESETS else "fast", "steps": 4, "image_size": 64, "settings": CASES[name]}
    here, there = (train(photos / "gear", tmp_path / device, device=device, **asked) for device in ("cpu", "meta"))
    assert waits == [0] * 2 * 2 * 4  # to cut the windows and to learn from them, in each step of both trainings
    assert there.best_validation_loss == pytest.approx(here.best_validation_loss, rel=1e-3)
    compare(here, there, sorted((photos / "gear" / "test").rglob("*.png"))[:6])


def test_a_region_is_inspected_there_as_on_the_cpu(machine: Machine, roi_run: Run, photos: Path) -> None:
    compare(roi_run, roi_run, sorted((photos / "gear" / "test").rglob("*.png"))[:6])


@pytest.mark.parametrize("suffices", [True, False])
def test_calibrates_there_or_where_the_memory_suffices(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, roi_run: Run, photos: Path,
    tmp_path: Path, suffices: bool,
) -> None:  # fmt: skip
    asked: Any = {"data": photos / "gear", "settings": {"scoring.num_modes": "3", "scoring.places": "shared"}}
    here = recalibrate(roi_run.path, out=tmp_path / "cpu", device="cpu", **asked)
    original, places = GoodPatches.fitted, []

    def fitted(self: GoodPatches, unseen: list[Tensor]) -> PatchDistribution:
        places.append(isinstance(unseen[0], OnDevice))
        if places[-1] and not suffices:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, unseen)

    monkeypatch.setattr(GoodPatches, "fitted", fitted)
    there = recalibrate(roi_run.path, out=tmp_path / "meta", device="meta", **asked)
    assert places[-1] == suffices
    assert ("the CPU does it" in caplog.text) != suffices
    compare(here, there, sorted((photos / "gear" / "test").rglob("*.png"))[:6])


def test_goes_on_there(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, photos: Path, tmp_path: Path
) -> None:  # fmt: skip
    judge, places = engine._judge, []

    def judged(*args: Any) -> None:
        places.append({value.device.type for value in args[3].values()})
        judge(*args)

    monkeypatch.setattr(engine, "_judge", judged)
    for steps in (2, 4):
        run = train(photos / "gear", tmp_path / "run", steps=steps, image_size=64, settings=TINY, device="meta",
                    resume=steps > 2)
    assert run.num_steps == 4
    assert places == [{"meta"}] * 2  # the best weights so far lie beside those that learn


def compare(here: Run, there: Run, paths: list[Path]) -> None:
    """Both give the same verdicts, repaired images and maps, but for rounding."""
    given = Detector.load(here.path, device="cpu").predict_batch(paths)
    assert any(each.is_anomalous for each in given)  # so that something was repaired twice
    for one, other in zip(given, Detector.load(there.path, device="meta").predict_batch(paths), strict=True):
        assert other.score == pytest.approx(one.score, rel=1e-2)
        assert other.setup_alarm == one.setup_alarm
        np.testing.assert_allclose(other.anomaly_map, one.anomaly_map, atol=0.01 * one.anomaly_map.max())
        np.testing.assert_allclose(other.repaired.astype(float), one.repaired.astype(float), atol=2)


def count_waits(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> list[int]:
    """Of each batch and of each step of a training from now on, how often the CPU had to wait for the device."""
    counts: list[int] = []

    def counted(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            before = len(machine.waits)
            result = work(*args, **kwargs)
            counts.append(len(machine.waits) - before)
            return result

        return run

    monkeypatch.setattr(engine, "_step", counted(engine._step))
    monkeypatch.setattr(WindowSampler, "batch", counted(WindowSampler.batch))
    return counts
