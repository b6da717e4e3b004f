"""A folder into which a camera writes → a verdict on each new photo, once and only once.

A photo is its path below the folder, its size and its time of change. It is inspected when it is wholly written, and
is done when its row is in the record: killed before, it is inspected again; killed after, never again. A file that is
rewritten is another photo and gets another row.
"""

import hashlib
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from intra.data.files import printable, remove_leftovers, sha256_of
from intra.data.images import read_image
from intra.deploy.arrivals import Arrivals, Photo, fingerprint
from intra.deploy.record import RECORD_FILE, Counts, Entry, Record, held
from intra.deploy.webhook import FINAL_S, Courier
from intra.errors import InTraError
from intra.evaluation.predict import PICTURES_FOLDER, save_pictures
from intra.inspection.detector import Detector, Prediction
from intra.inspection.device import OutOfMemoryError, is_out_of_memory
from intra.inspection.model_file import model_file
from intra.training.interrupt import stop_on_signal

__all__ = ["Verdict", "Watcher", "watch"]

MOST_TRIES = 3  # for a file that the system does not give out, or no memory for; a damaged one is not tried again
MEASURED = ("score", "threshold", "is_anomalous", "p_value", "setup_alarm", "setup_reason")  # recorded as they are
LEAST_REST = 9.0  # times as long as the look itself: looking into a large folder takes a tenth of the time at most


@dataclass(frozen=True)
class Verdict:
    """What became of a photo; its row is in the record."""

    id: int  # of the row
    path: Path
    prediction: Prediction | None
    error: str | None  # why it could not be inspected


@dataclass(frozen=True)
class Watcher:
    """How to watch; all but the first two have a default."""

    folder: Path
    out: Path
    settle_s: float = 2.0  # for so long size and time of change must stay the same
    poll_s: float = 1.0  # from one look to the next; longer where a look takes long
    once: bool = False  # end when nothing new is left
    save_images: bool = False
    webhook: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("--settle", self.settle_s), ("--poll", self.poll_s)):
            if not 0 <= value < float("inf"):
                raise InTraError(f"{name} is {value}; it must be seconds, 0 or more")


def watch(
    run: str | Path,
    watcher: Watcher,
    *,
    device: str = "auto",
    threshold: float | None = None,
    false_reject_rate: float | None = None,
    on_verdict: Callable[[Verdict], None] | None = None,
    on_trouble: Callable[[str], None] | None = None,
) -> Counts:
    """Watches until SIGINT or SIGTERM (ends after the photo in progress) or, with `once`, until nothing new is left.

    What the webhook has not yet got is then sent: all that is due, after a signal for `FINAL_S` at most.
    Writes `out`/record.sqlite, and with `save_images` pictures into `out`/images. `on_verdict` is called with each
    verdict after it is on the disk; `on_trouble` with what hinders, and does not end, the watching, also from the
    webhook's thread. Raises InTraError if folder or model are missing, `out` is in use, cannot be written or belongs to
    another folder, or the disk is full; nothing that was reported is lost, and the same call goes on.
    """
    digest = sha256_of(model_file(Path(run)))
    detector = Detector.load(run, device=device, threshold=threshold, false_reject_rate=false_reject_rate)
    if not watcher.folder.is_dir():
        raise InTraError(f"{watcher.folder} is no folder; give the folder that the photos come into")
    with held(watcher.out), stop_on_signal() as stop:
        remove_leftovers(watcher.out / PICTURES_FOLDER, older_than_s=0.0)  # nobody else writes here
        record = Record(watcher.out / RECORD_FILE, folder=watcher.folder)
        on_trouble = on_trouble or _ignore
        courier = Courier(record.path, watcher.webhook, on_trouble) if watcher.webhook else None
        try:
            if courier:
                courier.start()
            _Round(detector, digest, record, watcher, courier, on_verdict or _ignore, on_trouble).go_on(stop)
            if courier:
                courier.finish(FINAL_S, stop=stop)
                _raise(courier)
            return record.counts()
        finally:
            if courier:
                courier.finish(0.0)
            record.close()


class _Round:
    """The loop: look, inspect what is complete, rest."""

    def __init__(
        self, detector: Detector, model: str, record: Record, watcher: Watcher, courier: Courier | None,
        on_verdict: Callable[[Verdict], None], on_trouble: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.detector, self.model, self.record, self.watcher, self.courier = detector, model, record, watcher, courier
        self.on_verdict, self.on_trouble = on_verdict, on_trouble
        self.arrivals = Arrivals(
            watcher.folder, is_known=lambda photo: record.knows(photo.key, photo.size_bytes, photo.mtime_ns),
            settle_s=watcher.settle_s,
            skipped=frozenset(place.resolve() for place in (watcher.out, watcher.out / PICTURES_FOLDER)),
        )  # fmt: skip
        self.tries: dict[Photo, int] = {}  # photos that the system did not give out, or no memory for

    def go_on(self, stop: threading.Event) -> None:
        trouble = ""
        while not stop.is_set():
            started = time.monotonic()
            seen_before = set(self.arrivals.waiting)
            try:
                complete, new_trouble = self.arrivals.look(), ""
            except InTraError as error:  # a network drive may come back
                if self.watcher.once:
                    raise
                complete, new_trouble = [], str(error)
            if new_trouble and new_trouble != trouble:
                self.on_trouble(new_trouble)
            trouble = new_trouble
            took_s = time.monotonic() - started
            num_done = sum(self._inspect(photo) for photo in complete if not stop.is_set())
            if self.watcher.once and not num_done and self._is_over(seen_before):
                return
            rest_s = 0.0 if num_done else max(self.watcher.poll_s, LEAST_REST * took_s)
            stop.wait(rest_s if not self.watcher.once else min(rest_s, max(self.watcher.settle_s, 0.05)))

    def _is_over(self, seen_before: set[Photo]) -> bool:
        """Whether nothing is left to wait for but files that change while they are waited for."""
        keys = {photo.key for photo in seen_before}
        waiting = [photo for photo in self.arrivals.waiting if photo in seen_before or photo.key not in keys]
        for photo in set(self.arrivals.waiting).difference(waiting) if not waiting else ():
            self.on_trouble(f"{printable(photo.path)} is still being written; left for the next time")
        return not waiting

    def _inspect(self, photo: Photo) -> bool:
        """Whether the photo is done with: it has its row, or is gone."""
        _raise(self.courier)
        found = self._verdict_or_no_memory(photo)
        if fingerprint(photo.path) != (photo.size_bytes, photo.mtime_ns):
            self.on_trouble(f"{printable(photo.path)} vanished or changed while it was inspected; no verdict")
            return True  # changed, it is another photo and is waited for as such
        if isinstance(found, InTraError) and self._may_pass(found) and not self._was_last_try(photo):
            return False
        prediction, error = (None, found) if isinstance(found, InTraError) else (found, None)
        number = self.record.add(Entry(
            photo.key, photo.size_bytes, photo.mtime_ns,
            **{name: getattr(prediction, name, None) for name in MEASURED},
            defects=prediction.defects if prediction else (),
            error=None if error is None else printable(str(error)),
            pictures=_pictures(photo) if prediction and self.watcher.save_images else None,
            model=self.model,
        ), notify=self.courier is not None)  # fmt: skip
        if self.courier:
            self.courier.wake()
        self.on_verdict(Verdict(number, photo.path, prediction, None if error is None else printable(str(error))))
        return True

    def _verdict_or_no_memory(self, photo: Photo) -> Prediction | InTraError:
        """As `_verdict`; wherever the memory ran out, that is why there is none."""
        try:
            return self._verdict(photo)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return OutOfMemoryError(f"cannot inspect {photo.path}: it does not fit into memory; close other programs, "
                                    "pass --device cpu, or make the photo smaller")

    def _verdict(self, photo: Photo) -> Prediction | InTraError:
        """The verdict, with its pictures on the disk, or why there is none."""
        try:
            image = read_image(photo.path)
            prediction = self.detector.predict(image, repair_twice=self.watcher.save_images)
        except OutOfMemoryError:  # its message names no photo
            raise
        except InTraError as error:
            return error
        if self.watcher.save_images:
            save_pictures(image, prediction, self.watcher.out / _pictures(photo))
        return prediction

    @staticmethod
    def _may_pass(error: InTraError) -> bool:
        """Whether the system did not give the file out (no permission, a broken line), or no memory for it."""
        cause = error.__cause__ or error
        return is_out_of_memory(cause) or (isinstance(cause, OSError) and cause.errno is not None)

    def _was_last_try(self, photo: Photo) -> bool:
        self.tries = {known: count for known, count in self.tries.items() if known in self.arrivals.waiting}
        self.tries[photo] = self.tries.get(photo, 0) + 1
        return self.tries[photo] >= MOST_TRIES


def _pictures(photo: Photo) -> str:
    """Below `out`: a name that no other photo has, of harmless letters, and the same if it is made again."""
    identity = b"%s|%d|%d" % (photo.key, photo.size_bytes, photo.mtime_ns)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", printable(photo.path.stem)).lstrip(".")[:80] or "photo"
    return f"{PICTURES_FOLDER}/{stem}-{hashlib.sha256(identity).hexdigest()[:12]}"


def _raise(courier: Courier | None) -> None:
    """Raises what ended the courier, if anything did."""
    if courier and courier.error:
        raise courier.error


def _ignore(_: object) -> None:
    """For callbacks that nobody gave."""
