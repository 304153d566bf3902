"""The parity cases end with the weights of version 0.1, bit for bit, in every routine."""

import json
from pathlib import Path

import pytest
import torch

from tests_core.training.test_parity import CASES, ROUTINES, end_of  # noqa: F401  end_of is a fixture

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]


def machine() -> dict[str, str]:
    """Tell on what the last bit of a convolution depends."""
    images = torch.linspace(-1, 1, 5 * 12 * 40 * 40).reshape(5, 12, 40, 40)
    kernels = torch.linspace(-1, 1, 16 * 12 * 9).reshape(16, 12, 3, 3)
    return {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "amx": str(torch.cpu._is_amx_tile_supported()),
        "convolution": repr(torch.nn.functional.conv2d(images, kernels).double().sum().item()),
    }


@pytest.mark.parametrize("routine", ROUTINES)
@pytest.mark.parametrize("case", sorted({name.rpartition("/")[0] for name in GOLDEN["digests"]}))
def test_the_weights_are_those_of_version_0_1(end_of, case, routine):  # noqa: F811
    if machine() != GOLDEN["machine"]:
        pytest.skip("golden.json is of another machine or torch: another processor rounds otherwise")
    end = end_of(routine, CASES.get(case, {}))
    assert end.result.digest == GOLDEN["digests"][f"{case}/{routine}"]
