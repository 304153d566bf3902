"""An exported model takes raw values of any size and predicts as prediction does; others are not written."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from dida_core.data.contract import DataContract
from dida_core.errors import UserError
from dida_core.export import export
from dida_core.export.export import METADATA_FILE, TOLERANCE, ExportError, export_model, export_run
from dida_core.prediction import predict
from dida_core.storage.weights import weights_digest
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

import dida_tools
from dida_tools.config.config import global_config

from tests.helpers import PACKAGE, ROOT

RNG = np.random.default_rng(0)
SIZES = [(1, 16, 16), (2, 33, 50), (1, 5, 97), (3, 64, 21)]
KINDS = ["pt2", pytest.param("onnx", marks=pytest.mark.slow)]  # of what does not depend on the kind

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporters warn of their own future


@pytest.fixture(scope="module")
def onnx_file(small_run: SimpleNamespace) -> Path:
    path = small_run.weights.with_name("model.onnx")
    assert export_run(small_run.global_config, "small", path) <= TOLERANCE
    return path


def raw_images(batch: int, height: int, width: int) -> np.ndarray:
    images = RNG.integers(1, 256, (batch, 3, height, width), dtype=np.uint8)
    images[:, :, : height // 2, : width // 3] = 0  # no data
    images[:, 0, -1] = 0  # data: the other channels hold some
    return images


def expected(run: SimpleNamespace, images: np.ndarray) -> np.ndarray:
    """Return everything by hand, in float64 but for the model."""
    mean, std = (np.reshape(values, (1, 3, 1, 1)) for values in (run.contract.mean, run.contract.std))
    values = (images / 255 - mean) / std
    values *= (images != 0).any(1, keepdims=True)
    with torch.no_grad():
        logits = run.model(torch.from_numpy(values.astype(np.float32))).double()
    return (logits / run.contract.temperature).softmax(1).numpy()


def load(path: Path) -> tuple[Callable[[np.ndarray], np.ndarray], dict[str, str]]:
    """Return a function that predicts with an exported model, and its metadata."""
    if path.suffix == ".pt2":
        extra = {METADATA_FILE: ""}
        module = torch.export.load(path, extra_files=extra).module()
        run = lambda images: module(torch.from_numpy(images).float()).numpy()  # noqa: E731
        return run, json.loads(extra[METADATA_FILE])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    run = lambda images: session.run(None, {"image": images.astype(np.float32)})[0]  # noqa: E731
    return run, session.get_modelmeta().custom_metadata_map


def check_metadata(metadata: dict[str, str], run: SimpleNamespace) -> None:
    assert DataContract.from_dict(json.loads(metadata["contract"])) == run.contract
    assert json.loads(metadata["class_names"]) == ["ground", "left", "right"]
    assert json.loads(metadata["threshold"]) == run.contract.threshold
    assert metadata["version"].endswith(dida_tools.__version__) and metadata["run"] == run.name
    assert metadata["weights_sha256"] == weights_digest(run.model.state_dict())
    assert json.loads(metadata["model"])["@ref"].endswith(":UNET")
    assert json.loads(metadata["model_config"])["ch_out"] == 3


def test_onnx_predicts_as_the_model_at_every_size_and_carries_the_contract(small_run, onnx_file):
    run, metadata = load(onnx_file)
    for size in [*SIZES, (1, 1, 1), (1, 4, 130)]:
        images = raw_images(*size)
        found = run(images)
        assert (found.dtype, found.shape) == (np.float32, images.shape)
        np.testing.assert_allclose(found, expected(small_run, images), atol=1e-5)
    check_metadata(metadata, small_run)
    assert metadata["sizes"] == "any" and metadata["input"].endswith("values as in the uint8 files")
    proto = onnx.load(onnx_file)
    onnx.checker.check_model(proto, full_check=True)
    for (value,), name in ((proto.graph.input, "image"), (proto.graph.output, "probabilities")):
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert (value.name, dims) == (name, ["batch", 3, "height", "width"])


@pytest.mark.slow
def test_the_program_predicts_as_the_model_and_carries_the_contract(tmp_path, small_run):
    assert export_run(small_run.global_config, "latest", tmp_path / "model.pt2") <= TOLERANCE
    run, metadata = load(tmp_path / "model.pt2")
    for size in SIZES:
        images = raw_images(*size)
        np.testing.assert_allclose(run(images), expected(small_run, images), atol=1e-5)
    check_metadata(metadata, small_run)
    with pytest.raises(AssertionError, match="Guard failed"):
        run(raw_images(1, 4, 9))  # below 2 ** n_recursions + 1


def test_the_script_predicts_without_this_project(tmp_path, small_run, onnx_file):
    np.save(tmp_path / "scene.npy", raw_images(1, 45, 38)[0].transpose(1, 2, 0))
    config = {key: small_run.config[key] for key in ("MODEL", "MODEL_CONFIG", "DEVICE", "PRECISION")}
    places = {"FILES": tmp_path / "scene.npy", "OUT_DIR": tmp_path / "out", "WEIGHTS": small_run.weights}
    (written,) = predict(config | places)
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


def test_the_command_writes_safetensors(tmp_path, small_run, monkeypatch, capsys):
    for key, value in small_run.global_config.items():
        monkeypatch.setitem(global_config, key, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export", "latest", "--to", "safetensors", "-o", "file"])
    assert export.main() == 0 and capsys.readouterr().out.startswith("file is written")
    with safe_open(tmp_path / "file", "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert weights_digest(state) == weights_digest(small_run.model.state_dict())
        check_metadata(file.metadata(), small_run)


VALUES = {"task": "values", "mean": (1e6, -3.0), "std": (0.5, 2.0), "nodata": float("nan")}
LABELS = {"task": "multi-label", "scale": 0.01, "minimum": (0, 5), "maximum": (900, 800), "nodata": -9999}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "options", "center"), [("float32", VALUES, (1e6, -3.0)), ("int32", LABELS, (450, 400))]
)
def test_other_tasks_and_dtypes(tmp_path, dtype, options, center, kind):
    torch.manual_seed(0)
    model, contract = nn.Conv2d(2, 2, 1), DataContract(2, dtype=dtype, outputs=2, **options)
    export_model(model, contract, tmp_path / f"model.{kind}")
    image = (np.reshape(center, (1, 1, 2)) + RNG.normal(0, 2, (12, 9, 2))).astype(dtype)
    image[2:5, 3:] = contract.nodata
    with torch.no_grad():
        logits = model(contract.prepare(image)[0][None])
        wanted, empty = (contract.probabilities(x) for x in (logits, model.bias[None, :, None, None]))
    found = load(tmp_path / f"model.{kind}")[0](image.transpose(2, 0, 1)[None].copy())
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_needs_multiples_says_so(tmp_path, kind):
    model, path = Halving(), tmp_path / f"model.{kind}"
    export_model(model, DataContract(2, task="values"), path)
    run, metadata = load(path)
    assert metadata["sizes"] == "multiples of 4 pixels"
    x = RNG.random((2, 2, 12, 28), dtype=np.float32)
    with torch.no_grad():
        np.testing.assert_allclose(run(x), model(torch.from_numpy(x)), atol=1e-5)


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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Moody(), r"differs from PyTorch by .*, at most 0\.0001 is allowed"),
        (Branching(), r"Branching: torch\.export takes it with no .* data-dependent"),
        (nn.Linear(2, 2), "Linear: fails for images of 64 x n pixels"),
    ],
)
def test_what_cannot_be_exported_is_not_written_and_says_why(tmp_path, kind, model, message):
    (tmp_path / "model").write_text("older")
    with pytest.raises(ExportError, match=message):
        export_model(model, DataContract(2), tmp_path / "model", kind)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["older"]


def test_what_is_missing_is_named(tmp_path, small_run, monkeypatch):
    with pytest.raises(ExportError, match=r"its ending is none of \.onnx, \.pt2, \.safetensors"):
        export_run(small_run.global_config, "latest", tmp_path / "model.tflite")
    with pytest.raises(UserError, match="no run is called 'nothing'"):
        export_run(small_run.global_config, "nothing", tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r'onnxruntime is not installed.*-e "\.\[export\]"'):
        export_run(small_run.global_config, "latest", tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
