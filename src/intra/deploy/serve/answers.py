"""What the API answers, as it stands in /openapi.json."""

from typing import Literal

from pydantic import BaseModel, Field

__all__ = ["DefectAnswer", "ErrorAnswer", "HealthAnswer", "LimitsAnswer", "MapScaleAnswer", "ModelAnswer",
           "SecondsAnswer", "ThresholdAnswer", "VerdictAnswer"]


class DefectAnswer(BaseModel):
    """One connected region above the threshold, in px of the photo."""

    top: int
    left: int
    height: int
    width: int
    area_px: int
    score: float = Field(description="the highest value of the anomaly map inside")


class MapScaleAnswer(BaseModel):
    """The raw anomaly map is offset + step * pixel of the 16-bit picture `map`."""

    offset: float
    step: float


class SecondsAnswer(BaseModel):
    """Where the time went."""

    waiting: float = Field(description="in the queue")
    inspecting: float = Field(description="decoding, the photo's share of the inspection, drawing")


class VerdictAnswer(BaseModel):
    """The verdict on one photo."""

    name: str
    height: int = Field(description="px, after EXIF orientation")
    width: int
    verdict: Literal["good", "defect", "setup"] = Field(description="setup: the whole picture is not as good ones are, "
                                                                    "and its score says little of the part: look at "
                                                                    "light, focus and pose first; or it is good once "
                                                                    "it is laid as good ones lie")
    score: float = Field(description="raw; the higher, the further from good photos")
    p_value: float = Field(description="of good photos that were not trained on, the share that scores as high, this "
                                       "one counted in: small is unusual")
    is_anomalous: bool = Field(description="score > threshold")
    threshold: float
    false_reject_rate: float = Field(description="the mean share of good parts that the threshold promises to reject "
                                                 "at most")
    setup_alarm: bool = Field(description="verdict is setup; is_anomalous, score and defects are as without it")
    setup_reason: str = Field(description="what has changed, in a word; empty without an alarm")
    defects: list[DefectAnswer] = Field(description="the highest score first")
    pictures: dict[str, str] = Field(description="kind: a link to a PNG, which is forgotten after a while; or a data "
                                                 "URI, with inline=true")
    map_scale: MapScaleAnswer | None = Field(None, description="if the picture `map` was asked for")
    seconds: SecondsAnswer


class ThresholdAnswer(BaseModel):
    """A threshold and what it promises."""

    value: float
    false_reject_rate: float = Field(description="the promised mean share of good parts that are rejected")
    asked_rate: float
    num_images: int = Field(description="good photos, not trained on, from which it was taken")
    lowest_rate: float = Field(description="with highest_rate: where the share lies for 9 of 10 such sets of photos")
    highest_rate: float
    promise: str = Field(description="one sentence for people")


class LimitsAnswer(BaseModel):
    """What the server takes."""

    upload_bytes: int
    pixels: int
    waiting: int


class ModelAnswer(BaseModel):
    """What inspects here, and what moves the threshold without another inspection (an alarm stays as it was)."""

    name: str
    version: str = Field(description="of intra")
    height: int = Field(description="px of the photo as the model sees it")
    width: int
    channels: int
    threshold: ThresholdAnswer
    held_out_scores: list[float] = Field(
        description="scores of good photos that were not trained on, rising. A threshold t promises to reject at most "
                    "(number of scores above t + 1) / (number of scores + 1) of the good parts")
    limits: LimitsAnswer


class HealthAnswer(BaseModel):
    """Whether photos can be inspected."""

    status: Literal["ok", "stopped"]
    waiting: int = Field(description="photos in the queue")


class ErrorAnswer(BaseModel):
    """What was expected, what came, what to do."""

    detail: str
