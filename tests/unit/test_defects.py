"""Synthetic defects: seen where the mask says, the same from the same seed, and never in the image that was given."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intra.training.defects import plant_defects


def images(count: int = 8, channels: int = 3, height: int = 48, width: int = 64, seed: int = 0) -> torch.Tensor:
    coarse = torch.rand(count, channels, 6, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)


def plant(of: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return plant_defects(of, generator=torch.Generator().manual_seed(seed))


def test_the_same_seed_plants_the_same_and_another_seed_others():
    good = images()
    assert all(torch.equal(one, again) for one, again in zip(plant(good), plant(good), strict=True))
    assert not torch.equal(plant(good)[0], plant(good, seed=1)[0])


def test_the_given_images_stay_as_they_are():
    good = images()
    before = good.clone()
    plant(good)
    assert torch.equal(good, before)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), channels=st.sampled_from([1, 3, 5]), height=st.sampled_from([16, 48]))
def test_whatever_is_drawn_is_a_photo_with_a_mask_of_what_changed(seed, channels, height):
    good = images(3, channels, height)
    photos, masks = plant(good, seed)
    assert photos.shape == good.shape
    assert masks.shape == (3, height, 64)
    assert 0 <= photos.min() <= photos.max() <= 1
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    changed = torch.nn.functional.max_pool2d((photos - good).abs().amax(1, keepdim=True), 5, 1, 2)[:, 0]
    assert (changed[masks == 1] > 0.01).all()


def test_most_images_get_a_defect_and_some_stay_good():
    counts = [plant(images(), seed)[1].sum((1, 2)) > 0 for seed in range(60)]
    share = torch.cat(counts).float().mean()
    assert 0.65 < share < 0.9  # 15 % are left clean, and some changes cannot be seen
    good = images()
    untouched = [torch.equal(photo, image) for seed in range(20) for photo, image in zip(plant(good, seed)[0], good,
                                                                                        strict=True)]
    assert 0.05 < sum(untouched) / len(untouched) < 0.3


def test_defects_lie_everywhere():
    masks = torch.stack([plant(images(), seed)[1] for seed in range(150)]).mean((0, 1))
    assert masks.min() > 0
    assert masks.mean() < 0.2  # and yet are small


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_flat_images(value):
    planted = [plant(torch.full((4, 1, 32, 32), value), seed) for seed in range(5)]
    assert all(photos.isfinite().all() for photos, _ in planted)
    assert sum(float(masks.sum()) for _, masks in planted) > 0


def test_one_image_is_its_own_donor():
    assert any(plant(images(1), seed)[1].any() for seed in range(5))
