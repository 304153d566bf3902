"""
What is fitted on validation data once the weights are chosen, and goes into the contract.

It is the temperature that makes probabilities frequencies, and the thresholds with the highest F1.
"""

import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..data.contract import DataContract
from .evaluation import evaluate, gather_unless_stopped, holds_classes
from .setup import Setup
from .targets import counting, is_multi_class, precise, unmask

# From 1 / 8 to 8, four to an octave: with a parabola through the best three, the result is within 1 %.
TEMPERATURES = tuple(2.0 ** (step / 4) for step in range(-12, 13))
_BOUNDS = TEMPERATURES[0], TEMPERATURES[-1]
_UNIT = 2.0**-24  # losses are added as integers, so that the order does not matter
_MOST = 2.0**15


class NLL:
    """
    The negative log-likelihood of a dataset at each of several temperatures.

    :param ignore_index: target value of pixels that do not count
    :param is_masked: whether the first target channel is a usability mask
    """

    def __init__(self, ignore_index: int = 255, is_masked: bool = False) -> None:
        self._ignore_index, self._is_masked = ignore_index, is_masked
        self.sums = [0] * len(TEMPERATURES)  # in units of 2 ** -24

    @torch.no_grad()
    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """
        Add a batch, if its targets hold classes.

        :param predictions: (N, C, ...) logits in float32
        :param targets: by the conventions of targets.py
        """
        if not self._is_masked and not holds_classes(predictions, targets):
            return
        targets, valid = unmask(predictions, targets) if self._is_masked else (targets, None)
        keep = counting(predictions, targets, valid, self._ignore_index)
        targets = targets.masked_fill(~keep, 0)
        sums = []
        for temperature in TEMPERATURES:
            logits = precise(predictions / temperature)
            if is_multi_class(predictions, targets):
                loss = functional.nll_loss(logits.log_softmax(1), targets.long(), reduction="none")
            else:
                truth = targets.to(logits)
                loss = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
            units = (loss.nan_to_num(_MOST).clamp(max=_MOST) / _UNIT).long()
            sums.append(units.masked_fill(~keep, 0).sum())
        self.sums = [total + new for total, new in zip(self.sums, torch.stack(sums).tolist(), strict=True)]

    def results(self) -> dict[str, float]:
        """
        Return the temperature with the lowest NLL; of several, such as without data, that nearest to 1.

        :raises Preempted: if a signal has asked any of the processes to end
        """
        sums = [sum(parts) for parts in zip(*gather_unless_stopped(self.sums), strict=True)]
        middle = len(sums) // 2
        best = min(range(len(sums)), key=lambda index: (sums[index], abs(index - middle)))
        steps = float(best - middle)
        if 0 < best < len(sums) - 1:
            before, after = (sums[index] - sums[best] for index in (best - 1, best + 1))
            if before > 0 and after > 0:
                steps += (before - after) / (2 * (before + after))
        return {"temperature": round(2.0 ** (steps / 4), 4)}


def calibrate(setup: Setup, model: nn.Module) -> DataContract | None:
    """
    Return the contract with the temperature and thresholds that fit the validation data.

    The temperature is one for all classes, and changes no class of a multi-class prediction. Each class that
    does not exclude others has a threshold, for probabilities at that temperature. Without validation data,
    or where values are predicted, the result is None.

    :param model: with the weights that are predicted with
    :raises Preempted: if a signal has asked to end
    """
    contract, batches = setup.contract, setup.loaders.validation
    if batches is None or contract.task == "values":
        return None
    nll = NLL(setup.config["IGNORE_INDEX"], setup.metrics().is_masked)
    contract = replace(contract, temperature=evaluate(model, batches, nll, setup.context)["temperature"])
    if contract.temperature in _BOUNDS:
        low, high = _BOUNDS
        text = f"the temperature {contract.temperature} is at the bound of its search ({low} to {high})"
        warnings.warn(f"{text}: it is no fit, and probabilities may be far from frequencies.", stacklevel=2)
    if contract.task == "multi-class":
        return contract
    evaluation = setup.metrics(contract)
    evaluate(model, batches, evaluation, setup.context)
    scores = evaluation.scores
    if scores is None or scores.multi_class:
        return contract
    thresholds = tuple(scores.best_threshold(number) for number in range(len(scores.histograms)))
    return replace(contract, threshold=thresholds[0] if len(thresholds) == 1 else thresholds)


def describe_fit(contract: DataContract) -> dict[str, float]:
    """
    Return what was fitted: "temperature", and "threshold" or "threshold.class" if classes may overlap.

    A temperature at the bound of its search is no fit: it is "temperature_at_bound" then.
    """
    at_bound = "_at_bound" if contract.temperature in _BOUNDS else ""
    results, thresholds = {f"temperature{at_bound}": contract.temperature}, contract.threshold
    if contract.task != "multi-label":
        return results
    if isinstance(thresholds, float | int):
        return results | {"threshold": float(thresholds)}
    names = contract.class_names if len(contract.class_names) == len(thresholds) else range(len(thresholds))
    return results | {f"threshold.{name}": value for name, value in zip(names, thresholds, strict=True)}
