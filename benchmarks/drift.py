"""What raises the setup alarm: good and defective photos as they are, and good ones with everything changed.

    python benchmarks/drift.py DATA...

The setup is fitted to the good training photos, as `intra train` does; no network is needed. Gamma, blur, shift and
rotation are applied to the good test photos at their own size (px, borders repeated); the size is the model's.
"""

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import ndimage

from intra.config import preset
from intra.data.folder import find_categories
from intra.data.images import auto_channels, auto_image_size, prepare, read_image, read_info, read_set, to_unit
from intra.inspection.setup import Setup, SetupCheck

Change = Callable[[np.ndarray], np.ndarray]  # of a photo (H, W, C) in [0, 1]


def changes() -> dict[str, Change]:
    """By their names."""
    return {
        "as it is": lambda photo: photo,
        **{f"gamma {gamma}": lambda photo, gamma=gamma: photo**gamma for gamma in (0.6, 0.8, 1.25, 1.6)},
        **{f"blur, sigma {sigma} px": lambda photo, sigma=sigma: ndimage.gaussian_filter(photo, (sigma, sigma, 0),
                                                                                         mode="nearest")
           for sigma in (1, 2, 3)},
        **{f"shift {px} px": lambda photo, px=px: ndimage.shift(photo, (px, 0, 0), order=1, mode="nearest")
           for px in (5, 10, 15)},
        **{f"rotation {angle}°": lambda photo, angle=angle: ndimage.rotate(photo, angle, reshape=False, order=1,
                                                                           mode="nearest") for angle in (3, 6, 10)},
    }


def main() -> None:
    """Prints a table for each category."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="+")
    args = parser.parse_args()
    settings = preset("fast").model
    for category in (found for data in args.data for found in find_categories(data)):
        infos = [read_info(path) for path in category.train]
        size = auto_image_size([info.size for info in infos], patch_size=settings.patch_size,
                               window_size=settings.window_size)
        channels = auto_channels(infos)
        setup = Setup.of(read_set(category.train, size=size, channels=channels))

        def check(
            path: Path, change: Change, setup: Setup = setup, size: tuple[int, int] = size, channels: int = channels
        ) -> SetupCheck:
            image = read_image(path)
            if image.dtype == np.uint8:
                image = np.rint(255 * change(image / 255).clip(0, 1)).astype(np.uint8)
            else:
                whole = to_unit(prepare(image, size=image.shape[:2], channels=channels))
                image = change(whole.permute(1, 2, 0).numpy())
            return setup.check(to_unit(prepare(image, size=size, channels=channels))[None])[0]

        print(f"\n{category.name}: {len(category.train)} good photos, {size[0]}×{size[1]} px, alarm above "
              f"{setup.threshold:.2f}\n\n| photos | | setup alarm | named |\n|---|---|---|---|", flush=True)
        good = [image.path for image in category.test if not image.label]
        for name, change in changes().items():
            row(f"good, {name}", [check(path, change) for path in good])
        for defect in sorted({image.defect for image in category.test if image.label}):
            row(f"defective: {defect}", [check(image.path, lambda photo: photo) for image in category.test
                                         if image.defect == defect])


def row(name: str, checks: list[SetupCheck]) -> None:
    """One line of the table."""
    reasons = Counter(check.reason for check in checks if check.alarm)
    listed = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    print(f"| {name} | {len(checks)} | {sum(reasons.values()) / len(checks):.0%} | {listed} |", flush=True)


if __name__ == "__main__":
    main()
