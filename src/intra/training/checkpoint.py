"""The state from which training goes on: a safetensors file, so nothing is ever unpickled."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from intra.data.files import write_atomically
from intra.errors import InTraError

__all__ = ["CHECKPOINT_FILE", "CHECKPOINT_VERSION", "Progress", "load_checkpoint", "read_header", "save_checkpoint"]

CHECKPOINT_FILE = "last.ckpt"
CHECKPOINT_VERSION = 1


@dataclass
class Progress:
    """How far training has come; with the weights and the optimiser's state it is all that a resumed run needs."""

    step: int = 0  # steps done
    elapsed_s: float = 0.0
    best_validation_loss: float = float("inf")
    best_step: int = 0
    epochs_without_better: int = 0
    finished: bool = False


def save_checkpoint(
    path: Path, *, model: nn.Module, best: dict[str, Tensor], optimizer: torch.optim.Optimizer, progress: Progress,
    identity: dict[str, Any],
) -> None:  # fmt: skip
    """Writes the state, whole or not at all. `identity` says which run this is: config, seed, data."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"best.{name}": value for name, value in best.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in state.items()}
    # separate storages: safetensors refuses tensors that share memory, as `best` may with `model`
    tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    header = {"version": CHECKPOINT_VERSION, "progress": asdict(progress), "identity": identity}
    write_atomically(path, save(tensors, metadata={"intra_checkpoint": json.dumps(header)}))


def read_header(path: Path) -> dict[str, Any]:
    """Version, progress and identity of a checkpoint. Raises InTraError if it is none, or of another version."""
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            header = json.loads((opened.metadata() or {})["intra_checkpoint"])
        version, identity = header["version"], header["identity"]
        is_complete = identity["config"].keys() and identity["training_images"].keys() and (
            identity["budget"].keys() == {"steps", "seconds"} and type(identity["seed"]) is int)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InTraError(f"{path} is damaged or no checkpoint of intra ({error}); delete the folder and train again"
                         ) from error
    if not is_complete:
        raise InTraError(f"{path} does not say which run it is of; delete the folder and train again")
    if version != CHECKPOINT_VERSION:
        raise InTraError(f"{path} has checkpoint version {version}; this intra resumes version {CHECKPOINT_VERSION}; "
                         "train again")
    return header


def load_checkpoint(
    path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Progress, dict[str, Tensor]]:
    """Puts the state into model and optimiser; returns the progress and the best weights so far, on the same device.

    Raises InTraError if the file is damaged or does not fit the model.
    """
    try:
        return _load(path, model, optimizer)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, InTraError):
            raise
        raise InTraError(f"{path} is incomplete ({str(error).splitlines()[0]}); delete the folder and train again"
                         ) from error


def _load(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Progress, dict[str, Tensor]]:
    progress = Progress(**read_header(path)["progress"])
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimizer": {}}
    with safe_open(path, framework="pt", device="cpu") as opened:
        for name in opened.keys():  # noqa: SIM118, no mapping
            part, rest = name.split(".", 1)
            parts[part][rest] = opened.get_tensor(name)
    model.load_state_dict(parts["model"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in parts["optimizer"].items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return progress, {name: value.to(model.state_dict()[name].device) for name, value in parts["best"].items()}
