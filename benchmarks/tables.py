"""Fills the tables of the documents from what was measured, so that no figure is typed.

    .venv/bin/python benchmarks/tables.py            # writes
    .venv/bin/python benchmarks/tables.py --check    # exit 1 if a document says anything else

A table stands between `<!-- table: benchmarks/results/NAME -->` and `<!-- end of table -->`, each on a line of its own,
and shows benchmarks/results/NAME/cells/*.json, or where there are none NAME/table.md, as the script left it. Of many
methods `<!-- table: benchmarks/results/NAME of METHOD, METHOD -->` shows some, in that order.
"""

import argparse
import re
import sys
from pathlib import Path

from intra.errors import InTraError
from intra.evaluation.tables import markdown, table_of

DOCUMENTS = ("README.md", "docs/results.md", "docs/performance.md")
START, END = r"<!-- table: (.*?) -->", "<!-- end of table -->"
BLOCK = re.compile(rf"^{START}\n(.*?)^{END}$", flags=re.M | re.S)


def filled(document: str, root: Path) -> str:
    """The document with every table as the cells make it. Raises InTraError on a marker without its pair or cells."""
    num_marks = len(re.findall(START, document)), document.count(END), len(BLOCK.findall(document))
    if len(set(num_marks)) > 1:
        raise InTraError(f"{num_marks[0]} tables begin and {num_marks[1]} end; each needs both marks, on own lines")

    def table(match: re.Match[str]) -> str:
        folder, _, names = match[1].partition(" of ")
        cells, ready = root / folder / "cells", root / folder / "table.md"
        is_measured = bool(list(cells.glob("*.json")))
        if not folder.startswith("benchmarks/results/") or not (is_measured or ready.exists()):
            raise InTraError(f"no cells in {cells}; expected a table of benchmarks/results/NAME")
        if names and not is_measured:
            raise InTraError(f"no cells in {cells}, of which '{names}' could be shown; {ready} is shown whole or not")
        wanted = names.split(", ") if names else None
        text = markdown(table_of(cells, wanted)) if is_measured else ready.read_text(encoding="utf-8")
        return f"<!-- table: {match[1]} -->\n\n{text}\n{END}"

    return BLOCK.sub(table, document)


def main(root: Path, *, check: bool) -> int:
    """Writes the documents, or says which of them are not what the cells make of them."""
    differ = 0
    for path in (root / name for name in DOCUMENTS if (root / name).exists()):
        before = path.read_text(encoding="utf-8")
        try:
            after = filled(before, root)
        except InTraError as error:
            print(f"{path}: {error}")
            return 1
        if after != before and check:
            print(f"{path}: a table is not what its cells make of it; run benchmarks/tables.py")
            differ += 1
        elif after != before:
            path.write_text(after, encoding="utf-8")
            print(f"wrote {path}")
    return int(differ > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document differs")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the checkout")
    arguments = parser.parse_args()
    sys.exit(main(arguments.root, check=arguments.check))
