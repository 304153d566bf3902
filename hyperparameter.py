"""
Searches for the best config.

    python hyperparameter.py                                 20 trials of the small U-Net on the built-in scenes
    python hyperparameter.py --data DIR --trials 40 EPOCHS=10    your images; each trial is a run of 10 epochs
    python hyperparameter.py --workers 4                     four at a time, each with its share of threads and GPUs
    python hyperparameter.py --study big MODEL_CONFIG.bulk_ch=32     another search, under another name
    python hyperparameter.py --train-best EPOCHS=100         trains the best config of the search in full

What is tried stands below, in search_space; MONITOR says what is best. The same command again goes on, with what was
interrupted or killed first, up to --trials in all; with more --trials it goes further. Everything lies in
LOG_DIR/search/STUDY; each trial is a run like any other (python runs.py list --columns STUDY,TRIAL).

Other machines join with the same command where LOG_DIR is shared between them. Where it is not, give all of them the
URL of a database: --storage postgresql://user@host/name (pip install 'psycopg[binary]'; the password: PGPASSWORD).
Whatever the storage is, it can be looked at: optuna-dashboard logs/search/search/journal.log, or the URL.

Exit codes: 0 searched, or trained with --train-best; 75 ended by SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 after saving:
start it again; 130 ended at once by a second Ctrl-C; 1 failed, or no trial was trained to its end; 2 not understood.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from dida_tools.config.capture import capture
from dida_tools.config.check import check
from dida_tools.config.config import global_config
from dida_tools.config.device import get_device, get_precision
from dida_tools.config.errors import UserError
from dida_tools.config.overrides import override
from dida_tools.config.project import project_of
from dida_tools.search.space import Space, choice, integer, log_uniform, uniform, with_values
from dida_tools.training.routines import DEFAULT_ROUTINE, ROUTINES, load_routine, recorded_routine
from dida_tools.training.setup import prepare
from dida_tools.utils.data.build import build_datasets, use_folder
from dida_tools.utils.files import relative_path
from dida_tools.utils.redact import Redactor
from dida_tools.utils.signals import EXIT_CODE, Preempted

search_space = {  # <- your space here: keys of the config; uniform, log_uniform, integer, choice
    "OPTIMIZER_CONFIG.lr": log_uniform(1e-4, 1e-1),
    "OPTIMIZER": choice(torch.optim.AdamW, torch.optim.SGD),
    "MODEL_CONFIG.n_recursions": integer(2, 4),
    "MODEL_CONFIG.dropout": uniform(0.0, 0.4),
}
_NUM_SHOWN = 5


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="values of the config, such as EPOCHS=3"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with train/{x,y} and test/{x,y}")
    parser.add_argument("--routine", choices=ROUTINES, help=f"what trains (default: {DEFAULT_ROUTINE})")
    parser.add_argument("--variant", default="small", metavar="NAME", help="variant of its config, or full")
    parser.add_argument(
        "--trials", type=int, default=20, metavar="N", help="trials in all, earlier ones too (20)"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes on this machine (1)")
    parser.add_argument(
        "--storage",
        default=os.environ.get("OPTUNA_STORAGE"),
        metavar="URL",
        help="of a database, or a journal file (default: OPTUNA_STORAGE, else one in LOG_DIR/search/STUDY)",
    )
    parser.add_argument(
        "--study", default="search", metavar="NAME", help="name of the search (default: search)"
    )
    parser.add_argument(
        "--no-pruning", action="store_true", help="train trials to their end that do not look well"
    )
    parser.add_argument("--train-best", action="store_true", help="train the best config of the search")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)  # how the search starts its own
    parser.add_argument("-w", action="store_true", help="suppress warnings")
    arguments = parser.parse_intermixed_args()
    if arguments.w:
        warnings.simplefilter("ignore")
    if arguments.trials < 1 or arguments.workers < 1:
        parser.error("--trials and --workers: give 1 or more")
    try:
        if arguments.train_best:
            return train_best(arguments)
        return search(arguments, parser)
    except Preempted:
        return EXIT_CODE
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def search(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Checks everything, then has workers train."""
    project = project_of("dida_tools")
    routine = load_routine(arguments.routine or DEFAULT_ROUTINE)
    if arguments.variant not in ("full", *routine.VARIANTS):
        parser.error(f"--variant {arguments.variant}: choose one of full, {', '.join(routine.VARIANTS)}")
    # <- your config here: a model, a loss, ...; or edit train_config in the routine
    config = routine.train_config
    if arguments.variant != "full":
        config = routine.VARIANTS[arguments.variant](config)
    if arguments.data:
        override(config, arguments.overrides, project)  # typos are told before the data is read
        config = use_folder(
            config, arguments.data, project, Path(global_config["LOG_DIR"]) / "data_facts.json"
        )
    problems: list[str] = []
    config = override(config, arguments.overrides, project, problems)
    space = Space(search_space)

    def datasets(config: dict[str, Any]) -> tuple[Any, Any, Any]:
        # <- your data here: any datasets of (input, target) pairs
        return build_datasets(config)

    if arguments.worker is not None:

        def train(config: dict[str, Any]) -> Any:
            train_dataset, test_dataset, validation_dataset = datasets(config)
            return routine.train(train_dataset, test_dataset, config, global_config, validation_dataset)

        open_search(arguments, space, config).work(train, arguments.trials)
        return 0

    space.check(config, problems)
    first = with_values(config, space.first_values())
    get_precision(get_device(first.get("DEVICE", "auto")), first.get("PRECISION", "auto"))
    train_dataset, test_dataset, validation_dataset = datasets(first)
    # On the CPU: the GPU's memory is the workers'.
    rehearsed = first | {"DEVICE": "cpu", "PRECISION": "fp32"}
    given = (train_dataset, test_dataset, rehearsed, global_config, validation_dataset, routine.__name__)
    setup = prepare(*given)
    if setup.data.validation is None:
        raise UserError(
            "there is no validation set, so no trial is better than another: set VALIDATION_FRACTION=0.2."
        )
    redactor = Redactor(config=setup.config)
    record = setup.captured | {"config": redactor.config(setup.captured["config"])}
    place = capture({key: first[key] for key in ("DEVICE", "PRECISION") if key in first}, project)["config"]
    record["config"] = record["config"] | place
    found = open_search(arguments, space, config)
    found.begin(record)
    return found_best(found, arguments)


def found_best(found: Any, arguments: argparse.Namespace) -> int:
    """Has workers train, and shows what they have found."""
    from dida_tools.search.pictures import save_pictures  # needs optuna, which open_search has told about
    from dida_tools.search.workers import Workers, describe, values_of, watch

    print(
        f"{found.name}: up to {arguments.trials} trials for {found.config['MONITOR']}, {arguments.workers} at a time."
    )
    print(
        f"  storage  {relative_path(found.storage_place) if '://' not in found.storage_place else 'a database'}"
    )
    print(f"  workers  {relative_path(found.folder / 'worker-*.log')}")
    command = [sys.executable, *sys.argv, "--worker"]
    try:
        watch(found, Workers(command, arguments.workers, found.folder), arguments.trials)
    except Preempted:
        print("Ended by a signal; what was done is saved. The same command goes on.")
        raise
    finally:
        best = found.best_trials()
        if best:
            pictures = ", ".join(relative_path(file) for file in save_pictures(found))
            print(f"\nThe best of {len(best)} trials that were trained to their end:")
            for trial in best[:_NUM_SHOWN]:
                print(f"  trial {trial.number:>3}  {describe(trial, found.goal)}  {values_of(trial)}")
            print(
                f"  config   {relative_path(found.save_best())}\n  run      {best[0].user_attrs['run']}\n  pictures {pictures}"
            )
            study = f" --study {found.name}" if found.name != "search" else ""
            print(f"Train it in full: python hyperparameter.py{study} --train-best EPOCHS=100")
    if not best:
        raise UserError(
            f"no trial was trained to its end; why not: {relative_path(found.folder)}/worker-*.log"
        )
    return 0


def train_best(arguments: argparse.Namespace) -> int:
    """Trains the best config, as train.py would; goes on with that where it was interrupted."""
    config = open_search(
        arguments, Space(search_space), load_routine(DEFAULT_ROUTINE).train_config
    ).best_config()
    problems: list[str] = []
    project = project_of("dida_tools")
    config = override(config, arguments.overrides, project, problems)
    check(config, project, problems)
    routine = load_routine(arguments.routine or recorded_routine(config))
    train_dataset, test_dataset, validation_dataset = build_datasets(config)
    routine.train(train_dataset, test_dataset, config, global_config, validation_dataset)
    return 0


def open_search(arguments: argparse.Namespace, space: Space, config: dict[str, Any]) -> Any:
    """The study that the arguments name."""
    try:
        from dida_tools.search.study import Search
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("dida_tools"):
            raise
        install = f'{Path(sys.executable).name} -m pip install -c constraints.txt -e ".[search]"'
        raise UserError(f"a search needs {error.name}, which is not installed: {install}") from error
    storage, pruning = arguments.storage, not arguments.no_pruning
    return Search(arguments.study, space, config, global_config, storage, pruning)


if __name__ == "__main__":
    sys.exit(main())
