"""The application: routes, and nothing that computes."""

import asyncio
import base64
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib.resources import files
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar

from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from intra import __version__
from intra.deploy.serve.answers import (
    DefectAnswer,
    ErrorAnswer,
    HealthAnswer,
    LimitsAnswer,
    MapScaleAnswer,
    ModelAnswer,
    SecondsAnswer,
    ThresholdAnswer,
    VerdictAnswer,
)
from intra.deploy.serve.drawing import KINDS
from intra.deploy.serve.guard import FAILED, Guard
from intra.deploy.serve.intake import Intake, Upload
from intra.deploy.serve.limits import Limits
from intra.deploy.serve.metrics import Metrics, resident_bytes
from intra.deploy.serve.store import PictureStore
from intra.deploy.serve.worker import BusyError, Inspected, Inspector, UnfitPhotoError
from intra.errors import InTraError
from intra.inspection.calibration import Threshold, moved_threshold
from intra.inspection.detector import Detector

__all__ = ["create_app"]

DAMAGED = "it is damaged or truncated"  # what exactly, says the log: the decoder's words are of the inside
PAGE = {  # path: (file, media type); nothing else of the disk can be asked for
    "/": ("index.html", "text/html; charset=utf-8"),
    "/docs": ("docs.html", "text/html; charset=utf-8"),
    **{f"/page/{name}": (name, "text/css; charset=utf-8" if name.endswith(".css") else "text/javascript; charset=utf-8")
       for name in ("page.css", "main.js", "inspect.js", "stage.js", "table.js", "threshold.js", "docs.js")},
}  # fmt: skip
BODY = {"requestBody": {"required": True, "description": "The photo: JPEG, PNG, TIFF, WebP, BMP, JPEG 2000, AVIF, GIF "
                                                         "or PPM; 8 or 16 bit.", "content": {
    "image/*": {"schema": {"type": "string", "format": "binary"}},
    "multipart/form-data": {"schema": {"type": "object", "required": ["file"], "properties": {
        "file": {"type": "string", "format": "binary"}}}}}}}  # fmt: skip
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The form is damaged or holds no single file."},
    408: {"model": ErrorAnswer, "description": "The upload took too long."},
    413: {"model": ErrorAnswer, "description": "The upload is too large."},
    415: {"model": ErrorAnswer, "description": "Neither a photo as the body nor a multipart form."},
    422: {"model": ErrorAnswer, "description": "No photo that can be inspected, or a wrong parameter."},
    503: {"model": ErrorAnswer, "description": "Too many photos, or too little memory: try again after Retry-After "
                                               "seconds. Without that header the server stops, or was too slow.",
          "headers": {"Retry-After": {"schema": {"type": "integer"}}}},
}  # fmt: skip
_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


def create_app(detector: Detector, *, name: str, token: str | None = None, limits: Limits | None = None) -> Guard:
    """The ASGI application that inspects with this detector; `name` is the model's, for people.

    With a token every route needs it. Its lifespan starts and ends the thread that inspects.
    """
    parts = _Parts.of(detector, name, limits or Limits())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        parts.inspector.start()
        yield
        await asyncio.to_thread(parts.inspector.close)

    app = FastAPI(title="intra", version=__version__, summary=f"Inspects photos with the model {name}.", docs_url=None,
                  redoc_url=None, lifespan=lifespan, redirect_slashes=False)  # fmt: skip
    _add_errors(app)
    _add_page(app)
    _add_inspection(app, parts)
    _add_facts(app, parts)
    return Guard(app, token=token, metrics=parts.metrics)


class _Parts(NamedTuple):
    """What the routes share."""

    detector: Detector
    name: str
    limits: Limits
    metrics: Metrics
    inspector: Inspector
    store: PictureStore
    intake: Intake

    @classmethod
    def of(cls, detector: Detector, name: str, limits: Limits) -> "_Parts":
        metrics, store, intake = Metrics(), PictureStore(limits.store_bytes), Intake(limits)
        inspector = Inspector(detector, max_waiting=limits.waiting, max_pixels=limits.pixels,
                              on_batch=metrics.add_batch)
        metrics.gauge("intra_waiting_photos", "Photos in the queue.", lambda: inspector.num_waiting)
        metrics.gauge("intra_waiting_photos_limit", "Photos that may wait.", lambda: inspector.max_waiting)
        metrics.gauge("intra_upload_bytes", "Uploads that are held.", lambda: intake.held_bytes)
        metrics.gauge("intra_picture_bytes", "Pictures that are kept for their links.", lambda: store.num_bytes)
        metrics.gauge("process_resident_memory_bytes", "Memory of the server in RAM.", resident_bytes)
        return cls(detector, name, limits, metrics, inspector, store, intake)


def _add_inspection(app: FastAPI, parts: _Parts) -> None:
    detector, _, limits, metrics, inspector, store, intake = parts

    @app.post("/inspect", tags=["inspection"], responses=ERRORS, openapi_extra=BODY, summary="The verdict on a photo")
    async def inspect(
        request: Request,
        name: Annotated[str, Query(description="The photo's name, for people; a form's file has its own.")] = "",
        pictures: Annotated[str, Query(description=f"Which to make, with commas: {', '.join(KINDS)}; empty for none."
                                       )] = "repaired,map,mask",
        inline: Annotated[bool, Query(description="Pictures as data URIs instead of links.")] = False,
    ) -> VerdictAnswer:
        start = time.perf_counter()
        kinds = _kinds(pictures)
        try:
            inspector.refuse_if_busy()  # before anything is uploaded
            with intake.held() as held:
                upload = await intake.read(request, held)
                found = await _unless_left(
                    request, inspector.inspect(upload.data, name=upload.name, kinds=kinds), limits.answer_s)
        except BusyError as error:
            wait_s = error.retry_after_s
            raise HTTPException(503, str(error), None if wait_s is None else {"Retry-After": str(wait_s)}) from error
        except UnfitPhotoError as error:
            metrics.verdicts["unreadable"] += 1
            _refuse_photo(upload.name, error)
        metrics.verdicts[found.prediction.verdict] += 1
        metrics.answer_s.add(time.perf_counter() - start)
        if inline:
            links = {kind: "data:image/png;base64," + base64.b64encode(png).decode()
                     for kind, png in found.pictures.files.items()}
        else:
            key = store.add(found.pictures.files) if kinds else ""
            links = {kind: f"/pictures/{key}/{kind}.png" for kind in kinds}
        return _verdict(upload, found, links, detector.calibration)

    @app.get("/pictures/{key}/{kind}.png", tags=["inspection"], summary="A picture of a verdict",
             response_class=Response,
             responses={200: {"content": {"image/png": {}}}, 404: {"model": ErrorAnswer}})  # fmt: skip
    async def picture(key: str, kind: str) -> Response:
        png = store.get(key, kind)
        if png is None:
            raise HTTPException(404, "this picture is forgotten or never was; inspect the photo again")
        return Response(png, media_type="image/png", headers={"Cache-Control": "private, max-age=3600, immutable"})


def _add_facts(app: FastAPI, parts: _Parts) -> None:
    detector, name, limits, metrics, inspector, *_ = parts
    seen = detector.config.model
    about = ModelAnswer(
        name=name, version=__version__, height=seen.image_size[0], width=seen.image_size[1], channels=seen.channels,
        threshold=_threshold(detector.calibration), held_out_scores=sorted(detector.held_out_scores),
        limits=LimitsAnswer(upload_bytes=limits.body_bytes, pixels=limits.pixels, waiting=limits.waiting),
    )  # fmt: skip

    @app.get("/model", tags=["facts"], summary="What inspects here")
    async def model() -> ModelAnswer:
        return about

    @app.get("/threshold", tags=["facts"], summary="A threshold and what it promises",
             responses={422: {"model": ErrorAnswer}})  # fmt: skip
    async def threshold(value: float | None = None, false_reject_rate: float | None = None) -> ThresholdAnswer:
        """The threshold `value`, or the one that promises `false_reject_rate`; without both, the server's own."""
        if value is not None and false_reject_rate is not None:
            raise HTTPException(422, "give value or false_reject_rate, not both")
        try:
            return _threshold(moved_threshold(detector.calibration, detector.held_out_scores, threshold=value,
                                              false_reject_rate=false_reject_rate))
        except InTraError as error:
            raise HTTPException(422, str(error)) from error

    @app.get("/health", tags=["facts"], summary="Whether photos can be inspected",
             responses={503: {"model": HealthAnswer}})  # fmt: skip
    async def health(response: Response) -> HealthAnswer:
        response.status_code = 200 if inspector.is_alive else 503
        return HealthAnswer(status="ok" if inspector.is_alive else "stopped", waiting=inspector.num_waiting)

    @app.get("/metrics", tags=["facts"], summary="Counters for Prometheus", response_class=Response,
             responses={200: {"content": {"text/plain": {}}}})  # fmt: skip
    async def read_metrics() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_page(app: FastAPI) -> None:
    """Every file is read once: what a request's path says never reaches the disk."""
    folder = files("intra.deploy.serve") / "page"
    for path, (file, media_type) in PAGE.items():
        _add_file(app, path, (folder / file).read_bytes(), media_type)


def _add_file(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    async def answer() -> Response:
        return Response(content, headers={"Content-Type": media_type, "Cache-Control": "no-cache"})

    app.add_api_route(path, answer, include_in_schema=False, methods=["GET"])


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        """One line, and nothing of what was sent."""
        said = "; ".join(f"{'.'.join(map(str, each['loc'][1:]))}: {each['msg']}" for each in error.errors())
        return JSONResponse({"detail": said}, 422)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": FAILED}, 500)  # the guard logs it


def _kinds(pictures: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(filter(None, (kind.strip() for kind in pictures.split(",")))))
    if not set(kinds) <= set(KINDS):
        raise HTTPException(422, f"pictures: expected some of {', '.join(KINDS)}, with commas")
    return kinds


def _refuse_photo(name: str, error: UnfitPhotoError) -> NoReturn:
    reason = str(error)
    if reason.startswith(DAMAGED):
        _log.info("%r: %s", name, reason)
        reason = DAMAGED
    raise HTTPException(422, f"cannot inspect {name}: {reason}") from error


async def _unless_left(request: Request, work: Awaitable[_Result], limit_s: float) -> _Result:
    """The result of `work`, which is cancelled if the client leaves or waits too long (503)."""
    task = asyncio.ensure_future(work)
    left = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({task, left}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if left.done():
            raise HTTPException(400, "the client left")  # nobody reads this
        raise HTTPException(503, f"no verdict within {limit_s:g} s")
    finally:
        task.cancel()
        left.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _threshold(threshold: Threshold) -> ThresholdAnswer:
    return ThresholdAnswer(**asdict(threshold), promise=threshold.promise)


def _verdict(upload: Upload, found: Inspected, links: dict[str, str], threshold: Threshold) -> VerdictAnswer:
    verdict, scale = found.prediction, found.pictures.scale
    return VerdictAnswer(
        name=upload.name, height=found.size[0], width=found.size[1], verdict=verdict.verdict, score=verdict.score,
        p_value=verdict.p_value, is_anomalous=verdict.is_anomalous, threshold=verdict.threshold,
        false_reject_rate=threshold.false_reject_rate, setup_alarm=verdict.setup_alarm,
        setup_reason=verdict.setup_reason, pictures=links,
        defects=[DefectAnswer(**asdict(defect)) for defect in verdict.defects],
        map_scale=None if scale is None else MapScaleAnswer(offset=scale.offset, step=scale.step),
        seconds=SecondsAnswer(waiting=round(found.waited_s, 4), inspecting=round(found.inspected_s, 4)),
    )  # fmt: skip
