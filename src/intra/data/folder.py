"""Everything that is wrong with a folder of images. layout.py says what is where; its names are at home here too."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from intra.config import preset
from intra.data.files import name_below, sha256_of
from intra.data.images import UnreadableError, auto_image_size, in_threads, pixels_digest, read_image
from intra.data.layout import (
    GOOD,
    MASK_SUFFIXES,
    MIN_GOOD_IMAGES,
    Category,
    LabelledImage,
    Problem,
    find_all,
    find_categories,
    find_category,
    list_images,
    mask_files,
    require_enough,
    sub_folders,
)

__all__ = ["MIN_GOOD_IMAGES", "Category", "DataReport", "LabelledImage", "Problem", "Summary", "check_data",
           "find_categories", "find_category", "fingerprints_of", "list_images", "require_enough"]

_USUAL_SHARE = 0.9  # of the files; the others are then odd ones


@dataclass(frozen=True)
class Summary:
    """What the readable images of a category look like, and the size that `--image-size auto` makes of them."""

    sizes: Counter[tuple[int, int]]  # px: height, width
    channels: Counter[int]
    bit_depths: Counter[int]
    image_size: tuple[int, int] | None  # px: height, width; None if nothing is readable


@dataclass(frozen=True)
class DataReport:
    """What will be used for what, and what is wrong with it; errors first."""

    categories: tuple[Category, ...]
    summaries: Mapping[str, Summary]  # by the category's name
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether there is no error; there may be warnings."""
        return not any(problem.severity == "error" for problem in self.problems)


def check_data(
    data: str | Path, *, normal: str | Path | None = None, anomalous: str | Path | None = None,
    masks: str | Path | None = None, on_progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """What DATA holds, and every unreadable, duplicate, odd or wrongly masked file in it. Decodes each file once.

    `on_progress` gets how many files are done, and how many there are. Raises as `find_categories` does.
    """
    categories, problems = find_all(data, normal, anomalous, masks)
    paths = dict.fromkeys(path for category in categories for path in (
        *category.train, *(image.path for image in category.test), *mask_files(category)))
    examined = dict(zip(paths, in_threads(_examine, list(paths), on_progress), strict=True))
    problems += [Problem(path, "error", facts) for path, facts in examined.items() if isinstance(facts, str)]
    readable = {path: facts for path, facts in examined.items() if not isinstance(facts, str)}
    for category in categories:
        for check in (_too_few, _duplicates, _odd_sizes, _odd_channels, _flat, _masks_of_images, _masks_alone, _unused):
            problems += check(category, readable)
    return DataReport(
        categories=tuple(categories),
        summaries={category.name: _summary(category, readable) for category in categories},
        problems=tuple(sorted(problems, key=lambda problem: (problem.severity, problem.path, problem.message))),
    )


@dataclass(frozen=True)
class _Facts:
    """What is kept of a file after its pixels are gone."""

    size: tuple[int, int]
    channels: int
    bit_depth: int
    digest: bytes  # of the pixels: the same picture in another file format counts as a duplicate
    is_flat: bool
    num_marks: int  # different values that are not zero, up to 2


_Readable = Mapping[Path, _Facts]


def fingerprints_of(category: Category) -> dict[str, str]:
    """The SHA-256 of every good image, by its path below the category. Raises InTraError if one cannot be read."""
    hashes = in_threads(sha256_of, category.train)
    return {name_below(path, category.root): found for path, found in zip(category.train, hashes, strict=True)}


def _examine(path: Path) -> _Facts | str:
    """The facts, or why the file cannot be read."""
    try:
        image = read_image(path)
    except UnreadableError as error:
        return error.reason
    marks = image[image != 0]
    num_marks = 0 if marks.size == 0 else 1 if (marks == marks[0]).all() else 2
    is_flat = bool((image == image[0, 0]).all())
    return _Facts(image.shape[:2], image.shape[2], image.itemsize * 8, pixels_digest(image), is_flat, num_marks)


def _images_of(category: Category, readable: Collection[Path]) -> list[Path]:
    """The readable images of a category, training images first, each once."""
    paths = dict.fromkeys((*category.train, *(image.path for image in category.test)))
    return [path for path in paths if path in readable]


def _summary(category: Category, readable: _Readable) -> Summary:
    facts = [readable[path] for path in _images_of(category, readable)]
    sizes = [readable[path].size for path in category.train if path in readable]  # training sees these alone
    model = preset("fast").model  # the default
    size = auto_image_size(sizes, patch_size=model.patch_size, window_size=model.window_size) if sizes else None
    return Summary(Counter(fact.size for fact in facts), Counter(fact.channels for fact in facts),
                   Counter(fact.bit_depth for fact in facts), size)


def _too_few(category: Category, readable: _Readable) -> Iterator[Problem]:
    num_good = sum(path in readable for path in category.train)
    if num_good < MIN_GOOD_IMAGES:
        yield Problem(category.train[0].parent, "error", f"{num_good} readable good images; at least {MIN_GOOD_IMAGES} "
                      "are needed")


def _duplicates(category: Category, readable: _Readable) -> Iterator[Problem]:
    train = set(category.train)
    label = {image.path: image.label for image in category.test}
    groups = defaultdict(list)
    for path in _images_of(category, readable):
        groups[readable[path].digest].append(path)
    for first, *others in groups.values():
        for path in others:
            if path in train:
                yield Problem(path, "warning", f"the same picture as {first}")
            elif first in train:
                yield Problem(path, "error", f"the same picture as the training image {first}: test images must be new")
            elif label[path] != label[first]:
                yield Problem(path, "error", f"the same picture as {first}, but one is good and one anomalous")
            else:
                yield Problem(path, "warning", f"the same picture as {first}")


def _odd_sizes(category: Category, readable: _Readable) -> Iterator[Problem]:
    sizes = {path: "{}x{} px".format(*readable[path].size) for path in _images_of(category, readable)}
    yield from _odd_ones(category, sizes, "warning", "each is stretched to one size")


def _odd_channels(category: Category, readable: _Readable) -> Iterator[Problem]:
    facts = {path: readable[path] for path in _images_of(category, readable)}
    mixes = len({fact.channels for fact in facts.values()} - {1, 3}) > 0  # grey and RGB are turned into each other
    differ = len({fact.channels for fact in facts.values()}) > 1
    words = {path: f"{fact.channels} channels of {fact.bit_depth} bits" for path, fact in facts.items()}
    if mixes and differ:
        yield from _odd_ones(category, words, "error", "only 1 and 3 channels are turned into each other")
    else:
        yield from _odd_ones(category, words, "warning", "all are turned into one kind")


def _odd_ones(
    category: Category, values: Mapping[Path, str], severity: Literal["error", "warning"], rule: str
) -> Iterator[Problem]:
    """The few files that differ from nearly all others, or one problem for the whole category if all are mixed."""
    counts = Counter(values.values()).most_common()
    if len(counts) < 2:
        return
    usual, num_usual = counts[0]
    if num_usual >= _USUAL_SHARE * len(values):
        for path, value in values.items():
            if value != usual:
                yield Problem(path, severity, f"{value}; {num_usual} of {len(values)} images have {usual}; {rule}")
    else:
        listed = ", ".join(f"{value} ({count})" for value, count in counts[:3])
        yield Problem(category.root, severity, f"the images differ: {listed}"
                      + (f" and {len(counts) - 3} more kinds" if len(counts) > 3 else "") + f"; {rule}")


def _flat(category: Category, readable: _Readable) -> Iterator[Problem]:
    for path in _images_of(category, readable):
        if readable[path].is_flat:
            yield Problem(path, "warning", "every pixel has the same colour; was the lens covered?")


def _masks_of_images(category: Category, readable: _Readable) -> Iterator[Problem]:
    has_masks = any(image.mask for image in category.test)
    owners = Counter(image.mask for image in category.test if image.mask)
    for image in category.test:
        if image.mask is None:
            if image.label and has_masks:
                yield Problem(image.path, "warning", "anomalous, but without a mask, as the others have")
            continue
        if owners[image.mask] > 1:
            yield Problem(image.path, "error", f"shares the mask {image.mask} with another image")
        mask = readable.get(image.mask)
        if mask is None:
            continue
        if image.path in readable and mask.size != readable[image.path].size:
            yield Problem(image.mask, "error", "the mask has {}x{} px, its image {}x{}".format(
                *mask.size, *readable[image.path].size))
        if mask.num_marks == 0:
            yield Problem(image.mask, "error", "the mask is empty, but its image anomalous")
        elif mask.num_marks > 1:
            yield Problem(image.mask, "warning", "the mask has more than two values; all but zero count as defect")


def _masks_alone(category: Category, readable: _Readable) -> Iterator[Problem]:
    """Masks that no anomalous image uses."""
    used = {image.mask for image in category.test}
    defects = {image.defect for image in category.test}
    strays: dict[Path, int] = Counter()  # by folder
    for path in mask_files(category):
        if path in used or (path.parent.name == GOOD and path in readable and readable[path].num_marks == 0):
            continue  # an empty mask for a good image is true
        if path.parent.name == GOOD:
            yield Problem(path, "error", "a mask for a good image")
        elif path.parent != category.masks and path.parent.name not in defects:
            strays[path.parent] += 1
        elif path.suffix.lower() not in MASK_SUFFIXES:
            yield Problem(path, "error", f"{path.suffix} blurs a mask and is not used; save it as .png")
        else:
            yield Problem(path, "error", "a mask without an image")
    for folder, count in strays.items():
        yield Problem(folder, "error", f"{count} masks, but no images of a defect {folder.name}")


def _unused(category: Category, readable: _Readable) -> Iterator[Problem]:
    used = {path.parent for path in _images_of(category, readable)} | {category.train[0].parent}
    nested = [folder for folder in sub_folders(category.root) if folder != category.masks]
    for folder in [category.root, *nested, *(inner for outer in nested for inner in sub_folders(outer))]:
        num_images = len(list_images(folder)) if folder not in used and folder != category.masks else 0
        if num_images:
            yield Problem(folder, "warning", f"{num_images} images are not used")
