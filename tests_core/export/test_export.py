"""An exported model takes raw values of any size and predicts as prediction does; others are not written."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from dida_core.data.contract import DataContract
from dida_core.errors import UserError
from dida_core.export.export import METADATA_FILE, TOLERANCE, ExportError, export_model, export_run
from dida_core.prediction import predict
from dida_core.storage.weights import load_weights, weights_digest
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import dida_tools
from dida_tools.models import UNET

from tests.helpers import PACKAGE, ROOT

RNG = np.random.default_rng(0)
SIZES = [(1, 16, 16), (2, 33, 50), (1, 5, 97), (3, 64, 21)]

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporters warn of their own future


@pytest.fixture(scope="module")
def onnx_file(trained: Any) -> Path:
    path = trained.weights.with_name("model.onnx")
    assert export_run(trained.global_config, "exported", path) <= TOLERANCE
    return path


@pytest.fixture(scope="module")
def program_file(trained: Any) -> Path:
    path = trained.weights.with_name("model.pt2")
    assert export_run(trained.global_config, "latest", path) <= TOLERANCE
    return path


def raw_images(batch: int, height: int, width: int) -> np.ndarray:
    images = RNG.integers(1, 256, (batch, 3, height, width), dtype=np.uint8)
    images[:, :, : height // 2, : width // 3] = 0  # no data
    images[:, 0, -1] = 0  # data: the other channels hold some
    return images


def expected(run: Any, images: np.ndarray) -> np.ndarray:
    """Return everything by hand, in float64 but for the model."""
    mean, std = (np.reshape(values, (1, 3, 1, 1)) for values in (run.contract.mean, run.contract.std))
    values = (images / 255 - mean) / std
    values *= (images != 0).any(1, keepdims=True)
    with torch.no_grad():
        logits = run.model(torch.from_numpy(values.astype(np.float32))).double()
    return (logits / 1.7).softmax(1).numpy()


def run_onnx(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": images.astype(np.float32)})[0]


def onnx_metadata(path: Path) -> dict[str, str]:
    return onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map


def check_metadata(metadata: dict[str, str], trained: Any) -> None:
    assert DataContract.from_dict(json.loads(metadata["contract"])) == trained.contract
    assert json.loads(metadata["class_names"]) == ["ground", "tree", "house"]
    assert json.loads(metadata["threshold"]) == trained.contract.threshold
    assert metadata["version"].endswith(dida_tools.__version__) and metadata["run"] == trained.name
    assert metadata["weights_sha256"] == weights_digest(load_weights(trained.weights)["model"])
    assert json.loads(metadata["model"])["@ref"].endswith(":UNET")
    assert json.loads(metadata["model_config"]) == trained.model_config


@pytest.mark.parametrize("size", [*SIZES, (1, 1, 1), (1, 4, 130)])
def test_onnx_predicts_as_the_model_at_every_size(trained, onnx_file, size):
    images = raw_images(*size)
    found = run_onnx(onnx_file, images)
    assert (found.dtype, found.shape) == (np.float32, images.shape)
    np.testing.assert_allclose(found, expected(trained, images), atol=1e-5)


def test_onnx_is_valid_names_its_axes_and_carries_the_contract(trained, onnx_file):
    proto = onnx.load(onnx_file)
    onnx.checker.check_model(proto, full_check=True)
    for (value,), name in ((proto.graph.input, "image"), (proto.graph.output, "probabilities")):
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert (value.name, dims) == (name, ["batch", 3, "height", "width"])
    metadata = onnx_metadata(onnx_file)
    check_metadata(metadata, trained)
    assert metadata["sizes"] == "any" and metadata["input"].endswith("values as in the uint8 files")


def test_the_script_predicts_without_this_project(tmp_path, trained, onnx_file):
    np.save(tmp_path / "scene.npy", raw_images(1, 45, 38)[0].transpose(1, 2, 0))
    config = {"MODEL": UNET, "MODEL_CONFIG": trained.model_config, "WEIGHTS": trained.weights}
    places = {"FILES": tmp_path / "scene.npy", "OUT_DIR": tmp_path / "out"}
    (written,) = predict(config | places | {"DEVICE": "cpu", "PRECISION": "fp32"})
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(torch=None, {PACKAGE}=None)\n"  # importing them is an error
        "script, *sys.argv[1:] = sys.argv[1:]\n"
        "runpy.run_path(script)\n"
    )
    script = ROOT / "tools" / "predict_onnx.py"
    files = [script, onnx_file, tmp_path / "scene.npy", tmp_path / "classes.npy"]
    command = [sys.executable, "-I", "-c", code, *map(str, files)]
    subprocess.run(command, cwd=tmp_path, check=True)
    found, wanted = np.load(tmp_path / "classes.npy"), np.load(written)
    valid = wanted != 255  # where the image has data; the script does not look for it
    assert len(np.unique(found)) > 1
    assert found.dtype == np.uint8 and valid.mean() > 0.5 and np.array_equal(found[valid], wanted[valid])
    texts = [line for line in script.read_text().splitlines() if line]
    assert len([line for line in texts if not line.startswith(('"', "import", "from"))]) <= 20
    np.save(tmp_path / "scene.npy", np.zeros((9, 9, 4), np.uint8))
    refused = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert refused.returncode == 1 and "dtype and channels are ('uint8', 4)" in refused.stderr


def test_the_program_predicts_as_the_model_and_carries_the_contract(trained, program_file):
    extra = {METADATA_FILE: ""}
    module = torch.export.load(program_file, extra_files=extra).module()  # takes seconds
    for size in SIZES:
        images = raw_images(*size)
        found = module(torch.from_numpy(images).float()).numpy()
        np.testing.assert_allclose(found, expected(trained, images), atol=1e-5)
    check_metadata(json.loads(extra[METADATA_FILE]), trained)
    with pytest.raises(AssertionError, match="Guard failed"):
        module(torch.zeros(1, 3, 4, 9))  # below 2 ** n_recursions + 1


def test_the_command_writes_safetensors(tmp_path, trained):
    command = [
        sys.executable,
        "-m",
        f"{PACKAGE}.prediction.export",
        "latest",
        "--to",
        "safetensors",
        "-o",
        "file",
    ]
    environment = os.environ | {"ROOT_PATH": trained.global_config["ROOT_PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("file is written") and "Warning" not in done.stderr
    assert weights_digest(load_file(tmp_path / "file")) == weights_digest(trained.model.state_dict())
    with safe_open(tmp_path / "file", "pt") as file:
        check_metadata(file.metadata(), trained)


NORMALIZED = {"mean": (1e6, -3.0), "std": (0.5, 2.0), "nodata": float("nan")}
RANGED = {"scale": 0.01, "minimum": (0, 5), "maximum": (900, 800), "nodata": -9999}


@pytest.mark.parametrize(
    ("contract", "center"),
    [
        (DataContract(2, dtype="float32", task="values", **NORMALIZED), (1e6, -3.0)),
        (DataContract(2, dtype="int32", task="multi-label", **RANGED), (450, 400)),
    ],
)
def test_other_tasks_and_dtypes(tmp_path, contract, center):
    torch.manual_seed(0)
    model = nn.Conv2d(2, 2, 1)
    export_model(model, contract, tmp_path / "model.onnx")
    image = (np.reshape(center, (1, 1, 2)) + RNG.normal(0, 2, (12, 9, 2))).astype(contract.dtype)
    image[2:5, 3:] = contract.nodata
    with torch.no_grad():
        logits = model(contract.prepare(image)[0][None])
        wanted, empty = (contract.probabilities(x) for x in (logits, model.bias[None, :, None, None]))
    found = run_onnx(tmp_path / "model.onnx", image.transpose(2, 0, 1)[None])
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-6)
    assert found[0, :, 3, 5].tolist() == pytest.approx(empty.flatten().tolist(), abs=1e-6)


class Halving(nn.Module):
    """Joins what was halved twice: sizes have to be multiples of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        small = functional.max_pool2d(functional.max_pool2d(x, 2), 2)
        return self.head(torch.cat([x, functional.interpolate(small, scale_factor=4.0)], 1))


def test_a_model_that_needs_multiples_says_so(tmp_path):
    model, path = Halving(), tmp_path / "model.onnx"
    export_model(model, DataContract(2, task="values"), path)
    assert onnx_metadata(path)["sizes"] == "multiples of 4 pixels"
    x = RNG.random((2, 2, 12, 28), dtype=np.float32)
    with torch.no_grad():
        np.testing.assert_allclose(run_onnx(path, x), model(torch.from_numpy(x)), atol=1e-5)


def test_the_callers_model_stays_as_it_is(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).to(torch.bfloat16).train()
    before = copy.deepcopy(model.state_dict())
    export_model(model, DataContract(2), tmp_path / "model.safetensors")
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert weights_digest(model.state_dict()) == weights_digest(before)


class Moody(nn.Module):
    """Computes something else while it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if torch.compiler.is_exporting() else x


class Branching(nn.Module):
    """Decides by the values of the image."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else 2 * x


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_an_export_that_differs_is_not_written(tmp_path, kind):
    (tmp_path / "model").write_text("older")
    with pytest.raises(ExportError, match=r"differs from PyTorch by .*, at most 0\.0001 is allowed"):
        export_model(Moody(), DataContract(2), tmp_path / "model", kind)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["older"]


def test_what_cannot_be_exported_says_why(tmp_path):
    with pytest.raises(ExportError, match=r"Branching: torch\.export takes it with no .* data-dependent"):
        export_model(Branching(), DataContract(2), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named(tmp_path, trained, monkeypatch):
    with pytest.raises(ExportError, match=r"its ending is none of \.onnx, \.pt2, \.safetensors"):
        export_run(trained.global_config, "latest", tmp_path / "model.tflite")
    with pytest.raises(UserError, match="no run is called 'nothing'"):
        export_run(trained.global_config, "nothing", tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r'onnxruntime is not installed.*-e "\.\[export\]"'):
        export_run(trained.global_config, "latest", tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
