"""What a benchmark compares, what its table says, and that no figure in a document is typed."""

import json
import shlex
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from intra.config import PRESETS, preset
from intra.data.folder import find_category
from intra.errors import InTraError
from intra.evaluation.benchmark import _own_budget, _sharing, benchmark
from intra.evaluation.cell import Cell, _differences, fingerprint_of
from intra.evaluation.methods import Method, parse_methods
from intra.evaluation.tables import PAPER, markdown, table_of

ROOT = Path(__file__).parents[2]


# methods


@pytest.mark.parametrize("text", ["fast", "paper", "msa: fast model.attention=msa data.image_size=64x80"])
def test_a_method_says_what_it_was_made_of(text):
    (method,) = parse_methods([text])
    assert method.text == text
    assert method.config == preset(method.preset).with_settings(method.settings)


def test_every_wrong_word_is_told_at_once():
    texts = ["fsat", "a: fast train.batchsize=3", "b: fast train.batch_size=many", "c: fast spread",
             "fast model.depth=3", "paper", "paper", "a/b: fast", "d: fast model.depth=3 model.depth=4",
             ""]  # fmt: skip
    with pytest.raises(InTraError) as raised:
        parse_methods(texts)
    said = str(raised.value)
    for part in ("did you mean 'fast'?", "did you mean 'train.batch_size'?", "train.batch_size='many'",
                 "'spread' has no", "needs a name", "paper is given 2 times", "'a/b'", "model.depth is given twice",
                 "no preset"):
        assert part in said


@pytest.mark.parametrize("name", ["a__b", "_a", "a_", "ä", "a b"])
def test_names_that_would_not_do_as_files_are_refused(name):
    with pytest.raises(InTraError, match="the name is"):
        parse_methods([f"{name}: fast"])


@pytest.mark.parametrize("name", PRESETS)
def test_scoring_settings_survive_as_text(name):
    """Whatever the other method's scoring is, all of this one's comes over."""
    (method,) = parse_methods([f"a: {name} scoring.scales=1,8 scoring.deviation=squared scoring.spread=on "
                               "scoring.max_reference_images=7"])
    other = preset("fast").with_settings({"scoring.spread": "off", "scoring.deviation": "signed"})
    assert other.with_settings(method.scoring).scoring == method.config.scoring


def test_methods_that_only_score_differently_share_a_training():
    fast, scoring, lattice, training = parse_methods(["fast", "a: fast scoring.spread=off scoring.blur_size=3",
                                                      "b: fast scoring.lattice=3", "c: fast train.flips=off"])
    assert fast.training == scoring.training
    assert len({fast.training, lattice.training, training.training}) == 3


# cells


@pytest.fixture
def cell(photos, tmp_path) -> Cell:
    category = find_category(photos / "gear")
    (method,) = parse_methods(["msa: fast model.attention=msa"])
    return Cell(method, category, 3, {"steps": 5}, fingerprint_of(category), tmp_path, "auto", 1, 1)


def test_a_cell_can_be_made_again_from_its_command(cell):
    assert cell.command == "intra benchmark gear --out out --method 'msa: fast model.attention=msa' --seeds 3 --steps 5"
    assert str(cell.category.root.parent) not in cell.command


@pytest.mark.parametrize("where", ["finished", "begun"])
def test_what_was_asked_otherwise_is_refused_by_name(cell, where):
    if where == "finished":
        path, content = cell.file, {"asked": cell.asked}
    else:
        path, content = cell.run / "asked.json", cell.asked
    path.parent.mkdir(parents=True)
    (path.parent / "last.ckpt").touch()
    path.write_text(json.dumps(content))
    cell.check()
    (other,) = parse_methods(["msa: fast model.attention=msa train.batch_size=4"])
    for change, said in (
        ({"method": other}, "train.batch_size=8, asked is 4"),
        ({"budget": {"minutes": 2.5}}, "steps=5, asked is minutes=2.5"), ({"fingerprint": "0"}, "other photos"),
    ):  # fmt: skip
        with pytest.raises(InTraError, match=r"choose another --out") as raised:
            replace(cell, **change).check()
        assert said in str(raised.value)
    path.write_text(path.read_text()[:-5])
    with pytest.raises(InTraError, match="damaged"):
        cell.check()


def test_a_cell_that_failed_before_its_training_may_be_asked_for_otherwise(cell):
    cell.run.mkdir(parents=True)
    (cell.run / "asked.json").write_text(json.dumps(cell.asked))
    replace(cell, fingerprint="mended").check()
    (cell.run / "last.ckpt").touch()
    with pytest.raises(InTraError, match="other photos"):
        replace(cell, fingerprint="mended").check()


def test_who_takes_whose_weights(cell):
    """The first trains, unless another has finished; what is begun goes on, and weights that are gone give none."""
    methods = parse_methods(["a: fast", "b: fast scoring.spread=off", "c: fast scoring.blur_size=3",
                             "d: fast train.flips=on"])
    cells = [replace(cell, method=method) for method in methods]

    def givers() -> list[str | None]:
        return [one.weights_from and one.weights_from[0] for one in _sharing(cells)]

    def touch(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    assert givers() == [None, "a", "a", None]
    touch(cells[2].run / "last.ckpt")
    assert givers() == [None, "a", None, None]
    touch(cells[0].file)  # finished, but its run is not there
    assert givers() == [None, None, None, None]
    touch(cells[1].run / "model.safetensors")
    touch(cells[1].file)
    touch(cells[0].run / "model.safetensors")
    cells[0].file.unlink()
    assert givers() == ["b", None, None, None]


def test_the_fingerprint_is_of_names_photos_and_masks(photos, tmp_path):
    first = fingerprint_of(find_category(photos / "gear"))
    copy = shutil.copytree(photos / "gear", tmp_path / "elsewhere")
    assert fingerprint_of(find_category(copy)) == first
    mask = next((copy / "ground_truth").rglob("*.png"))
    mask.write_bytes(mask.read_bytes() + b" ")
    changed = fingerprint_of(find_category(copy))
    (copy / "train/good/000.png").rename(copy / "train/good/zzz.png")
    assert len({first, changed, fingerprint_of(find_category(copy))}) == 3


@pytest.mark.parametrize(("arguments", "said"), [
    ({"seeds": [0, 0]}, "--seeds is 0,0"), ({"seeds": []}, "--seeds is empty"), ({"jobs": 0}, "--jobs is 0"),
    ({"steps": 3, "minutes": 1.0}, "one budget, not --steps and --minutes"), ({"steps": 0}, "--steps must be above 0"),
    ({"methods": ["fsat"]}, "did you mean 'fast'"),
    ({"methods": ["a: fast train.max_steps=none train.max_minutes=none"]}, "a has no budget"),
])  # fmt: skip
def test_wrong_arguments_are_refused_before_anything_runs(photos, tmp_path, arguments, said):
    with pytest.raises(InTraError, match=said):
        benchmark(photos, out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_wrong_data_is_refused_before_anything_runs(photos, tmp_path):
    with pytest.raises(InTraError, match="2 categories are called gear"):
        benchmark([photos, photos / "gear"], out=tmp_path / "out")
    shutil.copytree(photos / "gear" / "train", tmp_path / "untested" / "train")
    with pytest.raises(InTraError, match="no test images"):
        benchmark(tmp_path / "untested", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# tables


def write_cell(folder: Path, method: str, category: str, seed: int, image: float | None, **others: object) -> None:
    """A cell as `intra benchmark` writes it, of what a table reads."""
    folder.mkdir(parents=True, exist_ok=True)
    cell = {
        "method": method, "category": category, "seed": seed, "budget": {"steps": 4200}, "commit": "a" * 40,
        "data": {"fingerprint": category, "num_train": 9, "num_validation": 2, "num_test": 5, "image_size": [64, 80]},
        "hardware": {"device_name": "Abacus", "threads": 2, "jobs": 1}, "versions": {"torch": "2"},
        "weights_from": None,
        "training": {"elapsed_s": 90.0},
        "results": {"image_auroc": image, "pixel_auroc": 0.5, "pixel_aupro": 0.25, "seconds_per_image": 0.02},
    } | others  # fmt: skip
    (folder / f"{method}__{category}__{seed}.json").write_text(json.dumps(cell))


def line_of(text: str, method: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {method} |")]
    return [part.strip() for part in line.strip("|").split("|")]


def test_the_papers_figures_have_the_papers_mean():
    """Pirnay & Chai 2021, over the 15 categories 95.0 detection, 96.6 segmentation; each figure is rounded to 0.1."""
    assert len(PAPER) == 15
    assert statistics.fmean(image for image, _ in PAPER.values()) == pytest.approx(95.0, abs=0.1)
    assert statistics.fmean(pixel for _, pixel in PAPER.values()) == pytest.approx(96.6, abs=0.1)


def test_a_table_by_hand(tmp_path):
    for seed, image in enumerate((0.9, 1.0)):
        write_cell(tmp_path, "fast", "bottle", seed, image)
        write_cell(tmp_path, "fast", "gear", seed, 0.8)
    write_cell(tmp_path, "slow", "bottle", 0, 0.7)
    text = markdown(table_of(tmp_path))
    # 0.9 and 1.0: deviation 0.0707; by seed 0.85 and 0.9: mean 0.875, deviation 0.0354
    assert line_of(text, "fast") == ["fast", "2", "95.0 ± 7.1 / 50.0 ± 0.0", "80.0 ± 0.0 / 50.0 ± 0.0",
                                     "87.5 ± 3.5 / 50.0 ± 0.0", "1.5", "20.0"]
    assert line_of(text, "slow") == ["slow", "1", "70.0 / 50.0", "—", "—", "1.5", "20.0"]
    assert line_of(text, "InTra paper") == ["InTra paper", "—", "100.0 / 97.1", "—", "—", "—", "—"]
    for note in ("Seeds: 0, 1 (fast)", "Budget: 4,200 steps.", "bottle 64×80 px, 9 to train on, 2 held out, 5 to test",
                 "Abacus, 2 threads, 1 cell at a time", "Commit: aaaaaaaaaa.", "full-size official images",
                 "slow on gear: 0 of 1 seeds."):
        assert note in text
    assert "mixed" not in text


def test_a_missing_metric_is_a_dash_and_never_a_number(tmp_path):
    write_cell(tmp_path, "fast", "bottle", 0, None)
    write_cell(tmp_path, "fast", "bottle", 1, 0.75)
    table = table_of(tmp_path)
    score = table.rows[0].scores["bottle"]["image_auroc"]
    assert (score.mean, score.std, score.num) == (0.75, None, 1)
    assert "fast on bottle: 1 of 2 seeds." in table.notes
    (tmp_path / "fast__bottle__1.json").unlink()
    assert line_of(markdown(table_of(tmp_path)), "fast")[2] == "— / 50.0"
    assert table_of(tmp_path).to_dict()["rows"][0]["mean"]["image_auroc"]["mean"] is None


def test_what_cannot_be_compared_is_said(tmp_path):
    write_cell(tmp_path, "fast", "bottle", 0, 0.5)
    others = {"fingerprint": "other", "num_train": 9, "num_validation": 2, "num_test": 5, "image_size": [64, 80]}
    write_cell(tmp_path, "slow", "bottle", 0, 0.5, commit="b" * 40 + "+changes", budget={"minutes": 3},
               weights_from="fast", data=others)
    text = markdown(table_of(tmp_path))
    for note in ("3 minutes (slow); 4,200 steps (fast)", "aaaaaaaaaa (fast); bbbbbbbbbb+changes (slow)",
                 "Results of different commits are mixed.", "bottle: not all results are from the same photos.",
                 "on the weights of another method: slow."):
        assert note in text


def test_a_table_of_some_methods_keeps_their_order(tmp_path):
    for method in ("a", "b", "c"):
        write_cell(tmp_path, method, "bottle", 0, 0.5)
    table = table_of(tmp_path, ["c", "a"])
    assert [row.method for row in table.rows] == ["c", "a"]
    with pytest.raises(InTraError, match="no cell of d; it has a, b, c"):
        table_of(tmp_path, ["d"])


def test_damaged_cells_are_refused_and_none_make_an_empty_table(tmp_path):
    assert table_of(tmp_path).rows == ()
    write_cell(tmp_path, "fast", "bottle", 0, 0.5)
    path = tmp_path / "fast__bottle__0.json"
    for content in (path.read_text()[:-1], path.read_text().replace("0.5,", '"high",', 1), "{}"):
        path.write_text(content)
        with pytest.raises(InTraError, match=r"fast__bottle__0.json"):
            table_of(tmp_path)


@pytest.mark.parametrize(("text", "budget"), [
    ("fast", {"steps": 6000}), ("paper", {"epochs": 200}), ("a: fast train.max_epochs=2", {"epochs": 2}),
    ("a: fast train.max_minutes=3", {"minutes": 3.0}), ("a: paper train.max_steps=7", {"steps": 7}),
    ("a: fast train.max_steps=none", {"minutes": 15.0}),
])  # fmt: skip
def test_without_a_budget_a_method_has_its_own(text, budget):
    assert _own_budget(parse_methods([text])[0]) == budget


# the documents


@pytest.mark.parametrize("folder", ["ablations", "networks"])
def test_the_ablations_ask_for_what_was_measured(folder):
    """Else the documented command is refused by the very cells that it made."""
    script = [sys.executable, str(ROOT / "benchmarks/ablations.py"), "--methods"]
    listed = subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines()
    methods = {method.name: method for method in parse_methods(listed)}
    cells = [json.loads(path.read_text()) for path in (ROOT / "benchmarks/results" / folder / "cells").glob("*.json")]
    assert cells
    assert {cell["method"] for cell in cells} <= set(methods)
    for cell in cells:
        assert not differences(cell, methods[cell["method"]]), cell["method"]


@pytest.mark.parametrize("document", ["README.md", "docs/results.md"])
def test_the_documents_ask_for_what_was_measured(document):
    """The same of the commands that stand there: they follow a change of the presets, or name what was before."""
    lines = (ROOT / document).read_text().replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.strip().startswith("intra benchmark DATA/")]
    num_cells = 0
    for words in commands:
        given = [(word, value) for word, value in pairwise(words) if word.startswith("--")]
        methods = parse_methods([value for word, value in given if word == "--method"])
        categories = [word.removeprefix("DATA/") for word in words if word.startswith("DATA/")]
        for path in (ROOT / dict(given)["--out"] / "cells").glob("*.json"):
            cell = json.loads(path.read_text())
            if cell["category"] not in categories:
                continue
            for method in (method for method in methods if method.name == cell["method"]):
                assert not differences(cell, method, budget={"minutes": float(dict(given)["--minutes"])}), path.name
                num_cells += 1
    assert num_cells >= 8


def differences(cell: dict[str, Any], method: Method, **asked: Any) -> list[str]:
    """In what a method of today, and what else is asked for, differ from what a cell was measured with."""
    config = json.loads(json.dumps(method.config.to_dict()))
    return _differences(cell["asked"], cell["asked"] | {"config": config} | asked)


def tables(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "benchmarks/tables.py"), *map(str, words)], capture_output=True,
                          text=True, check=False)


def test_no_document_differs_from_its_cells():
    done = tables("--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_typed_figure_is_caught(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "results.md").write_text("nothing\n")
    write_cell(tmp_path / "benchmarks/results/two/cells", "fast", "bottle", 0, 0.987)
    readme = tmp_path / "README.md"
    readme.write_text("before\n\n<!-- table: benchmarks/results/two -->\n<!-- end of table -->\n\nafter\n")
    assert tables("--root", tmp_path, "--check").returncode == 1
    assert tables("--root", tmp_path).returncode == 0
    assert line_of(readme.read_text(), "fast")[2] == "98.7 / 50.0"
    assert readme.read_text().startswith("before\n\n<!-- table")
    assert readme.read_text().endswith("<!-- end of table -->\n\nafter\n")
    assert tables("--root", tmp_path, "--check").returncode == 0
    readme.write_text(readme.read_text().replace("98.7", "99.7"))
    assert tables("--root", tmp_path, "--check").returncode == 1
    write_cell(tmp_path / "benchmarks/results/two/cells", "slow", "bottle", 0, 0.5)
    readme.write_text("<!-- table: benchmarks/results/two of slow -->\n<!-- end of table -->\n")
    assert tables("--root", tmp_path).returncode == 0
    assert "| slow |" in readme.read_text() and "| fast |" not in readme.read_text()
    start = "<!-- table: benchmarks/results/"
    for wrong in (f"{start}two -->\n", f"{start}none -->\n<!-- end of table -->\n"):
        readme.write_text(wrong)
        assert tables("--root", tmp_path).returncode == 1
        assert readme.read_text() == wrong
