"""intra: learns what good parts look like, and finds, outlines and repairs what is wrong in new photos.

The public names are loaded when they are first used, so that `import intra` loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from intra.errors import InTraError

if TYPE_CHECKING:
    from intra.config import Config, preset
    from intra.data.folder import check_data
    from intra.deploy.export import export
    from intra.evaluation.audit import audit
    from intra.evaluation.benchmark import benchmark
    from intra.evaluation.evaluate import evaluate
    from intra.inspection.detector import Defect, Detector, Prediction
    from intra.inspection.recalibration import calibrate
    from intra.training.run import Run, train

__version__ = "0.1.0"
__all__ = ["Config", "Defect", "Detector", "InTraError", "Prediction", "Run", "audit", "benchmark", "calibrate",
           "check_data", "evaluate", "export", "preset", "train"]

_HOME = {
    "Config": "intra.config",
    "preset": "intra.config",
    "audit": "intra.evaluation.audit",
    "benchmark": "intra.evaluation.benchmark",
    "calibrate": "intra.inspection.recalibration",
    "check_data": "intra.data.folder",
    "evaluate": "intra.evaluation.evaluate",
    "export": "intra.deploy.export",
    "Defect": "intra.inspection.detector",
    "Detector": "intra.inspection.detector",
    "Prediction": "intra.inspection.detector",
    "Run": "intra.training.run",
    "train": "intra.training.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'intra' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
