"""The choice of device and precision, what is refused, and what a forward pass is computed in."""

import platform
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from dida_core.data.images import DataError
from dida_core.errors import UserError
from dida_core.training.device import DeviceContext
from dida_core.training.setup import prepare
from torch import Tensor

from dida_tools.config import device as device_module
from dida_tools.config.device import get_device, get_precision

from tests.helpers import PACKAGE

CPU = torch.device("cpu")
HAS_CUDA, HAS_MPS = torch.cuda.is_available(), torch.backends.mps.is_available()
needs_gpu = pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU")
no_gpu = pytest.mark.skipif(HAS_CUDA, reason="needs a machine without a GPU")
no_mps = pytest.mark.skipif(HAS_MPS, reason="needs a machine without an Apple GPU")
WITHOUT = "but .*: use DEVICE=auto .* or DEVICE=cpu"


def refusal(choose: Any, *arguments: Any) -> str:
    """Return the sentence by which something is refused."""
    with pytest.raises(UserError) as caught:
        choose(*arguments)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and len(text) < 160
    return text


def test_auto_takes_the_best_device_and_a_requested_one_is_given():
    best = torch.device("cuda" if HAS_CUDA else "mps" if HAS_MPS else "cpu")
    assert get_device() == get_device("auto") == best
    assert get_device("cpu") == get_device(CPU) == CPU


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        pytest.param("cuda", f"DEVICE is 'cuda' {WITHOUT}", marks=no_gpu),
        pytest.param(torch.device("cuda", 0), f"DEVICE is 'cuda:0' {WITHOUT}", marks=no_gpu),
        pytest.param("mps", "DEVICE is 'mps' but this machine has no Apple GPU", marks=no_mps),
        pytest.param("cuda:99", "DEVICE is 'cuda:99' but there are .* GPUs", marks=needs_gpu),
        *[
            (one, "DEVICE is .*: choose one of auto, cpu, cuda")
            for one in ("gpu", "", "cuda:-1", "cuda:first", "CPU", 1.5)
        ],
    ],
)
def test_other_devices_are_refused_in_a_sentence(requested, expected):
    assert re.match(expected, refusal(get_device, requested))


@needs_gpu
def test_cuda_is_given_where_it_is():
    assert get_device("cuda") == torch.device("cuda") and get_device("cuda:0") == torch.device("cuda", 0)
    expected = "bf16" if torch.cuda.get_device_capability() >= (8, 0) or torch.version.hip else "fp32"
    assert get_precision(torch.device("cuda")) == expected


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64", reason="x86 Linux")
def test_auto_precision_is_bf16_exactly_where_the_cpu_computes_it():
    text = Path("/proc/cpuinfo").read_text()
    flags = next(line for line in text.splitlines() if line.startswith("flags")).split()
    expected = "bf16" if {"avx512_bf16", "amx_tile"} & set(flags) else "fp32"
    assert get_precision(CPU) == get_precision(CPU, "auto") == expected


def test_auto_precision_is_fp32_where_torch_cannot_tell(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert get_precision(CPU) == get_precision(torch.device("mps")) == "fp32"


def test_a_requested_precision_is_given_or_refused():
    assert [get_precision(CPU, one) for one in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert "PRECISION is 'fp16' but the device is 'cpu'" in refusal(get_precision, CPU, "fp16")
    for unknown in ("fp64", "float32", "BF16", "", torch.bfloat16):
        assert "choose one of auto, fp32, bf16, fp16" in refusal(get_precision, CPU, unknown)


# ------------------------------------------------------------------------------------------------ the context


def product(device: torch.device) -> Tensor:
    """Return 1 + 2 ** -10, which is a float32 but no bfloat16."""
    return torch.full((1, 1), 1 + 2**-10, device=device) @ torch.ones(1, 1, device=device)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_the_forward_pass_is_computed_in_the_precision(device):
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    for precision, dtype in (dtypes | ({"fp16": torch.float16} if device == "cuda" else {})).items():
        context = DeviceContext(torch.device(device), precision)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with DeviceContext(context.device, "bf16").autocast(), context.autocast():
                result = product(context.device)
        assert result.dtype == dtype and result.item() == (1 if dtype == torch.bfloat16 else 1 + 2**-10)
        assert product(context.device).dtype == torch.float32


def test_images_alone_are_moved_into_the_memory_format():
    for shape in [(4,), (4, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 4, 5, 6)]:
        for channels_last in (True, False):
            inputs = torch.randn(shape)
            moved = DeviceContext(CPU, channels_last=channels_last).move(inputs)
            is_changed = channels_last and len(shape) == 4
            assert torch.equal(moved, inputs) and moved.is_contiguous() != is_changed
            assert not is_changed or moved.is_contiguous(memory_format=torch.channels_last)


def test_device_and_precision_are_those_that_this_project_chooses(
    datasets, tiny_config, global_config, monkeypatch
):
    monkeypatch.setattr(device_module, "get_precision", lambda device, requested: f"{requested} on {device}")
    with pytest.raises(DataError, match="fp32 on cpu"):  # no number format that a forward pass knows
        prepare(*datasets, tiny_config, global_config, None, PACKAGE)
