"""The page on moving from 2021: each old call gives the same number, is taken, or is refused with the new."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dida_core.config.check import find_problems
from dida_core.config.project import project_of
from torch import Tensor, nn
from torch.nn import functional

from dida_tools import layers
from dida_tools.models import UNET
from dida_tools.training.routines import load_routine
from dida_tools.utils import logging, loss, torchutils
from dida_tools.utils.data import NpyPredictionDataset
from dida_tools.utils.path import create_dirs

PAGE = (Path(__file__).parents[2] / "docs" / "how_to" / "from_2021.md").read_text()
ROWS = re.findall(r"^\| `((\w+)\(.*?\))` \| `([\w.]+)` \| (.*) \|$", PAGE, re.MULTILINE)
SIGNATURES = """
ConvLayer(ch_in, ch_out, pad=1, ks=3, stride=1, dropout=None, activ=ELU)
DeconvLayer(ch_in, ch_out, ks=5, stride=2, dropout=None, activ=ELU)
TransConvLayer(ch_in, ch_out, pad=1, ks=3, stride=2, dropout=None, activ=ELU)
UNET(ch_in=12, ch_out=2, bulk_ch=32, n_recursions=4, use_shuffle=True, dropout=None, activ=ELU)
smooth_dice_loss(pred, target, smooth=1.0, eps=1e-6)
smooth_dice_beta_loss(pred, target, beta=1.0, smooth=1.0, eps=1e-6)
dice_bce_sum(pred, target, weight=0.5, smooth=1.0, eps=1e-6)
multi_class_smooth_dice_loss(pred, target, smooth=1.0, eps=1e-6)
multi_class_dice_ce_sum(pred, target, weight=0.5, smooth=1.0, eps=1e-6)
precision(pred, target, eps=1e-6)
recall(pred, target, eps=1e-6)
f1(pred, target, eps=1e-6)
masked_smooth_dice_loss(pred, target, smooth=1.0, eps=1e-6)
masked_precision(pred, target, eps=1e-6)
masked_recall(pred, target, eps=1e-6)
masked_f1(pred, target, eps=1e-6)
NpyDataset(x_dir, y_dir)
NpyPredictionDataset(files)
set_seed(seed)
load_model(model, model_args, model_weights, device)
forward(model, inputs, device)
backprop(model, loss_function, optimizer, batch, device)
assert_not_nan(tensor)
assert_isfinite(tensor)
assert_nonzero(tensor)
assert_upperbound(tensor, val)
assert_lowerbound(tensor, val)
set_module_trainable(module, mode)
create_dirs(path, verbose=False)
write_log(path, config, verbose=False)
SMTPNotifier(receivers, sender, cc)
""".strip().splitlines()

torch.manual_seed(0)
P, ONE = torch.randn(3, 1, 5, 6), torch.randn(1, 1, 5, 6)
T, LABEL = (torch.rand(3, 1, 5, 6) > 0.6).float(), (torch.rand(1, 1, 5, 6) > 0.6).float()
LOGITS, CLASSES = torch.randn(3, 4, 5, 6), torch.randint(4, (3, 5, 6))
USABLE = (torch.rand(1, 1, 5, 6) > 0.3).float()
MASKED = torch.cat([USABLE, LABEL], 1)
X = torch.randn(2, 3, 8, 8)
NAMES = vars(layers) | vars(loss) | vars(torchutils) | vars(logging) | globals()


def fbeta(probability: Tensor, target: Tensor, beta: float = 1.0, smooth: float = 1.0) -> Tensor:
    """2021's, of all pixels together."""
    tp, fp, fn = (
        (probability * target).sum(),
        (probability * (1 - target)).sum(),
        ((1 - probability) * target).sum(),
    )
    return 1 - ((1 + beta**2) * tp + smooth) / ((1 + beta**2) * tp + beta**2 * fn + fp + smooth)


def dice_of_classes(pred: Tensor, target: Tensor) -> Tensor:
    truth = functional.one_hot(target, pred.shape[1]).movedim(-1, 1).float()
    return torch.stack([fbeta(pred.softmax(1)[:, k], truth[:, k]) for k in range(pred.shape[1])]).mean()


def found(pred: Tensor, target: Tensor) -> Tensor:
    """Recall of 2021, and precision with its arguments swapped."""
    return ((pred > 0) & (target > 0)).sum() / (target > 0).sum()


HARMONIC = 2 / (1 / found(ONE, LABEL) + 1 / found(LABEL * 2 - 1, (ONE > 0).float()))
SAME: dict[str, Any] = {
    "smooth_dice_loss(ONE, LABEL)": fbeta(ONE.sigmoid(), LABEL),
    "smooth_dice_loss(ONE, LABEL, 0.5)": fbeta(ONE.sigmoid(), LABEL, smooth=0.5),
    "smooth_dice_loss(P, T, batch=True)": fbeta(P.sigmoid(), T),
    "smooth_dice_beta_loss(ONE, LABEL, 2.0, 0.5)": fbeta(ONE.sigmoid(), LABEL, 2.0, 0.5),
    "multi_class_smooth_dice_loss(LOGITS, CLASSES, batch=True)": dice_of_classes(LOGITS, CLASSES),
    "multi_class_dice_ce_sum(LOGITS, CLASSES, dice_weight=0.7, batch=True)": (
        0.7 * dice_of_classes(LOGITS, CLASSES) + 0.3 * functional.cross_entropy(LOGITS, CLASSES)
    ),
    "recall(P, T)": found(P, T),
    "precision(P, T)": found(T * 2 - 1, (P > 0).float()),
    "f1(ONE, LABEL)": HARMONIC,
    "masked_smooth_dice_loss(ONE, MASKED)": fbeta(ONE.sigmoid()[USABLE > 0], LABEL[USABLE > 0]),
    "masked_smooth_dice_loss(ONE, MASKED, 0.5)": fbeta(
        ONE.sigmoid()[USABLE > 0], LABEL[USABLE > 0], 1.0, 0.5
    ),
    "masked_recall(ONE, MASKED)": found(ONE, LABEL * USABLE),
    "TransConvLayer(3, 6, dropout=None)(X).shape[2]": 16.0,
    "DeconvLayer(3, 6)(X).shape[2]": 16.0,
    "ConvLayer(3, 6, dropout=None)(X).shape[2]": 8.0,
    "UNET(3, 2, 4, 1, True, None)(X).shape[2]": 8.0,
    "forward(nn.Identity(), ONE, 'cpu').sum()": ONE.sum(),
}
REFUSED = {
    "dice_bce_sum(P, T, 0.7)": "dice_bce_sum(pred, target, *, smooth=1.0, dice_weight=0.5, ",
    "dice_bce_sum(P, T, weight=0.7)": "dice_weight=0.5",
    "multi_class_dice_ce_sum(LOGITS, CLASSES, 0.7)": "dice_weight=0.5",
    "multi_class_dice_ce_sum(LOGITS, CLASSES, weight=0.7)": "dice_weight=0.5",
    "multi_class_smooth_dice_loss(LOGITS, CLASSES, 1.0, 1e-6)": "too many positional arguments",
    "multi_class_smooth_dice_loss(LOGITS, CLASSES[:, None])": "class numbers in the shape (3, 5, 6)",
    "smooth_dice_loss(P, T, 1.0, 1e-6)": "too many positional arguments",
    "smooth_dice_loss(P, T, eps=1e-6)": "unexpected keyword argument 'eps'",
    "smooth_dice_beta_loss(P, T, 1.0, 1.0, 1e-6)": "smooth=1.0, *",
    "masked_smooth_dice_loss(ONE, MASKED, 1.0, 1e-6)": "masked_smooth_dice_loss(pred, target, smooth=1.0, *",
    "masked_smooth_dice_loss(ONE, MASKED * 255)": "the usability mask holds 255",
    "smooth_dice_loss(P, T * 2)": "the target holds 2, a binary or multi-label target has 0 and 1",
    "smooth_dice_loss(P, T * 2 - 1)": "the target holds -1",
    "dice_bce_sum(P, T * 0.5)": "the target holds 0.5",
    "f1(P, T * 3)": "the target holds 3",
    "f1(P, T, 1e-6)": "f1(pred, target, *, threshold=0.5, ignore_index=255)",
    "recall(P, T, eps=1e-6)": "threshold=0.5",
    "masked_f1(ONE, MASKED, 1e-6)": "threshold=0.5",
    "ConvLayer(3, 6, 1)": "ConvLayer: too many positional arguments. It takes (ch_in, ch_out, *, k_size",
    "ConvLayer(3, 6, ks=1, pad=0)": "k_size, stride, dropout, activ, norm)",
    "DeconvLayer(3, 6, 5)": "(ch_in, ch_out, *, k_size, dropout, activ, norm)",
    "TransConvLayer(3, 6, 1, 3, 2)": "(ch_in, ch_out, *, dropout, activ, norm)",
    "UNET()": "'ch_in' and 'ch_out'",
    "load_model(model=UNET, model_args={}, model_weights='w.pt', device='cpu')": "(path, model, model_c",
    "assert_upperbound(X, val=9)": "assert_upperbound(values, bound)",
    "assert_upperbound(X, X.max())": "1 of 384 values are not below",
    "assert_lowerbound(X, X.min())": "1 of 384 values are not above",
    "assert_nonzero(T)": "values are zero",
    "set_module_trainable(nn.Identity(), mode=False)": "set_module_trainable(module, trainable)",
    "write_log('log.csv', {}, True)": "write_log(path, content)",
    "write_log('log.csv', {'MODEL': UNET})": "a cell holds a string, a number, a boolean or None",
}


def test_the_page_has_the_signatures_of_2021_and_each_name_is_there():
    assert [row[0] for row in ROWS] == SIGNATURES
    for _, name, place, happens in ROWS:
        module, _, now = place.rpartition(".")
        assert name == now and hasattr(importlib.import_module(f"dida_tools.{module}"), name)
        assert re.match("the same|taken|refused|likewise|as its plain form", happens)
    text = " ".join(SAME) + " ".join(REFUSED) + inspect.getsource(test_what_is_taken_does_what_it_did)
    assert [name for _, name, _, _ in ROWS if f"{name}(" not in text] == [
        "masked_precision",
        "NpyDataset",
        "SMTPNotifier",
    ]


@pytest.mark.parametrize("call", SAME)
def test_the_same_number(call):
    assert float(eval(call, NAMES)) == pytest.approx(float(SAME[call]), rel=1e-5)


@pytest.mark.parametrize("call", REFUSED)
def test_refused_with_the_new_call(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError, AssertionError), match=re.escape(REFUSED[call])):
        eval(call, NAMES)


def test_what_is_taken_does_what_it_did(tmp_path, capsys):
    model, file = nn.Linear(2, 1), tmp_path / "weights.pth"
    torch.save(model.state_dict(), file)
    again = torchutils.load_model(
        nn.Linear, {"in_features": 2, "out_features": 1}, str(file), torch.device("cpu")
    )
    assert torch.equal(again.weight, model.weight)
    optimizer, batch = torch.optim.SGD(again.parameters(), lr=0.1), (torch.ones(4, 2), torch.ones(4, 1))
    torchutils.backprop(again, functional.mse_loss, optimizer, batch, "cpu")
    torchutils.backprop(model, functional.mse_loss, torch.optim.SGD(model.parameters(), lr=0.1), *batch)
    assert torch.equal(again.weight, model.weight)
    create_dirs(str(tmp_path / "a"), True)
    create_dirs(tmp_path / "b", verbose=True)
    assert capsys.readouterr().out == f"folder {tmp_path / 'a'}\nfolder {tmp_path / 'b'}\n"
    assert (tmp_path / "a").is_dir() and (tmp_path / "b").is_dir()
    np.save(tmp_path / "image.npy", np.ones((4, 5, 3), np.float32))
    [(path, tensor)] = NpyPredictionDataset([str(tmp_path / "image.npy")])
    assert path == str(tmp_path / "image.npy") and tensor.shape == (3, 4, 5)
    torchutils.set_seed(7)
    drawn = np.random.rand(), torch.rand(1).item()
    np.random.seed(7)
    torch.manual_seed(7)
    assert drawn == (np.random.rand(), torch.rand(1).item())
    torchutils.assert_not_nan(X / 0)
    torchutils.assert_isfinite(X)
    for check in (torchutils.assert_not_nan, torchutils.assert_isfinite):
        with pytest.raises(AssertionError):
            check(X / 0 * 0)


def config_of_2021() -> dict[str, Any]:
    return {
        "DATE": "20210304-101112",
        "SESSION_NAME": "training-run",
        "ROUTINE_NAME": load_routine("pytorch"),
        "MODEL": UNET,
        "MODEL_CONFIG": {
            "ch_in": 12,
            "ch_out": 2,
            "n_recursions": 5,
            "dropout": None,
            "use_shuffle": True,
            "activ": nn.ELU,
        },
        "DATA_LOADER_CONFIG": {"batch_size": 32, "shuffle": True, "pin_memory": True, "num_workers": 8},
        "OPTIMIZER": torch.optim.SGD,
        "OPTIMIZER_CONFIG": {"lr": 1e-3},
        "EPOCHS": 100,
        "LOSS": loss.smooth_dice_loss,
        "METRICS": {"f1": loss.f1, "precision": loss.precision, "recall": loss.recall},
        "DEVICE": torch.device("cpu"),
        "LOGFILE": "experiments.csv",
        "__COMMENT": None,
    }


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"LR": 1e-3}, "it is OPTIMIZER_CONFIG.lr now."),
        ({"ONE_CYCLE": True}, "it is SCHEDULER=OneCycleLR now."),
        ({"MIXED_PRECISION": True}, "it is PRECISION, such as fp16 now."),
        ({"WEIGHTS": None}, "it is INIT_WEIGHTS now."),
    ],
)
def test_a_config_of_2021(changes, problem):
    found = find_problems(config_of_2021() | changes, project_of("dida_tools"))
    assert [one.partition(": ")[2] for one in found] == ([] if problem is None else [problem])
