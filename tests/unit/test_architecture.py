"""Who may import whom, and how quickly the package and its help come up."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import intra
from intra.deploy import serve
from intra.inspection.detector import READERS

SOURCE = Path(intra.__file__).parent
LAYERS = [  # left never imports right; modules of one layer may import each other
    {"errors", "provenance"},
    {"values"},
    {"settings"},
    {"config", "geometry", "similarity"},
    {"models", "data"},
    {"inspection"},
    {"training"},
    {"evaluation"},
    {"deploy"},
    {"terminal"},
    {"cli_watch", "cli_export", "cli_trust"},
    {"cli"},
]
WALLS = {  # third parties, and the only places that may import them
    "lightning_fabric": ("training/",),
    "PIL": ("data/", "evaluation/pictures.py", "evaluation/evaluate.py", "inspection/detector.py"),
    "jinja2": ("evaluation/report.py",),
    "sqlite3": ("deploy/record.py",),
    "urllib.request": ("deploy/webhook.py",),
    "typer": ("cli.py", "cli_watch.py", "cli_export.py", "cli_trust.py", "terminal.py"),
    "rich": ("cli.py", "terminal.py"),
    "sklearn": ("evaluation/metrics.py",),
    "torch.utils.tensorboard": ("training/",),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript", "openvino"), ("deploy/export",)),
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "h11", "pydantic", "python_multipart"), ("deploy/serve/",)),
}
MODULES = sorted(SOURCE.rglob("*.py"))


def layer(part: str) -> int:
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_serving_knows_its_extra_by_all_that_it_imports():
    assert {name for name, places in WALLS.items() if places == ("deploy/serve/",)} <= serve._EXTRA


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_left_never_imports_right(path):
    if path == SOURCE / "__init__.py":
        return  # names everything, loads nothing
    own = layer(path.relative_to(SOURCE).parts[0].removesuffix(".py"))
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "intra" and len(parts) > 1 and parts[1] != "__version__":
            assert layer(parts[1]) <= own, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_third_parties_stay_behind_their_walls(path):
    place = path.relative_to(SOURCE).as_posix()
    for name in imports(path):
        for wall, allowed in WALLS.items():
            if f"{name}.".startswith(f"{wall}."):
                assert place.startswith(allowed), f"{place} imports {name}"


def test_only_readers_of_exported_models_are_imported_by_name():
    """docs/decisions/0012-export.md: inspection names them in a table, and only them."""
    users = {path.relative_to(SOURCE).as_posix() for path in MODULES if "import_module" in path.read_text()}
    assert users == {"__init__.py", "inspection/detector.py"}
    assert set(READERS.values()) == {"intra.deploy.exported"}


def test_models_see_no_file_device_or_loss():
    for path in (SOURCE / "models").rglob("*.py"):
        for name in imports(path):
            allowed = {"torch", "jaxtyping", "typing", "intra", "collections"}
            assert name.split(".")[0] in allowed, f"{path} imports {name}"


def test_nothing_is_unpickled():
    for path in MODULES:
        code = path.read_text()
        assert "pickle" not in code.replace("unpickled", ""), path
        assert "torch.load(" not in code, path


def seconds(*command: str) -> float:
    """The quickest of three runs: the machine may be busy."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def test_import_loads_no_torch():
    code = "import sys, intra; assert 'torch' not in sys.modules and 'numpy' not in sys.modules; print(intra.__all__)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_is_quick():
    empty = seconds(sys.executable, "-c", "pass")
    assert seconds(sys.executable, "-m", "intra.cli", "--help") - empty < 0.5


def test_every_public_name_is_there():
    for name in intra.__all__:
        assert getattr(intra, name) is not None
    with pytest.raises(AttributeError):
        _ = intra.no_such_name
