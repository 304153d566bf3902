"""A study: what is searched, its trials, and the best of them."""

import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from ..config.capture import capture, restore
from ..config.keys import complete
from ..config.project import Project
from ..config.tree import difference
from ..errors import UserError
from ..report.console import say
from ..runs.redaction import Redactor
from ..storage.files import safe_name, write_atomic
from .space import Space, with_values
from .storage import open_storage

# What may differ between the workers of a search, or from one day to the next.
_FREE_TO_CHANGE = (
    *("DATE", "DEVICE", "LOGFILE", "NOTIFY", "__COMMENT", "CHECKPOINT_SECONDS", "STUDY", "TRIAL"),
    *("DATA_LOADER_CONFIG.num_workers", "DATA_LOADER_CONFIG.pin_memory"),
)


class Sampler(optuna.samplers.BaseSampler):
    """TPE whose draws follow from seed, trial, name and the trials before alone: the same after a restart."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Any:
        """Return what is drawn together."""
        return self._fresh(trial, "").infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> Any:
        """Draw that."""
        return self._fresh(trial, "").sample_relative(study, trial, search_space)

    def sample_independent(self, study: Any, trial: FrozenTrial, param_name: str, *arguments: Any) -> Any:
        """Draw one value."""
        return self._fresh(trial, param_name).sample_independent(study, trial, param_name, *arguments)

    def _fresh(self, trial: FrozenTrial, name: str) -> optuna.samplers.BaseSampler:
        digest = hashlib.sha256(f"{self._seed} {trial.number} {name}".encode()).digest()
        return optuna.samplers.TPESampler(seed=int.from_bytes(digest[:4]))  # <- your sampler here


def one_line(error: Exception, redactor: Redactor) -> str:
    """Return an error as text for people, without secrets."""
    return " ".join(redactor.text(f"{type(error).__name__}: {error}").split())[:500]


class Search:
    """A study, and the folder LOG_DIR/search/NAME that its locks and results lie in."""

    def __init__(
        self,
        name: str,
        space: Space,
        config: dict[str, Any],
        global_config: dict[str, str],
        project: Project,
        storage: str | None = None,
        pruning: bool = True,
    ) -> None:
        """
        Open a study, or make it.

        :param config: what is searched around; its MONITOR is the objective, its SEED that of the draws
        :param storage: a journal file or URL; None: a journal file in the folder
        :raises UserError: if the storage cannot be opened, or the name is none for a folder
        """
        if safe_name(name) != name:
            raise UserError(f"--study {name}: it names a folder, such as {safe_name(name)}.")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", message="Attempting to set identical", module="optuna")
        self.name, self.space, self.config, self.project = name, space, complete(config), project
        self.log_dir, self.weight_dir = Path(global_config["LOG_DIR"]), Path(global_config["WEIGHT_DIR"])
        self.pruning, self.folder = pruning, self.log_dir / "search" / name
        self.folder.mkdir(parents=True, exist_ok=True)
        direction, self.goal = self.config["MONITOR"].split()
        self.storage_place = storage or str(self.folder / "journal.log")
        self.storage = open_storage(self.storage_place)
        # Not before a fifth of the epochs: a schedule that warms up makes early results say little.
        pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=self.config["EPOCHS"] // 5)
        self.study = optuna.create_study(  # <- your pruner here
            storage=self.storage,
            study_name=name,
            direction="maximize" if direction == "max" else "minimize",
            sampler=Sampler(self.config["SEED"]),
            pruner=pruner,
            load_if_exists=True,
        )
        self._reported: set[int] = set()

    def begin(self, captured: dict[str, Any]) -> None:
        """
        Enter what is searched, or compare it with what the study has searched before.

        :param captured: the config of the first values
        :raises UserError: if it is another search
        """
        attributes, space = self.study.user_attrs, self.space.text()
        if "config" not in attributes:
            self.study.set_user_attr("space", space)
            self.study.set_user_attr("config", captured)
            return
        before, changes = attributes["space"], difference(attributes["config"], captured)
        changed = [f"space of {key}" for key in before | space if before.get(key) != space.get(key)]
        for key, (old, new) in changes.items() if not changed else ():
            if not key.startswith(_FREE_TO_CHANGE):
                changed.append(f"{key} (was {old}, is {new})")
        if changed:
            text = f"the study {self.name} has searched with another {', '.join(changed)}"
            raise UserError(f"{text}. Take another name, such as --study {self.name}-2, or the same values.")

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """
        Return the trials in these states, or all; to be read only.

        :raises UserError: if the storage cannot be reached
        """
        try:
            return self.study.get_trials(deepcopy=False, states=states or None)
        except Exception as error:  # each database has errors of its own
            reason = one_line(error, Redactor())
            raise UserError(f"Cannot reach the storage ({reason}); the same command resumes.") from error

    def best_trials(self) -> list[FrozenTrial]:
        """Return the trials that were trained to their end, the best first."""
        sign = -1 if self.study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        return sorted(self.trials(TrialState.COMPLETE), key=lambda trial: sign * (trial.value or 0.0))

    def best_record(self) -> dict[str, Any]:
        """
        Return the captured config of the best trial, with "study", "trial", "value" and "run".

        :raises UserError: if there is none
        """
        best, known = self.best_trials(), self.study.user_attrs
        if not best or "config" not in known:
            raise UserError(f"the study {self.name} has no finished trial yet: {self.storage_place}")
        if known["space"] != self.space.text():
            raise UserError(f"the study {self.name} had another search space: {json.dumps(known['space'])}.")
        values = capture(self.space.values(best[0].params), self.project)["config"]
        about = {"STUDY": self.name, "TRIAL": best[0].number, "DATE": None}
        left_out = self.space.left_out(best[0].params)
        config = with_values(known["config"]["config"], values, left_out) | about
        result = {"study": self.name, "trial": best[0].number, "value": best[0].value}
        return result | {"run": best[0].user_attrs["run"]} | known["config"] | {"config": config}

    def best_config(self) -> dict[str, Any]:
        """
        Return the config of the best trial, to be trained on its own.

        :raises UserError: if there is none, or if it cannot be restored
        """
        changes = {"SESSION_NAME": f"{self.name}-best", "RESUME": "auto"}
        return restore(self.best_record(), self.project) | changes

    def save_best(self) -> list[Path]:
        """Write the best config, and pictures of the search, and return the files."""
        from matplotlib import use

        use("Agg")  # no window system
        from optuna.visualization import matplotlib as visualization

        text = json.dumps(self.best_record(), indent=2)
        files = [self.folder / "best_config.json"]
        write_atomic(files[0], lambda stream: stream.write(text.encode()))
        axes: dict[str, Any] = {"history": visualization.plot_optimization_history(self.study)}
        axes["slices"] = visualization.plot_slice(self.study)
        if (number := len({trial.value for trial in self.best_trials()})) < 4:
            reason = f"it takes 4 finished trials of different results, not {number}"
            say(f"  importance.png is left out: {reason}.")
        else:
            # PED-ANOVA (https://arxiv.org/abs/2304.10255) needs no further library.
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            axes["importance"] = visualization.plot_param_importances(self.study, evaluator=evaluator)
        for name, axis in axes.items():
            figure = getattr(axis, "figure", None) or axis[0].figure
            files.append(self.folder / f"{name}.png")
            figure.savefig(files[-1], dpi=90, bbox_inches="tight")
        return files

    def report(self) -> None:
        """Print a line about each trial that has ended since the last report."""
        for trial in self.trials(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL):
            if trial.number not in self._reported:
                self._reported.add(trial.number)
                say(f"trial {trial.number:>3}: {self.describe(trial)}")

    def describe(self, trial: FrozenTrial) -> str:
        """Return what became of a trial, and what it has tried, by the last parts of the names."""
        found = f"failed: {trial.user_attrs.get('error', 'no reason is known')}"
        if trial.state == TrialState.COMPLETE:
            found = f"{self.goal} {trial.value:.4f}"
        if trial.state == TrialState.PRUNED:
            found = f"pruned after epoch {trial.last_step}"
        for key, value in trial.params.items():
            text = f"{value:.3g}" if isinstance(value, float) else str(value).rpartition(":")[2]
            found += f"  {key.rpartition('.')[2]}={text}"
        return found
