"""The baselines' networks: the cited sizes, what each output may depend on, and that they can learn."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import descend

from intra.config import ModelConfig, TrainConfig, preset
from intra.errors import InTraError
from intra.geometry import patchify
from intra.inspection.inpaint import repaired_views
from intra.models import RIAD, Autoencoder, InTra, build
from intra.models.riad import draw_cell_sets, inpaint_cells
from intra.training.loss import step_loss
from intra.training.sampler import Batch

AUTOENCODER = ModelConfig(network="autoencoder", channels=2, patch_size=16, grid=(2, 4), window_size=None)
SMALL_RIAD = ModelConfig(network="riad", channels=2, patch_size=8, grid=(4, 6), window_size=None, base_width=4,
                         cell_sizes=(2, 8))
NETWORKS = {"autoencoder": AUTOENCODER, "riad": SMALL_RIAD}


def make(config: ModelConfig, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build(config)


def pictures(config: ModelConfig, count: int = 3, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures in [0, 1]."""
    height, width = config.image_size
    coarse = torch.rand(count, config.channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(height, width), mode="bilinear")


def batch_of(images: torch.Tensor, config: ModelConfig, seed: int = 0) -> Batch:
    patches = patchify(images, config.patch_size)
    nowhere = torch.zeros(patches.shape[:2], dtype=torch.bool)
    return Batch(patches, nowhere.long(), nowhere, torch.empty(0, dtype=torch.long), seed)


def cells(count: int = 2, *, cell_size: int = 4, num_sets: int = 3, seed: int = 0) -> torch.Tensor:
    return draw_cell_sets(count, image_size=(24, 32), cell_size=cell_size, num_sets=num_sets,
                          generator=torch.Generator().manual_seed(seed))


def test_build_makes_the_network_that_was_named():
    assert isinstance(build(AUTOENCODER), Autoencoder)
    assert isinstance(build(SMALL_RIAD), RIAD)
    assert isinstance(build(ModelConfig(depth=1, embed_dim=16)), InTra)


def test_the_autoencoder_has_the_cited_shapes():
    """Table 1 of arXiv 1807.02011 behind one more layer, at 256 px: channels, rows, cols after each layer."""
    model, shapes = Autoencoder(), []
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            layer.register_forward_hook(lambda _, given, output: shapes.append(tuple(output.shape[1:])))
    assert model(torch.rand(1, 3, 256, 256)).shape == (1, 3, 256, 256)
    encoder = [(32, 128, 128), (32, 64, 64), (32, 32, 32), (32, 32, 32), (64, 16, 16), (64, 16, 16), (128, 8, 8),
               (64, 8, 8), (32, 8, 8), (100, 1, 1)]
    assert shapes[:10] == encoder
    assert shapes[10:] == [*reversed(encoder[:9]), (3, 256, 256)]
    kernels = [layer.kernel_size[0] for layer in model.encoder if isinstance(layer, torch.nn.Conv2d)]
    assert kernels == [4, 4, 4, 3, 4, 3, 4, 3, 3, 8]
    slopes = [layer.negative_slope for layer in model.modules() if isinstance(layer, torch.nn.LeakyReLU)]
    assert slopes == [0.2] * 18  # none after the encoder's and the decoder's last layer


def test_the_u_net_joins_each_level_with_its_own():
    model, widths = RIAD(channels=3, base_width=64), []
    for block in (*model.encoder, *model.decoder):
        block.register_forward_hook(lambda _, given, output: widths.append((given[0].shape[1], *output.shape[1:])))
    assert model(torch.rand(2, 3, 32, 48)).shape == (2, 3, 32, 48)
    assert widths == [(3, 64, 32, 48), (64, 128, 16, 24), (128, 256, 8, 12), (256, 512, 4, 6), (512, 512, 2, 3),
                      (1024, 512, 4, 6), (512, 256, 8, 12), (256, 128, 16, 24), (128, 64, 32, 48)]


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_every_parameter_gets_a_finite_gradient(config):
    model = make(config)
    loss = step_loss(model, batch_of(pictures(config), config), config=TrainConfig(), model_config=config)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("cell_size", "num_sets"), [(1, 2), (2, 3), (4, 3), (8, 3), (8, 12)])
def test_the_sets_part_the_cells_of_an_image(cell_size, num_sets):
    hidden = cells(4, cell_size=cell_size, num_sets=num_sets)
    assert hidden.shape == (4, num_sets, 24, 32)
    assert hidden.sum(1).eq(1).all()  # each pixel lies in exactly one set
    of_cells = hidden.unfold(2, cell_size, cell_size).unfold(3, cell_size, cell_size).flatten(-2)
    assert of_cells.all(-1).logical_or(~of_cells.any(-1)).all()  # a cell is hidden whole or not at all
    sizes = hidden.sum((2, 3)) // cell_size**2
    assert sizes.max() - sizes.min() <= 1


def test_the_sets_are_drawn_for_each_image_and_from_the_generator_alone():
    assert torch.equal(cells(), cells())
    assert not torch.equal(cells(), cells(seed=1))
    assert not torch.equal(*cells().unbind(0))


def test_hidden_pixels_have_no_influence_on_what_stands_in_their_place():
    model, images = make(SMALL_RIAD).eval(), pictures(SMALL_RIAD, 2).requires_grad_()
    hidden = draw_cell_sets(2, image_size=(32, 48), cell_size=8, num_sets=3, generator=torch.Generator().manual_seed(0))
    for one_set in hidden.unbind(1):  # (B, H, W)
        inside = one_set[:, None].expand_as(images)
        (gradient,) = torch.autograd.grad(inpaint_cells(model, images, hidden)[inside].square().sum(), images)
        assert gradient[inside].eq(0).all()
        assert gradient[~inside].abs().gt(0).float().mean() > 0.9


def test_each_pixel_comes_from_the_pass_in_which_it_was_hidden():
    images, hidden = torch.rand(2, 2, 24, 32), cells()
    repaired = inpaint_cells(lambda x: (x == 0).float(), images, hidden)  # 1 where the network sees a gap
    assert repaired.eq(1).all()


def test_a_fresh_autoencoder_tells_images_apart():
    one, other = make(AUTOENCODER)(pictures(AUTOENCODER, 2)).unbind(0)
    assert (one - other).std() > 1e-3  # 3e-9 from PyTorch's own start


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
def test_one_batch_is_overfitted(config):
    model, train = make(config), TrainConfig(gms_weight=0.0, ssim_weight=0.0)
    batch = batch_of(pictures(config), config)
    losses = descend(model, lambda: step_loss(model, batch, config=train, model_config=config), steps=200, rate=1e-3)
    assert losses[-1] < 0.03 * losses[0]


def test_the_draw_of_a_step_depends_on_its_seed_alone():
    model, images = make(SMALL_RIAD).eval(), pictures(SMALL_RIAD)
    losses = [step_loss(model, batch_of(images, SMALL_RIAD, seed), config=TrainConfig(), model_config=SMALL_RIAD).item()
              for seed in (0, 0, *range(1, 9))]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 9


def test_views():
    model, images = make(SMALL_RIAD).eval(), pictures(SMALL_RIAD)
    views = repaired_views(model, images, model_config=SMALL_RIAD, lattice=3)
    assert len(views) == len(SMALL_RIAD.cell_sizes)
    again = repaired_views(model, images[1:], model_config=SMALL_RIAD, lattice=3)
    for view, other in zip(views, again, strict=True):  # whatever the batch, the same cells
        torch.testing.assert_close(view[1:], other)
    autoencoder, images = make(AUTOENCODER), pictures(AUTOENCODER)
    (view,) = repaired_views(autoencoder, images, model_config=AUTOENCODER, lattice=3)
    torch.testing.assert_close(view, autoencoder(images))


@pytest.mark.parametrize(("name", "model", "said"), [
    ("autoencoder_l2", {"patch_size": 16, "grid": (4, 5)}, "64x80 px; .*multiples of 32 px"),
    ("riad", {"patch_size": 8, "grid": (9, 8)}, "72x64 px; .*multiples of 16 px"),
    ("riad", {"grid": (4, 4), "cell_sizes": (2, 24)}, "cell_sizes has 24.*multiples of each cell size"),
    ("riad", {"grid": (4, 4), "cell_sizes": (64,)}, "fewer cells"),
])  # fmt: skip
def test_images_that_do_not_fit_are_refused(name, model, said):
    config = preset(name)
    with pytest.raises(InTraError, match=said):
        dataclasses.replace(config, model=dataclasses.replace(config.model, **model)).check_grid()


@pytest.mark.parametrize("name", ["autoencoder_l2", "autoencoder_ssim", "riad"])
def test_the_presets_fit_images_of_256_px(name):
    config = preset(name)
    side = 256 // config.model.patch_size
    dataclasses.replace(config, model=dataclasses.replace(config.model, grid=(side, side))).check_grid()
