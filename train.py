"""
Trains a model.

    python train.py                                          the built-in scenes, a small U-Net
    python train.py --data DIR                               your images and masks: DIR/train/{x,y}, DIR/test/{x,y}
    python train.py EPOCHS=3 MODEL_CONFIG.dropout=0.1        other values, by the config's own keys
    python train.py --variant full DEVICE=cuda               the full config of the routine
    python train.py --routine ignite                         another routine: the same weights, bit for bit
    python train.py --resume NAME EPOCHS=40                  goes on with a run, or prolongs it
    python train.py --resume auto EPOCHS=40                  goes on with this very run if it was interrupted
    python train.py --rerun NAME                             does a run again: are its weights the same, bit for bit?
    torchrun --nproc-per-node 2 train.py                     on two GPUs, or by two processes (pytorch, ignite)

Exit codes: 0 trained; 75 ended by SIGTERM, SIGINT (Ctrl-C) or SIGUSR1 after saving: start it again with --resume;
130 ended at once by a second Ctrl-C; 1 failed, or not identical with --rerun; 2 not understood.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from dida_tools.config.check import check
from dida_tools.config.config import global_config
from dida_tools.config.errors import UserError
from dida_tools.config.overrides import override
from dida_tools.config.project import project_of
from dida_tools.training.routines import DEFAULT_ROUTINE, ROUTINES, load_routine, recorded_routine
from dida_tools.utils.data.build import build_datasets, use_folder
from dida_tools.utils.logging.runs import find_run, read_run_config
from dida_tools.utils.signals import EXIT_CODE, Preempted


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="values of the config, such as EPOCHS=3"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with train/{x,y} and test/{x,y}")
    parser.add_argument(
        "--routine", choices=ROUTINES, help=f"what trains (default: what the run had, else {DEFAULT_ROUTINE})"
    )
    parser.add_argument(
        "--variant", default="small", metavar="NAME", help="variant of its config, or full (default: small)"
    )
    parser.add_argument("--resume", metavar="NAME", help="run to go on with: a name, latest, or auto")
    parser.add_argument(
        "--rerun", metavar="NAME", help="run to do again and compare with: a name, or its row's number"
    )
    parser.add_argument(
        "--smtp", metavar="ADDRESS", help="mail about start and end; server: dida_tools/utils/notify"
    )
    parser.add_argument("-w", action="store_true", help="suppress warnings")
    arguments = parser.parse_intermixed_args()
    if arguments.w:
        warnings.simplefilter("ignore")

    if arguments.resume and arguments.rerun:
        parser.error("--resume goes on with a run, --rerun does it again: give one of them")
    if arguments.rerun and arguments.overrides:
        parser.error("--rerun trains as it was: leave KEY=VALUE out")
    recorded = arguments.rerun or (arguments.resume if arguments.resume != "auto" else None)
    if recorded and (arguments.data or arguments.variant != "small"):
        parser.error("data and variant come from the run's record: leave --data and --variant out")
    try:
        config: dict[str, Any] = {}
        project = project_of("dida_tools")
        if recorded:
            name = find_run(global_config, recorded)
            config = read_run_config(Path(global_config["LOG_DIR"]) / name, project)
            config |= {"RESUME": name} if arguments.resume else {"RERUN_OF": name, "DATE": None}
        routine = load_routine(arguments.routine or recorded_routine(config))
        if arguments.variant not in ("full", *routine.VARIANTS):
            parser.error(f"--variant {arguments.variant}: choose one of full, {', '.join(routine.VARIANTS)}")
        if not recorded:
            # <- your config here: a model, a loss, ...; or edit train_config in the routine
            config = routine.train_config
            if arguments.variant != "full":
                config = routine.VARIANTS[arguments.variant](config)
            if arguments.data:
                override(config, arguments.overrides, project)  # typos are told before the data is read
                config = use_folder(
                    config, arguments.data, project, Path(global_config["LOG_DIR"]) / "data_facts.json"
                )
            config = config | {"RESUME": arguments.resume}
        if arguments.smtp:
            config = config | {"NOTIFY": arguments.smtp}
        problems: list[str] = []
        config = override(config, arguments.overrides, project, problems)
        check(config, project, problems)

        # <- your data here: any two datasets of (input, target) pairs
        train_dataset, test_dataset, validation_dataset = build_datasets(config)

        result = routine.train(train_dataset, test_dataset, config, global_config, validation_dataset)
    except Preempted:
        return EXIT_CODE  # the run has said how it goes on
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes one is enough
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 1 if result.identical is False else 0


if __name__ == "__main__":
    sys.exit(main())
