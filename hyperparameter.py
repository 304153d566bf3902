"""
Search for the best config.

    python hyperparameter.py                               20 trials of the small U-Net on the built-in scenes
    python hyperparameter.py --data DIR --trials 40 EPOCHS=10        your images; each trial runs 10 epochs
    python hyperparameter.py --workers 4                   four at a time, each with a share of threads, GPUs
    python hyperparameter.py --study big MODEL_CONFIG.bulk_ch=32     another search, under another name
    python hyperparameter.py --train-best EPOCHS=100       train the best config of the search in full

What is tried stands below, in search_space; MONITOR decides what is best. The same command again resumes,
with what was interrupted or killed first, up to --trials in all. Everything lies in LOG_DIR/search/STUDY;
each trial is a run like any other (python runs.py list --columns STUDY,TRIAL).

Other machines join with the same command where LOG_DIR is shared. Where it is not, give all the URL of a
database: --storage postgresql://user@host/name (pip install 'psycopg[binary]'; the password: PGPASSWORD).
To look into a storage: optuna-dashboard logs/search/search/journal.log, or the URL.

Exit codes: 0 searched, or trained with --train-best; 75 ended by SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 after
saving: start it again; 130 ended at once by a second Ctrl-C; 1 failed, or no trial was trained to its end;
2 usage error.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from dida_core.errors import exit_code

from dida_tools.config.config import global_config
from dida_tools.training.routines import DEFAULT_ROUTINE, ROUTINES, load_routine, recorded_routine


def search_space() -> dict[str, Any]:
    """Return what to try: keys of the config, and uniform, log_uniform, integer or choice."""
    import torch
    from dida_core.search.space import choice, integer, log_uniform, uniform

    return {  # <- your space here
        "OPTIMIZER_CONFIG.lr": log_uniform(1e-4, 1e-1),
        "OPTIMIZER": choice(torch.optim.AdamW, torch.optim.SGD),
        "MODEL_CONFIG.n_recursions": integer(2, 4),
        "MODEL_CONFIG.dropout": uniform(0.0, 0.4),
    }


def main() -> int:
    """Search, or train the best config."""
    arguments = parse_arguments()
    # Not above, so that --help answers at once.
    from dida_core.config.check import check
    from dida_core.config.overrides import override
    from dida_core.config.project import project_of
    from dida_core.data.build import build_datasets, use_folder
    from dida_core.search.commands import dry_run, open_search, run_search
    from dida_core.search.space import Space

    project, problems = project_of("dida_tools"), list[str]()
    space, routine = Space(search_space(), project), load_routine(arguments.routine or DEFAULT_ROUTINE)
    if arguments.variant not in ("full", *routine.VARIANTS):
        print(f"--variant: choose one of full, {', '.join(routine.VARIANTS)}", file=sys.stderr)
        return 2
    # <- your config here: a model, a loss, ...; or edit train_config
    config = routine.train_config
    if arguments.variant != "full":
        config = routine.VARIANTS[arguments.variant](config)
    if arguments.train_best:
        config = open_search(arguments, space, config, global_config, project).best_config()
        routine = load_routine(arguments.routine or recorded_routine(config))
    elif arguments.data:
        config = override(config, arguments.overrides, project)  # reports typos before the data is read
        cache_file = Path(global_config["LOG_DIR"]) / "data_facts.json"
        config = use_folder(config, arguments.data, project, cache_file)
    config = override(config, arguments.overrides, project, problems)

    def datasets(config: dict[str, Any]) -> tuple[Any, Any, Any]:
        # <- your data here: any datasets of (input, target) pairs, for training, test and validation
        return build_datasets(config)

    def train(config: dict[str, Any]) -> Any:
        train_dataset, test_dataset, validation_dataset = datasets(config)
        return routine.train(train_dataset, test_dataset, config, global_config, validation_dataset)

    if arguments.train_best:
        check(config, project, problems)
        train(config)
    else:
        about = space, config, datasets, global_config, project, routine.__name__, problems
        captured = None if arguments.worker else dry_run(*about)
        search = open_search(arguments, space, config, global_config, project)
        run_search(search, captured, train, arguments)
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add, storage = parser.add_argument, os.environ.get("OPTUNA_STORAGE")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="values of the config, such as EPOCHS=3")
    add("--data", type=Path, metavar="DIR", help="folder with train/{x,y} and test/{x,y}")
    add("--routine", choices=ROUTINES, help=f"training loop to use (default: {DEFAULT_ROUTINE})")
    add("--variant", default="small", metavar="NAME", help="variant of its config, or full")
    add("--trials", type=int, default=20, metavar="N", help="trials in all, earlier ones too (20)")
    add("--workers", type=int, default=1, metavar="N", help="processes on this machine (1)")
    add("--storage", default=storage, metavar="URL", help="database, or journal file (OPTUNA_STORAGE)")
    add("--study", default="search", metavar="NAME", help="name of the search (default: search)")
    add("--no-pruning", action="store_true", help="train unpromising trials to their end, too")
    add("--train-best", action="store_true", help="train the best config of the search")
    add("--worker", action="store_true", help=argparse.SUPPRESS)  # how a search starts its own processes
    add("-w", action="store_true", help="suppress warnings")
    arguments = parser.parse_intermixed_args()
    if arguments.w:
        warnings.simplefilter("ignore")
    if arguments.trials < 1 or arguments.workers < 1:
        parser.error("--trials and --workers: give 1 or more")
    return arguments


if __name__ == "__main__":
    sys.exit(exit_code(main))
