"""How many defective photos among the good ones the audit finds.

    python benchmarks/audit.py DATA... [--share 0.05] [--seeds 5]

Into the good training photos of each category real defective test photos are put, drawn at random, so that they are
--share of all; then `intra audit`'s ranking of them all, as for `intra audit DATA`. Printed: how many of the planted
ones lie in the top tenth.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from intra.config import preset
from intra.data.folder import find_categories
from intra.data.images import auto_channels, auto_image_size, read_info, read_set
from intra.inspection.audit import audit_photos


def main() -> None:
    """Prints a row for each category and seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--share", type=float, default=0.05, help="of all photos that are defective")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    settings = preset("fast")
    print("| category | good | planted | seed | planted in the top tenth | at ranks | CPU seconds |\n"
          "|---|---|---|---|---|---|---|", flush=True)
    for category in (found for data in args.data for found in find_categories(data)):
        infos = [read_info(path) for path in category.train]
        size = auto_image_size([info.size for info in infos], patch_size=settings.model.patch_size,
                               window_size=settings.model.window_size)
        channels = auto_channels(infos)
        good = read_set(category.train, size=size, channels=channels)
        bad = read_set([image.path for image in category.test if image.label], size=size, channels=channels)
        num_planted = round(args.share * len(good) / (1 - args.share))
        for seed in range(args.seeds):
            rng = np.random.default_rng(seed)
            photos = torch.cat([good, bad[torch.from_numpy(rng.permutation(len(bad))[:num_planted])]])
            order = torch.from_numpy(rng.permutation(len(photos)))  # anywhere among the good ones
            start = time.process_time()
            scores = np.array(audit_photos(photos[order], scoring=settings.scoring).scores)
            elapsed_s = time.process_time() - start
            is_planted = order.numpy() >= len(good)
            ranks = 1 + np.flatnonzero(is_planted[np.argsort(-scores)])
            in_top = int((ranks <= round(0.1 * len(photos))).sum())
            print(f"| {category.name} | {len(good)} | {num_planted} | {seed} | {in_top} | "
                  f"{', '.join(map(str, ranks))} | {elapsed_s:.0f} |", flush=True)


if __name__ == "__main__":
    main()
