"""What is where in a folder of images.

DATA takes one of three forms:

1. an MVTec-style category: `train/good/`, `test/good/`, `test/DEFECT/`, `ground_truth/DEFECT/NAME_mask.png`;
2. a folder of several such categories;
3. a plain folder: good images directly inside it, or in the folder that `normal` names. `anomalous` names a folder of
   anomalous images, or of one sub-folder for each kind of defect; `masks` names a folder of their masks, with the same
   sub-folders or without. All three are absolute or relative to DATA.

In the plain form the good images of a sub-folder `good` of `anomalous` are the good test images. Without one, the
training images are also the good test images; `intra evaluate` leaves out those that the model was trained on.

A mask is called NAME_mask.* or NAME.*, and lossless. Hidden files and files without an image's suffix are ignored.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from intra.data.decode import IMAGE_SUFFIXES
from intra.errors import InTraError

__all__ = ["GOOD", "MASK_SUFFIXES", "MIN_GOOD_IMAGES", "Category", "LabelledImage", "Problem", "find_all",
           "find_categories", "find_category", "image_files", "list_images", "mask_files", "require_enough",
           "sub_folders"]

MIN_GOOD_IMAGES = 10  # fewer show too little of what varies between good parts, and leave none for the threshold
MASK_SUFFIXES = frozenset({".png", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".pgm", ".pbm", ".ppm", ".pnm"})
GOOD = "good"


@dataclass(frozen=True)
class LabelledImage:
    """A test image and what is known about it."""

    path: Path
    label: int  # 0 good, 1 anomalous
    defect: str  # "good", or the name of the defect's folder
    mask: Path | None


@dataclass(frozen=True)
class Category:
    """The images of one kind of part, in the order of their folders and names."""

    name: str
    root: Path
    train: tuple[Path, ...]
    test: tuple[LabelledImage, ...]
    masks: Path | None = None  # the folder of masks


@dataclass(frozen=True)
class Problem:
    """Something wrong with a file or folder: an error makes training or figures wrong, a warning may."""

    path: Path
    severity: Literal["error", "warning"]
    message: str


def find_categories(
    data: str | Path, *, normal: str | Path | None = None, anomalous: str | Path | None = None,
    masks: str | Path | None = None,
) -> list[Category]:
    """The categories in DATA, by name; the module says which forms it takes. Opens no image.

    Raises InTraError if there is no good image in one of them, or a named folder is missing or empty.
    """
    categories, problems = find_all(data, normal, anomalous, masks)
    errors = [problem.message for problem in problems if problem.severity == "error"]
    if errors:  # left out in silence, a category would be missed only much later
        raise InTraError("; ".join(errors))
    return categories


def find_category(
    data: str | Path, *, normal: str | Path | None = None, anomalous: str | Path | None = None,
    masks: str | Path | None = None,
) -> Category:
    """The one category in DATA. Raises InTraError as `find_categories`, and if there are several."""
    categories = find_categories(data, normal=normal, anomalous=anomalous, masks=masks)
    if len(categories) != 1:
        names = ", ".join(category.name for category in categories)
        raise InTraError(f"{data} holds {len(categories)} categories ({names}); a model is for one, e.g. "
                         f"{Path(data) / categories[0].name}")
    return categories[0]


def require_enough(category: Category) -> None:
    """Raises InTraError if the category has fewer good training images than `MIN_GOOD_IMAGES`."""
    if len(category.train) < MIN_GOOD_IMAGES:
        raise InTraError(f"{category.name}: expected at least {MIN_GOOD_IMAGES} good images to learn from, found "
                         f"{len(category.train)} in {category.train[0].parent if category.train else category.root}; "
                         "add photos of good parts")


def find_all(
    data: str | Path, normal: str | Path | None, anomalous: str | Path | None, masks: str | Path | None
) -> tuple[list[Category], list[Problem]]:
    """The usable categories as `find_categories`, and what is wrong with the folders beside them."""
    root = Path(data)
    if not root.is_dir():
        raise InTraError(f"expected a folder of images, found {'a file' if root.exists() else 'nothing'} at {root}; "
                         "give the path of the folder")
    if normal is not None or anomalous is not None or masks is not None:
        return [_plain(root, normal, anomalous, masks)], []
    if (root / "train").is_dir():
        return [_mvtec(root)], []
    folders = sub_folders(root)
    if not any((folder / "train").is_dir() for folder in folders):
        return [_plain(root, None, None, None)], []
    categories: list[Category] = []
    problems: list[Problem] = []
    for folder in folders:
        if not (folder / "train").is_dir():
            problems.append(Problem(folder, "warning", "no category, not used: it has no folder train/good"))
            continue
        try:
            categories.append(_mvtec(folder))
        except InTraError as error:
            problems.append(Problem(folder, "error", str(error)))
    if not categories:
        raise InTraError("; ".join(problem.message for problem in problems if problem.severity == "error"))
    return categories, problems


def list_images(folder: Path, *, recursive: bool = False) -> tuple[Path, ...]:
    """The image files directly in a folder, by name; with `recursive` those of its sub-folders after them.

    A broken link counts as an image: reading it tells what is wrong. Links to folders are not followed down, as they
    can form a ring. Raises InTraError for a folder that cannot be read.
    """
    entries = _entries(folder)
    images = [path for path in entries if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()]
    for inner in entries if recursive else ():
        if inner.is_dir() and not inner.is_symlink():
            images += list_images(inner, recursive=True)
    return tuple(images)


def image_files(images: Sequence[str | Path]) -> list[Path]:
    """The files that are meant by paths of files and folders, each once, those of sub-folders too.

    Raises InTraError for one that is not there, or if there is none.
    """
    found: dict[Path, None] = {}
    for image in map(Path, images):
        if not image.exists():
            raise InTraError(f"{image} is not there; give image files or folders of them")
        found.update(dict.fromkeys(list_images(image, recursive=True) if image.is_dir() else [image]))
    if not found:
        raise InTraError(f"no image in {', '.join(map(str, images))}; give image files or folders of them")
    return list(found)


def sub_folders(folder: Path) -> list[Path]:
    """The folders directly in a folder, hidden ones left out, by name."""
    return [path for path in _entries(folder) if path.is_dir()]


def mask_files(category: Category) -> list[Path]:
    """Every image file in a category's folder of masks, used or not."""
    if category.masks is None:
        return []
    return [path for folder in (category.masks, *sub_folders(category.masks)) for path in list_images(folder)]


def _mvtec(root: Path) -> Category:
    good = root / "train" / GOOD
    train = list_images(good) if good.is_dir() else ()
    if not train:
        raise InTraError(f"expected good images in {good}, found {'none' if good.is_dir() else 'no such folder'}; put "
                         "them there, or name their folder with --normal")
    masks = root / "ground_truth" if (root / "ground_truth").is_dir() else None
    defects = sub_folders(root / "test") if (root / "test").is_dir() else []
    test = [image for folder in defects for image in _labelled(folder, [masks / folder.name] if masks else [])]
    return Category(_name(root), root, train, tuple(test), masks)


def _plain(
    root: Path, normal: str | Path | None, anomalous: str | Path | None, masks: str | Path | None
) -> Category:
    if masks is not None and anomalous is None:
        raise InTraError("--masks needs --anomalous: the masks belong to anomalous images")
    good = root if normal is None else _named(root, normal, "--normal")
    train = list_images(good)
    if not train:
        nested = [folder.name for folder in sub_folders(good) if list_images(folder)]
        raise InTraError(f"expected good images in {good}, found none" + (
            f"; name their sub-folder with --normal ({', '.join(nested)})" if nested
            else "; put photos of good parts there, or in train/good"))
    name = _name(root)
    if anomalous is None:
        return Category(name, root, train, ())
    bad = _named(root, anomalous, "--anomalous")
    mask_folder = None if masks is None else _named(root, masks, "--masks")
    if len({good, bad, mask_folder}) < 3:
        raise InTraError("--normal, --anomalous and --masks must be three different folders")
    test: list[LabelledImage] = []
    for folder in [bad, *(folder for folder in sub_folders(bad) if folder not in (mask_folder, good))]:
        test += _labelled(folder, [mask_folder / folder.name, mask_folder] if mask_folder else [])
    if not any(image.label for image in test):
        raise InTraError(f"expected anomalous images in {bad} or its sub-folders, found none")
    if all(image.label for image in test):
        test = [LabelledImage(path, 0, GOOD, None) for path in train] + test
    return Category(name, root, train, tuple(test), mask_folder)


def _name(root: Path) -> str:
    return root.name if root.name not in ("", "..") else root.resolve().name


def _named(root: Path, folder: str | Path, option: str) -> Path:
    """A folder that the user named, absolute or relative to DATA."""
    if not (root / folder).is_dir():
        raise InTraError(f"expected a folder at {root / folder}, found none; {option} is absolute or relative to "
                         f"{root}")
    return root / folder


def _labelled(folder: Path, mask_folders: list[Path]) -> Iterator[LabelledImage]:
    """The images of a defect's folder (or of `good`), each with the first mask that goes by its name."""
    label = int(folder.name != GOOD)
    masks: dict[str, Path] = {}
    for mask_folder in mask_folders if label else ():
        for path in list_images(mask_folder) if mask_folder.is_dir() else ():
            if path.suffix.lower() in MASK_SUFFIXES:
                masks.setdefault(path.stem, path)
    for path in list_images(folder):
        yield LabelledImage(path, label, folder.name, masks.get(f"{path.stem}_mask") or masks.get(path.stem))


def _entries(folder: Path) -> list[Path]:
    """All that is in a folder and not hidden, by name."""
    try:
        return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)
    except OSError as error:
        raise InTraError(f"cannot look into {folder}: {error.strerror or error}") from error
