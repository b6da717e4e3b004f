"""The segmenter beside InTra: shapes, gradients, that it learns, and its part in the anomaly map."""

import dataclasses
import math

import pytest
import torch
from conftest import descend

from intra.config import ModelConfig, TrainConfig, preset
from intra.errors import InTraError
from intra.geometry import hidden_places, patchify
from intra.inspection.inpaint import log_odds
from intra.models import Segmenter, build
from intra.training.defects import plant_defects
from intra.training.loss import patch_loss, segmentation_loss, step_loss
from intra.training.sampler import Batch

SMALL = ModelConfig(channels=2, patch_size=8, grid=(4, 6), window_size=None, embed_dim=32, depth=2, num_heads=2,
                    readout="token", segmenter_width=4)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def make(config: ModelConfig = SMALL) -> torch.nn.Module:
    torch.manual_seed(0)
    return build(config)


def batch(count: int = 3) -> Batch:
    patches = patchify(rand(count, 2, 32, 48), 8)
    hidden = rand(count, 24, seed=1) < 0.3
    return Batch(patches, torch.arange(24).expand(count, -1), hidden, hidden_places(hidden), seed=5)


def test_marks_cells_of_two_by_two_px():
    assert Segmenter(channels=3, width=4)(rand(2, 3, 32, 64)).shape == (2, 16, 32)
    assert log_odds(make().eval(), rand(2, 2, 32, 48)).shape == (2, 32, 48)


def test_every_parameter_gets_a_finite_gradient():
    model = make()
    step_loss(model, batch(), config=TrainConfig(), model_config=SMALL).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_the_loss_is_the_sum_of_both_parts():
    model, drawn = make().eval(), batch()
    config = TrainConfig(segmentation_weight=0.5)
    inpainted = model(drawn.patches, drawn.positions, drawn.hidden)
    photos, masks = plant_defects(rand(3, 2, 32, 48), generator=torch.Generator().manual_seed(drawn.seed))
    expected = patch_loss(inpainted, drawn.patches[drawn.hidden], channels=2, config=config) + 0.5 * segmentation_loss(
        model.segment(photos), masks)
    torch.testing.assert_close(step_loss(model, drawn, config=config, model_config=SMALL), expected)


def test_a_defective_context_is_repaired_towards_the_good_image():
    """The transformer sees the planted defects, but its target does not have them."""
    model, drawn = make().eval(), batch()
    clean, defective = (TrainConfig(segmentation_weight=0.0, defective_context=on) for on in (False, True))
    photos, _ = plant_defects(rand(3, 2, 32, 48), generator=torch.Generator().manual_seed(drawn.seed))
    inpainted = model(patchify(photos, 8), drawn.positions, drawn.hidden)
    expected = patch_loss(inpainted, drawn.patches[drawn.hidden], channels=2, config=defective)
    found = step_loss(model, drawn, config=defective, model_config=SMALL)
    torch.testing.assert_close(found, expected)
    assert found != step_loss(model, drawn, config=clean, model_config=SMALL)


def test_it_can_learn_one_batch():
    torch.manual_seed(0)
    segmenter = Segmenter(channels=1, width=8)
    photos, masks = plant_defects(0.4 + 0.1 * rand(6, 1, 32, 32), generator=torch.Generator().manual_seed(2))
    losses = descend(segmenter, lambda: segmentation_loss(segmenter(photos), masks), steps=120, rate=1e-2)
    assert losses[-1] < 0.3 * losses[0]


def test_segmentation_loss_by_hand():
    masks = torch.zeros(1, 4, 4)
    masks[:, :2] = 1
    certain = torch.where(masks[:, ::2, ::2] > 0, 20.0, -20.0)
    assert segmentation_loss(certain, masks).item() == pytest.approx(0, abs=1e-6)
    undecided = 4.0 * 0.25 * math.log(2) + 0.3 * (1 - (2 * 1 + 1) / (2 + 2 + 1))
    assert segmentation_loss(torch.zeros(1, 2, 2), masks).item() == pytest.approx(undecided)
    assert segmentation_loss(-certain, masks).item() > 10


@pytest.mark.parametrize("wrong", [{"window_size": 3}, {"network": "riad"}, {"segmenter_width": -1}])
def test_settings_that_do_not_go_together_are_refused(wrong):
    settings = {"window_size": None, "segmenter_width": 8} | wrong
    assert any("segmenter_width" in problem for problem in ModelConfig(**settings).problems())


def test_an_image_of_any_side_is_marked_whole():
    """Padded inside, and cut off again; the inner part is the same as of the larger image."""
    torch.manual_seed(0)
    segmenter = Segmenter(channels=1, width=4).eval()
    photo = rand(1, 1, 40, 50)
    assert segmenter(photo).shape == (1, 20, 25)
    assert segmenter(rand(1, 1, 17, 16)).shape == (1, 9, 8)
    padded = torch.nn.functional.pad(photo, (0, 14, 0, 8), mode="replicate")
    torch.testing.assert_close(segmenter(photo), segmenter(padded)[:, :20, :25])


def test_the_transformer_starts_from_the_same_weights_with_and_without_it():
    with_it, without = make().state_dict(), make(dataclasses.replace(SMALL, segmenter_width=0)).state_dict()
    assert without
    assert all(torch.equal(with_it[name], value) for name, value in without.items())


def test_a_segmenter_that_learns_nothing_may_not_be_heard():
    silent = {"model.segmenter_width": "8", "train.segmentation_weight": "0"}
    with pytest.raises(InTraError, match="nothing but noise"):
        preset("fast").with_settings(silent)
    preset("fast").with_settings(silent | {"scoring.segmenter_weight": "0"})


@pytest.mark.parametrize("name", ["fast", "quality"])
def test_the_presets_fit_their_image_with_a_segmenter(name):
    preset(name).with_settings({"model.segmenter_width": "8"}).check_grid()
