"""What the search script does: a dry run of the first trial, the search itself, and its results."""

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.capture import capture
from ..config.project import Project
from ..errors import UserError
from ..runs.redaction import Redactor
from ..storage.files import relative_path
from ..training.setup import prepare
from ..training.signals import Preempted
from .space import Space, with_values

if TYPE_CHECKING:
    from .study import Search

_NUM_SHOWN = 5


def dry_run(
    space: Space,
    config: dict[str, Any],
    make_datasets: Callable[[dict[str, Any]], tuple[Any, Any, Any]],
    global_config: dict[str, str],
    project: Project,
    routine: str,
    problems: list[str],
) -> dict[str, Any]:
    """
    Check everything before the first trial, and return the captured config of the first values.

    :param problems: of the config, that were found before
    :raises UserError: with all problems
    """
    space.check(config, problems)
    first, device = with_values(config, space.first_values()), project.module(".config.device")
    device.get_precision(device.get_device(first.get("DEVICE", "auto")), first.get("PRECISION", "auto"))
    train, test, validation = make_datasets(first)
    on_cpu = first | {"DEVICE": "cpu", "PRECISION": "fp32"}  # the GPU's memory is the workers'
    setup = prepare(train, test, on_cpu, global_config, validation, routine)
    if setup.data.validation is None:
        raise UserError("there is no validation set to compare trials on: set VALIDATION_FRACTION=0.2.")
    given: dict[str, Any] = {key: first[key] for key in ("DEVICE", "PRECISION") if key in first}
    captured = Redactor(config=setup.config).config(setup.experiment.captured["config"])
    return setup.experiment.captured | {"config": captured | capture(given, project)["config"]}


def open_search(
    arguments: Namespace, space: Space, config: dict[str, Any], folders: dict[str, str], project: Project
) -> "Search":
    """Open the study that the arguments name. Raise UserError if it cannot be opened."""
    try:
        from .study import Search
    except ModuleNotFoundError as error:
        install = f'{Path(sys.executable).name} -m pip install -c constraints.txt -e ".[search]"'
        raise UserError(f"a search needs {error.name}, which is not installed: {install}") from error
    storage, pruning = arguments.storage, not arguments.no_pruning
    return Search(arguments.study, space, config, folders, project, storage, pruning)


def run_search(
    search: "Search", captured: dict[str, Any] | None, train: Callable[..., Any], arguments: Namespace
) -> None:
    """
    Train the trials, in this process or in several of them, and show the results.

    :param captured: what dry_run returned; None: this is one of the several
    :param train: trains a run; its config is the only argument
    :raises UserError: if it is another search than before, or no trial was trained to its end
    """
    from .workers import Worker, run_workers

    if captured is None:
        Worker(search).work(train, arguments.trials)
        return
    search.begin(captured)
    place = "a database" if "://" in search.storage_place else relative_path(search.storage_place)
    print(f"{search.name}: up to {arguments.trials} trials for {search.config['MONITOR']}, kept in {place}")
    try:
        if arguments.workers == 1:
            Worker(search).work(train, arguments.trials)
        else:
            run_workers([sys.executable, *sys.argv, "--worker"], arguments.workers, search)
    except Preempted:
        print("Ended by a signal; what was done is saved. The same command resumes.")
        raise
    finally:
        if search.best_trials():
            show_results(search)
    if not search.best_trials():
        raise UserError(f"no trial was trained to its end; see {relative_path(search.folder)}.")


def show_results(search: "Search") -> None:
    """Print the best trials, and where their config and the pictures are."""
    best = search.best_trials()
    print(f"\nThe best of {len(best)} trials that were trained to their end:")
    for trial in best[:_NUM_SHOWN]:
        print(f"  trial {trial.number:>3}  {search.describe(trial)}")
    print(f"  run      {best[0].user_attrs['run']}")
    print(f"  files    {', '.join(relative_path(file) for file in search.save_best())}")
    study = f" --study {search.name}" if search.name != "search" else ""
    print(f"Train it in full: python hyperparameter.py{study} --train-best EPOCHS=100")
