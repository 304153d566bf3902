"""UNET: any size, its parameters and receptive field, and what it keeps when exported, cast or saved."""

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dida_tools.models import UNET

GROUP_NORM = partial(nn.GroupNorm, 2)
NORMS = [nn.BatchNorm2d, GROUP_NORM, None]
every_norm = pytest.mark.parametrize("norm", NORMS)
both_ways = pytest.mark.parametrize(
    ("use_shuffle", "use_pooling"), [(True, True), (True, False), (False, True), (False, False)]
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small_unet(ch_in: int = 3, ch_out: int = 2, **options: Any) -> UNET:
    return UNET(ch_in, ch_out, **{"bulk_ch": 4, "n_recursions": 2, **options})


def settled_unet(**options: Any) -> UNET:
    model = small_unet(**options)
    for _ in range(3):
        model(torch.randn(4, 3, 16, 16))
    return model.eval()


# -------------------------------------------------------------------------------------------------- its form


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (4, 4), (7, 5), (8, 12), (9, 17), (16, 3)])
@both_ways
def test_any_height_and_width(size: tuple[int, int], use_shuffle: bool, use_pooling: bool) -> None:
    model = small_unet(use_shuffle=use_shuffle, use_pooling=use_pooling).eval()
    output = model(torch.randn(2, 3, *size))
    assert output.shape == (2, 2, *size) and output.isfinite().all()


@pytest.mark.parametrize("n_recursions", [1, 2, 3, 4])
def test_sizes_around_a_multiple_and_any_number_of_channels(n_recursions: int) -> None:
    for ch_in, ch_out, surplus in ((1, 7, -1), (3, 1, 0), (12, 2, 1)):
        model = small_unet(ch_in, ch_out, bulk_ch=2, n_recursions=n_recursions)
        size = 2 * 2**n_recursions + surplus
        assert model(torch.randn(2, ch_in, size, 5)).shape == (2, ch_out, size, 5)
    for too_few in (0, -1):
        with pytest.raises(ValueError, match=f"n_recursions is {too_few}"):
            UNET(3, 2, n_recursions=too_few)


@pytest.mark.parametrize("use_pooling", [True, False])
def test_each_level_doubles_the_channels_halves_the_size_and_joins_with_its_input(use_pooling: bool) -> None:
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    model = small_unet(n_recursions=3, use_pooling=use_pooling)
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, x, output, name=name: seen.update({name: (x[0], output)}))
    model(torch.randn(2, 3, 16, 40))
    levels = ("below", "below.deeper", "below.deeper.deeper")
    shapes = [tuple(seen[f"{level}.encode"][1].shape) for level in levels]
    assert shapes == [(2, 8, 8, 20), (2, 16, 4, 10), (2, 32, 2, 5)]
    for level in levels:
        x = seen[level][0]
        assert torch.equal(seen[f"{level}.decode"][0], torch.cat([x, seen[f"{level}.up"][1]], 1))
        assert not use_pooling or torch.equal(seen[f"{level}.down"][1], functional.max_pool2d(x, 2))


def seen_pixels(pixel: int, levels: int, use_pooling: bool) -> tuple[int, int]:
    """First and last input pixel along one axis that an output pixel of a level depends on."""

    def level(low: int, high: int, levels: int) -> tuple[int, int]:
        low, high = (low - 2) // 2, (high + 2) // 2
        if levels > 1:
            low, high = level(low, high, levels - 1)
        low, high = low - 2, high + 2
        return (2 * low, 2 * high + 1) if use_pooling else (2 * low - 1, 2 * high + 1)

    low, high = level(pixel, pixel, levels)
    return low - 2, high + 2


@pytest.mark.parametrize("n_recursions", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
@both_ways
def test_receptive_field(n_recursions: int, use_shuffle: bool, use_pooling: bool) -> None:
    options = {"use_shuffle": use_shuffle, "use_pooling": use_pooling, "n_recursions": n_recursions}
    model, size = small_unet(1, 1, **options).double().eval(), 128 if n_recursions > 2 else 64
    row, column = size // 2 - 3, size // 2 + 2
    # Max pooling passes the gradient of a quarter of its input only: together, several images show all of it.
    seen = torch.zeros(size, size, dtype=torch.bool)
    for _ in range(12 if use_pooling else 1):
        x = torch.randn(1, 1, size, size, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(x)[0, 0, row, column], x)
        seen |= gradient[0, 0] != 0
    for pixel, axis in ((row, 1), (column, 0)):
        found = seen.any(axis).nonzero().flatten()
        low, high = seen_pixels(pixel, n_recursions, use_pooling)
        assert low > 0 and high < size - 1, "the image is too small to show the receptive field"
        assert (int(found[0]), int(found[-1])) == (low, high)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 8), (7, 5), (8, 12)])
def test_padding_copies_the_outermost_pixels_at_the_bottom_and_right(height: int, width: int) -> None:
    model = settled_unet()
    x = torch.randn(2, 3, height, width)
    rows = torch.arange(-(-height // 4) * 4).clamp(max=height - 1)
    columns = torch.arange(-(-width // 4) * 4).clamp(max=width - 1)
    padded = x[:, :, rows][..., columns].contiguous()
    assert torch.equal(model(x), model.head(model.below(model.encode(padded)))[..., :height, :width])


# ---------------------------------------------------------------------------------------------- in training


@every_norm
@pytest.mark.parametrize("activ", [nn.ELU, partial(nn.LeakyReLU, 0.1, inplace=True)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@both_ways
def test_every_combination_trains_every_parameter(
    norm: Any, activ: Any, dropout: float, use_shuffle: bool, use_pooling: bool
) -> None:
    options = {"norm": norm, "activ": activ, "dropout": dropout}
    model = small_unet(use_shuffle=use_shuffle, use_pooling=use_pooling, bulk_ch=8, **options)
    x = torch.randn(2, 3, 9, 11)
    before = x.clone()
    model(x).square().mean().backward()
    assert torch.equal(x, before)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_dropout_stands_after_every_pair_but_the_first() -> None:
    for dropout, expected in ((0.0, 0), (0.2, 2 * 3)):
        model = small_unet(n_recursions=3, dropout=dropout)
        assert sum(isinstance(module, nn.Dropout2d) for module in model.modules()) == expected
        assert not any(isinstance(module, nn.Dropout2d) for module in model.encode.modules())


def test_learns_to_copy_a_threshold_and_has_no_final_activation() -> None:
    model, x = small_unet(1, 1, n_recursions=1, bulk_ch=8), torch.randn(4, 1, 16, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = functional.binary_cross_entropy_with_logits(model(x), (x > 0).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]
    with torch.no_grad():
        for bias in (-50.0, 50.0):
            model.head.bias.fill_(bias)
            assert (model(x) * bias > 500).all()


# ------------------------------------------------------------------------------------- what it is turned into


@pytest.mark.parametrize("use_shuffle", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_exported_equals_eager_at_every_size(use_shuffle: bool) -> None:
    model = settled_unet(use_shuffle=use_shuffle, use_pooling=use_shuffle)
    batch, height, width = (torch.export.Dim(name, min=low) for name, low in (("n", 1), ("h", 5), ("w", 5)))
    dims = ({0: batch, 2: height, 3: width},)
    exported = torch.export.export(model, (torch.randn(2, 3, 14, 19),), dynamic_shapes=dims).module()
    for shape in ((1, 3, 8, 8), (2, 3, 5, 7), (3, 3, 16, 24), (1, 3, 33, 6), (5, 3, 12, 13)):
        x = torch.randn(*shape)
        assert torch.equal(exported(x), model(x)), shape


@pytest.mark.slow
@pytest.mark.parametrize("use_shuffle", [True, False])
@pytest.mark.parametrize("options", [{"backend": "eager", "dynamic": True, "fullgraph": True}, {}])
def test_compiled_is_close_to_eager(use_shuffle: bool, options: dict[str, Any]) -> None:
    torch.compiler.reset()
    model = settled_unet(n_recursions=1, use_shuffle=use_shuffle, use_pooling=use_shuffle)
    compiled = torch.compile(model, **options)
    for shape in ((2, 3, 16, 16), (2, 3, 13, 22), (1, 3, 9, 5)):
        x = torch.randn(*shape)
        assert torch.allclose(compiled(x), model(x), atol=0 if options else 1e-4)


@every_norm
def test_copies_pickles_and_state_dicts_give_equal_outputs(norm: Any, tmp_path: Path) -> None:
    model, x = settled_unet(norm=norm, dropout=0.2, activ=partial(nn.ELU, 0.5)), torch.randn(2, 3, 6, 7)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        with torch.no_grad():
            next(twin.parameters()).zero_()
        assert not torch.equal(twin(x), model(x))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.manual_seed(1)
    other = small_unet(norm=norm, activ=partial(nn.ELU, 0.5)).eval()
    assert not torch.equal(other(x), model(x))
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other(x), model(x))


@every_norm
@both_ways
def test_channels_last_is_kept(norm: Any, use_shuffle: bool, use_pooling: bool) -> None:
    model = settled_unet(norm=norm, use_shuffle=use_shuffle, use_pooling=use_pooling)
    x = torch.randn(2, 3, 9, 10)
    expected = model(x)
    outputs: list[Tensor] = []
    for module in model.modules():
        module.register_forward_hook(lambda _, __, output: outputs.append(output))
    model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in outputs)
    assert torch.allclose(outputs[-1], expected, atol=1e-5)


@every_norm
def test_other_precisions_are_finite_and_samples_do_not_mix(norm: Any) -> None:
    model, x = settled_unet(norm=norm), torch.randn(2, 3, 13, 10)
    expected = model(x)
    assert torch.allclose(expected, torch.cat([model(sample[None]) for sample in x]), atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.bfloat16 and output.isfinite().all()
    assert (output.float() - expected).abs().max() < 0.05 * expected.abs().max()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        output = model.to(dtype)(x.to(dtype))
        assert output.dtype == dtype and output.isfinite().all()
