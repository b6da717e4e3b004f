"""What each part of the method is worth: the paper's ablations, and those that it lacks.

    python benchmarks/ablations.py DATA/bottle DATA/transistor --out benchmarks/results/ablations --seeds 0,1,2
    python benchmarks/ablations.py DATA/bottle --out … --only mfsa,l2    # some of them
    python benchmarks/ablations.py --methods                            # the list, without measuring

Networks: each is the preset `fast` with one thing changed, and *plain* with nothing. Scorings: *base* and what
changes one thing of it, all on the weights of `fast`. All of a table have the same minutes of training, validation
included. All but *fast* and distribution_and_difference look at the difference of photo and repaired image alone (the
deviation of 1 − GMS), as the paper does: the default's distribution also sees the photo itself, and would hide what
the network is worth. Goes on where it was stopped, as `intra benchmark` does, and takes the weights of finished cells
of the same training, where they lie in the same folder. docs/results.md shows the tables.
"""

import argparse
import sys
from pathlib import Path

from intra.errors import InTraError
from intra.evaluation.benchmark import Event, benchmark

MINUTES = 3.0
DIFFERENCE = {"scoring.difference_weight": "1", "scoring.distribution_weight": "0"}


def window(side: int) -> dict[str, str]:
    """One patch is hidden; a step has the tokens of eight whole grids, and an epoch one step an image, as ever."""
    count = str(8 * 256 // side**2)
    return {"model.window_size": str(side), "train.hidden_fraction": "none", "train.batch_size": count,
            "train.windows_per_image": count}


NETWORKS: dict[str, dict[str, str]] = {
    "plain": {},
    "mfsa": {"model.attention": "mfsa"},
    "no_long_residuals": {"model.long_residuals": "off"},
    **{f"window_{side}": window(side) for side in (3, 5, 7, 9)},
    "lattice_3": {"scoring.lattice": "3"},
    "lattice_4": {"scoring.lattice": "4"},
    "hidden_0.05": {"train.hidden_fraction": "0.05,0.05"},
    "hidden_0.25": {"train.hidden_fraction": "0.25,0.25"},
    "one_hidden": {"train.hidden_fraction": "none", "scoring.lattice": "4"},
    "l2": {"train.gms_weight": "0", "train.ssim_weight": "0"},
    "l2_gms": {"train.ssim_weight": "0"},
    "l2_ssim": {"train.gms_weight": "0"},
    "side_128": {"data.image_size": "128,128", "train.batch_size": "32", "train.windows_per_image": "32"},
}
# the same shares of the photo are compared and blurred
SIDES = {"side_128": {"scoring.scales": "1,2,4,8", "scoring.blur_size": "15"}}
SCORINGS: dict[str, dict[str, str]] = {
    "base": {},
    "scales_1": {"scoring.scales": "1"},
    "scales_1_2_4": {"scoring.scales": "1,2,4"},
    "blur_1": {"scoring.blur_size": "1"},
    "blur_11": {"scoring.blur_size": "11"},
    "clipped": {"scoring.deviation": "clipped"},
    "no_mean": {"scoring.deviation": "none", "scoring.spread": "off"},
    "no_spread": {"scoring.spread": "off"},
    "ssim": {"scoring.difference": "ssim"},
    "squared_difference": {"scoring.difference": "squared"},
}


def methods(only: str | None = None) -> list[str]:
    """As `intra benchmark --method` takes them; all, or those with these names. Raises InTraError on an unknown one."""
    found = {name: settings | DIFFERENCE | SIDES.get(name, {}) for name, settings in NETWORKS.items()}
    found |= {name: settings | DIFFERENCE for name, settings in SCORINGS.items()}
    found |= {"fast": {}, "distribution_and_difference": {"scoring.difference_weight": "1"}}
    chosen = list(found) if only is None else only.split(",")
    if unknown := [name for name in chosen if name not in found]:
        raise InTraError(f"no ablation {', '.join(unknown)}; there are {', '.join(found)}")
    return [" ".join([f"{name}:", "fast", *(f"{key}={value}" for key, value in found[name].items())])
            for name in chosen]


def tell(event: Event) -> None:
    """One line for each cell that has ended."""
    if event.state != "running":
        print(f"{event.num_ended}/{event.num_cells} {event.cell} {event.state} {event.text}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="*", metavar="DATA", help="categories in MVTec's layout")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ablations"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of training, for each cell")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    parser.add_argument("--only", help="names of methods, with commas between")
    parser.add_argument("--methods", action="store_true", help="print them, and end")
    given = parser.parse_args()
    if given.methods:
        print("\n".join(methods()))
        sys.exit()
    try:
        outcome = benchmark(given.data, out=given.out, methods=methods(given.only), minutes=given.minutes,
                            jobs=given.jobs, seeds=[int(seed) for seed in given.seeds.split(",")], on_cell=tell)
    except InTraError as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if outcome.failed else 0)
