"""How long it takes until something happens: an import, the help, and a first verdict. Each in a process of its own.

    python benchmarks/startup.py MODEL PHOTO [--repeats 11] [--json FILE]

All from the start of the interpreter, with warm disk caches: `import intra`, `intra --help`, and a verdict on one photo
in Python and by `intra predict`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from speed import hardware

from intra.data.files import write_atomically


def seconds(command: list[str]) -> float:
    """That one process takes, from its start to its end."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="what `intra train` wrote, or an exported model")
    parser.add_argument("photo", type=Path)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    verdict = (f"import intra; detector = intra.Detector.load({str(given.model)!r}, device='cpu'); "
               f"print(detector.predict({str(given.photo)!r}).verdict)")
    with tempfile.TemporaryDirectory() as out:
        commands = {
            "python, nothing else": [sys.executable, "-c", ""],
            "import intra": [sys.executable, "-c", "import intra"],
            "intra --help": [sys.executable, "-m", "intra.cli", "--help"],
            "import intra, Detector.load, first verdict": [sys.executable, "-c", verdict],
            "intra predict, one photo": [sys.executable, "-m", "intra.cli", "predict", str(given.model),
                                         str(given.photo), "--out", out, "--device", "cpu"],
        }  # fmt: skip
        rows = []
        print("| what | shortest, s | median, s | longest, s |\n|---|---|---|---|")
        for what, command in commands.items():
            seconds(command)  # fills the disk cache
            times = sorted(seconds(command) for _ in range(given.repeats))
            rows.append({"what": what, "seconds": times})
            print(f"| {what} | {times[0]:.2f} | {statistics.median(times):.2f} | {times[-1]:.2f} |", flush=True)
    if given.json:
        content = {"hardware": hardware("cpu"), "rows": rows}
        write_atomically(given.json, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
