"""Cells of a benchmark → a table beside the paper's figures. Loads no torch, so that documents are filled quickly."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intra.errors import InTraError

__all__ = ["PAPER", "Row", "Score", "Table", "markdown", "read_cell", "table_of"]

READ = {"commit", "data", "hardware", "training", "weights_from"}  # what else a table reads of each cell
FIGURES = ("image_auroc", "pixel_auroc", "pixel_aupro")
MISSING = "—"
# ROC AUC in %, detection and segmentation: Pirnay & Chai 2021 (arXiv 2104.13897), the tables of results on MVTec AD
PAPER = {
    "carpet": (98.8, 99.2), "grid": (100.0, 98.8), "leather": (100.0, 99.5), "tile": (98.2, 94.4),
    "wood": (97.5, 88.7), "bottle": (100.0, 97.1), "cable": (70.3, 91.0), "capsule": (86.5, 97.7),
    "hazelnut": (95.7, 98.3), "metal_nut": (96.9, 93.3), "pill": (90.2, 98.3), "screw": (95.7, 99.5),
    "toothbrush": (100.0, 98.9), "transistor": (95.8, 96.1), "zipper": (99.4, 99.2),
}  # fmt: skip
PAPER_NOTE = ("InTra paper: Pirnay & Chai 2021, their own figures, with full-size official images; matched by the "
              "category's name, not measured here.")

Record = Mapping[str, Any]  # one JSON file of a benchmark


@dataclass(frozen=True)
class Score:
    """A figure over seeds, in [0, 1]; None where there is none."""

    mean: float | None = None
    std: float | None = None  # of the sample, over n − 1; None with one seed
    num: int = 0  # seeds that have the figure


@dataclass(frozen=True)
class Row:
    """One method."""

    method: str
    seeds: tuple[int, ...]
    scores: Mapping[str, Mapping[str, Score]]  # by category, then by figure
    mean: Mapping[str, Score]  # over the categories; empty scores where one of the categories has none
    training_minutes: float | None  # mean of the cells
    ms_per_image: float | None  # mean of the cells


@dataclass(frozen=True)
class Table:
    """Methods × categories, and what one must know to read it."""

    categories: tuple[str, ...]
    rows: tuple[Row, ...]
    paper: Row
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of plain values, fit for JSON."""
        return asdict(self)


def read_cell(path: Path) -> dict[str, Any]:
    """One cell of a benchmark. Raises InTraError if the file is damaged or something else."""
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
        named = cell["method"], cell["category"], cell["seed"], *(cell["results"][name] for name in FIGURES)
        _ = [cell[name] for name in READ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InTraError(f"{path} is damaged or no cell of a benchmark ({error!r}); delete it, and run the benchmark "
                         "again") from error
    if not isinstance(named[2], int) or any(figure is not None and not _is_number(figure) for figure in named[3:]):
        raise InTraError(f"{path} is no cell of a benchmark: a seed or a figure is no number; delete it")
    return dict(cell)


def table_of(folder: str | Path, wanted: Sequence[str] | None = None) -> Table:
    """The table of the cells in a folder, categories and methods by name, or the wanted methods in that order; of no
    cells if it is empty or not there.

    Raises InTraError if a file in it is damaged, or a wanted method has no cell.
    """
    cells = [read_cell(path) for path in sorted(Path(folder).glob("*.json"))]
    methods = sorted({cell["method"] for cell in cells})
    if wanted is not None:
        if missing := [name for name in wanted if name not in methods]:
            raise InTraError(f"{folder} has no cell of {', '.join(missing)}; it has {', '.join(methods) or 'none'}")
        methods, cells = list(wanted), [cell for cell in cells if cell["method"] in wanted]
    categories = tuple(sorted({cell["category"] for cell in cells}))
    rows = tuple(_row(method, [cell for cell in cells if cell["method"] == method], categories) for method in methods)
    return Table(categories, rows, _paper_row(categories), (*_notes(cells), *_missing(rows, categories), PAPER_NOTE))


def markdown(table: Table) -> str:
    """The table in Markdown, with its notes beneath: image / pixel AUROC in %, mean ± deviation over seeds."""
    lines = [["method", "seeds", *table.categories, "mean", "training, min", "ms an image"]]
    for row in (*table.rows, table.paper):
        groups = [row.scores.get(category, {}) for category in table.categories]
        lines.append([row.method, str(len(row.seeds)) if row.seeds else MISSING, *map(_pair, (*groups, row.mean)),
                      _number(row.training_minutes), _number(row.ms_per_image)])
    head, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    rule = "|" + "---|" * len(lines[0])
    return "\n".join([head, rule, *body, "", *(f"- {note}" for note in table.notes)]) + "\n"


def _row(method: str, cells: Sequence[Record], categories: Sequence[str]) -> Row:
    by_category = {name: [cell for cell in cells if cell["category"] == name] for name in categories}
    scores = {name: {figure: _score([cell["results"][figure] for cell in own]) for figure in FIGURES}
              for name, own in by_category.items() if own}
    seeds = tuple(sorted({cell["seed"] for cell in cells}))
    mean = {figure: _mean_score(by_category, figure, seeds) for figure in FIGURES}
    minutes = [cell["training"]["elapsed_s"] / 60 for cell in cells]
    ms = [cell["results"]["seconds_per_image"] * 1000 for cell in cells]
    return Row(method, seeds, scores, mean, statistics.fmean(minutes), statistics.fmean(ms))


def _paper_row(categories: Sequence[str]) -> Row:
    scores = {name: {figure: Score(percent / 100, num=1) for figure, percent in zip(FIGURES, PAPER[name], strict=False)}
              for name in categories if name in PAPER}
    whole = bool(categories) and len(scores) == len(categories)
    mean = {figure: Score(statistics.fmean(PAPER[name][index] / 100 for name in categories), num=1)
            for index, figure in enumerate(FIGURES[:2]) if whole}
    return Row("InTra paper", (), scores, mean, None, None)


def _score(figures: Iterable[float | None]) -> Score:
    known = [figure for figure in figures if figure is not None]
    if not known:
        return Score()
    return Score(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def _mean_score(by_category: Mapping[str, Sequence[Record]], figure: str, seeds: Sequence[int]) -> Score:
    """The mean over categories, for each seed by itself; only of seeds that have every category."""
    found: list[float | None] = []
    for seed in seeds:
        figures = [cell["results"][figure] for cells in by_category.values() for cell in cells if cell["seed"] == seed]
        whole = len(figures) == len(by_category) and None not in figures
        found.append(statistics.fmean(figures) if whole else None)
    return _score(found)


def _notes(cells: Sequence[Record]) -> list[str]:
    """How the figures came about, so that nobody compares what cannot be compared."""
    notes = ["image / pixel AUROC in %, ± the sample standard deviation where there are several seeds; the mean is "
             "over all categories, and over the seeds that have them all."]
    if cells:
        notes += [
            f"Seeds: {_listed(cells, lambda cell: str(cell['seed']), ', ')}.",
            f"Budget: {_listed(cells, lambda cell: _budget(cell['budget']))}.",
            f"Photos: {_listed(cells, _photos, methods=False)}.",
            f"Hardware: {_listed(cells, _hardware)}.",
            f"Software: {_listed(cells, lambda cell: _software(cell['versions']))}.",
            f"Commit: {_listed(cells, lambda cell: _commit(cell['commit']))}.",
        ]
        if len({cell["commit"] for cell in cells}) > 1:
            notes.append("Results of different commits are mixed.")
        for name in sorted({cell["category"] for cell in cells}):
            if len({cell["data"]["fingerprint"] for cell in cells if cell["category"] == name}) > 1:
                notes.append(f"{name}: not all results are from the same photos.")
        shared = sorted({cell["method"] for cell in cells if cell["weights_from"]})
        if shared:
            notes.append(f"Scoring alone differs, on the weights of another method: {', '.join(shared)}.")
    return notes


def _missing(rows: Sequence[Row], categories: Sequence[str]) -> list[str]:
    """What has not been measured, or gave no figure: a mean over fewer seeds looks like any other."""
    said = []
    for row in rows:
        for category in categories:
            num = row.scores[category][FIGURES[0]].num if category in row.scores else 0
            if num < len(row.seeds):
                said.append(f"{row.method} on {category}: {num} of {len(row.seeds)} seeds.")
    return said


def _listed(cells: Sequence[Record], say: Callable[[Record], str], comma: str = "; ", *, methods: bool = True) -> str:
    """What the cells say, each thing once; where they differ, with the methods that say it."""
    said: dict[str, set[str]] = {}
    for cell in cells:
        said.setdefault(say(cell), set()).add(cell["method"])
    everyone = {cell["method"] for cell in cells}
    return comma.join(text + (f" ({', '.join(sorted(names))})" if methods and names != everyone else "")
                      for text, names in sorted(said.items()))


def _budget(budget: Mapping[str, int | float]) -> str:
    return ", ".join(f"{value:,.10g} {unit}" if value != 1 else f"1 {unit.removesuffix('s')}"
                     for unit, value in budget.items())


def _photos(cell: Record) -> str:
    data = cell["data"]
    return (f"{cell['category']} {data['image_size'][0]}×{data['image_size'][1]} px, {data['num_train']} to train on, "
            f"{data['num_validation']} held out, {data['num_test']} to test")


def _hardware(cell: Record) -> str:
    found = cell["hardware"]
    return (f"{found['device_name']}, {_counted(found['threads'], 'thread')}, "
            f"{_counted(found['jobs'], 'cell')} at a time")


def _counted(number: int, word: str) -> str:
    return f"{number} {word}" + "s" * (number != 1)


def _software(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _commit(commit: str | None) -> str:
    if commit is None:
        return "not known (no checkout)"
    head, plus, rest = commit.partition("+")
    return head[:10] + plus + rest


def _pair(scores: Mapping[str, Score]) -> str:
    """`98.7 ± 0.2 / 91.2 ± 0.4`."""
    pair = [scores.get(figure, Score()) for figure in FIGURES[:2]]
    return " / ".join(map(_percent, pair)) if any(score.mean is not None for score in pair) else MISSING


def _percent(score: Score) -> str:
    if score.mean is None:
        return MISSING
    return f"{100 * score.mean:.1f}" + (f" ± {100 * score.std:.1f}" if score.std is not None else "")


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
