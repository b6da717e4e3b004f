"""The detector: a trained model with everything that an inspection needs, in one file."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from intra.config import Config, ModelConfig, ScoringConfig
from intra.data.images import box_slices, convert_channels, prepare, read_image, to_unit
from intra.errors import InTraError
from intra.geometry import touched_patches
from intra.inspection.anomaly import Evidence, Reference, anomaly_map, difference_map, evidence_kinds, image_score
from intra.inspection.calibration import Threshold, choose_threshold, moved_threshold, p_value
from intra.inspection.device import autocast, for_inference, in_chunks, pick_device
from intra.inspection.distribution import PatchDistribution
from intra.inspection.inpaint import Hiding, log_odds, repaired_views
from intra.inspection.model_file import (
    DISTRIBUTION_TENSORS,
    FINE_TENSORS,
    FORMAT_VERSION,
    KINDS_TENSORS,
    REGION_TENSORS,
    SETUP_TENSORS,
    check_content,
    model_file,
    read_model,
    stored_distribution,
    stored_region,
    stored_setup,
    write_model,
)
from intra.inspection.region import Region
from intra.inspection.setup import Setup, SetupCheck
from intra.models import build
from intra.similarity import box_blur

__all__ = ["READERS", "Defect", "Detector", "Prediction", "is_exported", "refuse_exported", "repair",
           "verdict_of"]

WHOLE = (0.0, 0.0, 1.0, 1.0)  # the box of what is cut out of no photo
SEGMENTER_BLUR = 5  # px: one noisy cell is no defect
# Who reads exported models, by the end of the file's name; imported by its name when such a file is loaded, for
# inspection knows no other runtime: docs/decisions/0012-export.md
READERS = {".onnx": "intra.deploy.exported", ".xml": "intra.deploy.exported"}
IMAGES_PER_BATCH = 8  # bounds the memory of predict_batch, whatever the number of images

Image = str | Path | PIL.Image.Image | np.ndarray


@dataclass(frozen=True)
class Defect:
    """One connected region of the mask, in px of the original image."""

    top: int
    left: int
    height: int
    width: int
    area_px: int
    score: float  # the highest value of the anomaly map inside


def verdict_of(is_anomalous: bool, setup_alarm: bool) -> Literal["good", "defect", "setup"]:
    """What `Prediction.verdict` says, of what was kept of one."""
    if setup_alarm:
        return "setup"
    return "defect" if is_anomalous else "good"


@dataclass(frozen=True)
class Prediction:
    """The verdict on one image. Map, mask and repaired image have the input's own height and width; outside the model's
    region of interest, if it has one, they are 0, False and the input's own pixels. The repaired image of a defect was
    repaired twice; the map comes from the first repair.
    """

    score: float  # raw; the higher, the further from good images
    is_anomalous: bool  # score > threshold
    threshold: float
    anomaly_map: np.ndarray  # (H, W) float32, raw
    mask: np.ndarray  # (H, W) bool
    repaired: np.ndarray  # (H, W) or (H, W, C), channels of the model; uint8 or uint16 as the input, else float32
    defects: tuple[Defect, ...]  # the highest score first
    # Of good images that were not trained on, the share that scores as high, this one counted in: small is unusual.
    p_value: float = 1.0
    setup_alarm: bool = False  # the whole picture is not as good ones are: light, focus or pose has changed
    setup_reason: str = ""  # what has changed, in a word; "" without an alarm

    @property
    def verdict(self) -> Literal["good", "defect", "setup"]:
        """What to do with the part. "setup", whatever the score, under another light, focus or pose than that of the
        good images, where a score says little of the part; and for a score above the threshold that comes of where the
        part lies alone (docs/decisions/0011-trust.md).
        """
        return verdict_of(self.is_anomalous, self.setup_alarm)


class Detector:
    """A trained model, ready to inspect. Load one with `Detector.load`; `intra.train` makes one."""

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        *,
        reference: Reference,
        held_out_scores: Sequence[float],
        provenance: dict[str, Any],
        distribution: PatchDistribution | None = None,
        setup: Setup | None = None,
        region: Region | None = None,
        threshold: Threshold | None = None,
        device: str = "auto",
    ) -> None:
        self.device = pick_device(device)
        self.model = model.to(self.device).eval()
        self._network = for_inference(self.model, self.device, config.scoring.precision)
        self.config = config
        self.reference = reference.to(self.device)
        self.distribution = distribution.to(self.device) if distribution else None
        self.setup = setup.to(self.device) if setup else None  # None: no setup alarm is ever raised
        self.region = region.to(self.device) if region else None  # None: everything is inspected
        self.held_out_scores = list(held_out_scores)
        self.provenance = provenance
        self.calibration = threshold or choose_threshold(self.held_out_scores, config.scoring.false_reject_rate)

    @classmethod
    def load(
        cls, path: str | Path, *, device: str = "auto", threshold: float | None = None,
        false_reject_rate: float | None = None,
    ) -> "Detector":  # fmt: skip
        """The detector in a run's folder, in a model file, or in an exported model (.onnx, or OpenVINO's .xml).

        `threshold`, or the `false_reject_rate` that it is to promise, replaces the stored one. Raises InTraError if the
        file is missing, damaged, no model of intra, or of another format version.
        """
        if is_exported(path):
            exported: Detector = import_module(READERS[Path(path).suffix.lower()]).load_exported(
                Path(path), device=device, threshold=threshold, false_reject_rate=false_reject_rate)
            return exported
        header, tensors = read_model(model_file(Path(path)))
        try:
            config = Config.from_dict(header["config"])
            config.check_grid()
            scores, provenance = header["calibration"]["held_out_scores"], header["provenance"]
            chosen = Threshold(**header["calibration"]["threshold"])
            reference = Reference(tensors.pop("reference.mean"), tensors.pop("reference.spread", None),
                                  tensors.pop("reference.tails", None))
            region = stored_region(config, tensors)
            distribution = stored_distribution(config, tensors, region, header["calibration"]["places"])
            setup = stored_setup(config, tensors, header["calibration"].get("setup_scores"))
            check_content(config, tensors, reference, [chosen.value, *scores], provenance)
            with torch.device("meta"):
                model = build(config.model)
            model.load_state_dict({key.removeprefix("model."): value for key, value in tensors.items()}, assign=True)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = (str(error).splitlines() or ["?"])[0]
            raise InTraError(f"{path} does not hold what its header says ({reason}); train or copy it again") from error
        chosen = moved_threshold(chosen, scores, threshold=threshold, false_reject_rate=false_reject_rate)
        return cls(model, config, reference=reference, held_out_scores=scores, provenance=provenance,
                   distribution=distribution, setup=setup, region=region, threshold=chosen, device=device)

    @property
    def threshold(self) -> float:
        """An image is anomalous if its score is above."""
        return self.calibration.value

    @property
    def info(self) -> dict[str, Any]:
        """All that the model file says of itself, fit for JSON."""
        model = self.config.model
        return {
            "format_version": FORMAT_VERSION,
            "config": self.config.to_dict(),
            "preprocessing": {"height": model.image_size[0], "width": model.image_size[1], "channels": model.channels,
                              "resize": "bilinear, antialiased", "range": [0, 1]},
            "calibration": {"threshold": asdict(self.calibration), "held_out_scores": self.held_out_scores,
                            "setup_scores": list(self.setup.scores) if self.setup else None,
                            "places": self.distribution.places if self.distribution else None},
            "provenance": self.provenance,
        }

    def save(self, path: str | Path) -> None:
        """Writes the model file: whole or not at all."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        reference = self.reference
        tensors |= {f"reference.{name}": part for name, part in (
            ("mean", reference.mean), ("spread", reference.spread), ("tails", reference.tails)) if part is not None}
        for index, filters in enumerate(self.distribution.describe.filters if self.distribution else ()):
            tensors[f"distribution.filters.{index}"] = filters
        for index, part in enumerate(self.distribution.parts if self.distribution else ()):
            tensors |= {f"distribution.{index}.{name}": getattr(part, name) for name in DISTRIBUTION_TENSORS}
            tensors |= {f"distribution.{index}.kinds.{name}": getattr(part.kinds, name) for name in KINDS_TENSORS
                        if part.kinds}
        if self.distribution and self.distribution.fine:
            tensors |= {f"distribution.fine.{name}": getattr(self.distribution.fine, name) for name in FINE_TENSORS}
        if self.setup:
            tensors |= {f"setup.{name}": getattr(self.setup, name) for name in SETUP_TENSORS}
        if self.region:
            tensors |= {f"roi.{name}": getattr(self.region, name) for name in REGION_TENSORS}
        write_model(Path(path), self.info, tensors)

    def predict(self, image: Image, *, repair_twice: bool = True) -> Prediction:
        """The verdict on one image: a path, a PIL image, or an array (H, W[, C]) of uint8, uint16 or float in [0, 1].

        A defect is repaired twice, so that less of it shows through in the repaired image; without `repair_twice` only
        once, in less time. The verdict is the same. docs/decisions/0018-repaired-twice.md

        Raises InTraError if it cannot be read or its channels do not fit the model.
        """
        return self.predict_batch([image], repair_twice=repair_twice)[0]

    def predict_batch(self, images: Sequence[Image], *, repair_twice: bool = True) -> list[Prediction]:
        """The verdicts on many images, of any sizes, in their order; the same as one by one."""
        return list(self.predictions(images, repair_twice=repair_twice))

    def predictions(self, images: Sequence[Image], *, repair_twice: bool = True) -> Iterator[Prediction]:
        """The verdicts one after the other, computed in batches, so that memory does not grow with their number."""
        for start in range(0, len(images), IMAGES_PER_BATCH):
            arrays = [read_image(image) for image in images[start : start + IMAGES_PER_BATCH]]
            yield from self._predict_arrays(arrays, repair_twice)

    def inspect(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b h w"]]:
        """The repaired images and the anomaly maps of images in [0, 1], of the model's own size and on its device."""
        scoring = self.config.scoring
        kinds = evidence_kinds(scoring, has_segmenter=self.config.model.segmenter_width > 0)
        repaired, evidence = repair(self._network, images, model_config=self.config.model, scoring=scoring, kinds=kinds,
                                    distribution=self.distribution, region=self.region)
        return repaired, anomaly_map(evidence, self.reference, kinds=kinds, scoring=scoring,
                                     inside=self.region.inside if self.region else None)

    def inside(self, photo_size: tuple[int, int]) -> np.ndarray | None:
        """Which pixels (H, W) of a photo of this size lie inside the region of interest, bool; None without one."""
        if self.region is None:
            return None
        inside = np.zeros(photo_size, dtype=bool)
        part = inside[box_slices(photo_size, self.config.data.box or WHOLE)]
        part[:] = self.region.at((part.shape[0], part.shape[1]))
        return inside

    def repaired(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The repaired images alone, in less time than `inspect` takes for them."""
        return repair(self._network, images, model_config=self.config.model, scoring=self.config.scoring, kinds=(),
                      region=self.region)[0]

    def _predict_arrays(self, arrays: Sequence[np.ndarray], repair_twice: bool) -> list[Prediction]:
        parts = in_chunks(lambda start, stop: self._predict_at_once(arrays[start:stop], repair_twice), len(arrays),
                          len(arrays))
        return list(itertools.chain.from_iterable(parts))

    def _predict_at_once(self, arrays: Sequence[np.ndarray], repair_twice: bool) -> list[Prediction]:
        config = self.config.model
        batch = torch.stack([
            to_unit(prepare(array, size=config.image_size, channels=config.channels, box=self.config.data.box))
            for array in arrays]).to(self.device)
        repaired, maps = self.inspect(batch)
        scores = image_score(maps).tolist()
        checks: Sequence[SetupCheck | None] = [None] * len(batch)
        if self.setup:
            checks = self._with_moved_parts(self.setup, batch, scores, self.setup.check(batch))
        anomalous = [index for index, score in enumerate(scores) if score > self.threshold]
        if repair_twice and anomalous:
            repaired[anomalous] = self._repaired_again(batch[anomalous], repaired[anomalous], maps[anomalous])
        return [
            self._verdict(score, one_map, one_repaired, array, check) for score, one_map, one_repaired, array, check
            in zip(scores, maps.cpu(), repaired.cpu(), arrays, checks, strict=True)
        ]  # fmt: skip

    def _repaired_again(
        self, images: Float[Tensor, "b c h w"], repaired: Float[Tensor, "b c h w"], maps: Float[Tensor, "b h w"]
    ) -> Float[Tensor, "b c h w"]:  # fmt: skip
        """The repaired images of images in which what is flagged has been repaired before: no patch is inpainted from
        a defect beside it.
        """
        flagged = (maps > self.threshold)[:, None]
        return self.repaired(torch.where(flagged, repaired.clamp(0, 1), images))

    def _with_moved_parts(
        self, setup: Setup, images: Float[Tensor, "b c h w"], scores: Sequence[float], checks: list[SetupCheck]
    ) -> list[SetupCheck]:
        """The checks, with an alarm for each image above the threshold that is below it once it is laid as good images
        lie: what is odd about it is where it lies.
        """
        doubted = [index for index, (score, check) in enumerate(zip(scores, checks, strict=True))
                   if score > self.threshold and not check.alarm]
        if not doubted:
            return checks
        laid, reasons = setup.laid(images[doubted])
        moved = [number for number, reason in enumerate(reasons) if reason]
        if not moved:
            return checks
        laid_scores = image_score(self.inspect(laid[moved])[1]).tolist()
        for number, score in zip(moved, laid_scores, strict=True):
            if score <= self.threshold:
                checks[doubted[number]] = replace(checks[doubted[number]], alarm=True, reason=reasons[number])
        return checks

    def _verdict(
        self, score: float, small_map: Float[Tensor, "h w"], small_repaired: Float[Tensor, "c h w"], array: np.ndarray,
        check: SetupCheck | None,
    ) -> Prediction:  # fmt: skip
        photo_size = array.shape[0], array.shape[1]
        where = box_slices(photo_size, self.config.data.box or WHOLE)
        size = where[0].stop - where[0].start, where[1].stop - where[1].start
        large_map = _resize(small_map[None], size)[0].numpy()
        inside = self.inside(photo_size)
        if inside is not None:
            inside = inside[where]
            large_map[~inside] = 0
        if not math.isfinite(score):  # never let a broken model call a part good
            raise InTraError("the model gives scores that are no numbers; train or copy it again")
        is_anomalous = score > self.threshold
        # Resizing lowers the peak a little: an anomalous image shows at least that.
        mask = large_map > min(self.threshold, np.nextafter(large_map.max(), -np.inf)) if is_anomalous else (
            np.zeros(size, dtype=bool))
        repaired = _like(_resize(small_repaired, size), array)
        if inside is not None:
            large_map = _placed(large_map, inside, where, np.zeros(photo_size, dtype=large_map.dtype))
            mask = _placed(mask, inside, where, np.zeros(photo_size, dtype=bool))
            photo = convert_channels(array, self.config.model.channels)
            repaired = _placed(repaired, inside, where, (photo[..., 0] if repaired.ndim == 2 else photo).copy())
        return Prediction(
            score=score, is_anomalous=is_anomalous, threshold=self.threshold, anomaly_map=large_map, mask=mask,
            repaired=repaired, defects=_defects(mask, large_map),
            p_value=p_value(score, self.held_out_scores), setup_alarm=check is not None and check.alarm,
            setup_reason=check.reason if check else "",
        )  # fmt: skip


def repair(
    model: nn.Module, images: Float[Tensor, "b c h w"], *, model_config: ModelConfig, scoring: ScoringConfig,
    kinds: Sequence[Evidence], distribution: PatchDistribution | None = None, hiding: Hiding | None = None,
    region: Region | None = None,
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k h w"]]:  # fmt: skip
    """The repaired images, and these kinds of evidence of images in [0, 1]. One way for training and inspection.

    Where the network repairs an image several times, the means. Without a distribution, which is made from images that
    were repaired before, its evidence is left out. `hiding`, for tracing, as for `repaired_views`. Of a region of
    interest nothing outside is looked at; there the repaired images are the images themselves.
    """
    with torch.no_grad():
        given, wanted = images, None
        if region:
            images = region.shown(images)
            wanted = None if hiding else touched_patches(region.inside, model_config.patch_size)
        with autocast(images.device, scoring.precision):
            views = repaired_views(model, images, model_config=model_config, lattice=scoring.lattice, hiding=hiding,
                                   wanted=wanted)
        if region:
            views = [torch.where(region.inside, view, images) for view in views]
        repaired = torch.stack(views).mean(0)
        evidence = [images.new_zeros(images.shape[0], 0, *images.shape[-2:])]  # len() would fix it in a graph
        for kind in kinds:
            if kind == "difference":
                found = torch.stack([difference_map(images, view, scales=scoring.scales, blur_size=scoring.blur_size,
                                                    kind=scoring.difference) for view in views]).mean(0)
            elif kind == "segmenter":
                with autocast(images.device, scoring.precision):
                    found = box_blur(log_odds(model, images), SEGMENTER_BLUR)
            elif kind == "distribution":
                if distribution is None:
                    continue
                found = distribution.evidence(images, repaired)
            else:
                raise ValueError(f"evidence is {kind!r}; expected difference, segmenter or distribution")
            evidence.append(found[:, None])
        shown = torch.where(region.inside, repaired, given) if region else repaired
        return shown, torch.cat(evidence, dim=1)


def is_exported(path: str | Path) -> bool:
    """Whether a path names an exported model, by the end of its name."""
    return Path(path).suffix.lower() in READERS and not Path(path).is_dir()


def refuse_exported(path: str | Path) -> None:
    """Raises InTraError for an exported model: it holds no weights, so no other calibration can be made for it."""
    if is_exported(path):
        raise InTraError(f"{path} is an exported model, which stays as it is; pass the run that it was made of, and "
                         "export what comes of it")


def _resize(maps: Float[Tensor, "c h w"], size: tuple[int, int]) -> Float[Tensor, "c height width"]:
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]


def _placed(
    part: np.ndarray, inside: np.ndarray, where: tuple[slice, slice], whole: np.ndarray
) -> np.ndarray:
    """`whole`, in which the part inside the region, which was cut out there, stands in its place."""
    np.copyto(whole[where], part, where=inside if part.ndim == 2 else inside[..., None])
    return whole


def _like(image: Float[Tensor, "c h w"], array: np.ndarray) -> np.ndarray:
    """A picture in [0, 1] as an array of another's dtype; one channel is (H, W)."""
    pixels = image.clamp(0, 1).permute(1, 2, 0).numpy()
    if pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if np.issubdtype(array.dtype, np.integer):
        return np.rint(pixels * np.iinfo(array.dtype).max).astype(array.dtype)
    return pixels


def _defects(mask: np.ndarray, scores: np.ndarray) -> tuple[Defect, ...]:
    if not mask.any():
        return ()
    from scipy import ndimage  # a quarter of a second, which a first good photo need not wait for

    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    found = []
    for index, (rows, cols) in enumerate(ndimage.find_objects(labels), start=1):
        inside = labels[rows, cols] == index
        found.append(Defect(rows.start, cols.start, rows.stop - rows.start, cols.stop - cols.start,
                            int(inside.sum()), float(scores[rows, cols][inside].max())))
    return tuple(sorted(found, key=lambda defect: -defect.score))
