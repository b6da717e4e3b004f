"""Inspects photos with an exported model; needs numpy, pillow and onnxruntime alone: run_onnx.py MODEL.onnx PHOTO..."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

model, *photos = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
header = json.loads(session.get_modelmeta().custom_metadata_map["intra"])["header"]
height, width, channels = (header["preprocessing"][name] for name in ("height", "width", "channels"))
top, left, bottom, right = header["config"]["data"].get("box") or (0, 0, 1, 1)  # around a region of interest

for path in photos:
    photo = ImageOps.exif_transpose(Image.open(path)).convert("L" if channels == 1 else "RGB")
    sides = (photo.width, photo.height) * 2
    part = photo.crop([round(share * side) for share, side in zip((left, top, right, bottom), sides, strict=True)])
    pixels = np.asarray(part.resize((width, height), Image.Resampling.BILINEAR)).reshape(1, height, width, channels)
    # The threshold is an input with a default: add "threshold": np.array(2.5, np.float32) to move it.
    repaired, anomaly_map, score, is_anomalous = session.run(None, {"photos": pixels})
    row, col = np.unravel_index(anomaly_map[0].argmax(), anomaly_map[0].shape)
    down, across = top + (row + 0.5) / height * (bottom - top), left + (col + 0.5) / width * (right - left)
    place = f"row {down:.0%}, col {across:.0%}"
    print(f"{'DEFECT' if is_anomalous[0] else 'good'}\t{score[0]:.4f}\t{path}\thighest at {place}")
