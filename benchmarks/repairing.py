"""How near the repaired image comes to the part as it was before a defect was planted, repaired once and twice.

    python benchmarks/repairing.py RUN DATA/bottle [--seed 0] [--picture FILE]

At the model's own size each good test photo of DATA gets two defects, in two copies, of the kinds of planted.py in turn
(not the last, half a photo of another finish). Over the defects that are found: the mean absolute difference from the
photo before, in levels of 255, within the defect's mask and over the whole image.
"""

import argparse
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from planted import KINDS, plant

from intra import Detector
from intra.data.folder import find_category
from intra.data.images import prepare, read_image, to_unit

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
    detector, rng = Detector.load(arguments.run), np.random.default_rng(arguments.seed)
    model, errors, rows, planted = detector.config.model, [], [], 0
    good = [image.path for image in find_category(arguments.data).test if not image.label]
    for path in (path for path in good for _ in range(2)):
        before = prepare(read_image(path), size=model.image_size, channels=model.channels).permute(1, 2, 0).numpy()
        changed, mask = plant(before / 255, KINDS[planted % NUM_KINDS], rng)
        planted += 1
        photo = np.rint(255 * changed).astype(np.uint8)
        prediction = detector.predict(photo)
        if not prediction.is_anomalous:
            continue
        once = detector.repaired(to_unit(torch.from_numpy(photo).permute(2, 0, 1)[None]))[0].clamp(0, 1)
        twice = prediction.repaired.reshape(photo.shape)
        shown = [before, photo, np.rint(255 * once.permute(1, 2, 0).numpy()).astype(np.uint8), twice]
        away = [np.abs(each.astype(float) - before).mean(2) for each in shown[1:]]
        errors.append([part for each in away for part in (each[mask].mean(), each.mean())])
        rows.append(np.concatenate(shown, axis=1))
    print(f"{arguments.data.name}: {len(errors)} of {planted} planted defects found\n")
    print("| | within the defect | whole image |\n|---|---|---|")
    for name, (inside, whole) in zip(("the photo", "repaired once", "repaired twice"),
                                     np.mean(errors, axis=0).reshape(3, 2), strict=True):
        print(f"| {name} | {inside:.1f} | {whole:.1f} |")
    if arguments.picture:
        chosen = rows[:: max(1, len(rows) // ROWS)][:ROWS]
        PIL.Image.fromarray(np.concatenate(chosen).squeeze()).save(arguments.picture)


if __name__ == "__main__":
    main()
