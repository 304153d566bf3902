"""Contains pictures of a search: its history, what matters, and the value over each key."""

from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from .study import Search

_FEWEST_TRIALS = 4  # below, no importance can be told
_MARKS = {"trained": "o", "pruned": "x"}


def save_pictures(search: Search) -> list[Path]:
    """Draws history.png, slices.png and, from four trials on, importance.png into the folder of a search."""
    from matplotlib.figure import Figure  # without pyplot, so that no window system is touched

    complete, pruned = search.trials(TrialState.COMPLETE), search.trials(TrialState.PRUNED)
    if not complete:
        return []
    groups = {"trained": complete, "pruned": [trial for trial in pruned if trial.value is not None]}
    keys = list(search.space.text())
    figures: dict[str, Any] = {"history": Figure(figsize=(8, 4.5), layout="constrained")}
    _draw_history(figures["history"].subplots(), groups, search.goal, complete, search.best_trials()[0])
    columns = min(4, len(keys))
    rows = -(-len(keys) // columns)
    figures["slices"] = Figure(figsize=(1 + 3.2 * columns, 0.6 + 3 * rows), layout="constrained")
    axes = figures["slices"].subplots(rows, columns, squeeze=False, sharey=True).flat
    for axis, key in zip(axes, keys, strict=False):
        _draw_slice(axis, groups, key, search.goal)
    for axis in axes[len(keys) :]:
        axis.set_axis_off()
    importance = find_importance(search)
    if importance:
        figures["importance"] = Figure(figsize=(8, 1.2 + 0.4 * len(importance)), layout="constrained")
        axis = figures["importance"].subplots()
        axis.barh(list(importance)[::-1], list(importance.values())[::-1])
        axis.set(title=f"what matters for {search.goal}", xlabel="importance")
    files = []
    for name, figure in figures.items():
        files.append(search.folder / f"{name}.png")
        figure.savefig(files[-1], dpi=90, format="png")
    return files


def find_importance(search: Search) -> dict[str, float]:
    """
    Which part each key has in being among the best, the largest first; empty where there are too few trials.

    By PED-ANOVA (Watanabe et al., "PED-ANOVA: Efficiently Quantifying Hyperparameter Importance in Arbitrary
    Subspaces", IJCAI 2023), which needs no further library.
    """
    if len({trial.value for trial in search.trials(TrialState.COMPLETE)}) < _FEWEST_TRIALS:
        return {}
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    return dict(optuna.importance.get_param_importances(search.study, evaluator=evaluator))


def _draw_history(
    axis: Any, groups: dict[str, list[FrozenTrial]], goal: str, complete: list[FrozenTrial], best: FrozenTrial
) -> None:
    for name, trials in groups.items():
        if trials:
            numbers, values = [trial.number for trial in trials], [trial.value for trial in trials]
            axis.scatter(numbers, values, marker=_MARKS[name], label=name, s=24)
    found = np.array([trial.value for trial in complete])
    so_far = (np.maximum if best.value == found.max() else np.minimum).accumulate(found)
    axis.step(
        [trial.number for trial in complete], so_far, where="post", label="best so far", color="tab:red"
    )
    axis.set(title=f"best {goal} {best.value:.4f}, in trial {best.number}", xlabel="trial", ylabel=goal)
    axis.legend()


def _draw_slice(axis: Any, groups: dict[str, list[FrozenTrial]], key: str, goal: str) -> None:
    for name, trials in groups.items():
        points = [(trial.params[key], trial.value) for trial in trials if key in trial.params]
        if points:
            texts = [str(value) if not _is_number(value) else value for value, _ in points]
            axis.scatter(texts, [value for _, value in points], marker=_MARKS[name], s=18)
    distributions = [trial.distributions[key] for trials in groups.values() for trial in trials]
    if getattr(distributions[0], "log", False):
        axis.set_xscale("log")
    axis.set(xlabel=key, ylabel=goal)
    axis.tick_params(axis="x", labelrotation=30, labelsize=7)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
