"""
Train a model.

    python train.py                                          the built-in scenes, a small U-Net
    python train.py --data DIR                               your data: DIR/train/{x,y}, DIR/test/{x,y}
    python train.py EPOCHS=3 MODEL_CONFIG.dropout=0.1        other values, by the config's own keys
    python train.py --variant full DEVICE=cuda               the full config
    python train.py --routine ignite                         another routine: the same weights, bit for bit
    python train.py --resume NAME EPOCHS=40                  resume a run, or prolong it
    python train.py --resume auto EPOCHS=40                  resume this very run if it was interrupted
    python train.py --rerun NAME                             rerun it: are its weights the same, bit for bit?
    torchrun --nproc-per-node 2 train.py                     on two GPUs or processes (pytorch, ignite)

Exit codes: 0 trained; 75 ended by SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 after saving: start it again with
--resume; 130 ended at once by a second Ctrl-C; 1 failed, or not identical with --rerun; 2 usage error.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

from dida_core.errors import exit_code

from dida_tools.training.routines import DEFAULT_ROUTINE, ROUTINES


def main() -> int:
    """Train by the command line's arguments, and return the exit code."""
    parser = make_parser()
    arguments = parser.parse_intermixed_args()
    if arguments.w:
        warnings.simplefilter("ignore")
    if arguments.resume and arguments.rerun:
        parser.error("--resume and --rerun exclude each other: give one of them")
    if "" in (arguments.resume, arguments.rerun):
        parser.error("--resume and --rerun need the name of a run")
    if arguments.rerun and arguments.overrides:
        parser.error("--rerun trains as it was: leave KEY=VALUE out")
    recorded = arguments.rerun or (arguments.resume if arguments.resume != "auto" else None)
    if recorded and (arguments.data or arguments.variant != "small"):
        parser.error("data and variant come from the run's record: leave --data and --variant out")

    # Imported when needed: --help answers without PyTorch.
    from dida_core.config.check import check
    from dida_core.config.overrides import override
    from dida_core.config.project import project_of
    from dida_core.data.build import build_datasets, use_folder
    from dida_core.runs.lookup import find_run, read_run_config

    from dida_tools.config.config import global_config
    from dida_tools.training.routines import load_routine, recorded_routine

    project, log_dir = project_of("dida_tools"), Path(global_config["LOG_DIR"])
    config: dict[str, Any] = {}
    if recorded:
        name = find_run(global_config, recorded)
        config = read_run_config(log_dir / name, project)
        config |= (
            {"RESUME": name}
            if arguments.resume
            else {"RERUN_OF": name, "DATE": None, "STUDY": None, "TRIAL": None}
        )
    routine = load_routine(arguments.routine or recorded_routine(config))
    if arguments.variant not in ("full", *routine.VARIANTS):
        parser.error(f"--variant {arguments.variant}: choose one of full, {', '.join(routine.VARIANTS)}")
    if not recorded:
        # <- your config here: a model, a loss, ...; or edit train_config in training/config.py
        config = routine.train_config
        if arguments.variant != "full":
            config = routine.VARIANTS[arguments.variant](config)
        if arguments.data:
            config = override(config, arguments.overrides, project)  # reports typos before the data is read
            config = use_folder(config, arguments.data, project, log_dir / "data_facts.json")
        config = config | {"RESUME": arguments.resume}
    if arguments.smtp:
        config = config | {"NOTIFY": arguments.smtp}
    problems: list[str] = []
    config = override(config, arguments.overrides, project, problems)
    check(config, project, problems)

    # <- your data here: any two datasets of (input, target) pairs
    train_dataset, test_dataset, validation_dataset = build_datasets(config)

    result = routine.train(train_dataset, test_dataset, config, global_config, validation_dataset)
    return 1 if result.identical is False else 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="values of the config, such as EPOCHS=3")
    add("--data", type=Path, metavar="DIR", help="folder with train/{x,y} and test/{x,y}")
    default = f"default: that of the run, else {DEFAULT_ROUTINE}"
    add("--routine", choices=ROUTINES, help=f"training loop to use ({default})")
    add("--variant", default="small", metavar="NAME", help="variant of the config, or full (default: small)")
    add("--resume", metavar="NAME", help="run to resume: a name, latest, or auto")
    add("--rerun", metavar="NAME", help="run to rerun and compare with: a name, or its row's number")
    add("--smtp", metavar="ADDRESS", help="mail about start and end; server: utils/notify/smtp.py")
    add("-w", action="store_true", help="suppress warnings")
    return parser


if __name__ == "__main__":
    sys.exit(exit_code(main))
