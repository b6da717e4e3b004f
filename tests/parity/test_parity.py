"""The fast path equals the naive one-window-at-a-time implementation."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from intra.config import ModelConfig, preset
from intra.inspection import inpaint as fast
from intra.models import build

sys.path.insert(0, str(Path(__file__).parent))
import naive

SMALL = ModelConfig(channels=3, patch_size=4, grid=(6, 5), window_size=3, embed_dim=32, depth=3, num_heads=4)
TOLERANCE = {"atol": 1e-5, "rtol": 0.0}


def sharpened(config: ModelConfig, seed: int = 0) -> torch.nn.Module:
    """A network whose output depends strongly on its input: fresh weights alone hardly tell windows apart."""
    torch.manual_seed(seed)
    model = build(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2)
    return model


@pytest.mark.parametrize(
    ("window_size", "channels", "tokens_per_batch"),
    [(3, 3, 1), (3, 3, 40), (3, 3, 10**6), (1, 3, 40), (4, 3, 40), (5, 1, 40)],
)
def test_windows(monkeypatch, window_size, channels, tokens_per_batch):
    monkeypatch.setitem(fast.TOKENS_PER_BATCH, "cpu", tokens_per_batch)
    config = dataclasses.replace(SMALL, window_size=window_size, channels=channels)
    model = sharpened(config)
    images = torch.rand(2, channels, 24, 20, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([naive.inpaint(model, image, patch_size=4, window_size=window_size) for image in images])
    found = fast.inpaint(model, images, patch_size=4, window_size=window_size, lattice=3)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert expected.std() > 0.05  # it says something


@pytest.mark.parametrize("conditional_positions", [False, True])
@pytest.mark.parametrize("spacing", [1, 2, 3, 4, 9])
def test_lattice(spacing, conditional_positions):
    model = sharpened(dataclasses.replace(SMALL, window_size=None, readout="token",
                                          conditional_positions=conditional_positions))
    images = torch.rand(2, 3, 24, 20, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([naive.inpaint_lattice(model, image, patch_size=4, spacing=spacing) for image in images])
    found = fast.inpaint(model, images, patch_size=4, window_size=None, lattice=spacing)
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_the_papers_network_on_an_image():
    """The preset `paper` itself: 13 blocks of width 512, on 7x8 patches of 16 px to be quick."""
    config = dataclasses.replace(preset("paper").model, grid=(7, 8))
    torch.manual_seed(0)
    model = build(config).eval()
    image = torch.rand(1, 3, 112, 128, generator=torch.Generator().manual_seed(0))
    expected = naive.inpaint(model, image[0], patch_size=16, window_size=7)
    found = fast.inpaint(model, image, patch_size=16, window_size=7, lattice=3)[0]
    torch.testing.assert_close(found, expected, **TOLERANCE)
