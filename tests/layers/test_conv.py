"""Layers: their sizes, the order of their parts, and what each of them starts with."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dida_tools.layers import ConvLayer, DeconvLayer, TransConvLayer

LAYERS = [ConvLayer, TransConvLayer, DeconvLayer]
NORMS = [nn.BatchNorm2d, nn.InstanceNorm2d, partial(nn.GroupNorm, 2), None]
every_layer = pytest.mark.parametrize("layer", LAYERS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@torch.no_grad()
def share_inside_cells(output: Tensor) -> float:
    """Return which part of the variance is between the four pixels of a cell: a checkerboard."""
    means = functional.avg_pool2d(output, 2)
    inside = (output - functional.interpolate(means, scale_factor=2)).square().mean()
    return float(inside / (output - output.mean((0, 2, 3), keepdim=True)).square().mean())


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (7, 8), (9, 5)])
@pytest.mark.parametrize("k_size", [1, 3, 7])
def test_sizes_are_kept_halved_rounding_up_or_doubled(height: int, width: int, k_size: int) -> None:
    x = torch.randn(2, 3, height, width)
    assert ConvLayer(3, 6, k_size=k_size)(x).shape == (2, 6, height, width)
    halved = ConvLayer(3, 6, k_size=k_size, stride=2)(x)
    assert halved.shape == (2, 6, (height + 1) // 2, (width + 1) // 2)
    for layer in (TransConvLayer(3, 6), DeconvLayer(3, 6, k_size=k_size)):
        assert layer(x).shape == (2, 6, 2 * height, 2 * width)


@pytest.mark.parametrize("layer", [ConvLayer, DeconvLayer])
@pytest.mark.parametrize("k_size", [0, 2, 4])
def test_even_kernel_is_refused(layer: type, k_size: int) -> None:
    with pytest.raises(ValueError, match=f"k_size is {k_size}: choose an odd one"):
        layer(3, 6, k_size=k_size)


@every_layer
def test_order_is_convolution_normalization_activation_dropout(layer: type) -> None:
    order = []
    module = layer(3, 4, dropout=0.5)
    for name, child in module.named_children():
        child.register_forward_hook(lambda *_, name=name: order.append(name))
    module(torch.randn(2, 3, 6, 6))
    shuffle = ["shuffle"] if layer is DeconvLayer else []
    assert order == ["conv", *shuffle, "norm", "activ", "dropout"]


@every_layer
def test_the_normalization_gets_the_output_channels_and_takes_the_place_of_the_bias(layer: type) -> None:
    for norm in NORMS:
        assert (layer(3, 4, norm=norm).conv.bias is None) == (norm is not None)
    output = layer(3, 4, activ=nn.Identity)(torch.randn(8, 3, 16, 16) * 5 + 3)
    assert torch.allclose(output.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(output.var((0, 2, 3)), torch.ones(4), atol=1e-2)


@every_layer
def test_activation_class_may_be_a_partial(layer: type) -> None:
    output = layer(3, 4, activ=partial(nn.Hardtanh, 0.0, 0.25))(torch.randn(2, 3, 6, 6))
    assert output.min() == 0 and output.max() == 0.25


@every_layer
def test_dropout_zeroes_full_channels_in_training_only_and_is_not_there_by_default(layer: type) -> None:
    module, x = layer(3, 64, dropout=0.5, norm=None), torch.randn(2, 3, 6, 6)
    dropped = (module(x) == 0).flatten(2)
    assert torch.equal(dropped.any(-1), dropped.all(-1)) and 0.3 < dropped.float().mean() < 0.7
    assert not (module.eval()(x) == 0).any()
    assert not any(isinstance(module, nn.Dropout2d) for module in layer(3, 4).modules())


@pytest.mark.parametrize("k_size", [1, 3])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, None])
def test_deconvolution_starts_as_nearest_neighbor_and_learns(k_size: int, norm: type | None) -> None:
    layer, x = DeconvLayer(8, 5, k_size=k_size, norm=norm), torch.randn(4, 8, 12, 12)
    output = layer(x)
    assert share_inside_cells(output) < 1e-12
    assert torch.equal(output, functional.interpolate(output[..., ::2, ::2].contiguous(), scale_factor=2))
    assert len(output[0].flatten(1).unique(dim=0)) == 5  # the channels differ
    functional.mse_loss(output, torch.randn(4, 5, 24, 24)).backward()
    torch.optim.SGD(layer.parameters(), lr=1.0).step()
    assert share_inside_cells(layer(x)) > 1e-4
    layer.conv.reset_parameters()
    assert share_inside_cells(layer(x)) > 0.5  # without that start
