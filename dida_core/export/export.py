"""
Export a trained model: one file that takes images as they stand in their files and returns probabilities.

    python -m dida_core.export NAME -o model.onnx      NAME: a run's name or part of it, latest, best

The ending decides: .onnx for onnxruntime and others, .pt2 for torch.export.load, .safetensors for weights
alone (read them with safetensors.torch.load_file into a model that was built with the MODEL_CONFIG).

onnx and pt2 take values as they stand in the files, as float32 (N, C, H, W): integers are exact up to
2 ** 24. Scaling, normalization, nodata to 0, temperature and softmax or sigmoid are inside; the output is
(N, K, H, W). Nothing is refused: unlike in prediction, NaN in gives NaN out. Data contract, class names,
thresholds and the digest of the weights are in the file's metadata. UNET needs images of at least
2 ** n_recursions + 1 pixels in a .pt2, 1 in ONNX. A file is compared with PyTorch before it gets its name.
"""

import argparse
import copy
import io
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__
from ..config.capture import capture
from ..config.project import find_project
from ..data.contract import DataContract
from ..errors import UserError
from ..prediction.predict import run_config
from ..prediction.predictor import load_predictor
from ..storage.files import relative_path, write_atomic
from ..storage.weights import weights_digest

# Largest difference from PyTorch: of probabilities; of a regression's values as a fraction of the largest.
TOLERANCE = 1e-4
METADATA_FILE = "contract.json"  # of a .pt2, see torch.export.load(extra_files)
_MULTIPLES = (1, 2, 4, 8, 16, 32, 64)  # that image sizes may have to be of: tried in this order

Notes = dict[str, str]


class ExportError(UserError):
    """A model that cannot be exported, or whose export does not do what the model does."""


class RawModel(nn.Module):
    """A model with its contract's pre- and post-processing: raw values in, probabilities out."""

    def __init__(self, model: nn.Module, contract: DataContract) -> None:
        super().__init__()
        self.model, self.contract = copy.deepcopy(model).cpu().float(), contract
        # As DataContract.prepare: of a large mean, float32 loses the std.
        self.dtype = torch.float32 if np.dtype(contract.dtype).itemsize <= 2 else torch.float64
        numbers = contract.scale, contract.mean, contract.std
        self.numbers = [torch.tensor(one, dtype=self.dtype).reshape(-1, 1, 1) for one in numbers]
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, H, W) in float32 as in the files to (N, K, H, W) in float32."""
        scale, mean, std = self.numbers
        values = image.to(self.dtype) * scale
        if self.contract.mean:
            values = (values - mean) / std
        values = values.float()
        if self.contract.nodata is not None:
            nodata = np.float32(self.contract.nodata)
            missing = image.isnan() if np.isnan(nodata) else image == float(nodata)
            # As has_data.
            missing = missing.all(1, True) if self.contract.dtype == "uint8" else missing.any(1, True)
            values = values.masked_fill(missing, 0.0)
        return self.contract.probabilities(self.model(values))


def export_run(global_config: dict[str, str] | None, wanted: str, path: str | Path, kind: str = "") -> float:
    """
    Export the best weights of a run; see export_model.

    :param global_config: None: the project's
    :param wanted: as in find_run
    """
    config = run_config(wanted, global_config)
    predictor = load_predictor(config["WEIGHTS"], config["MODEL"], config["MODEL_CONFIG"], device="cpu")
    project = find_project(config["MODEL"].__module__)
    record = capture({key: config[key] for key in ("MODEL", "MODEL_CONFIG")}, project)["config"]
    notes = {key.lower(): json.dumps(value) for key, value in record.items()}
    notes["run"] = config["WEIGHTS"].parent.name
    return export_model(predictor.model, predictor.contract, path, kind, notes)


def export_model(
    model: nn.Module, contract: DataContract, path: str | Path, kind: str = "", notes: Notes | None = None
) -> float:
    """
    Export a model with its contract.

    :param kind: one of KINDS; by default the ending of the path
    :param notes: further metadata
    :return: largest difference from PyTorch
    :raises ExportError: if it cannot be exported, or differs by more than TOLERANCE; then nothing is written
    """
    kind = kind or Path(path).suffix[1:]
    if kind not in KINDS:
        raise ExportError(f"{path}: its ending is none of .{', .'.join(KINDS)}: change it, or give --to.")
    raw, stored = RawModel(model, contract), contract.to_dict()
    facts = {"contract": stored, "class_names": stored["class_names"], "threshold": stored["threshold"]}
    metadata = {key: json.dumps(value) for key, value in facts.items()} | (notes or {})
    metadata["version"] = f"{__name__.partition('.')[0]} {__version__}"
    metadata["weights_sha256"] = weights_digest(raw.model.state_dict())
    try:
        content, difference = KINDS[kind](raw, metadata)
    except ImportError as error:
        message = f'{error.name} is not installed: pip install -c constraints.txt -e ".[export]".'
        raise ExportError(message) from error
    if not difference <= TOLERANCE:  # NaN too
        limits = f"differs from PyTorch by {difference:g}, at most {TOLERANCE:g} is allowed"
        raise ExportError(f"{path}: the exported model {limits}; nothing is written.")
    write_atomic(path, lambda file: file.write(content))
    return difference


def _to_onnx(raw: RawModel, metadata: Notes) -> tuple[bytes, float]:
    import onnxruntime
    import onnxscript  # noqa: F401  # torch's exporter needs it

    program, multiple = _export(raw, metadata)
    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["probabilities"]}
    exported = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    assert exported is not None
    proto = exported.model_proto
    for value in (*proto.graph.input, *proto.graph.output):
        for axis, name in {0: "batch", 2: "height", 3: "width"}.items():
            value.type.tensor_type.shape.dim[axis].dim_param = name
    del proto.graph.value_info[:]  # the shapes in between, by the old names
    for key, text in metadata.items():
        proto.metadata_props.add(key=key, value=text)
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, _compare(raw, lambda image: session.run(None, {"image": image.numpy()})[0], multiple)


def _to_program(raw: RawModel, metadata: Notes) -> tuple[bytes, float]:
    program, multiple = _export(raw, metadata)
    stream = io.BytesIO()
    torch.export.save(program, stream, extra_files={METADATA_FILE: json.dumps(metadata, indent=2)})
    stream.seek(0)
    return stream.getvalue(), _compare(raw, torch.export.load(stream).module(), multiple)


def _to_safetensors(raw: RawModel, metadata: Notes) -> tuple[bytes, float]:
    import safetensors.torch

    state = {name: tensor.contiguous().clone() for name, tensor in raw.model.state_dict().items()}
    content = safetensors.torch.save(state, metadata)
    is_same = weights_digest(safetensors.torch.load(content)) == metadata["weights_sha256"]
    return content, 0.0 if is_same else float("inf")


KINDS = {"onnx": _to_onnx, "pt2": _to_program, "safetensors": _to_safetensors}


def _export(raw: RawModel, metadata: Notes) -> tuple[torch.export.ExportedProgram, int]:
    """Return the program, and the smallest number that heights and widths have to be multiples of."""
    name, contract = type(raw.model).__name__, raw.contract
    for multiple in _MULTIPLES:
        example = _images(contract, 2, 256 // multiple + 1, 256 // multiple + 3, multiple)
        try:
            raw(example)
            break
        except Exception as error:  # whatever the model raises
            if multiple == _MULTIPLES[-1]:
                raise ExportError(f"{name}: fails for images of {multiple} x n pixels: {error}") from error
    metadata["input"] = f"float32 (N, {contract.channels}, H, W), values as in the {contract.dtype} files"
    metadata["sizes"] = f"multiples of {multiple} pixels" if multiple > 1 else "any"
    shapes: dict[int, Any] = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    if multiple > 1:
        shapes |= {axis: multiple * torch.export.Dim(f"side{axis}", min=1) for axis in (2, 3)}
    try:
        return torch.export.export(raw, (example,), dynamic_shapes=(shapes,), strict=False), multiple
    except Exception as error:  # likewise
        raise ExportError(
            f"{name}: torch.export takes it with no dynamic batch, height and width: have it not decide by "
            f"values or sizes in Python; the reason: {' '.join(str(error).split())[:300]}"
        ) from error


def _compare(raw: RawModel, run: Callable[[Tensor], Any], multiple: int) -> float:
    """Compare with the way from raw values to probabilities that prediction takes, at an odd size."""
    contract = raw.contract
    images = _images(contract, 3, 67 // multiple | 1, 93 // multiple | 1, multiple)
    in_files = images.movedim(1, -1).numpy().astype(contract.dtype)
    with torch.no_grad():
        prepared = torch.stack([contract.prepare(image)[0] for image in in_files])
        expected = contract.probabilities(raw.model(prepared)).numpy()
    unit = max(1.0, float(np.abs(expected).max())) if contract.task == "values" else 1.0
    return float(np.abs(np.asarray(run(images)) - expected).max()) / unit


def _images(contract: DataContract, number: int, rows: int, columns: int, multiple: int) -> Tensor:
    """Return random images (N, C, H, W) with values as in the files, in float32; some pixels hold no data."""
    generator, dtype = np.random.default_rng(0), np.dtype(contract.dtype)
    shape = (number, rows * multiple, columns * multiple, contract.channels)
    high = min(np.iinfo(dtype).max, 2**16) if dtype.kind in "ui" else 1
    values = generator.uniform(contract.minimum or 0, contract.maximum or high, shape).astype(dtype)
    if contract.nodata is not None:
        values[:, :3, 2:9] = contract.nodata
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(values.astype(np.float32), -1, 1)))


def main() -> int:
    """Export a run by its name."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("name", metavar="NAME", help="the run: its name or part of it, latest, or best")
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="the file to be written")
    parser.add_argument("--to", choices=KINDS, default="", help="the format (default: by the ending of FILE)")
    given = parser.parse_args()
    # The exporters warn of optional libraries and of their own future.
    warnings.simplefilter("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    difference = export_run(None, given.name, given.out, given.to)
    print(f"{relative_path(given.out)} is written; its largest difference from PyTorch is {difference:.1e}.")
    return 0
