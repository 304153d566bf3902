"""Predict an image with an exported model alone: python predict_onnx.py MODEL.onnx IMAGE OUT.npy"""

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
found, known = (image.dtype.name, image.shape[2]), (contract["dtype"], contract["channels"])
if found != known:
    sys.exit(f"{source}: its dtype and channels are {found}, those of the model {known}")
inputs = np.moveaxis(image, -1, 0)[None].astype(np.float32)
probabilities = session.run(None, {"image": inputs})[0][0]  # (K, H, W)
if contract["task"] == "multi-class":
    probabilities = probabilities.argmax(0).astype(np.uint8)
elif contract["task"] == "multi-label":
    thresholds = np.reshape(contract["threshold"], (-1, 1, 1)).astype(np.float32)
    probabilities = (probabilities >= thresholds).astype(np.uint8)
np.save(target, probabilities)
