"""Fixtures that several tests share: small photos, and a model that was really trained on them."""

import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: tests hold figures of the CPU against each other

import torch

from intra.data.demo import make_demo
from intra.training.run import Run, train

torch.set_num_threads(min(2, torch.get_num_threads()))

# The lattice variant, small enough to learn 64 px photos in seconds.
TINY = {
    "model.patch_size": "8", "model.embed_dim": "48", "model.depth": "3", "model.num_heads": "4",
    "model.segmenter_width": "4", "model.mean_start": "off",
    "train.precision": "fp32", "scoring.precision": "fp32", "scoring.blur_size": "7", "scoring.scales": "1,2",
}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache is neither read nor written; processes that are started inherit the folder."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("INTRA_CACHE")
    os.environ["INTRA_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["INTRA_CACHE"]
    else:
        os.environ["INTRA_CACHE"] = before


def descend(model: torch.nn.Module, loss_of: Callable[[], torch.Tensor], *, steps: int, rate: float) -> list[float]:
    """The loss before each of some steps of Adam on one batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@contextmanager
def no_larger_file_than(size_bytes: int) -> Iterator[None]:
    """Every write beyond fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def read_only_folder() -> Iterator[Path]:
    """A folder in which this process may not write; as root it becomes nobody meanwhile."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            if is_root:
                os.seteuid(0)
            Path(name).chmod(0o755)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in photos at 64 px: two categories."""
    folder = tmp_path_factory.mktemp("photos")
    make_demo(folder, size_px=64, num_train=16, num_test_good=6, num_per_defect=2)
    return folder


@pytest.fixture(scope="session")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model trained for a few seconds on the gear."""
    return train(photos / "gear", tmp_path_factory.mktemp("run"), steps=60, image_size=64, settings=TINY)


@pytest.fixture(scope="session")
def roi_mask() -> np.ndarray:
    """A region of interest: three quarters of the height and width, without the upper right quarter of that. Twice as
    large as the photos.
    """
    mask = np.zeros((128, 128), dtype=bool)
    mask[16:112, 8:104] = True
    mask[16:64, 56:104] = False
    return mask


@pytest.fixture(scope="session")
def roi_run(photos: Path, roi_mask: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model of the gear inside that region, of which the photos show just as many px as the model takes."""
    folder = tmp_path_factory.mktemp("roi")
    PIL.Image.fromarray(roi_mask.astype(np.uint8)).save(folder / "mask.png")  # 1 is as good as 255
    return train(photos / "gear", folder / "run", steps=40, image_size=48, settings=TINY, roi=folder / "mask.png")
