"""The audit: odd photos among good ones are ranked first, each by what the others look like."""

import json
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
from test_report import _Page

import intra
from intra.config import preset
from intra.errors import InTraError
from intra.inspection.audit import _cross_fitted, audit_photos
from intra.inspection.features import PatchFeatures

SCORING = preset("fast").scoring


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def planted(count: int = 40, odd: tuple[int, ...] = (3, 17)) -> torch.Tensor:
    """Photos of one part with noise, uint8; the odd ones lack a piece of it, each another."""
    photos = 0.3 + 0.4 * noise(1, 3, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3) + 0.05 * noise(
        count, 3, 64, 64, seed=1)
    for number, index in enumerate(odd):
        first = 8 + 16 * number
        photos[index, :, first : first + 16, first : first + 16] = 0.5
    return (255 * photos.clamp(0, 1)).byte()


def test_odd_photos_come_first_and_are_shown_where_they_are_odd() -> None:
    photos = planted()
    done: list[tuple[int, int]] = []
    found = audit_photos(photos, scoring=SCORING, on_progress=lambda *each: done.append(each))
    order = sorted(range(40), key=lambda index: -found.scores[index])
    assert set(order[:2]) == {3, 17}
    assert done[-1] == (40, 40)
    evidence = found.evidence(photos[17], 17)
    row, col = divmod(int(evidence.argmax()), 64)
    assert 20 <= row < 44
    assert 20 <= col < 44


def test_a_photo_has_no_say_in_its_own_score() -> None:
    """The distribution of a fold is that of the kept photos of the others."""
    photos, kept = planted(20), torch.arange(20) != 7
    describe = PatchFeatures.of(photos, scoring=SCORING, seed=0)
    features = describe(photos / 255, None)
    for fold, distribution in enumerate(_cross_fitted(describe, features, kept, 5, 16)):
        others = features[0][..., kept & (torch.arange(20) % 5 != fold)]
        torch.testing.assert_close(distribution.parts[0].mean, others.mean(2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("photos", [torch.zeros(10, 1, 32, 48, dtype=torch.uint8), noise(11, 5, 9, 70),
                                    torch.ones(2, 3, 16, 16)])
def test_flat_few_and_odd_photos_give_finite_scores(photos: torch.Tensor) -> None:
    assert all(torch.isfinite(torch.tensor(audit_photos(photos, scoring=SCORING).scores)))


def test_the_page_and_the_list(photos: Path, tmp_path: Path) -> None:
    """A defective photo among the built-in good ones is in the list, and on the page, under its name."""
    gear = tmp_path / "gear"
    shutil.copytree(photos / "gear" / "train" / "good", gear)
    odd = sorted((photos / "gear" / "test" / "contamination").iterdir())[0]
    shutil.copy(odd, gear / "odd <one>.png")
    found = intra.audit(gear, out=tmp_path / "out", top=5)
    assert json.loads((tmp_path / "out" / "audit.json").read_text()) == found
    assert [row["rank"] for row in found["photos"]] == list(range(1, 18))
    assert "odd <one>.png" in [row["path"] for row in found["photos"][:3]]
    page = _Page((tmp_path / "out" / "audit.html").read_text("utf-8"))
    assert page.tags.count("img") == 15
    assert all(link.startswith("data:image/webp;base64,") for link in page.links)
    assert "odd <one>.png" in page.text


def test_what_cannot_be_audited_is_refused_by_name(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InTraError, match="--top"):
        intra.audit(photos / "gear", out=tmp_path, top=0)
    for number in range(9):
        PIL.Image.new("L", (8, 8)).save(tmp_path / f"{number}.png")
    with pytest.raises(InTraError, match="at least 10"):
        intra.audit(tmp_path, out=tmp_path / "out")
    (tmp_path / "9.png").write_bytes(b"half")
    with pytest.raises(InTraError, match=r"9\.png"):
        intra.audit(tmp_path, out=tmp_path / "out")
