"""The demo set: MVTec's layout, the same bytes each time, exact masks, clear errors."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from intra.data.demo import DEFECTS, demo_photo, make_demo
from intra.errors import InTraError

KINDS = [(category, f"test/{defect}") for category, defects in DEFECTS.items() for defect in defects]
SMALL = {"size_px": 64, "num_train": 3, "num_test_good": 2, "num_per_defect": 2}


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    assert make_demo(out, **SMALL) == [out / "fabric", out / "gear"]
    return out


def test_layout_is_mvtecs_and_the_counts_are_those_asked_for(demo: Path):
    expected = set()
    for category, defects in DEFECTS.items():
        assert len(defects) >= 4
        expected |= {f"{category}/train/good/{i:03d}.png" for i in range(3)}
        expected |= {f"{category}/test/good/{i:03d}.png" for i in range(2)}
        for defect in defects:
            expected |= {f"{category}/test/{defect}/{i:03d}.png" for i in range(2)}
            expected |= {f"{category}/ground_truth/{defect}/{i:03d}_mask.png" for i in range(2)}
    assert set(contents(demo)) == expected


def test_files_are_rgb_images_and_two_valued_masks_of_one_size(demo: Path):
    for path in demo.rglob("*.png"):
        image = Image.open(path)
        assert image.size == (64, 64)
        is_mask = "ground_truth" in path.parts
        assert image.mode == ("L" if is_mask else "RGB")
        if is_mask:
            assert set(np.unique(np.asarray(image))) == {0, 255}


def test_the_same_seed_writes_the_same_bytes_and_a_smaller_set_is_the_beginning(demo: Path, tmp_path: Path):
    again, fewer, other = (tmp_path / name for name in ("again", "fewer", "other"))
    make_demo(again, **SMALL)
    make_demo(fewer, size_px=64, num_train=2, num_test_good=1, num_per_defect=1)
    make_demo(other, size_px=64, num_train=2, num_test_good=1, num_per_defect=1, seed=1)
    whole, part = contents(demo), contents(fewer)
    assert contents(again) == whole
    assert part.items() < whole.items()
    assert not any(whole[name] == data for name, data in contents(other).items() if "ground_truth" not in name)


def test_writing_again_into_the_same_folder_changes_nothing(demo: Path):
    before = contents(demo)
    make_demo(demo, **SMALL)
    assert contents(demo) == before


@pytest.mark.parametrize("size_px", [48, 64, 128])
@pytest.mark.parametrize(("category", "kind"), KINDS)
def test_the_mask_marks_where_the_picture_differs_from_its_clean_twin(category: str, kind: str, size_px: int):
    for index in range(3):
        image, clean, mask = demo_photo(category, kind, index, size_px=size_px)
        assert image.shape == clean.shape == (size_px, size_px, 3)
        assert mask.shape == (size_px, size_px)
        change = np.abs(image.astype(int) - clean).max(axis=2)
        inside = mask == 255
        assert 8 <= inside.sum() <= 0.2 * size_px**2
        assert (change > 8)[inside].mean() > 0.7  # the rest are the gaps that closing fills
        assert (change > 24)[inside].sum() >= 4  # plain to see, far above the noise
        assert (change > 16)[~ndimage.binary_dilation(inside)].mean() < 0.001


def test_a_good_picture_is_its_own_clean_twin():
    for category in DEFECTS:
        image, clean, mask = demo_photo(category, "test/good", 0, size_px=64)
        np.testing.assert_array_equal(image, clean)
        assert not mask.any()


@pytest.mark.parametrize("category", DEFECTS)
def test_good_pictures_differ_but_are_of_one_kind(category: str):
    pictures = [demo_photo(category, kind, i, size_px=64)[0].astype(float) for kind in ("train/good", "test/good")
                for i in range(4)]
    for one, other in combinations(pictures, 2):
        assert np.abs(one - other).mean() > 2
        assert abs(one.mean() - other.mean()) < 12
    assert min(picture.std() for picture in pictures) > 20  # contrast enough to learn from


def test_pictures_are_well_exposed():
    for category in DEFECTS:
        image, _, _ = demo_photo(category, "train/good", 0, size_px=128)
        assert np.isin(image, (0, 255)).mean() < 0.02
        assert 60 < image.mean() < 160


def test_both_lie_the_same_in_each_photo():
    def mean_contrast(category: str) -> float:
        pictures = np.stack([demo_photo(category, "train/good", i, size_px=64)[0].astype(float) for i in range(12)])
        return pictures.mean(axis=0).std() / pictures.std(axis=(1, 2, 3)).mean()

    assert mean_contrast("gear") > 0.8
    assert mean_contrast("fabric") > 0.6


@pytest.mark.parametrize(("setting", "value"), [("size_px", 47), ("num_train", 0), ("num_test_good", 0),
                                                ("num_per_defect", 0), ("seed", -1)])
def test_settings_out_of_range_are_refused_by_name(tmp_path: Path, setting: str, value: int):
    with pytest.raises(InTraError, match=rf"{setting} is {value}; it must be at least {value + 1}"):
        make_demo(tmp_path / "demo", **(SMALL | {setting: value}))
    assert not (tmp_path / "demo").exists()


def test_an_out_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "demo").write_text("mine")
    with pytest.raises(InTraError, match="is a file"):
        make_demo(tmp_path / "demo", **SMALL)


def test_images_of_another_set_are_neither_mixed_in_nor_deleted(tmp_path: Path):
    mine = tmp_path / "gear" / "train" / "good" / "900.png"
    mine.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(mine)
    with pytest.raises(InTraError, match=r"900\.png is no part of this demo set"):
        make_demo(tmp_path, **SMALL)
    assert list(contents(tmp_path)) == ["gear/train/good/900.png"]
