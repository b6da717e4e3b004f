"""One thread that inspects: what waits is inspected together, and the number of those who wait is bounded.

Decoding, inspection and drawing all happen in this thread. The event loop never blocks on them, and the memory that
photos take is that of one batch, however many clients there are: those who wait hold the file as it was sent.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from intra.data.images import convert_channels, read_bytes
from intra.deploy.serve.drawing import Drawn, draw
from intra.errors import InTraError
from intra.inspection.detector import IMAGES_PER_BATCH, Detector, Prediction
from intra.inspection.device import is_out_of_memory

__all__ = ["BusyError", "Inspected", "Inspector", "Job", "UnfitPhotoError"]

SMOOTHING = 0.1  # weight of the newest batch in the seconds that a photo takes
MEMORY_RETRY_S = 10
_log = logging.getLogger(__name__)


class BusyError(Exception):
    """Why no photo can be inspected now; `retry_after_s` says when to come back, None that nobody should."""

    def __init__(self, reason: str, retry_after_s: int | None) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class UnfitPhotoError(InTraError):
    """A photo that cannot be decoded or does not fit the model; the message is meant for the client."""


class Inspected(NamedTuple):
    """What became of a photo."""

    prediction: Prediction  # its arrays are dropped as soon as the pictures are drawn: see `Inspector`
    size: tuple[int, int]  # height, width, px
    pictures: Drawn
    waited_s: float
    inspected_s: float  # decoding, its share of the batch, and drawing


@dataclass(eq=False)
class Job:
    """A photo that waits."""

    data: bytes  # empty as soon as its client has left
    name: str
    kinds: tuple[str, ...]  # of pictures to draw
    future: "asyncio.Future[Inspected]"
    queued_at: float = field(default_factory=time.perf_counter)


class Inspector:
    """The thread, its queue, and the detector. `start` it inside the event loop, `close` it at the end."""

    def __init__(
        self, detector: Detector, *, max_waiting: int, max_pixels: int,
        on_batch: Callable[[int, float], None] | None = None,
    ) -> None:  # fmt: skip
        self.detector = detector
        self.max_pixels = max_pixels
        self.on_batch = on_batch
        self.seconds_per_photo = 0.1  # a first guess, for Retry-After alone
        self.max_waiting = max_waiting
        self._jobs: deque[Job] = deque()  # of clients that are still there
        self._closed = False
        self._changed = threading.Condition()  # guards these two
        self._thread = threading.Thread(target=self._work, name="inspector", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float = 10.0) -> None:
        """Inspects what still waits, then ends."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_s)

    @property
    def num_waiting(self) -> int:
        return len(self._jobs)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def refuse_if_busy(self) -> None:
        """Raises BusyError if no photo could be added now."""
        if self._closed:
            raise BusyError("the server stops", None)
        if self.num_waiting >= self.max_waiting:
            raise BusyError(f"{self.num_waiting} photos wait already; try again",
                            max(1, math.ceil(self.num_waiting * self.seconds_per_photo)))

    async def inspect(self, data: bytes, *, name: str, kinds: tuple[str, ...]) -> Inspected:
        """The verdict. Raises BusyError at once if too many wait, or later if the memory does not suffice, and
        UnfitPhotoError; cancel it to leave the queue."""
        job = Job(data, name, kinds, asyncio.get_running_loop().create_future())
        with self._changed:
            self.refuse_if_busy()
            self._jobs.append(job)
            self._changed.notify()
        try:
            return await job.future
        except asyncio.CancelledError:
            with self._changed:
                if job in self._jobs:
                    self._jobs.remove(job)
            job.data = b""
            raise

    def _work(self) -> None:
        while jobs := self._next_jobs():
            start = time.perf_counter()
            self._inspect_all(jobs, start)
            elapsed_s = time.perf_counter() - start
            self.seconds_per_photo += SMOOTHING * (elapsed_s / len(jobs) - self.seconds_per_photo)
            if self.on_batch is not None:
                self.on_batch(len(jobs), elapsed_s)
            jobs.clear()  # an idle thread must not keep the last photo

    def _next_jobs(self) -> list[Job]:
        """Those that wait, at most a batch, as soon as there are any; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            return [self._jobs.popleft() for _ in range(min(len(self._jobs), IMAGES_PER_BATCH))]

    def _inspect_all(self, jobs: list[Job], taken_at: float) -> None:
        """Decodes in turn; inspects together as many as have `max_pixels` between them."""
        group: list[tuple[Job, np.ndarray]] = []
        num_pixels = 0
        for job in jobs:
            try:
                photo = read_bytes(job.data, name=job.name, max_pixels=self.max_pixels)
                convert_channels(photo[:1, :1], self.detector.config.model.channels)  # refuses what does not fit
            except InTraError as error:
                _settle(job, _too_little_memory() if is_out_of_memory(error.__cause__ or error) else
                        UnfitPhotoError(getattr(error, "reason", str(error))))
                continue
            size = photo.shape[0] * photo.shape[1]
            if group and num_pixels + size > self.max_pixels:
                self._inspect_group(group, taken_at)
                group, num_pixels = [], 0
            group.append((job, photo))
            num_pixels += size
        if group:
            self._inspect_group(group, taken_at)

    def _inspect_group(self, group: list[tuple[Job, np.ndarray]], taken_at: float) -> None:
        try:
            predictions = self.detector.predict_batch([photo for _, photo in group],
                                                      repair_twice=any("repaired" in job.kinds for job, _ in group))
        except Exception as error:  # the thread must live on
            for job, _ in group:
                _settle(job, _failure(error))
            return
        for (job, photo), prediction in zip(group, predictions, strict=True):
            try:
                pictures = draw(photo, prediction, job.kinds)
            except Exception as error:  # one photo's pictures are nobody else's failure
                _settle(job, _failure(error))
                continue
            _settle(job, Inspected(_without_arrays(prediction), photo.shape[:2], pictures,
                                   waited_s=taken_at - job.queued_at,
                                   inspected_s=(time.perf_counter() - taken_at) / len(group)))


def _failure(error: Exception) -> Exception:
    """What the client gets, a 500 or 503; the log has the reason."""
    _log.error("inspection failed", exc_info=error)
    return _too_little_memory() if is_out_of_memory(error) else RuntimeError(
        f"inspection failed: {type(error).__name__}")


def _too_little_memory() -> BusyError:
    return BusyError("the memory does not suffice for this photo now; try again", MEMORY_RETRY_S)


def _without_arrays(prediction: Prediction) -> Prediction:
    """The verdict alone: a photo's arrays can take hundreds of megabytes."""
    nothing = np.zeros((0, 0), np.float32)
    return replace(prediction, anomaly_map=nothing, mask=nothing > 0, repaired=nothing)


def _settle(job: Job, outcome: Inspected | Exception) -> None:
    """Hands the outcome to the event loop of the request, if it still runs."""

    def settle() -> None:
        if not job.future.done():
            if isinstance(outcome, Exception):
                job.future.set_exception(outcome)
            else:
                job.future.set_result(outcome)

    loop = job.future.get_loop()
    try:
        loop.call_soon_threadsafe(settle)
    except RuntimeError:  # the loop is closed: nobody waits any more
        _log.debug("a verdict came after the server's end")
