"""`intra verify`: the manifest, and what it finds."""

import json
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from intra.data.files import sha256_of
from intra.deploy.verify import manifest_of, summary, training_images_of
from intra.errors import InTraError
from intra.inspection.detector import Detector
from intra.inspection.model_file import FORMAT_VERSION, content_digest
from intra.inspection.recalibration import calibrate
from intra.provenance import code_sha256


def verify(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "intra.cli", "verify", *map(str, words)], capture_output=True,
                          text=True, check=False)  # fmt: skip


def test_the_manifest_says_where_the_model_comes_from(run, photos):
    manifest = manifest_of(run.path)
    text = "\n".join(summary(manifest))
    for said in (sha256_of(run.model_path), "intact", "16, by name and SHA-256: 13 trained on, 3 held out",
                 "no third-party weights", "intra 0.1.0", code_sha256(), "threshold", "held-out images"):
        assert said in text
    assert manifest["provenance"]["training_images"].keys() == {f"train/good/{n:03}.png" for n in range(16)}
    assert manifest["config"]["train"]
    assert training_images_of(manifest, photos / "gear") == []


def test_changed_missing_and_added_images_are_found(run, photos, tmp_path):
    manifest = manifest_of(run.path)
    gear = shutil.copytree(photos / "gear", tmp_path / "gear")
    good = gear / "train" / "good"
    content = bytearray((good / "003.png").read_bytes())
    content[-20] ^= 1
    (good / "003.png").write_bytes(content)
    (good / "004.png").rename(good / "new.png")
    (good / "005.png").unlink()
    found = training_images_of(manifest, gear)
    assert found == ["2 missing (train/good/004.png, train/good/005.png)", "1 added (train/good/new.png)",
                     "1 changed (train/good/003.png)"]


def forged(run, target: Path, change) -> Path:
    """A copy whose header was changed by somebody who can make a checksum."""
    info, tensors = json.loads(json.dumps(Detector.load(run.path).info)), load_file(run.model_path)
    change(info["provenance"])
    header = json.dumps(info)
    envelope = {"header": header, "sha256": content_digest(header, tensors), "format_version": FORMAT_VERSION}
    save_file(tensors, target, metadata={"intra": json.dumps(envelope)})
    return target


@pytest.mark.parametrize(("change", "words"), [
    (lambda made: made.update(pretrained_weights="somebody/resnet"), "third-party weights"),
    (lambda made: made.pop("pretrained_weights"), "third-party weights"),
    (lambda made: made.pop("training_images"), "trained on"),
    (lambda made: made.update(training_images={"a": 3}), "trained on"),
])  # fmt: skip
def test_a_model_that_does_not_say_its_origin_is_refused(run, tmp_path, change, words):
    with pytest.raises(InTraError, match=words):
        manifest_of(forged(run, tmp_path / "model.safetensors", change))


def test_a_sparse_manifest_is_still_told(run, tmp_path):
    """A model from before the code was recorded."""
    file = forged(run, tmp_path / "model.safetensors", lambda made: [
        made.pop(key) for key in list(made) if key not in ("training_images", "pretrained_weights")])
    assert any("not recorded" in line for line in summary(manifest_of(file)))


def test_how_the_threshold_was_set_again_is_told(run, photos, tmp_path):
    def line(file: Path) -> str:
        (found,) = (line for line in summary(manifest_of(file)) if line.startswith("recalibrated"))
        return found.removeprefix("recalibrated").strip()

    assert line(run.path) == "no"
    new = sorted((photos / "gear" / "test" / "good").glob("*.png"))
    calibrate(run.path, new, out=tmp_path / "new.safetensors")
    today = datetime.now(UTC).date().isoformat()
    assert re.fullmatch(rf"{today}T\S+ by {len(new)} new good images", line(tmp_path / "new.safetensors"))
    file = forged(run, tmp_path / "both.safetensors", lambda made: made.update(
        calibrated={"created": "2026-02-01", "num_images": 40},
        recalibrated={"created": "2026-01-01", "settings": {"scoring.spread": "off"}}))
    assert line(file) == ("2026-01-01 by its own images, with the settings {'scoring.spread': 'off'}; "
                          "2026-02-01 by 40 new good images")


def test_on_the_command_line(run, photos, tmp_path):
    done = verify(run.path, photos / "gear")
    assert done.returncode == 0, done.stderr
    assert "each of the 16 training images" in done.stdout
    assert json.loads(verify(run.path, "--json").stdout)["pretrained_weights"] is None
    file = tmp_path / "model.safetensors"
    content = bytearray(run.model_path.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    done = verify(file)
    assert done.returncode == 2
    assert "does not match its checksum" in done.stderr
    done = verify(run.path, photos / "fabric")
    assert done.returncode == 2
    assert "is not what the model was trained on: " in done.stderr
