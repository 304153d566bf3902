import platform
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from dida_core.config.project import project_of
from dida_core.errors import UserError
from dida_core.training.device import DeviceContext, choose_context
from torch import Tensor

from dida_tools.config.config import make_global_config
from dida_tools.config.device import PRECISIONS, get_device, get_precision

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
no_mps = pytest.mark.skipif(torch.backends.mps.is_available(), reason="needs a machine without an Apple GPU")
WITHOUT = "but .*: use DEVICE=auto .* or DEVICE=cpu"
UNKNOWN_DEVICES = ["gpu", "", "cuda:-1", "cuda:first", "CPU", 1.5]
UNKNOWN_PRECISIONS = ["fp64", "float32", "BF16", "", torch.bfloat16]


def refusal(choose: Any, *arguments: Any) -> str:
    """Return the sentence by which something is refused."""
    with pytest.raises(UserError) as caught:
        choose(*arguments)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and len(text) < 160
    return text


@pytest.mark.parametrize("requested", [None, "auto"])
def test_auto_takes_the_best_device_of_the_machine(requested):
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert get_device(requested) == torch.device(best)


@pytest.mark.parametrize("requested", ["cpu", CPU])
def test_a_requested_cpu_is_given(requested):
    assert get_device(requested) == CPU


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        *[pytest.param(one, f"DEVICE is '{one}' {WITHOUT}", marks=no_gpu) for one in ("cuda", "cuda:1")],
        pytest.param(torch.device("cuda", 0), f"DEVICE is 'cuda:0' {WITHOUT}", marks=no_gpu),
        pytest.param("mps", "DEVICE is 'mps' but this machine has no Apple GPU", marks=no_mps),
        *[(one, "DEVICE is .*: choose one of auto, cpu, cuda") for one in UNKNOWN_DEVICES],
        pytest.param("cuda:99", "DEVICE is 'cuda:99' but there are .* GPUs", marks=needs_gpu),
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


@pytest.mark.parametrize("requested", ["fp32", "bf16"])
def test_a_requested_precision_is_given(requested):
    assert get_precision(CPU, requested) == requested


@pytest.mark.parametrize("requested", UNKNOWN_PRECISIONS)
def test_an_unknown_precision_is_refused_with_the_known_ones(requested):
    assert "choose one of auto, fp32, bf16, fp16" in refusal(get_precision, CPU, requested)


def test_fp16_on_the_cpu_is_refused():
    assert "PRECISION is 'fp16' but the device is 'cpu'" in refusal(get_precision, CPU, "fp16")


# ------------------------------------------------------------------------------------------------ the context


def product(device: torch.device) -> Tensor:
    """Return 1 + 2 ** -10, which is a float32 but no bfloat16."""
    return torch.full((1, 1), 1 + 2**-10, device=device) @ torch.ones(1, 1, device=device)


@pytest.mark.parametrize(
    ("device", "precision", "dtype"),
    [
        ("cpu", "fp32", torch.float32),
        ("cpu", "bf16", torch.bfloat16),
        pytest.param("cuda", "fp32", torch.float32, marks=needs_gpu),
        pytest.param("cuda", "bf16", torch.bfloat16, marks=needs_gpu),
        pytest.param("cuda", "fp16", torch.float16, marks=needs_gpu),
    ],
)
def test_the_forward_pass_is_computed_in_the_precision(device, precision, dtype):
    context = DeviceContext(torch.device(device), precision)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with DeviceContext(context.device, "bf16").autocast(), context.autocast():
            result = product(context.device)
    assert result.dtype == dtype and result.item() == (1 if dtype == torch.bfloat16 else 1 + 2**-10)
    assert product(context.device).dtype == torch.float32


def test_every_precision_has_a_context():
    for precision in PRECISIONS:
        assert isinstance(DeviceContext(CPU, precision).autocast(), torch.autocast)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 4, 5, 6)])
def test_images_alone_are_moved_into_the_memory_format(shape, channels_last):
    inputs = torch.randn(shape)
    moved = DeviceContext(CPU, channels_last=channels_last).move(inputs)
    is_changed = channels_last and len(shape) == 4
    assert torch.equal(moved, inputs) and moved.is_contiguous() != is_changed
    assert not is_changed or moved.is_contiguous(memory_format=torch.channels_last)


def test_device_and_precision_are_those_that_the_project_chooses(monkeypatch):
    project = project_of(make_global_config.__module__)
    assert choose_context(project, "cpu", "bf16", False) == DeviceContext(CPU, "bf16", False)
    assert choose_context(project).device == get_device()
    monkeypatch.setattr(
        project.module(".config.device"), "get_device", lambda requested: torch.device("meta")
    )
    assert choose_context(project, "cpu", "fp32") == DeviceContext(torch.device("meta"), "fp32", True)
