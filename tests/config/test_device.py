import platform
import warnings
from pathlib import Path

import pytest
import torch

from dida_tools.config.device import PRECISIONS, get_device, get_precision
from dida_tools.training.device import DeviceContext

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
needs_no_mps = pytest.mark.skipif(
    torch.backends.mps.is_available(), reason="needs a machine without an Apple GPU"
)


def assert_is_one_sentence(text):
    assert text.endswith(".")
    assert "\n" not in text
    assert len(text) < 160


def best_device():
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@pytest.mark.parametrize("requested", [None, "auto"])
def test_auto_takes_the_best_device_of_the_machine(requested):
    assert get_device(requested) == best_device()


@pytest.mark.parametrize("requested", ["cpu", CPU])
def test_a_requested_cpu_is_given(requested):
    assert get_device(requested) == CPU


@needs_no_gpu
@pytest.mark.parametrize("requested", ["cuda", "cuda:1", torch.device("cuda"), torch.device("cuda", 0)])
def test_cuda_on_a_machine_without_is_refused_in_one_sentence(requested):
    with pytest.raises(
        ValueError, match=f"DEVICE is '{requested}' but .*: use DEVICE=auto .* or DEVICE=cpu"
    ) as caught:
        get_device(requested)
    assert_is_one_sentence(str(caught.value))


@needs_no_mps
def test_mps_on_a_machine_without_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="DEVICE is 'mps' but this machine has no Apple GPU") as caught:
        get_device("mps")
    assert_is_one_sentence(str(caught.value))


@pytest.mark.parametrize("requested", ["gpu", "", "cuda:-1", "cuda:first", "CPU", 1.5])
def test_what_is_no_device_is_refused_in_one_sentence(requested):
    with pytest.raises(ValueError, match=r"DEVICE is .*: choose one of auto, cpu, cuda") as caught:
        get_device(requested)
    assert_is_one_sentence(str(caught.value))


@needs_gpu
def test_cuda_is_given_where_it_is():
    assert get_device("cuda") == torch.device("cuda")
    assert get_device("cuda:0") == torch.device("cuda", 0)


@needs_gpu
def test_a_gpu_beyond_the_last_is_refused():
    number = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"DEVICE is 'cuda:{number}' but there are {number} GPUs"):
        get_device(f"cuda:{number}")


@pytest.mark.parametrize("requested", [None, "auto"])
def test_auto_precision_is_one_that_the_cpu_can_do(requested):
    assert get_precision(CPU, requested) in ("fp32", "bf16")


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64", reason="needs /proc/cpuinfo"
)
def test_auto_precision_is_bf16_exactly_where_the_cpu_computes_it():
    flags = next(
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")
    ).split()
    expected = "bf16" if {"avx512_bf16", "amx_tile"} & set(flags) else "fp32"
    assert get_precision(CPU) == expected


def test_auto_precision_is_fp32_where_torch_cannot_tell(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert get_precision(CPU) == "fp32"


@pytest.mark.parametrize("requested", ["fp32", "bf16"])
def test_a_requested_precision_is_given(requested):
    assert get_precision(CPU, requested) == requested


@pytest.mark.parametrize("requested", ["fp64", "float32", "BF16", "", torch.bfloat16])
def test_an_unknown_precision_is_refused_with_the_known_ones(requested):
    with pytest.raises(ValueError, match="choose one of auto, fp32, bf16, fp16") as caught:
        get_precision(CPU, requested)
    assert_is_one_sentence(str(caught.value))


def test_fp16_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match="PRECISION is 'fp16' but the device is 'cpu'") as caught:
        get_precision(CPU, "fp16")
    assert_is_one_sentence(str(caught.value))


def product(device, weight):
    """1 + 2 ** -10 is a float32 but no bfloat16."""
    return torch.full((1, 1), 1 + 2**-10, device=device) @ weight


def test_bf16_really_computes_in_bf16_and_keeps_the_weights():
    weight = torch.ones(1, 1)
    with DeviceContext(CPU, "bf16").autocast():
        result = product(CPU, weight)
    assert result.dtype == torch.bfloat16
    assert result.item() == 1
    assert weight.dtype == torch.float32


def test_fp32_computes_in_float32_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with DeviceContext(CPU, "fp32").autocast():
            result = product(CPU, torch.ones(1, 1))
    assert result.dtype == torch.float32
    assert result.item() == 1 + 2**-10


def test_fp32_computes_in_float32_within_bf16_too():
    with DeviceContext(CPU, "bf16").autocast(), DeviceContext(CPU, "fp32").autocast():
        assert product(CPU, torch.ones(1, 1)).dtype == torch.float32


def test_the_context_ends_with_the_block():
    with DeviceContext(CPU, "bf16").autocast():
        pass
    assert product(CPU, torch.ones(1, 1)).dtype == torch.float32


@needs_gpu
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_gpu_computes_in_the_requested_precision(precision, dtype):
    device = get_device("cuda")
    assert get_precision(device, precision) == precision
    with DeviceContext(device, precision).autocast():
        assert product(device, torch.ones(1, 1, device=device)).dtype == dtype


@needs_gpu
def test_auto_precision_of_a_gpu_follows_its_hardware():
    expected = "bf16" if torch.cuda.get_device_capability() >= (8, 0) or torch.version.hip else "fp32"
    assert get_precision(torch.device("cuda")) == expected


@needs_gpu
def test_fp32_on_the_gpu_computes_in_float32():
    device = get_device("cuda")
    with DeviceContext(device, "fp32").autocast():
        assert product(device, torch.ones(1, 1, device=device)).dtype == torch.float32


def test_every_precision_has_a_context():
    for precision in PRECISIONS:
        assert isinstance(DeviceContext(torch.device("cpu"), precision).autocast(), torch.autocast)
