"""An exported model takes raw values of any size and answers as prediction does; what would not is not written."""

import copy
import dataclasses
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
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import dida_tools
from dida_tools.config.config import make_global_config
from dida_tools.config.errors import UserError
from dida_tools.models import UNET
from dida_tools.prediction import predict
from dida_tools.prediction.export import (
    KINDS,
    METADATA_FILE,
    TOLERANCE,
    ExportError,
    export_onnx,
    export_program,
    export_run,
)
from dida_tools.training.pytorch_training import train
from dida_tools.utils.data import NpyDataset
from dida_tools.utils.data.contract import DataContract
from dida_tools.utils.loss import multi_class_dice_ce_sum
from dida_tools.utils.torchutils import load_model
from dida_tools.utils.weights import load_weights, save_weights, weights_digest

ROOT = Path(dida_tools.__file__).parents[1]
RNG = np.random.default_rng(0)
SIZES = [(1, 16, 16), (2, 33, 50), (1, 5, 97), (3, 64, 21)]
MODEL_CONFIG = {"ch_in": 3, "ch_out": 3, "bulk_ch": 4, "n_recursions": 2}


@dataclasses.dataclass
class Run:
    """A tracked run, and its model."""

    global_config: dict[str, str]
    name: str
    weights: Path
    model: nn.Module
    contract: DataContract


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, pairs_dir: Path) -> Run:
    """A run whose contract has everything: statistics, nodata, a temperature, names and thresholds."""
    places = make_global_config(tmp_path_factory.mktemp("project"))
    config = {
        "SESSION_NAME": "exported", "MODEL": UNET, "MODEL_CONFIG": MODEL_CONFIG, "LOSS": multi_class_dice_ce_sum,
        "OPTIMIZER": torch.optim.AdamW, "OPTIMIZER_CONFIG": {"lr": 1e-2}, "EPOCHS": 2, "MONITOR": "min loss",
        "DATA_LOADER_CONFIG": {"batch_size": 4}, "DEVICE": "cpu", "PRECISION": "fp32", "METRICS": {},
    }  # fmt: skip
    parts = [NpyDataset(pairs_dir / part / "x", pairs_dir / part / "y") for part in ("train", "test")]
    name = train(*parts, training_config=config, global_config=places).name
    weights = Path(places["WEIGHT_DIR"]) / name / "best.pt"
    stored = load_weights(weights)
    contract = dataclasses.replace(
        DataContract.from_dict(stored["contract"]),
        nodata=0,
        temperature=1.7,
        class_names=("ground", "tree", "house"),
    )
    save_weights(weights, stored | {"contract": contract.to_dict()})
    return Run(places, name, weights, load_model(weights, UNET, MODEL_CONFIG), contract)


@pytest.fixture(scope="module")
def onnx_file(trained: Run) -> Path:
    path = trained.weights.with_name("model.onnx")
    assert export_run(trained.global_config, "exported", path) <= TOLERANCE
    return path


@pytest.fixture(scope="module")
def program_file(trained: Run) -> Path:
    path = trained.weights.with_name("model.pt2")
    assert export_run(trained.global_config, "latest", path) <= TOLERANCE
    return path


def raw_images(batch: int, height: int, width: int) -> np.ndarray:
    images = RNG.integers(1, 256, (batch, 3, height, width), dtype=np.uint8)
    images[:, :, : height // 2, : width // 3] = 0  # no data
    images[:, 0, -1] = 0  # data: the other channels hold some
    return images


def expected(run: Run, images: np.ndarray) -> np.ndarray:
    """Everything by hand, in float64 but for the model."""
    mean, std = (np.reshape(values, (1, 3, 1, 1)) for values in (run.contract.mean, run.contract.std))
    values = (images / 255 - mean) / std
    values *= (images != 0).any(1, keepdims=True)
    with torch.no_grad():
        logits = run.model(torch.from_numpy(values.astype(np.float32))).double()
    return (logits / 1.7).softmax(1).numpy()


def run_onnx(path: Path, images: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": images.astype(np.float32)})[0]


# ----------------------------------------------------------------------------------------------------------------- ONNX


@pytest.mark.parametrize("size", [*SIZES, (1, 1, 1), (1, 4, 130)])
def test_onnx_answers_as_the_model_at_every_size(
    trained: Run, onnx_file: Path, size: tuple[int, int, int]
) -> None:
    images = raw_images(*size)
    found = run_onnx(onnx_file, images)
    assert (found.dtype, found.shape) == (np.float32, images.shape)
    np.testing.assert_allclose(found, expected(trained, images), atol=1e-5)


def test_onnx_is_valid_and_names_its_axes(onnx_file: Path) -> None:
    proto = onnx.load(onnx_file)
    onnx.checker.check_model(proto, full_check=True)
    for value, name, channels in ((proto.graph.input, "image", 3), (proto.graph.output, "probabilities", 3)):
        (value,) = value
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert (value.name, dims) == (name, ["batch", channels, "height", "width"])


def check_metadata(metadata: dict[str, str], trained: Run) -> None:
    assert DataContract.from_dict(json.loads(metadata["contract"])) == trained.contract
    assert json.loads(metadata["class_names"]) == ["ground", "tree", "house"]
    assert json.loads(metadata["threshold"]) == trained.contract.threshold
    assert metadata["version"].endswith(dida_tools.__version__) and metadata["run"] == trained.name
    assert metadata["weights_sha256"] == weights_digest(load_weights(trained.weights)["model"])
    assert json.loads(metadata["model"])["@ref"].endswith(":UNET")
    assert json.loads(metadata["model_config"]) == MODEL_CONFIG


def test_onnx_carries_the_contract(trained: Run, onnx_file: Path) -> None:
    metadata = onnxruntime.InferenceSession(onnx_file).get_modelmeta().custom_metadata_map
    check_metadata(metadata, trained)
    assert metadata["sizes"] == "edges of 1 pixels or more"


def test_the_script_predicts_without_this_project(tmp_path: Path, trained: Run, onnx_file: Path) -> None:
    np.save(tmp_path / "scene.npy", raw_images(1, 45, 38)[0].transpose(1, 2, 0))
    (written,) = predict({
        "MODEL": UNET, "MODEL_CONFIG": MODEL_CONFIG, "WEIGHTS": trained.weights, "FILES": tmp_path / "scene.npy",
        "OUT_DIR": tmp_path / "out", "DEVICE": "cpu", "PRECISION": "fp32",
    })  # fmt: skip
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(torch=None, {dida_tools.__name__}=None)\n"  # importing them is an error
        "script, *sys.argv[1:] = sys.argv[1:]\n"
        "runpy.run_path(script)\n"
    )
    script = ROOT / "tools" / "predict_onnx.py"
    command = [
        sys.executable,
        "-I",
        "-c",
        code,
        script,
        onnx_file,
        tmp_path / "scene.npy",
        tmp_path / "classes.npy",
    ]
    subprocess.run(list(map(str, command)), cwd=tmp_path, check=True)
    found = np.load(tmp_path / "classes.npy")
    assert len(np.unique(found)) > 1
    expected = np.load(written)
    valid = expected != 255  # where the image has data; the script does not look for it
    assert found.dtype == np.uint8 and valid.mean() > 0.5 and np.array_equal(found[valid], expected[valid])
    lines = [
        line
        for line in script.read_text().splitlines()
        if line and not line.startswith(('"', "import", "from"))
    ]
    assert len(lines) <= 20
    np.save(tmp_path / "scene.npy", np.zeros((9, 9, 4), np.uint8))
    refused = subprocess.run(
        list(map(str, command)), cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert refused.returncode == 1 and "its dtype and channels are ('uint8', 4)" in refused.stderr


# --------------------------------------------------------------------------------------------------------- torch.export


def test_the_program_answers_as_the_model_carries_the_contract_and_refuses_what_is_too_small(
    trained: Run, program_file: Path
) -> None:
    extra = {METADATA_FILE: ""}
    module = torch.export.load(program_file, extra_files=extra).module()  # takes seconds
    for size in SIZES:
        images = raw_images(*size)
        found = module(torch.from_numpy(images).float()).numpy()
        np.testing.assert_allclose(found, expected(trained, images), atol=1e-5)
    metadata = json.loads(extra[METADATA_FILE])
    check_metadata(metadata, trained)
    assert metadata["sizes"] == "edges of 5 pixels or more"
    with pytest.raises(AssertionError, match="Guard failed"):
        module(torch.zeros(1, 3, 4, 9))


# ---------------------------------------------------------------------------------------------------------- safetensors


def test_the_command_writes_safetensors(tmp_path: Path, trained: Run) -> None:
    command = [
        sys.executable,
        "-m",
        "dida_tools.prediction.export",
        "latest",
        "--to",
        "safetensors",
        "-o",
        "weights",
    ]
    environment = os.environ | {"ROOT_PATH": trained.global_config["ROOT_PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("weights is written") and "Warning" not in done.stderr
    state = load_file(tmp_path / "weights")
    assert weights_digest(state) == weights_digest(trained.model.state_dict())
    with safe_open(tmp_path / "weights", "pt") as file:
        check_metadata(file.metadata(), trained)


# -------------------------------------------------------------------------------------------------------- any contract


@pytest.mark.parametrize(
    "contract",
    [
        DataContract(
            2, dtype="float32", mean=(1e6, -3.0), std=(0.5, 2.0), nodata=float("nan"), task="values"
        ),
        DataContract(
            2, dtype="int32", scale=0.01, minimum=(0, 5), maximum=(900, 800), nodata=-9999, task="multi-label"
        ),
    ],
)
def test_other_tasks_and_dtypes(tmp_path: Path, contract: DataContract) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(2, 2, 1)
    export_onnx(model, contract, tmp_path / "model.onnx")
    values = {"float32": (1e6, -3.0), "int32": (450, 400)}[contract.dtype]
    image = (np.reshape(values, (1, 1, 2)) + RNG.normal(0, 2, (12, 9, 2))).astype(contract.dtype)
    image[2:5, 3:] = contract.nodata
    with torch.no_grad():
        logits = model(contract.prepare(image)[0][None])
    wanted = logits if contract.task == "values" else logits.sigmoid()
    found = run_onnx(tmp_path / "model.onnx", image.transpose(2, 0, 1)[None])
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-6)
    assert found[0, :, 3, 5].tolist() == pytest.approx(
        (model.bias if contract.task == "values" else model.bias.sigmoid()).tolist(), abs=1e-6
    )


class Halving(nn.Module):
    """Joins what was halved twice: sizes have to be multiples of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        small = functional.max_pool2d(functional.max_pool2d(x, 2), 2)
        return self.head(torch.cat([x, functional.interpolate(small, scale_factor=4.0)], 1))


def test_a_model_that_needs_multiples_says_so(tmp_path: Path) -> None:
    model = Halving()
    export_onnx(model, DataContract(2, task="values"), tmp_path / "model.onnx")
    metadata = onnxruntime.InferenceSession(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map
    assert metadata["sizes"] == "edges of 1 pixels or more, multiples of 4"
    x = RNG.random((2, 2, 12, 28), dtype=np.float32)
    with torch.no_grad():
        np.testing.assert_allclose(
            run_onnx(tmp_path / "model.onnx", x), model(torch.from_numpy(x)), atol=1e-5
        )


def test_the_callers_model_stays_as_it_is(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).to(torch.bfloat16).train()
    before = copy.deepcopy(model.state_dict())
    KINDS["safetensors"](model, DataContract(2), tmp_path / "model.safetensors")
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert weights_digest(model.state_dict()) == weights_digest(before)


# ------------------------------------------------------------------------------------------------------------- refusals


class Forgetful(nn.Module):
    """Answers otherwise from its second call on, which an exported program cannot know."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.calls = nn.Parameter(torch.ones(())), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.scale * self.calls


class Branching(nn.Module):
    """Decides by the values of the image."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else 2 * x


@pytest.mark.parametrize("write", [export_onnx, export_program])
def test_an_export_that_differs_is_not_written(tmp_path: Path, write: Any) -> None:
    (tmp_path / "model").write_text("older")
    with pytest.raises(ExportError, match=r"differs from PyTorch by .*, at most 0\.0001 is allowed"):
        write(Forgetful(), DataContract(2), tmp_path / "model")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["older"]


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"Branching: torch\.export takes it with no dynamic .* data-dependent"
    ):
        export_program(Branching(), DataContract(2), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named(tmp_path: Path, trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"its ending is none of \.onnx, \.pt2, \.safetensors"):
        export_run(trained.global_config, "latest", tmp_path / "model.tflite")
    with pytest.raises(UserError, match="no run is called 'nothing'"):
        export_run(trained.global_config, "nothing", tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r'onnxruntime is not installed.*-e "\.\[export\]"'):
        export_run(trained.global_config, "latest", tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
