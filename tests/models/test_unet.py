"""UNET: any size, its parameters and receptive field, and what it keeps when compiled, cast or saved."""

import ast
import copy
import itertools
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import dida_tools
from dida_tools.models import UNET

PACKAGE = dida_tools.__name__
BOTH_WAYS = list(itertools.product([True, False], repeat=2))
GROUP_NORM = partial(nn.GroupNorm, 2)
NORMS = [nn.BatchNorm2d, GROUP_NORM, None]
SIZES = [(1, 1), (1, 9), (2, 3), (4, 4), (5, 8), (7, 5), (8, 12), (9, 17), (16, 3)]
FITTING_SIZES = [(4, 4), (8, 12), (16, 4)]


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


def layer_parameters(ch_in: int, ch_out: int, kernel: int = 9, has_norm: bool = True) -> int:
    return ch_in * ch_out * kernel + (2 * ch_out if has_norm else ch_out)


def level_parameters(ch: int, levels: int, use_shuffle: bool, use_pooling: bool, has_norm: bool) -> int:
    layer = partial(layer_parameters, has_norm=has_norm)
    down = 0 if use_pooling else layer(ch, ch)
    encode = layer(ch, 2 * ch) + layer(2 * ch, 2 * ch)
    deeper = level_parameters(2 * ch, levels - 1, use_shuffle, use_pooling, has_norm) if levels > 1 else 0
    bias_of_shuffle = 0 if has_norm else 3 * ch
    up = layer(2 * ch, ch, kernel=4) + (bias_of_shuffle if use_shuffle else 0)
    return down + encode + deeper + up + layer(2 * ch, ch) + layer(ch, ch)


def seen_pixels(pixel: int, levels: int, use_pooling: bool) -> tuple[int, int]:
    """First and last input pixel along one axis that an output pixel of a level depends on."""

    def level(low: int, high: int, levels: int) -> tuple[int, int]:
        low, high = low - 2, high + 2
        low, high = low // 2, high // 2
        if levels > 1:
            low, high = level(low, high, levels - 1)
        low, high = low - 2, high + 2
        return (2 * low, 2 * high + 1) if use_pooling else (2 * low - 1, 2 * high + 1)

    low, high = level(pixel, pixel, levels)
    return low - 2, high + 2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("use_shuffle, use_pooling", BOTH_WAYS)
def test_any_height_and_width(size: tuple[int, int], use_shuffle: bool, use_pooling: bool) -> None:
    model = small_unet(use_shuffle=use_shuffle, use_pooling=use_pooling).eval()
    output = model(torch.randn(2, 3, *size))
    assert output.shape == (2, 2, *size) and output.isfinite().all()


@pytest.mark.parametrize("n_recursions", [1, 2, 3, 4])
@pytest.mark.parametrize("surplus", [-1, 0, 1])
def test_sizes_around_a_multiple(n_recursions: int, surplus: int) -> None:
    model = small_unet(bulk_ch=2, n_recursions=n_recursions)
    edge = 2 * 2**n_recursions + surplus
    assert model(torch.randn(2, 3, edge, 5)).shape == (2, 2, edge, 5)


@pytest.mark.parametrize("ch_in", [1, 3, 12])
@pytest.mark.parametrize("ch_out", [1, 2, 7])
@pytest.mark.parametrize("bulk_ch", [1, 5])
def test_any_number_of_channels(ch_in: int, ch_out: int, bulk_ch: int) -> None:
    assert small_unet(ch_in, ch_out, bulk_ch=bulk_ch)(torch.randn(2, ch_in, 6, 7)).shape == (2, ch_out, 6, 7)


@pytest.mark.parametrize("use_pooling", [True, False])
def test_each_recursion_doubles_the_channels_and_halves_the_size(use_pooling: bool) -> None:
    shapes: list[tuple[int, ...]] = []
    model = small_unet(n_recursions=3, use_pooling=use_pooling)
    for name in ("encode", "below.encode", "below.deeper.encode", "below.deeper.deeper.encode"):
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output: shapes.append(tuple(output.shape))
        )
    model(torch.randn(2, 3, 16, 40))
    assert shapes == [(2, 4, 16, 40), (2, 8, 8, 20), (2, 16, 4, 10), (2, 32, 2, 5)]


@pytest.mark.parametrize("level", ["below", "below.deeper"])
def test_each_recursion_pools_and_joins_with_what_was_there(level: str) -> None:
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    model = small_unet()
    for name in ("", ".down", ".up", ".decode"):
        module = model.get_submodule(level + name)
        module.register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)})
        )
    model(torch.randn(2, 3, 8, 12))
    x = seen[""][0]
    assert torch.equal(seen[".down"][1], functional.max_pool2d(x, 2))
    assert torch.equal(seen[".decode"][0], torch.cat([x, seen[".up"][1]], 1))


@pytest.mark.parametrize("n_recursions, bulk_ch", [(1, 4), (3, 6)])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("use_shuffle, use_pooling", BOTH_WAYS)
def test_number_of_parameters(
    n_recursions: int, bulk_ch: int, norm: Any, use_shuffle: bool, use_pooling: bool
) -> None:
    has_norm = norm is not None
    layer = partial(layer_parameters, has_norm=has_norm)
    expected = layer(3, bulk_ch) + layer(bulk_ch, bulk_ch) + 5 * bulk_ch + 5
    expected += level_parameters(bulk_ch, n_recursions, use_shuffle, use_pooling, has_norm)
    model = UNET(3, 5, bulk_ch, n_recursions, use_shuffle, use_pooling=use_pooling, norm=norm)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activ", [nn.ELU, nn.ReLU, partial(nn.LeakyReLU, 0.1, inplace=True)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("use_shuffle, use_pooling", BOTH_WAYS)
def test_every_combination_trains_every_parameter(
    norm: Any, activ: Any, dropout: float, use_shuffle: bool, use_pooling: bool
) -> None:
    options = {"norm": norm, "activ": activ, "dropout": dropout}
    model = small_unet(use_shuffle=use_shuffle, use_pooling=use_pooling, bulk_ch=8, **options)
    output = model(torch.randn(2, 3, 9, 11))
    assert output.shape == (2, 2, 9, 11)
    output.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize("dropout, expected", [(0.0, 0), (0.2, 2 * 3)])
def test_dropout_stands_after_every_pair_but_the_first(dropout: float, expected: int) -> None:
    model = small_unet(n_recursions=3, dropout=dropout)
    assert sum(isinstance(module, nn.Dropout2d) for module in model.modules()) == expected
    assert not any(isinstance(module, nn.Dropout2d) for module in model.encode.modules())


@pytest.mark.parametrize("n_recursions", [1, 2, 3])
@pytest.mark.parametrize("use_shuffle", [True, False])
@pytest.mark.parametrize("use_pooling", [True, False])
def test_receptive_field(n_recursions: int, use_shuffle: bool, use_pooling: bool) -> None:
    options = {"use_shuffle": use_shuffle, "use_pooling": use_pooling, "n_recursions": n_recursions}
    model = small_unet(1, 1, **options).double().eval()
    row, column = 61, 66
    # Max pooling passes the gradient of a quarter of its input only: together, several images show all of it.
    seen = torch.zeros(128, 128, dtype=torch.bool)
    for _ in range(12 if use_pooling else 1):
        x = torch.randn(1, 1, 128, 128, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(model(x)[0, 0, row, column], x)
        seen |= gradient[0, 0] != 0
    for pixel, axis in ((row, 1), (column, 0)):
        found = seen.any(axis).nonzero().flatten()
        low, high = seen_pixels(pixel, n_recursions, use_pooling)
        assert low > 0 and high < 127, "the image is too small to show the receptive field"
        assert (int(found[0]), int(found[-1])) == (low, high)


@pytest.mark.parametrize("size", FITTING_SIZES)
def test_padding_changes_nothing_where_the_size_fits(size: tuple[int, int]) -> None:
    model = settled_unet()
    x = torch.randn(2, 3, *size)
    assert torch.equal(model(x), model.head(model.below(model.encode(x))))


@pytest.mark.parametrize("height, width", [(1, 1), (5, 8), (7, 5), (8, 9)])
def test_padding_copies_the_edge_at_the_bottom_and_right(height: int, width: int) -> None:
    model = settled_unet()
    x = torch.randn(2, 3, height, width)
    rows = torch.arange(-(-height // 4) * 4).clamp(max=height - 1)
    columns = torch.arange(-(-width // 4) * 4).clamp(max=width - 1)
    assert torch.equal(model(x), model(x[:, :, rows][..., columns])[..., :height, :width])


def test_input_is_left_as_it_is() -> None:
    x = torch.randn(2, 3, 8, 8)
    before = x.clone()
    small_unet(activ=partial(nn.ReLU, inplace=True), norm=None)(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("use_shuffle", [True, False])
def test_compiled_equals_eager(use_shuffle: bool) -> None:
    torch.compiler.reset()
    model = settled_unet(n_recursions=1, use_shuffle=use_shuffle)
    compiled = torch.compile(model, backend="eager", dynamic=True, fullgraph=True)
    for shape in ((1, 3, 8, 8), (2, 3, 5, 7), (3, 3, 6, 4)):
        x = torch.randn(*shape)
        assert torch.equal(compiled(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("use_shuffle, use_pooling", [(True, True), (False, False)])
def test_compiled_by_inductor_is_close_to_eager(use_shuffle: bool, use_pooling: bool) -> None:
    torch.compiler.reset()
    model = settled_unet(n_recursions=1, use_shuffle=use_shuffle, use_pooling=use_pooling)
    compiled = torch.compile(model)
    for shape in ((2, 3, 16, 16), (2, 3, 13, 22), (1, 3, 9, 5)):
        x = torch.randn(*shape)
        assert torch.allclose(compiled(x), model(x), atol=1e-4)


@pytest.mark.parametrize("use_shuffle, use_pooling", [(True, True), (False, False)])
def test_exported_equals_eager_at_every_size(use_shuffle: bool, use_pooling: bool) -> None:
    model = settled_unet(use_shuffle=use_shuffle, use_pooling=use_pooling)
    batch, height, width = (torch.export.Dim(name, min=low) for name, low in (("n", 1), ("h", 5), ("w", 5)))
    dims = ({0: batch, 2: height, 3: width},)
    exported = torch.export.export(model, (torch.randn(2, 3, 14, 19),), dynamic_shapes=dims).module()
    for shape in ((1, 3, 8, 8), (2, 3, 5, 7), (3, 3, 16, 24), (1, 3, 33, 6), (5, 3, 12, 13)):
        x = torch.randn(*shape)
        assert torch.equal(exported(x), model(x)), shape


@pytest.mark.parametrize("norm", NORMS)
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
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("use_shuffle, use_pooling", BOTH_WAYS)
@pytest.mark.parametrize("size", [(8, 8), (9, 10)])
def test_channels_last_is_kept(
    norm: Any, use_shuffle: bool, use_pooling: bool, size: tuple[int, int]
) -> None:
    model = settled_unet(norm=norm, use_shuffle=use_shuffle, use_pooling=use_pooling)
    x = torch.randn(2, 3, *size)
    expected = model(x)
    outputs: list[Tensor] = []
    for module in model.modules():
        module.register_forward_hook(lambda _, __, output: outputs.append(output))
    model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in outputs)
    assert torch.allclose(outputs[-1], expected, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_other_precisions_are_finite_and_autocast_is_close(norm: Any) -> None:
    model, x = settled_unet(norm=norm), torch.randn(2, 3, 13, 10)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.bfloat16 and output.isfinite().all()
    expected = model(x)
    assert (output.float() - expected).abs().max() < 0.05 * expected.abs().max()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        output = model.to(dtype)(x.to(dtype))
        assert output.dtype == dtype and output.isfinite().all()


def test_equal_seeds_give_equal_weights_and_dropout_alone_is_random() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(small_unet(dropout=0.5, norm=GROUP_NORM))
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    model, x = models[0], torch.randn(2, 3, 8, 8)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))
    model = small_unet(norm=GROUP_NORM).train()
    assert torch.equal(model(x), model(x))


def test_samples_of_a_batch_do_not_mix_in_evaluation() -> None:
    model = settled_unet()
    x = torch.randn(3, 3, 7, 9)
    alone = torch.cat([model(sample[None]) for sample in x])
    assert torch.allclose(model(x), alone, atol=1e-5)


@pytest.mark.parametrize("n_recursions", [0, -1])
def test_less_than_one_level_is_refused(n_recursions: int) -> None:
    with pytest.raises(ValueError, match=f"n_recursions is {n_recursions}"):
        UNET(3, 2, n_recursions=n_recursions)


def test_output_has_no_final_activation() -> None:
    model = settled_unet()
    with torch.no_grad():
        model.head.bias += torch.tensor([-50.0, 50.0])
    output = model(torch.randn(1, 3, 8, 8))
    assert output[:, 0].max() < -10 and output[:, 1].min() > 10


def test_learns_to_copy_a_threshold() -> None:
    model = small_unet(1, 1, n_recursions=1, bulk_ch=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = torch.randn(4, 1, 16, 16)
    losses = []
    for _ in range(40):
        loss = functional.binary_cross_entropy_with_logits(model(x), (x > 0).float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


@pytest.mark.parametrize("folder", ["layers", "models"])
def test_layers_and_models_import_torch_alone(folder: str) -> None:
    root = Path(dida_tools.__file__).parent
    for file in (root / folder).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            elif isinstance(node, ast.ImportFrom):
                target = file.parents[node.level - 1] / str(node.module or "").replace(".", "/")
                assert target.relative_to(root).parts[0] in ("layers", "models"), (file.name, node.lineno)
            for name in names:
                top = name.partition(".")[0]
                assert top == "torch" or top in sys.stdlib_module_names, (file.name, name)


def test_importing_the_model_loads_nothing_but_layers_and_models() -> None:
    code = (
        "import sys, torch, typing; before = set(sys.modules); "
        f"import {PACKAGE}.models.unet; print(*sorted(set(sys.modules) - before))"
    )
    root = Path(dida_tools.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    expected = ["", ".layers", ".layers.conv", ".models", ".models.unet"]
    assert done.stdout.split() == [PACKAGE + name for name in expected]
