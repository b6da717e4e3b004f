"""Methods × categories × seeds → one JSON a cell, and a table. What is finished is never done again."""

import json
import math
import multiprocessing
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Literal

import torch

from intra.data.files import write_atomically
from intra.data.folder import Category, find_categories, require_enough
from intra.errors import InTraError
from intra.evaluation.cell import CELLS_FOLDER, Cell, fingerprint_of, work
from intra.evaluation.methods import Method, parse_methods
from intra.evaluation.tables import Table, markdown, table_of
from intra.inspection.device import pick_device

__all__ = ["Benchmark", "Event", "benchmark"]


@dataclass(frozen=True)
class Event:
    """What a progress bar shows of a cell."""

    cell: str
    state: Literal["running", "done", "failed", "kept"]  # kept: finished by an earlier call
    share: float  # of what the cell is at, in [0, 1]
    text: str  # what it is at, or why it failed
    num_ended: int  # cells done, failed or kept so far
    num_cells: int


@dataclass(frozen=True)
class Benchmark:
    """The outcome of a call: the table of all cells in the folder, and what became of those that were asked for."""

    table: Table
    done: tuple[str, ...]  # names of cells
    kept: tuple[str, ...]
    failed: Mapping[str, str]  # why, by the cell's name; the next call tries them again


def benchmark(
    data: str | Path | Sequence[str | Path],
    *,
    out: str | Path,
    methods: Sequence[str] = ("fast",),
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    minutes: float | None = None,
    epochs: int | None = None,
    jobs: int = 1,
    device: str = "auto",
    on_cell: Callable[[Event], None] | None = None,
) -> Benchmark:
    """Trains and evaluates every method on every category with every seed; writes `out`/table.md and table.json.

    Each cell runs in a fresh process, so in a script the call stands below `if __name__ == "__main__":`. Its figures
    go to `out`/cells/METHOD__CATEGORY__SEED.json, its training and its report to `out`/runs/. Finished cells are kept,
    stopped ones go on, failed ones are tried again. Methods that differ in `scoring.*` alone (scoring.lattice excepted)
    share one training. Ctrl-C ends it with a checkpoint.

    Args:
        data: categories in MVTec's layout, or folders of several.
        methods: `PRESET`, or `NAME: PRESET key=value key=value`.
        steps, minutes, epochs: the budget of each training, one of them; without any, the preset's.
        jobs: cells at a time; each gets its share of the threads.
        on_cell: called often, with what a cell is at.

    Raises InTraError, before anything runs, if something is wrong with what is asked for, or if `out` holds cells of
    other settings, budgets or photos.
    """
    places = [data] if isinstance(data, str | Path) else list(data)
    parsed = _methods(methods, seeds, {"steps": steps, "minutes": minutes, "epochs": epochs}, jobs)
    pick_device(device)
    threads = max(1, torch.get_num_threads() // jobs)
    given: dict[str, int | float] = {
        key: value for key, value in (("steps", steps), ("minutes", minutes), ("epochs", epochs)) if value is not None}
    photos = [(category, fingerprint_of(category)) for category in _categories(places)]
    cells = [
        Cell(method, category, seed, given or _own_budget(method), fingerprint, Path(out), device, threads, jobs)
        for seed in seeds for category, fingerprint in photos for method in parsed  # a whole table early, seed by seed
    ]  # fmt: skip
    for cell in cells:
        cell.check()
    kept = [cell for cell in cells if cell.file.exists()]
    outcome = _Outcome(Path(out), len(cells), on_cell)
    outcome.write_table()
    for cell in kept:
        outcome.end(cell, "kept", "")
    _run([cell for cell in _sharing(cells) if not cell.file.exists()], jobs, outcome)
    return Benchmark(table_of(Path(out) / CELLS_FOLDER), tuple(outcome.done), tuple(cell.name for cell in kept),
                     outcome.failed)


class _Outcome:
    """What has become of the cells; tells of it and keeps the table up to date."""

    def __init__(self, out: Path, num_cells: int, on_cell: Callable[[Event], None] | None) -> None:
        self.out = out
        self.num_cells = num_cells
        self.on_cell = on_cell
        self.num_ended = 0
        self.done: list[str] = []
        self.failed: dict[str, str] = {}

    def tell(self, cell: Cell, state: Literal["running", "done", "failed", "kept"], share: float, text: str) -> None:
        if self.on_cell is not None:
            self.on_cell(Event(cell.name, state, share, text, self.num_ended, self.num_cells))

    def end(self, cell: Cell, state: Literal["done", "failed", "kept"], text: str) -> None:
        self.num_ended += 1
        if state == "done":
            self.done.append(cell.name)
            self.write_table()
        elif state == "failed":
            self.failed[cell.name] = text
        self.tell(cell, state, 1.0, text)

    def write_table(self) -> None:
        table = table_of(self.out / CELLS_FOLDER)
        write_atomically(self.out / "table.json", json.dumps(table.to_dict(), indent=2, allow_nan=False) + "\n")
        write_atomically(self.out / "table.md", markdown(table))


def _methods(
    texts: Sequence[str], seeds: Sequence[int], budget: Mapping[str, int | float | None], jobs: int
) -> tuple[Method, ...]:
    """The methods. Raises one InTraError that tells of all that is wrong with the arguments."""
    problems: list[str] = []
    methods: tuple[Method, ...] = ()
    try:
        methods = parse_methods(texts)
    except InTraError as error:
        problems.append(str(error))
    given = {key: value for key, value in budget.items() if value is not None}
    if len(given) > 1:
        problems.append(f"give one budget, not {' and '.join(f'--{key}' for key in given)}")
    problems += [f"--{key} must be above 0" for key, value in given.items() if not 0 < value < math.inf]
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**31 for seed in seeds):
        problems.append(f"--seeds is {','.join(map(str, seeds)) or 'empty'}; expected different whole numbers from 0 "
                        f"to {2**31 - 1}, e.g. 0,1,2")
    if jobs < 1:
        problems.append(f"--jobs is {jobs}; it must be at least 1")
    if problems:
        raise InTraError("; ".join(problems))
    return methods


def _own_budget(method: Method) -> dict[str, int | float]:
    """The method's own budget, said aloud, as the preset may change: what it sets itself, else the preset's steps,
    which are everywhere the same work, or its epochs, or its minutes.
    """
    config = method.config.train
    known = {"steps": config.max_steps, "epochs": config.max_epochs, "minutes": config.max_minutes}
    for name in sorted(known, key=lambda name: f"train.max_{name}" not in method.settings):  # stable
        if (value := known[name]) is not None:
            return {name: value}
    raise InTraError(f"{method.name} has no budget: give --minutes, --epochs or --steps, or set train.max_steps, "
                     "train.max_epochs or train.max_minutes")


def _categories(places: Sequence[str | Path]) -> list[Category]:
    """Every category. Raises InTraError if two have one name, or one has too few photos to train or none to test on."""
    found = [category for place in places for category in find_categories(place)]
    problems = [f"{count} categories are called {name}; name their folders differently"
                for name, count in Counter(category.name for category in found).items() if count > 1]
    for category in found:
        require_enough(category)
        if not category.test:
            problems.append(f"{category.root} has no test images; expected test/good and test/DEFECT")
    if not found:
        problems.append("no DATA; give a category or a folder of several")
    if problems:
        raise InTraError("; ".join(problems))
    return found


def _sharing(cells: Sequence[Cell]) -> list[Cell]:
    """The same cells; those that differ from another in scoring alone take its weights."""
    givers: dict[object, str] = {}
    weights_from: dict[str, str] = {}
    for cell in sorted(cells, key=lambda cell: not cell.has_weights):  # stable: finished ones first
        key = cell.category.name, cell.seed, cell.method.training, *cell.budget.items()
        if cell.file.exists() and not cell.has_weights:
            continue  # its figures were kept, its weights were not
        giver = givers.setdefault(key, cell.name)
        if giver != cell.name and not cell.is_begun:
            weights_from[cell.name] = giver
    return [replace(cell, weights_from=weights_from.get(cell.name)) for cell in cells]


@dataclass
class _Running:
    """A cell's process, and the last that it said."""

    cell: Cell
    process: SpawnProcess
    said: tuple[str, str] = ("", "")


def _run(cells: Sequence[Cell], jobs: int, outcome: _Outcome) -> None:
    """Runs the cells, some at a time; a cell whose weights come from another waits for it."""
    waiting, running = list(cells), dict[Connection, _Running]()
    try:
        while waiting or running:
            unfinished = {cell.name for cell in waiting} | {one.cell.name for one in running.values()}
            for cell in [cell for cell in waiting if cell.weights_from not in unfinished]:
                if cell.weights_from in outcome.failed:
                    waiting.remove(cell)
                    outcome.end(cell, "failed", f"not run: the training of {cell.weights_from} failed")
                elif len(running) < jobs:
                    waiting.remove(cell)
                    connection, one = _start(cell)
                    running[connection] = one
                    outcome.tell(cell, "running", 0.0, "starting")
            ready = wait(list(running)) if running else []  # without any it would wait for ever
            for connection in [connection for connection in running if connection in ready]:
                _listen(connection, running, outcome)
    except BaseException:
        _stop(running)
        raise


def _start(cell: Cell) -> tuple[Connection, _Running]:
    context = multiprocessing.get_context("spawn")  # fresh: its peak memory is its own, and no lock is inherited
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(cell, theirs), name=cell.name)
    with _interrupts_ignored():
        process.start()
    theirs.close()  # so that ours ends when the process does
    return ours, _Running(cell, process)


def _listen(connection: Connection, running: dict[Connection, _Running], outcome: _Outcome) -> None:
    """Takes one message, or notices the end of the process."""
    one = running[connection]
    try:
        state, share, text = connection.recv()
    except (EOFError, OSError):
        one.process.join()
        connection.close()
        del running[connection]
        state, text = one.said
        if state == "done":
            outcome.end(one.cell, "done", "")
        else:
            code = one.process.exitcode or 0
            ended = f"exit code {code}" if code >= 0 else f"killed by signal {-code}, perhaps for want of memory"
            outcome.end(one.cell, "failed", text if state == "failed" else f"its process ended early: {ended}")
        return
    if state == "running":
        outcome.tell(one.cell, "running", share, text)
    else:
        one.said = state, text


def _stop(running: Mapping[Connection, _Running]) -> None:
    """Asks every process to end, and waits until each has written its checkpoint; a second Ctrl-C ends them at once."""
    for connection in running:
        with suppress(OSError):
            connection.send("stop")
    try:
        for one in running.values():
            one.process.join()
    finally:
        for connection, one in running.items():
            if one.process.is_alive():
                one.process.kill()
                one.process.join()
            connection.close()


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes that start inside ignore Ctrl-C: the terminal sends it to all, and they are told by us."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
