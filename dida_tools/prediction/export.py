"""
Exports a trained model: one file that takes images as they stand in their files and gives probabilities.

    python -m dida_tools.prediction.export NAME -o model.onnx      NAME: a run's name or part of it, latest, or best

The ending decides: .onnx for onnxruntime and others, .pt2 for torch.export.load, .safetensors for the weights alone.

onnx and pt2 take values as they stand in the files, as float32 (N, C, H, W): whoever calls them casts integers. That is
exact up to 2 ** 24; of uint32, int32, float64, what float32 cannot hold is lost. Scaling, normalization, nodata to 0,
temperature and softmax or sigmoid are inside; what comes out is (N, K, H, W). Nothing is refused: unlike in prediction,
NaN in gives NaN out. Data contract, class names, thresholds and the digest of the weights are in the file's metadata.
What was written is read again and compared with PyTorch, at several sizes and batches, before it gets its name.
"""

import argparse
import contextlib
import copy
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__
from ..config.config import global_config as default_global_config
from ..config.errors import UserError
from ..config.project import project_of
from ..utils.data.contract import DataContract
from ..utils.files import relative_path, write_atomic
from ..utils.logging.runs import find_run, read_record, read_run_config
from ..utils.torchutils import load_model
from ..utils.weights import load_weights, weights_digest

TOLERANCE = 1e-4  # largest difference from PyTorch: of probabilities, and of a regression's values in parts of the largest
METADATA_FILE = "contract.json"  # of a .pt2, see torch.export.load(extra_files)
_MULTIPLES = (1, 2, 4, 8, 16, 32, 64)  # that image edges may have to be of: tried in this order

Notes = dict[str, str]
Runner = Callable[[np.ndarray], np.ndarray]


class ExportError(UserError):
    """A model that cannot be exported, or whose export does not do what the model does."""


class RawModel(nn.Module):
    """A model with its contract's pre- and post-processing: raw values in, probabilities out."""

    scale: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, contract: DataContract) -> None:
        super().__init__()
        self.model, self.contract = model, contract
        # As DataContract.prepare: of a large mean, float32 loses the deviation.
        self.dtype = torch.float32 if np.dtype(contract.dtype).itemsize <= 2 else torch.float64
        for name in ("scale", "mean", "std"):
            values = torch.tensor(getattr(contract, name), dtype=self.dtype)
            self.register_buffer(name, values.reshape(-1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, H, W) in float32 as in the files to (N, K, H, W) in float32."""
        values = image.to(self.dtype) * self.scale
        if self.contract.mean:
            values = (values - self.mean) / self.std
        values = values.float()
        if self.contract.nodata is not None:
            nodata = np.float32(self.contract.nodata)
            missing = image.isnan() if np.isnan(nodata) else image == float(nodata)
            values = values.masked_fill(missing.all(1, keepdim=True), 0.0)
        return self.contract.probabilities(self.model(values))


def export_onnx(
    model: nn.Module, contract: DataContract, path: str | Path, notes: Notes | None = None
) -> float:
    """
    Writes a model as ONNX, with dynamic batch, height and width.

    :param notes: further metadata
    :return: largest difference from PyTorch at the checked sizes
    :raises ExportError: if it cannot be exported, or differs by more than TOLERANCE; then nothing is written
    """
    onnxruntime = _library("onnxruntime")
    _library("onnxscript")
    raw = _raw(model, contract)
    program, multiple = _export(raw)
    with _quiet():
        exported = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["image"], output_names=["probabilities"]
        )
    assert exported is not None
    proto = exported.model_proto
    _name_axes(proto)
    for key, value in (_metadata(raw, multiple, 1) | (notes or {})).items():
        proto.metadata_props.add(key=key, value=value)
    try:
        content = proto.SerializeToString()
    except Exception as error:  # of protobuf, whose errors are many
        raise ExportError(
            f"{path}: the model cannot be written as one ONNX file (2 GB at most): {error}."
        ) from error
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    difference = _check(raw, lambda image: session.run(None, {"image": image})[0], multiple, 1, path)
    write_atomic(path, lambda file: file.write(content))
    return difference


def export_program(
    model: nn.Module, contract: DataContract, path: str | Path, notes: Notes | None = None
) -> float:
    """
    Writes a model as what torch.export.load reads; as export_onnx otherwise.

    The metadata are JSON in the extra file METADATA_FILE. The smallest image, which torch.export decides on, is among
    them: UNET needs edges of at least 2 ** n_recursions + 1 pixels here, none in ONNX.
    """
    raw = _raw(model, contract)
    program, multiple = _export(raw)
    smallest = _smallest_edge(program, contract.channels, multiple)
    metadata = json.dumps(_metadata(raw, multiple, smallest) | (notes or {}), indent=2)
    stream = io.BytesIO()
    with _quiet():
        torch.export.save(program, stream, extra_files={METADATA_FILE: metadata})
        stream.seek(0)
        loaded = torch.export.load(stream).module()
    difference = _check(raw, lambda image: loaded(torch.from_numpy(image)).numpy(), multiple, smallest, path)
    write_atomic(path, lambda file: file.write(stream.getvalue()))
    return difference


def export_safetensors(
    model: nn.Module, contract: DataContract, path: str | Path, notes: Notes | None = None
) -> float:
    """
    Writes the weights alone, for publishing, with the contract as metadata; as export_onnx otherwise.

    They are read with safetensors.torch.load_file into a model that was built with the MODEL_CONFIG.
    """
    safetensors = _library("safetensors.torch")
    raw = _raw(model, contract)
    state = {name: tensor.contiguous().clone() for name, tensor in raw.model.state_dict().items()}
    metadata = _metadata(raw, None, None) | (notes or {})
    content = safetensors.save(state, metadata)
    if weights_digest(safetensors.load(content)) != metadata["weights_sha256"]:
        raise ExportError(f"{path}: the weights that were read again are not those of the model.")
    write_atomic(path, lambda file: file.write(content))
    return 0.0


KINDS: dict[str, Callable[..., float]] = {
    "onnx": export_onnx,
    "pt2": export_program,
    "safetensors": export_safetensors,
}


def export_run(
    global_config: dict[str, str], wanted: str, path: str | Path, kind: str | None = None
) -> float:
    """
    Exports the best weights of a tracked run.

    :param wanted: as in find_run
    :param kind: one of KINDS; None takes the ending of the path
    :return: largest difference from PyTorch
    """
    kind = kind or Path(path).suffix[1:]
    if kind not in KINDS:
        raise ExportError(
            f"{path}: its ending is none of {', '.join('.' + name for name in KINDS)}: change it, or --to."
        )
    name = find_run(global_config, wanted, with_weights=True)
    run_dir, weights = (
        Path(global_config["LOG_DIR"]) / name,
        Path(global_config["WEIGHT_DIR"]) / name / "best.pt",
    )
    config, record = read_run_config(run_dir, project_of(__name__)), read_record(run_dir)["config"]
    model = load_model(weights, config["MODEL"], config["MODEL_CONFIG"])
    stored = load_weights(weights)
    if "contract" not in stored:
        raise ExportError(
            f"{weights}: holds no data contract: its dataset has none, so raw images cannot be scaled."
        )
    notes = {"run": name} | {key.lower(): json.dumps(record[key]) for key in ("MODEL", "MODEL_CONFIG")}
    return KINDS[kind](model, DataContract.from_dict(stored["contract"]), path, notes)


# ---------------------------------------------------------------------------------------------------------------- steps


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(
            f'{name} is not installed: pip install -c constraints.txt -e ".[export]" ({error}).'
        ) from error


def _raw(model: nn.Module, contract: DataContract) -> RawModel:
    """A copy in float32 on the CPU; the caller's model stays as it is."""
    return RawModel(copy.deepcopy(model).cpu().float(), contract).eval().requires_grad_(False)


def _metadata(raw: RawModel, multiple: int | None, smallest: int | None) -> Notes:
    contract = raw.contract
    metadata = {
        "contract": json.dumps(contract.to_dict()),
        "class_names": json.dumps(list(contract.class_names)),
        "threshold": json.dumps(contract.to_dict()["threshold"]),
        "version": f"{__name__.partition('.')[0]} {__version__}",
        "weights_sha256": weights_digest(raw.model.state_dict()),
    }
    if multiple is not None:
        metadata["input"] = f"float32 (N, {contract.channels}, H, W), values as in the {contract.dtype} files"
        metadata["sizes"] = f"edges of {smallest} pixels or more" + f", multiples of {multiple}" * (
            multiple > 1
        )
    return metadata


def _export(raw: RawModel) -> tuple[torch.export.ExportedProgram, int]:
    """The program, and the number that heights and widths are to be multiples of."""
    multiple, example = _example(raw)
    dims: list[Any] = [torch.export.Dim.DYNAMIC] * 3
    if multiple > 1:
        dims[1:] = [multiple * torch.export.Dim(name, min=1) for name in ("rows", "columns")]
    try:
        with _quiet():
            shapes = (dict(zip((0, 2, 3), dims, strict=True)),)
            return torch.export.export(raw, (example,), dynamic_shapes=shapes, strict=False), multiple
    except Exception as error:  # whatever the model raises
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ExportError(
            f"{type(raw.model).__name__}: torch.export takes it with no dynamic batch, height and width: have it not "
            f"decide by values or sizes in Python; the reason: {reason}"
        ) from error


def _example(raw: RawModel) -> tuple[int, Tensor]:
    """The smallest multiple that the model takes as height and width, and images that are no multiple of more."""
    reason = ""
    for multiple in _MULTIPLES:
        rows = 256 // multiple + 1  # odd
        example = torch.zeros(2, raw.contract.channels, rows * multiple, (rows + 2) * multiple)
        try:
            with torch.no_grad():
                raw(example)
            return multiple, example
        except Exception as error:  # whatever the model raises
            reason = " ".join(str(error).split())[:300]
    raise ExportError(
        f"{type(raw.model).__name__}: fails for images of {_MULTIPLES[-1]} x n pixels: {reason}"
    )


def _smallest_edge(program: torch.export.ExportedProgram, channels: int, multiple: int) -> int:
    """The smallest edge of a square image that the program does not refuse."""
    run = program.module()
    for edge in range(multiple, 2**10, multiple):
        with contextlib.suppress(Exception):  # a guard, whose type PyTorch does not name
            run(torch.zeros(1, channels, edge, edge))
            return edge
    raise ExportError("the exported program takes no image below 1024 pixels.")


def _name_axes(proto: Any) -> None:
    """Readable names for what torch.export calls s40 and the like."""
    for value in (*proto.graph.input, *proto.graph.output):
        dims = value.type.tensor_type.shape.dim
        for axis, name in {0: "batch", 2: "height", 3: "width"}.items():
            if axis < len(dims) and not dims[axis].HasField("dim_value"):
                dims[axis].dim_param = name
    del proto.graph.value_info[:]  # the shapes in between, by the old names


def _check(raw: RawModel, run: Runner, multiple: int, smallest: int, path: str | Path) -> float:
    """Compares with the way from raw values to probabilities that prediction takes."""
    contract, generator, largest = raw.contract, np.random.default_rng(0), 0.0
    low = -(-max(smallest, 16) // multiple)
    for batch, rows, columns in ((1, low, low), (3, low + 3, low + 8), (2, 2 * low + 5, low + 1)):
        shape = (batch, rows * multiple, columns * multiple, contract.channels)
        images = _images(contract, shape, generator)
        with torch.no_grad():
            prepared = torch.stack([contract.prepare(image)[0] for image in images])
            expected = contract.probabilities(raw.model(prepared)).numpy()
        found = run(np.ascontiguousarray(np.moveaxis(images, -1, 1), np.float32))
        unit = max(1.0, float(np.abs(expected).max())) if contract.task == "values" else 1.0
        difference = float(np.abs(found - expected).max()) if found.shape == expected.shape else np.inf
        if not difference <= TOLERANCE * unit:  # NaN too
            raise ExportError(
                f"{path}: the exported model differs from PyTorch by {difference:g}, at most {TOLERANCE * unit:g} is "
                f"allowed ({batch} images of {shape[1]} x {shape[2]} pixels); nothing is written."
            )
        largest = max(largest, difference)
    return largest


def _images(contract: DataContract, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Random images (N, H, W, C) with values as in the files; some pixels hold no data."""
    dtype = np.dtype(contract.dtype)
    low, high = (
        (0.0, 1.0) if dtype.kind == "f" else (0, 1 if dtype.kind == "b" else min(np.iinfo(dtype).max, 2**16))
    )
    if contract.mean:
        mean, std = (np.asarray(values) / contract.scale for values in (contract.mean, contract.std))
        values = generator.normal(mean, std, shape)
    else:
        values = generator.uniform(contract.minimum or low, contract.maximum or high, shape)
    if dtype.kind in "ui":
        values = values.round().clip(np.iinfo(dtype).min, np.iinfo(dtype).max)
    if contract.nodata is not None:
        values[:, :3, 2:9] = contract.nodata
    return values.astype(np.float32).astype(dtype)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out what the exporters say about optional libraries and their own future."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(before)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="NAME", help="the run: its name or part of it, latest, or best")
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="the file to be written")
    parser.add_argument("--to", choices=KINDS, help="the format (default: by the ending of FILE)")
    arguments = parser.parse_args()
    try:
        difference = export_run(default_global_config, arguments.name, arguments.out, arguments.to)
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(
        f"{relative_path(arguments.out)} is written; its largest difference from PyTorch is {difference:.1e}."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
