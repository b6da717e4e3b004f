"""The audit of a folder of good photos → audit.json and audit.html."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import intra
from intra.config import preset
from intra.data.files import name_below, write_atomically
from intra.data.folder import Category, find_category, require_enough
from intra.data.images import auto_channels, auto_image_size, read_image, read_info, read_set
from intra.errors import InTraError
from intra.evaluation import pictures
from intra.evaluation.report import MAX_SIDE_PX, page
from intra.inspection.audit import Audit, audit_photos

__all__ = ["audit", "audit_category"]

USUAL_SHARE = 0.9  # of the photos score below what the pictures mark
MOST_SHOWN = 100  # photos on the page, about 60 KB each


@dataclass(frozen=True)
class _Shown:
    """A photo on the page."""

    rank: int
    path: str
    score: float
    pictures: tuple[tuple[str, str], ...]  # caption, data URI


def audit(
    data: str | Path, *, out: str | Path, normal: str | Path | None = None, top: int = 20,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The good photos of one category, those first that look least like the others, as in `out`/audit.json.

    Also writes `out`/audit.html, which shows the first `top` of them with a heatmap and an outline of what is unlike
    the others. No model is needed or made. `on_progress` gets how much is done, and how much there is.

    Raises InTraError if there are too few photos, or one cannot be read.
    """
    return audit_category(find_category(data, normal=normal), out=out, top=top, on_progress=on_progress)


def audit_category(
    category: Category, *, out: str | Path, top: int = 20, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Like `audit`, for a category that is already found."""
    if not 1 <= top <= MOST_SHOWN:
        raise InTraError(f"--top is {top}; it must lie between 1 and {MOST_SHOWN}")
    require_enough(category)
    infos = [read_info(path) for path in category.train]
    settings = preset("fast")
    size = auto_image_size([info.size for info in infos], patch_size=settings.model.patch_size,
                           window_size=settings.model.window_size)
    photos = read_set(category.train, size=size, channels=auto_channels(infos))
    found = audit_photos(photos, scoring=settings.scoring, on_progress=on_progress)
    order = sorted(range(len(photos)), key=lambda index: -found.scores[index])
    usual = float(np.quantile(found.scores, USUAL_SHARE))
    results = {
        "category": category.name, "num_photos": len(photos), "usual_score": usual, "image_size": list(size),
        "provenance": {"date": datetime.now(UTC).isoformat(timespec="seconds"), "intra": intra.__version__,
                       "torch": torch.__version__, "numpy": np.__version__},
        "photos": [{"rank": rank, "path": name_below(category.train[index], category.root),
                    "score": found.scores[index]} for rank, index in enumerate(order, start=1)],
    }  # fmt: skip
    write_atomically(Path(out) / "audit.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    shown = [_shown(category, index, rank, found, photos[index], usual)
             for rank, index in enumerate(order[:top], start=1)]
    write_atomically(Path(out) / "audit.html", page("audit.html.j2", {"results": results, "shown": shown}))
    return results


def _shown(
    category: Category, index: int, rank: int, found: Audit, photo: torch.Tensor, usual: float
) -> _Shown:  # fmt: skip
    path = category.train[index]
    picture = pictures.shrink(pictures.to_rgb8(read_image(path)), MAX_SIDE_PX)
    evidence = found.evidence(photo, index)[None, None]
    unlike = F.interpolate(evidence, size=picture.shape[:2], mode="bilinear", align_corners=False)[0, 0].numpy()
    mask = unlike > min(usual, np.nextafter(unlike.max(), -np.inf))  # at least the oddest place of each
    drawn = (("Photo", picture), ("Unlike the others", pictures.heatmap_overlay(picture, unlike, usual)),
             ("Outline", pictures.outline(picture, mask)))
    return _Shown(rank, name_below(path, category.root), found.scores[index],
                  tuple((caption, pictures.data_uri(each)) for caption, each in drawn))
