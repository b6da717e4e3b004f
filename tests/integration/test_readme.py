"""Every command of the README runs. Budgets shrink and photos are small; all else is as it stands there."""

import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from conftest import TINY

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = " ".join(["--steps 3 --image-size 64", *(f"--set {key}={value}" for key, value in TINY.items())])
HANDLED = ("make ", "source ", "intra ")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


def test_every_command_is_of_a_kind_that_is_run_here():
    assert len(COMMANDS) == 14
    assert all(line.startswith(HANDLED) for line in COMMANDS)


@pytest.fixture(scope="module")
def desk(photos, tmp_path_factory) -> Path:
    """A folder as the README's reader has it."""
    desk = tmp_path_factory.mktemp("desk")
    shutil.copytree(photos / "gear", desk / "photos" / "bottle")
    shutil.copytree(photos / "gear" / "test" / "dent", desk / "new_photos")
    shutil.copytree(photos / "gear" / "test" / "good", desk / "good_photos")
    return desk


def run(command: str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, shell=True, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def serve(command: str, folder: Path) -> None:
    """The command that goes on until it is stopped: answers on a free port instead of its own, then ends."""
    words = [sys.executable, "-m", "intra.cli", *command.split()[1:], "--port", "0"]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        address = server.stdout.readline().split()[0]
        with urllib.request.urlopen(f"{address}/health") as answer:
            assert b"ok" in answer.read()
        server.send_signal(signal.SIGINT)
        assert server.wait(100) == 0


def test_the_commands_for_ones_own_photos(desk):
    for command in COMMANDS:
        if command.startswith("intra serve "):
            serve(command, desk)
        elif command.startswith("intra "):
            ending = " --once --settle 0" if command.startswith("intra watch ") else ""
            run(command.replace("--minutes 15", SHORT) + ending, desk)
    assert (desk / "bottle.onnx").exists()
    assert (desk / "results/bottle/report.html").exists()
    assert (desk / "verdicts/predictions.jsonl").exists()
    assert (desk / "audits/bottle/audit.html").exists()
    assert (desk / "runs/bottle_june/model.safetensors").exists()
    assert list((desk / "verdicts/images").glob("*_repaired.png"))
    assert len((desk / "verdicts.csv").read_text().splitlines()) == 1 + len(list((desk / "new_photos").iterdir()))


def test_the_python_lines(desk):
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    short = f"steps=3, image_size=64, settings={TINY!r}"
    (desk / "lines.py").write_text(code.replace("minutes=10", short))
    said = run(f"{sys.executable} lines.py", desk)
    assert re.match(r"(good|defect|setup) [\d.e-]+ [\d.e-]+\n", said)


def last_command_of(target: str) -> str:
    """What make would run last; this test may itself run under make, whose flags must not reach the inner one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", "--dry-run", "--no-print-directory", target], cwd=ROOT, env=environment,
                          capture_output=True, text=True, check=True).stdout.strip().splitlines()[-1]


def test_make_demo_runs_what_is_tested_here(tmp_path):
    """`make demo` on a machine that has everything is this one command; here with three steps at 96 px."""
    command = last_command_of("demo").replace(".venv/bin/", "")
    assert command == "intra demo --out demo"
    said = run(f"{command} --steps 3 --image-size 96", tmp_path)
    assert "fabric" in said
    assert "gear" in said
    for category in ("fabric", "gear"):
        report = tmp_path / "demo" / "results" / category / "report.html"
        assert report.stat().st_size > 100_000
        assert re.search(rf"report:\s+{re.escape(str(report.relative_to(tmp_path)))}", said)


def test_make_test_runs_pytest():
    assert last_command_of("test").endswith("-m pytest")


def test_pictures_and_links_are_there():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
