"""Whether the whole picture has changed – light, focus, pose – and not a place in it.

A defect is local; a lamp, a lens or a camera that moved changes everything. A few numbers describe a photo as a whole,
each so that a defect on a small part of it hardly moves them: medians over brightness classes and over cells, and a
registration against the mean good photo that gives odd places little weight. What they are for good photos is
cross-fitted, without the network, so those photos count, too, that trained it. docs/decisions/0011-trust.md
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from intra.data.images import to_unit
from intra.inspection.calibration import conformal_quantile, p_value
from intra.similarity import box_blur

__all__ = ["LEAST_GOOD", "Setup", "SetupCheck", "measurements"]

ALARM_RATE = 0.01  # of good photos, that raise the alarm
TAIL_SHARE, TAIL_DEVIATION = 0.05, 1.96  # of good photos, that may be odd; what so many of normal values exceed
LEAST_THRESHOLD = 3.0  # in spreads, which are at least what nobody would call a change
NUM_FOLDS = 10
CHUNK = 8  # photos at a time
LEAST_GOOD = 10  # photos: the spread of fewer says little
MOST_GOOD = 1000  # photos: more say the same, and each takes 3 ms
MEAN_SIDE = 64  # px: the longer side of the mean photo
CLASSES = 4  # of brightness: a gamma moves the dark, an exposure the bright
ENERGY_GRID = (32, 32)  # cells, over which sharpness is a median
EDGE_SHARE = 4  # one of so many cells has edges
NUM_SHARPNESS = 2
ENERGY_FLOOR = 0.0005  # of pixels in [0, 1]: below the noise of 8 bits
LEVELS = (16, 32, 64)  # px: the longer side at which the pose is sought, coarse to fine
STEPS = 4  # of Gauss and Newton at each
LEAST_MOVED = 1.0  # spread of a pose: from there on a photo is laid as good ones lie
MOST_MOVED = 0.05  # of each part of a pose: up to there, as further off the registration may have found another place
DAMPING = 1e-3  # of the normal matrix's mean diagonal: a round part has no angle
LEAST_DAMPING = 1e-4  # where nothing is to be seen
OUTLIERS_FROM = 3  # times the median difference: from there on a pixel counts less than half
LARGEST_STEP = 0.1  # of each part of a pose
# What nobody would call a change is added to each measurement's spread; good photos may be more alike than that.
LEAST_TONE = 0.01  # of the range
LEAST_SHARPNESS = 0.05  # of a logarithm
LEAST_POSE = (0.003, 0.003, 0.005, 0.01)  # down, right (of the longer side), scale (of 1), angle (rad)
POSES = (("shifted", "shifted"), ("shifted", "shifted"), ("nearer", "farther"), ("turned", "turned"))
TINTED_BELOW = 0.25  # of the channel that changes most: where another changes less, or the other way


@dataclass(frozen=True)
class SetupCheck:
    """Of one photo."""

    score: float  # how far the oddest measurement lies from good photos, in their spreads
    p_value: float  # (1 + good photos as far away) / (1 + good photos)
    alarm: bool
    reason: str  # "" without an alarm, else what has changed, in a word


@dataclass(frozen=True)
class Setup:
    """What good photos are like as a whole."""

    mean: Float[Tensor, "c h w"]  # of good photos, reduced, in [0, 1]
    centre: Float[Tensor, " q"]  # of the measurements
    spread: Float[Tensor, " q"]
    scores: tuple[float, ...]  # of good photos, each against the others

    @classmethod
    def of(cls, *sets: Shaped[Tensor, "_ c h w"]) -> "Setup":
        """From sets of good photos, uint8 or float in [0, 1], together at least LEAST_GOOD, of which MOST_GOOD evenly
        spaced ones are looked at; each fold of them is held against the others.
        """
        given = sum(len(photos) for photos in sets)
        if given < LEAST_GOOD:
            raise ValueError(f"{given} good photos; expected at least {LEAST_GOOD}")
        count = min(given, MOST_GOOD)
        seen = [(_small(photos), _sharpness(photos)) for photos in _chosen(sets, given, count)]
        small, sharpness = (torch.cat(parts) for parts in zip(*seen, strict=True))
        fold = torch.arange(count, device=small.device) % min(NUM_FOLDS, count)
        found = small.new_zeros(count, _num_measurements(small.shape[1]))
        for number in range(int(fold.max()) + 1):
            mean = small[fold != number].mean(0)
            for chunk in (fold == number).nonzero()[:, 0].split(CHUNK):
                found[chunk] = _held_against(mean, small[chunk], sharpness[chunk])
        scores = small.new_zeros(count)
        for number in range(int(fold.max()) + 1):
            centre, spread = _typical(found[fold != number])
            scores[fold == number] = ((found[fold == number] - centre) / spread).abs().amax(1)
        return cls(small.mean(0), *_typical(found), tuple(scores.tolist()))

    @property
    def threshold(self) -> float:
        """A photo raises the alarm if its score is above; parts that only lie elsewhere do so in `Detector`."""
        return max(LEAST_THRESHOLD, conformal_quantile(self.scores, ALARM_RATE))

    def to(self, device: torch.device) -> "Setup":
        """The same on a device."""
        return Setup(self.mean.to(device), self.centre.to(device), self.spread.to(device), self.scores)

    def fits(self, image_size: tuple[int, int], channels: int) -> bool:
        """Whether it can check images of that height, width and number of channels."""
        size, count = _fitting(image_size, MEAN_SIDE), _num_measurements(channels)
        return self.mean.shape == (channels, *size) and self.centre.shape == self.spread.shape == (count,)

    def check(self, photos: Float[Tensor, "b c h w"]) -> list[SetupCheck]:
        """Of photos in [0, 1], of the size that the good ones had."""
        away = (measurements(photos, self.mean) - self.centre) / self.spread
        threshold = self.threshold
        return [self._verdict(one, threshold) for one in away.cpu()]

    def laid(self, photos: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], list[str]]:
        """The photos as they would be if they lay as good ones do, borders repeated; and how they lie, in a word, ""
        for those that lie usually or too far off to be laid back.
        """
        pose = _poses(_small(photos).mean(1), self.mean.mean(0)) - self.centre[-len(POSES):]
        away = (pose / self.spread[-len(POSES):]).cpu()
        can_be = (away.abs().amax(1) > LEAST_MOVED) & (pose.abs().amax(1).cpu() <= MOST_MOVED)
        reasons = [_pose_word(one) if is_moved else "" for one, is_moved in zip(away, can_be.tolist(), strict=True)]
        return _laid_back(photos, pose), reasons

    def _verdict(self, away: Float[Tensor, " q"], threshold: float) -> SetupCheck:
        score = float(away.abs().max())
        reason = self._reason(away, threshold) if score > threshold else ""
        return SetupCheck(score, p_value(score, self.scores), score > threshold, reason)

    def _reason(self, away: Float[Tensor, " q"], threshold: float) -> str:
        """The first cause that shows: a part that lies elsewhere also looks darker or blurred somewhere, and a lamp may
        blur, but not the other way round.
        """
        num_tones = len(away) - NUM_SHARPNESS - len(POSES)
        tones, sharpness, pose = away.split([num_tones, NUM_SHARPNESS, len(POSES)])
        if pose.abs().max() > threshold:
            return _pose_word(pose)
        if tones.abs().max() <= threshold:
            return "sharper" if sharpness[sharpness.abs().argmax()] > 0 else "blurred"
        channels = len(self.mean)
        of_class = int(tones.abs().argmax()) // channels * channels
        change = (tones * self.spread.cpu()[:num_tones])[of_class:][:channels]
        most = change[change.abs().argmax()]
        if float((change / most).min()) < TINTED_BELOW:
            return "another colour"
        return "brighter" if most > 0 else "darker"


def _chosen(sets: Sequence[Shaped[Tensor, "_ c h w"]], given: int, count: int) -> Iterator[Float[Tensor, "_ c h w"]]:
    """Some of the photos of all sets, evenly spaced, a few at a time, in [0, 1]."""
    places = torch.linspace(0, given - 1, count).round().long()
    first = 0
    for photos in sets:
        inside = places[(places >= first) & (places < first + len(photos))] - first
        for start in range(0, len(inside), CHUNK):
            yield to_unit(photos[inside[start : start + CHUNK].to(photos.device)])
        first += len(photos)


def _pose_word(away: Float[Tensor, " 4"]) -> str:
    oddest = int(away.abs().argmax())
    return POSES[oddest][0 if away[oddest] > 0 else 1]


def measurements(photos: Float[Tensor, "b c h w"], mean: Float[Tensor, "c i j"]) -> Float[Tensor, "b q"]:
    """Tone of each class of brightness and channel, sharpness, and pose, of photos against good photos' mean."""
    return _held_against(mean, _small(photos), _sharpness(photos))


def _held_against(
    mean: Float[Tensor, "c i j"], small: Float[Tensor, "b c i j"], sharpness: Float[Tensor, "b 2"]
) -> Float[Tensor, "b q"]:
    pose = _poses(small.mean(1), mean.mean(0))
    return torch.cat([_tones(small, _warped(mean, _places(mean), pose)), sharpness, pose], dim=1)


def _small(photos: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c i j"]:
    return F.adaptive_avg_pool2d(photos, _fitting((photos.shape[-2], photos.shape[-1]), MEAN_SIDE))


def _num_measurements(channels: int) -> int:
    return CLASSES * channels + NUM_SHARPNESS + len(POSES)


def _fitting(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Height and width with a longer side of that many px; never larger than they were."""
    share = min(1, side / max(size))
    return max(1, round(size[0] * share)), max(1, round(size[1] * share))


def _tones(small: Float[Tensor, "b c i j"], mean: Float[Tensor, "b c i j"]) -> Float[Tensor, "b q"]:
    """The median change of the pixels that are equally bright in the mean photo, which lies as the photo does: a defect
    is less than half of them.
    """
    order = mean.mean(1).flatten(1).argsort(1)[:, None].expand(-1, mean.shape[1], -1)
    change = (small - mean).flatten(2).gather(2, order)  # (B, C, pixels)
    classes = change.tensor_split(CLASSES, dim=2)
    return torch.cat([(part if part.shape[2] else change).median(dim=2).values for part in classes], dim=1)


def _sharpness(photos: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 2"]:
    """Log energy of fine detail over that of coarser detail, of the median cell and of the median one with edges. Light
    scales both alike, and a defect changes few cells.
    """
    grey = photos.mean(1)
    smooth, smoother = box_blur(grey, 3), box_blur(grey, 9)
    fine, coarse = (F.adaptive_avg_pool2d(each.abs()[:, None] + ENERGY_FLOOR, ENERGY_GRID).flatten(1).log()
                    for each in (grey - smooth, smooth - smoother))  # (B, cells) each
    edges = coarse.topk(coarse.shape[1] // EDGE_SHARE, dim=1).indices
    ratios = fine - coarse
    return torch.stack([ratios.median(1).values, ratios.gather(1, edges).median(1).values], dim=1)


def _poses(photos: Float[Tensor, "b i j"], mean: Float[Tensor, "i j"]) -> Float[Tensor, "b 4"]:
    """How the photo lies against the mean: moved down and right, enlarged, and turned. Least squares with Cauchy's
    weights, so that odd places count little, and with brightness and contrast free.
    """
    pose = photos.new_zeros(len(photos), 4)
    for level in LEVELS:
        size = _fitting((mean.shape[0], mean.shape[1]), level)
        image, template = F.adaptive_avg_pool2d(photos, size), F.adaptive_avg_pool2d(mean[None], size)[0]
        places = _places(template)
        for _ in range(STEPS):
            pose = pose + _pose_step(image, template, places, pose)
    return pose


def _pose_step(
    image: Float[Tensor, "b i j"], template: Float[Tensor, "i j"], places: Float[Tensor, "2 i j"],
    pose: Float[Tensor, "b 4"],
) -> Float[Tensor, "b 4"]:  # fmt: skip
    """One step of Gauss and Newton."""
    y, x = (places - pose[:, :2, None, None]).unbind(1)
    warped = _warped(template[None], places, pose)[:, 0]
    inner = F.pad(warped[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    longer = max(template.shape)
    by_y = (inner[:, 2:, 1:-1] - inner[:, :-2, 1:-1]) * longer / 2
    by_x = (inner[:, 1:-1, 2:] - inner[:, 1:-1, :-2]) * longer / 2
    columns = torch.stack([-by_y, -by_x, -(by_y * y + by_x * x), by_x * y - by_y * x, torch.ones_like(warped),
                           warped - warped.mean((1, 2), keepdim=True)], dim=-1).flatten(1, 2)  # (B, pixels, 6)
    away = (image - warped).flatten(1)
    away = away - away.median(1, keepdim=True).values
    weight = 1 / (1 + (away / (OUTLIERS_FROM * away.abs().median(1, keepdim=True).values + LEAST_TONE)) ** 2)
    normal = columns.transpose(1, 2) @ (weight[..., None] * columns)
    ridge = DAMPING * normal.diagonal(dim1=1, dim2=2)[:, :4].mean(1) + LEAST_DAMPING
    normal = normal + ridge[:, None, None] * torch.eye(6, device=image.device)
    step = torch.linalg.solve(normal, columns.transpose(1, 2) @ (weight * away)[..., None])[:, :4, 0]
    return step.clamp(-LARGEST_STEP, LARGEST_STEP)


def _warped(
    template: Float[Tensor, "c i j"], places: Float[Tensor, "2 i j"], pose: Float[Tensor, "b 4"]
) -> Float[Tensor, "b c i j"]:
    """The template as it lies in each pose, the border repeated."""
    scale, angle = pose[:, 2:, None, None].unbind(1)
    y, x = (places - pose[:, :2, None, None]).unbind(1)
    cos, sin = angle.cos() / scale.exp(), angle.sin() / scale.exp()
    return _sampled(template.expand(len(pose), -1, -1, -1), y * cos - x * sin, y * sin + x * cos, mode="bilinear")


def _laid_back(photos: Float[Tensor, "b c h w"], pose: Float[Tensor, "b 4"]) -> Float[Tensor, "b c h w"]:
    """The photos that lie in these poses as they would lie without: `_warped` undone."""
    down, right, scale, angle = (part[:, None, None] for part in pose.unbind(1))
    y, x = _places(photos)
    cos, sin = angle.cos() * scale.exp(), angle.sin() * scale.exp()
    return _sampled(photos, y * cos + x * sin + down, x * cos - y * sin + right, mode="bicubic").clamp(0, 1)


def _sampled(
    pictures: Float[Tensor, "b c i j"], down: Float[Tensor, "b i j"], right: Float[Tensor, "b i j"], *, mode: str
) -> Float[Tensor, "b c i j"]:  # fmt: skip
    """The pictures at these places, in longer sides from their middle; the border repeated."""
    height, width = pictures.shape[-2:]
    longer = max(height, width)
    where = torch.stack([2 * longer * right / width, 2 * longer * down / height], dim=-1)
    return F.grid_sample(pictures, where, mode=mode, padding_mode="border", align_corners=False)


def _places(template: Float[Tensor, "*c i j"]) -> Float[Tensor, "2 i j"]:
    """Down and right of each pixel from the middle of the picture, in longer sides."""
    height, width = template.shape[-2:]
    rows, cols = ((torch.arange(side, device=template.device) - (side - 1) / 2) / max(height, width)
                  for side in (height, width))
    return torch.stack(torch.meshgrid(rows, cols, indexing="ij"))


def _typical(found: Float[Tensor, "n q"]) -> tuple[Float[Tensor, " q"], Float[Tensor, " q"]]:
    """Median and spread of each measurement: as a standard deviation of normal values, from the median deviation or, if
    that is wider, from the one that TAIL_SHARE of the photos exceed. Good photos may be of two kinds, between which
    half of them say little; and a few odd photos do not widen it.
    """
    centre = found.median(0).values
    away = (found - centre).abs()
    spread = torch.maximum(1.4826 * away.median(0).values, away.quantile(1 - TAIL_SHARE, dim=0) / TAIL_DEVIATION)
    num_tones = found.shape[1] - NUM_SHARPNESS - len(POSES)
    least: Sequence[float] = (*[LEAST_TONE] * num_tones, *[LEAST_SHARPNESS] * NUM_SHARPNESS, *LEAST_POSE)
    return centre, (spread**2 + spread.new_tensor(least) ** 2).sqrt()
