"""Predict with an exported model, without this project: python predict_onnx.py MODEL.onnx IMAGE OUT.npy"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

model, source, target = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=onnxruntime.get_available_providers())
contract = json.loads(session.get_modelmeta().custom_metadata_map["contract"])
image = np.load(source) if source.endswith(".npy") else np.asarray(Image.open(source))
image = image[:, :, None] if image.ndim == 2 else image
found, expected = (image.dtype.name, image.shape[2]), (contract["dtype"], contract["channels"])
if found != expected:
    sys.exit(f"{source}: dtype and channels are {found}, the model expects {expected}")
[output] = session.run(None, {"image": np.moveaxis(image, -1, 0)[None].astype(np.float32)})
result = output[0]  # probabilities (K, H, W)
if contract["task"] == "multi-class":
    result = result.argmax(0).astype(np.uint8)
elif contract["task"] == "multi-label":
    thresholds = np.reshape(contract["threshold"], (-1, 1, 1)).astype(np.float32)
    result = (result >= thresholds).astype(np.uint8)
np.save(target, result)
