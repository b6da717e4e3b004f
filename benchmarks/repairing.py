"""How near the repaired image comes to the part as it was before a defect was planted, repaired once and twice.

    python benchmarks/repairing.py RUN DATA/bottle [--seed 0] [--picture FILE]

At the model's own size each good test photo of DATA gets two defects, in two copies, of the kinds of planted.py in turn
(not the last, half a photo of another finish). Over the copies that are anomalous: the mean absolute difference from
the photo before, in levels of 255, within the defect's mask and outside. The median time of a verdict on them, too.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
from planted import KINDS, plant

from intra import Detector
from intra.data.folder import find_category
from intra.data.images import prepare, read_image
from intra.errors import InTraError

NUM_KINDS = len(KINDS) - 1
ROWS = 6  # of the picture


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="rows of: before, with the defect, repaired once, repaired twice")
    arguments = parser.parse_args()
    detector, rng = Detector.load(arguments.run, device="cpu"), np.random.default_rng(arguments.seed)
    if detector.region is not None or detector.config.model.channels not in (1, 3):
        sys.exit("error: only for models of grey or RGB photos, without a region of interest")
    model, errors, rows, seconds, planted = detector.config.model, [], [], [], 0
    good = [image.path for image in find_category(arguments.data).test if not image.label]
    for number, path in enumerate(path for path in good for _ in range(2)):
        before = prepare(read_image(path), size=model.image_size, channels=model.channels).permute(1, 2, 0).numpy()
        if before.dtype != np.uint8:
            sys.exit(f"error: {path} has more than 8 bits; such photos cannot be planted yet")
        try:
            changed, mask = plant(before / 255, KINDS[number % NUM_KINDS], rng)
        except InTraError:  # nowhere on this photo that kind can be seen
            continue
        planted += 1
        photo = np.rint(255 * changed).astype(np.uint8)
        shown, taken = [before, photo], []
        for repair_twice in (False, True):
            started = time.perf_counter()
            prediction = detector.predict(photo, repair_twice=repair_twice)
            taken.append(time.perf_counter() - started)
            shown.append(prediction.repaired.reshape(photo.shape))
        if prediction.is_anomalous:
            away = [np.abs(each.astype(float) - before).mean(2) for each in shown[1:]]
            errors.append([part for each in away for part in (each[mask].mean(), each[~mask].mean())])
            rows.append(np.concatenate(shown, axis=1))
            seconds.append(taken)
    if not errors:
        sys.exit(f"error: none of {planted} planted defects is above the threshold")
    once, twice = 1000 * np.median(seconds, axis=0)
    print(f"{arguments.data.name}: {len(errors)} of {planted} above the threshold; "
          f"{once:.0f} ms once, {twice:.0f} ms twice\n")
    print("| | within the defect | outside |\n|---|---|---|")
    for name, (inside, outside) in zip(("the photo", "repaired once", "repaired twice"),
                                       np.mean(errors, axis=0).reshape(3, 2), strict=True):
        print(f"| {name} | {inside:.1f} | {outside:.1f} |")
    if arguments.picture:
        chosen = [rows[index] for index in np.linspace(0, len(rows) - 1, ROWS).round().astype(int)]
        PIL.Image.fromarray(np.concatenate(chosen).squeeze()).save(arguments.picture)


if __name__ == "__main__":
    main()
