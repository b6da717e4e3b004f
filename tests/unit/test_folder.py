"""What is where in a folder, and every kind of problem found where it was planted."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from intra.data.folder import (
    MIN_GOOD_IMAGES,
    Category,
    DataReport,
    LabelledImage,
    check_data,
    find_categories,
    list_images,
    require_enough,
)
from intra.errors import InTraError

SIZE = (12, 16)  # px: height, width


def write_image(path: Path, *, size: tuple[int, int] = SIZE, channels: int = 3, dtype: type = np.uint8) -> Path:
    """A picture of noise that is the same for the same path, and another for each other path."""
    rng = np.random.default_rng(list(str(path).encode()))
    pixels = rng.integers(0, np.iinfo(dtype).max, (*size, channels), dtype=dtype)
    return write_pixels(path, pixels.squeeze(2) if channels == 1 else pixels)


def write_pixels(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(path)
    return path


def write_mask(path: Path, *, size: tuple[int, int] = SIZE, value: int = 255) -> Path:
    mask = np.zeros(size, np.uint8)
    mask[2:5, 3:7] = value
    return write_pixels(path, mask)


def write_category(root: Path, *, num_good: int = MIN_GOOD_IMAGES) -> Path:
    """A category without any problem: 2 good and 2 x 2 anomalous test images with masks."""
    for i in range(num_good):
        write_image(root / "train" / "good" / f"{i:03}.png")
    for defect in ("good", "crack", "stain"):
        for i in range(2):
            write_image(root / "test" / defect / f"{i:03}.png")
            if defect != "good":
                write_mask(root / "ground_truth" / defect / f"{i:03}_mask.png")
    return root


def write_plain(root: Path, *, num_good: int = MIN_GOOD_IMAGES) -> Path:
    for i in range(num_good):
        write_image(root / f"{i:03}.png")
    return root


def names(paths: tuple[Path, ...]) -> list[str]:
    return [path.name for path in paths]


class TestCategory:
    def test_what_is_where(self, tmp_path):
        root = write_category(tmp_path / "bottle")
        (category,) = find_categories(root)
        assert category.name == "bottle"
        assert category.root == root
        assert names(category.train) == [f"{i:03}.png" for i in range(10)]
        masks, test = root / "ground_truth", root / "test"
        assert category.test == (
            LabelledImage(test / "crack/000.png", 1, "crack", masks / "crack/000_mask.png"),
            LabelledImage(test / "crack/001.png", 1, "crack", masks / "crack/001_mask.png"),
            LabelledImage(test / "good/000.png", 0, "good", None),
            LabelledImage(test / "good/001.png", 0, "good", None),
            LabelledImage(test / "stain/000.png", 1, "stain", masks / "stain/000_mask.png"),
            LabelledImage(test / "stain/001.png", 1, "stain", masks / "stain/001_mask.png"),
        )
        assert find_categories(str(root)) == [category]

    @pytest.mark.parametrize("mask", ["000_mask.png", "000.png", "000_mask.BMP", "000.tiff"])
    def test_names_of_masks(self, tmp_path, mask):
        root = write_category(tmp_path / "bottle")
        (root / "ground_truth/crack/000_mask.png").unlink()
        write_mask(root / "ground_truth/crack" / mask)
        assert find_categories(root)[0].test[0].mask == root / "ground_truth/crack" / mask
        assert check_data(root).problems == ()

    def test_only_training_images(self, tmp_path):
        for i in range(3):
            write_image(tmp_path / f"train/good/{i}.png")
        (category,) = find_categories(tmp_path)
        assert category.test == ()

    def test_odd_names_and_files(self, tmp_path):
        good = tmp_path / "Flasche groß" / "train" / "good"
        for name in ("b.PNG", "ünï côde 日本.png", "a.Jpeg", "a b.tif", ".hidden.png"):
            write_image(good / name)
        for name in ("Thumbs.db", "notes.txt", "no_suffix", "array.npy"):
            (good / name).write_text("x")
        (good / "folder.png").mkdir()
        (good / "z.png").symlink_to(good / "b.PNG")
        (category,) = find_categories(tmp_path / "Flasche groß")
        assert names(category.train) == ["a b.tif", "a.Jpeg", "b.PNG", "z.png", "ünï côde 日本.png"]

    def test_the_name_of_the_present_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(write_category(tmp_path / "bottle"))
        assert find_categories(".")[0].name == "bottle"

    def test_no_good_images(self, tmp_path):
        write_image(tmp_path / "train" / "bad" / "0.png")
        with pytest.raises(InTraError, match=r"train/good, found no such folder.*--normal"):
            find_categories(tmp_path)
        (tmp_path / "train" / "good").mkdir()
        with pytest.raises(InTraError, match="train/good, found none"):
            find_categories(tmp_path)


class TestSeveral:
    def test_by_name(self, tmp_path):
        for name in ("b", "a", "c"):
            write_category(tmp_path / name)
        (tmp_path / ".cache" / "train" / "good").mkdir(parents=True)
        assert [category.name for category in find_categories(tmp_path)] == ["a", "b", "c"]
        assert check_data(tmp_path).problems == ()

    def test_links_to_one_category_keep_their_names(self, tmp_path):
        write_category(tmp_path / "real" / "x")
        (tmp_path / "root").mkdir()
        for name in ("a", "b"):
            (tmp_path / "root" / name).symlink_to(tmp_path / "real" / "x")
        assert [category.name for category in find_categories(tmp_path / "root")] == ["a", "b"]

    def test_what_is_no_category_is_told(self, tmp_path):
        write_category(tmp_path / "a")
        write_image(tmp_path / "docs" / "logo.png")
        (tmp_path / "empty" / "train" / "good").mkdir(parents=True)
        report = check_data(tmp_path)
        assert [category.name for category in report.categories] == ["a"]
        assert planted(report, "error") == [(tmp_path / "empty", "expected good images in")]
        assert planted(report, "warning") == [(tmp_path / "docs", "no category, not used:")]

    def test_none_usable(self, tmp_path):
        (tmp_path / "empty" / "train" / "good").mkdir(parents=True)
        with pytest.raises(InTraError, match=r"expected good images in .*empty/train/good"):
            find_categories(tmp_path)


class TestPlain:
    def test_good_images_alone(self, tmp_path):
        write_plain(tmp_path / "parts")
        write_image(tmp_path / "parts" / "later" / "0.png")  # sub-folders do not count
        (category,) = find_categories(tmp_path / "parts")
        assert (category.name, len(category.train), category.test) == ("parts", 10, ())

    @pytest.mark.parametrize("absolute", [True, False])
    def test_named_folders(self, tmp_path, absolute):
        write_plain(tmp_path / "ok")
        write_image(tmp_path / "nok" / "scratch" / "0.png")
        write_image(tmp_path / "nok" / "dent" / "0.png")
        write_image(tmp_path / "nok" / "1.png")
        write_mask(tmp_path / "marks" / "scratch" / "0_mask.png")
        write_mask(tmp_path / "marks" / "1.png")
        at = tmp_path if absolute else Path()
        (category,) = find_categories(tmp_path, normal=at / "ok", anomalous=at / "nok", masks=at / "marks")
        assert len(category.train) == 10
        assert category.test[:10] == tuple(LabelledImage(path, 0, "good", None) for path in category.train)
        assert category.test[10:] == (
            LabelledImage(tmp_path / "nok/1.png", 1, "nok", tmp_path / "marks/1.png"),
            LabelledImage(tmp_path / "nok/dent/0.png", 1, "dent", None),
            LabelledImage(tmp_path / "nok/scratch/0.png", 1, "scratch", tmp_path / "marks/scratch/0_mask.png"),
        )

    def test_good_test_images_of_their_own(self, tmp_path):
        write_plain(tmp_path / "ok")
        write_image(tmp_path / "test" / "good" / "0.png")
        write_image(tmp_path / "test" / "dent" / "0.png")
        (category,) = find_categories(tmp_path, normal="ok", anomalous="test")
        assert category.test == (
            LabelledImage(tmp_path / "test/dent/0.png", 1, "dent", None),
            LabelledImage(tmp_path / "test/good/0.png", 0, "good", None),
        )

    def test_anomalous_below_the_good_ones(self, tmp_path):
        write_plain(tmp_path)
        write_image(tmp_path / "nok" / "0.png")
        write_mask(tmp_path / "nok" / "masks" / "0.png")
        (category,) = find_categories(tmp_path, anomalous="nok", masks="nok/masks")
        assert category.test[10:] == (
            LabelledImage(tmp_path / "nok/0.png", 1, "nok", tmp_path / "nok/masks/0.png"),)
        assert check_data(tmp_path, anomalous="nok", masks="nok/masks").problems == ()

    def test_training_images_as_good_test_images_are_no_leak(self, tmp_path):
        write_plain(tmp_path / "ok")
        write_image(tmp_path / "nok" / "0.png")
        assert check_data(tmp_path, normal="ok", anomalous="nok").problems == ()

    @pytest.mark.parametrize("options, words", [
        ({"normal": "nowhere"}, "--normal is absolute or relative to"),
        ({"anomalous": "nowhere"}, "--anomalous is absolute or relative to"),
        ({"anomalous": "nok", "masks": "nowhere"}, "--masks is absolute or relative to"),
        ({"masks": "nok"}, "--masks needs --anomalous"),
        ({"anomalous": "nok", "masks": "nok"}, "three different folders"),
        ({"anomalous": "."}, "three different folders"),
        ({"anomalous": "empty"}, "expected anomalous images"),
        ({"normal": "empty"}, "expected good images"),
    ])  # fmt: skip
    def test_wrong_folders(self, tmp_path, options, words):
        write_plain(tmp_path)
        write_image(tmp_path / "nok" / "0.png")
        (tmp_path / "empty").mkdir()
        with pytest.raises(InTraError, match=words):
            find_categories(tmp_path, **options)


class TestNothing:
    def test_missing_folder(self, tmp_path):
        with pytest.raises(InTraError, match="expected a folder of images, found nothing at"):
            find_categories(tmp_path / "nowhere")

    def test_a_file(self, tmp_path):
        with pytest.raises(InTraError, match="found a file at"):
            find_categories(write_image(tmp_path / "a.png"))

    def test_an_empty_folder(self, tmp_path):
        for function in (find_categories, check_data):
            with pytest.raises(InTraError, match="found none; put photos of good parts there"):
                function(tmp_path)

    def test_images_one_level_too_deep(self, tmp_path):
        write_image(tmp_path / "ok" / "0.png")
        (tmp_path / "none").mkdir()
        with pytest.raises(InTraError, match=r"name their sub-folder with --normal \(ok\)"):
            find_categories(tmp_path)


def test_list_images_recursively_without_following_rings(tmp_path):
    for name in ("b.png", "a.png", "x/c.png", "x/y/d.png", ".git/e.png"):
        write_image(tmp_path / name)
    (tmp_path / "x" / "ring").symlink_to(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in list_images(tmp_path, recursive=True)] == [
        "a.png", "b.png", "x/c.png", "x/y/d.png"]  # fmt: skip
    assert names(list_images(tmp_path)) == ["a.png", "b.png"]


@pytest.mark.parametrize("num_good, enough", [(MIN_GOOD_IMAGES, True), (MIN_GOOD_IMAGES - 1, False), (0, False)])
def test_require_enough(tmp_path, num_good, enough):
    category = Category("parts", tmp_path, tuple(tmp_path / f"{i}.png" for i in range(num_good)), ())
    if enough:
        require_enough(category)
    else:
        with pytest.raises(InTraError, match=f"at least 10 good images to learn from, found {num_good} in .*; add"):
            require_enough(category)


def planted(report: DataReport, severity: str) -> list[tuple[Path, str]]:
    """Path and first four words of the problems of a severity."""
    return [(problem.path, " ".join(problem.message.split()[:4])) for problem in report.problems
            if problem.severity == severity]


def _copy(path: Path, to: Path) -> Path:
    to.write_bytes(path.read_bytes())
    return to


def _truncate(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:200])
    return path


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _pages(path: Path) -> Path:
    first, *others = (PIL.Image.fromarray(np.full(SIZE, 9 + i, np.uint8)) for i in range(4))
    first.putpixel((0, 0), 0)  # not flat
    first.save(path, save_all=True, append_images=others)
    return path


def _flat(path: Path) -> Path:
    return write_pixels(path, np.zeros((*SIZE, 3), np.uint8))


# What is planted in a category without problems (returns the path that is to be named), and what is found.
ERRORS: list[tuple[str, Callable[[Path], Path], str]] = [
    ("no image", lambda root: _write(root / "train/good/x.png", b"no image"), "it is no image,"),
    ("zero bytes", lambda root: _write(root / "test/good/x.png", b""), "the file is empty"),
    ("truncated", lambda root: _truncate(write_image(root / "test/crack/000.png")), "it is damaged or"),
    ("damaged mask", lambda root: _truncate(write_image(root / "ground_truth/crack/000_mask.png")), "it is damaged or"),
    ("leak", lambda root: _copy(root / "train/good/003.png", root / "test/good/x.png"), "the same picture as"),
    ("good and anomalous", lambda root: _copy(root / "test/crack/001.png", root / "test/good/x.png"),
     "the same picture as"),
    ("channels", lambda root: _pages(root / "train/good/x.tif"), "4 channels of 8"),
    ("mask alone", lambda root: write_mask(root / "ground_truth/crack/x_mask.png"), "a mask without an"),
    ("mask of another size", lambda root: write_mask(root / "ground_truth/crack/000_mask.png", size=(16, 12)),
     "the mask has 16x12"),
    ("empty mask", lambda root: write_mask(root / "ground_truth/crack/000_mask.png", value=0), "the mask is empty,"),
    ("mask for good", lambda root: write_mask(root / "ground_truth/good/000_mask.png"), "a mask for a"),
    ("masks for no defect", lambda root: write_mask(root / "ground_truth/dent/000_mask.png").parent, "1 masks, but no"),
    ("lossy mask", lambda root: write_mask(root / "ground_truth/crack/000_mask.jpg"), ".jpg blurs a mask"),
]
WARNINGS: list[tuple[str, Callable[[Path], Path], str]] = [
    ("train twice", lambda root: _copy(root / "train/good/003.png", root / "train/good/x.png"), "the same picture as"),
    ("test twice", lambda root: _copy(root / "test/good/001.png", root / "test/good/x.png"), "the same picture as"),
    ("size", lambda root: write_image(root / "train/good/x.png", size=(12, 17)), "12x17 px; 16 of"),
    ("grey among RGB", lambda root: write_image(root / "train/good/x.png", channels=1), "1 channels of 8"),
    ("flat", lambda root: _flat(root / "train/good/x.png"), "every pixel has the"),
    ("no mask", lambda root: write_image(root / "test/crack/x.png"), "anomalous, but without a"),
    ("unused", lambda root: write_image(root / "train/bad/x.png").parent, "1 images are not"),
    ("unused test", lambda root: write_image(root / "test/x.png").parent, "1 images are not"),
]


class TestCheckData:
    def test_a_faultless_category(self, tmp_path):
        steps = []
        report = check_data(write_category(tmp_path / "a"), on_progress=lambda *progress: steps.append(progress))
        assert report.problems == ()
        assert report.ok
        assert steps == [(done, 20) for done in range(1, 21)]  # 10 + 6 images and 4 masks
        summary = report.summaries["a"]
        assert (summary.sizes, summary.channels, summary.bit_depths) == ({SIZE: 16}, {3: 16}, {8: 16})
        assert summary.image_size == (224, 288)

    @pytest.mark.parametrize("plant, words", [case[1:] for case in ERRORS], ids=[case[0] for case in ERRORS])
    def test_each_error_is_found_alone(self, tmp_path, plant, words):
        path = plant(write_category(tmp_path / "a"))
        report = check_data(tmp_path / "a")
        assert planted(report, "error") == [(path, words)]
        assert not report.ok

    @pytest.mark.parametrize("plant, words", [case[1:] for case in WARNINGS], ids=[case[0] for case in WARNINGS])
    def test_each_warning_is_found_alone(self, tmp_path, plant, words):
        path = plant(write_category(tmp_path / "a"))
        report = check_data(tmp_path / "a")
        assert planted(report, "warning") == [(path, words)]
        assert report.ok

    def test_mask_of_many_values(self, tmp_path):
        root = write_category(tmp_path / "a")
        path = write_mask(root / "ground_truth/crack/000_mask.png")
        write_pixels(path, np.arange(SIZE[0] * SIZE[1], dtype=np.uint8).reshape(SIZE))
        assert planted(check_data(root), "warning") == [(path, "the mask has more")]

    def test_an_empty_mask_for_a_good_image_is_true(self, tmp_path):
        root = write_category(tmp_path / "a")
        write_mask(root / "ground_truth/good/000_mask.png", value=0)
        assert check_data(root).problems == ()

    def test_masks_are_not_missed_where_there_are_none(self, tmp_path):
        root = write_category(tmp_path / "a")
        for path in (root / "ground_truth").rglob("*.png"):
            path.unlink()
        assert check_data(root).problems == ()

    def test_one_mask_for_two_images(self, tmp_path):
        root = write_category(tmp_path / "a")
        other = write_image(root / "test/crack/000.bmp")
        words = f"shares the mask {root}/ground_truth/crack/000_mask.png"
        assert planted(check_data(root), "error") == [(other, words), (root / "test/crack/000.png", words)]

    def test_too_few_readable_good_images(self, tmp_path):
        root = write_category(tmp_path / "a")
        path = _write(root / "train/good/000.png", b"")
        report = check_data(root)
        assert planted(report, "error") == [(path.parent, "9 readable good images;"), (path, "the file is empty")]

    def test_the_same_picture_in_another_format(self, tmp_path):
        root = write_category(tmp_path / "a")
        PIL.Image.open(root / "train/good/003.png").save(root / "test/good/x.bmp")
        assert planted(check_data(root), "error") == [(root / "test/good/x.bmp", "the same picture as")]

    def test_generally_mixed_sizes_are_one_problem(self, tmp_path):
        for i in range(12):
            write_image(tmp_path / f"train/good/{i:02}.png", size=(20 + i // 2, 20))
        (problem,) = check_data(tmp_path).problems
        assert (problem.path, problem.severity) == (tmp_path, "warning")
        assert problem.message == ("the images differ: 20x20 px (2), 21x20 px (2), 22x20 px (2) and 3 more kinds; "
                                   "each is stretched to one size")  # fmt: skip

    def test_mixed_bit_depths(self, tmp_path):
        for i in range(12):
            write_image(tmp_path / f"train/good/{i}.png", channels=1, dtype=np.uint16 if i % 2 else np.uint8)
        (problem,) = check_data(tmp_path).problems
        assert problem.message.startswith("the images differ: 1 channels of 8 bits (6), 1 channels of 16 bits (6)")

    def test_nothing_readable(self, tmp_path):
        for i in range(3):
            _write(tmp_path / f"{i}.png", b"no image")
        report = check_data(tmp_path)
        assert report.summaries[tmp_path.name].image_size is None
        assert len(report.problems) == 4

    def test_errors_come_first_and_by_path(self, tmp_path):
        root = write_category(tmp_path / "a")
        _flat(root / "test/good/0.png")
        _write(root / "train/good/z.png", b"")
        _write(root / "train/good/y.png", b"")
        found = [(problem.severity, problem.path.name) for problem in check_data(root).problems]
        assert found == [("error", "y.png"), ("error", "z.png"), ("warning", "0.png")]

    def test_a_broken_link(self, tmp_path):
        root = write_category(tmp_path / "a")
        (root / "train/good/x.png").symlink_to(tmp_path / "nowhere")
        assert planted(check_data(root), "error") == [(root / "train/good/x.png", "there is no such")]
