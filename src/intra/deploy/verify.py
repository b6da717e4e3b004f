"""What a model says of its origin, and whether that holds: against its own checksum, and against the photos.

The checksum in a model file finds damage. It does not find a forger, who can renew it: against one, keep the SHA-256 of
the whole file, which `intra verify` prints first, in another place.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import intra
from intra.data.files import sha256_of
from intra.data.folder import find_category, fingerprints_of
from intra.deploy.exported import EXPORT_VERSION
from intra.errors import InTraError
from intra.inspection.detector import Detector
from intra.inspection.model_file import model_file
from intra.provenance import code_sha256

__all__ = ["manifest_of", "summary", "training_images_of"]

MOST_NAMED = 5  # files in one message
PLACES = {"own": "each is judged by what good photos show there",
          "shared": "all are judged by what good photos show anywhere"}


def manifest_of(model: str | Path) -> dict[str, Any]:
    """The manifest of a model file that is intact, fit for JSON.

    Keys: file, sha256, num_images, pretrained_weights, and all that the file says of itself: format_version, config,
    preprocessing, calibration, provenance. Raises InTraError if the file is missing, damaged, no model of intra, does
    not hold what its header says, or was made with somebody's pretrained weights.
    """
    file = model_file(Path(model))
    detector = Detector.load(file, device="cpu")
    images = detector.provenance.get("training_images")
    if not isinstance(images, dict) or not all(
            isinstance(part, str) for pair in images.items() for part in pair):
        raise InTraError(f"{file} does not say what it was trained on; train it again")
    if "pretrained_weights" not in detector.provenance or detector.provenance["pretrained_weights"] is not None:
        raise InTraError(f"{file} does not say that it holds no third-party weights; train it again")
    return {"file": str(file), "sha256": sha256_of(file), "num_images": len(images), "pretrained_weights": None,
            **detector.info}


def summary(manifest: Mapping[str, Any]) -> Iterator[str]:
    """The manifest in lines for people."""
    made, threshold = manifest["provenance"], manifest["calibration"]["threshold"]
    known = {key: made.get(key, "?") for key in ("category", "num_train", "num_validation", "seed", "intra", "torch",
                                                 "python", "device", "machine", "created", "steps", "best_step")}
    version = f"export version {EXPORT_VERSION}" if "export" in manifest else (
        f"format version {manifest['format_version']}")
    yield f"{manifest['file']}: intact ({version}, checksum of header and weights)"
    for name, text in (
        ("sha256", manifest["sha256"]),
        ("category", known["category"]),
        ("training images", f"{manifest['num_images']}, by name and SHA-256: {known['num_train']} trained on, "
                            f"{known['num_validation']} held out"),
        ("pretrained weights", "none: no third-party weights; all come from these images and the seed"),
        ("seed", known["seed"]),
        ("code", "intra {intra}, torch {torch}, python {python}, on {device} {machine}".format(**known)),
        ("code sha256", _code(made)),
        ("created", "{created}, after {steps} steps, best at {best_step}".format(**known)),
        ("recalibrated", _recalibrated(made)),
        ("exported", _exported(manifest.get("export"))),
        ("settings", f"preset {manifest['config'].get('preset', '?')}; each of them with --json"),
        ("calibration", f"threshold {threshold['value']:.6g} from {threshold['num_images']} held-out images: at most "
                        f"{threshold['false_reject_rate']:.2%} of good parts are rejected on average"),
        ("places", PLACES.get(manifest["calibration"].get("places"), "not judged by a distribution")),
    ):  # fmt: skip
        yield f"{name:<20}{text}"


def training_images_of(manifest: Mapping[str, Any], data: str | Path, *, normal: str | Path | None = None) -> list[str]:
    """What differs between the good images of DATA and those of the manifest, in words; empty if nothing does.

    Raises InTraError if there are no good images, or one cannot be read.
    """
    known = manifest["provenance"]["training_images"]
    category = find_category(data, normal=normal)
    found = fingerprints_of(category)
    groups = {
        "missing": sorted(known.keys() - found.keys()),
        "added": sorted(found.keys() - known.keys()),
        "changed": sorted(name for name in known.keys() & found.keys() if known[name] != found[name]),
    }
    return [f"{len(names)} {what} ({', '.join(names[:MOST_NAMED])}{', …' * (len(names) > MOST_NAMED)})"
            for what, names in groups.items() if names]


def _recalibrated(made: Mapping[str, Any]) -> str:
    """By new good images, as `intra calibrate` does, and by new settings of the scoring, the latest last."""
    found = []
    if record := made.get("calibrated"):
        found.append(f"{record.get('created', '?')} by {record.get('num_images', '?')} new good images")
    if record := made.get("recalibrated"):
        found.append(f"{record.get('created', '?')} by its own images, with the settings {record.get('settings', '?')}")
    return "; ".join(sorted(found)) or "no"


def _exported(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "no"
    found = record["parity"]
    return (f"to {record['format']} in {record['precision']}; on {found['num_photos']} photos its maps differ from the "
            f"model's own by {found['largest_difference']:.1e} of their range at most")


def _code(made: Mapping[str, Any]) -> str:
    digest = made.get("code_sha256")
    if not isinstance(digest, str):
        return "not recorded"
    here = "the code" if digest == code_sha256() else "other code than that"
    return f"{digest} ({here} of the intra {intra.__version__} that checks this)"
