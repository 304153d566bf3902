"""
Trains a model.

    python train.py                                          the built-in scenes, a small U-Net
    python train.py --data DIR                               your images and masks: DIR/train/{x,y}, DIR/test/{x,y}
    python train.py EPOCHS=3 MODEL_CONFIG.dropout=0.1        other values, by the config's own keys
    python train.py --variant full DEVICE=cuda               the full config of the routine
    python train.py --resume NAME EPOCHS=40                  goes on with a run, or prolongs it
"""

import argparse
import importlib
import pkgutil
import sys
import warnings
from pathlib import Path

from dida_tools import training
from dida_tools.config.capture import check, override
from dida_tools.config.config import global_config
from dida_tools.config.errors import UserError
from dida_tools.utils.data.build import build_datasets, use_folder
from dida_tools.utils.logging.runs import find_run, read_run_config

ROUTINES = [module.name[:-9] for module in pkgutil.iter_modules(training.__path__) if module.name.endswith("_training")]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values of the config, such as EPOCHS=3")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with train/{x,y} and test/{x,y}")
    parser.add_argument("--routine", default="pytorch", choices=ROUTINES, help="what trains (default: pytorch)")
    parser.add_argument(
        "--variant", default="small", metavar="NAME", help="variant of its config, or full (default: small)"
    )
    parser.add_argument("--resume", metavar="NAME", help="run to go on with: a name, or latest")
    parser.add_argument("-w", action="store_true", help="suppress warnings")
    arguments = parser.parse_args()
    if arguments.w:
        warnings.simplefilter("ignore")

    routine = importlib.import_module(f"dida_tools.training.{arguments.routine}_training")
    if arguments.resume and (arguments.data or arguments.variant != "small"):
        parser.error("--resume takes data and variant from the run's record: leave --data and --variant out")
    if arguments.variant not in ("full", *routine.VARIANTS):
        parser.error(f"--variant {arguments.variant}: choose one of full, {', '.join(routine.VARIANTS)}")
    try:
        if arguments.resume:
            name = find_run(global_config, arguments.resume)
            config = read_run_config(Path(global_config["LOG_DIR"]) / name) | {"RESUME": name}
        else:
            # <- your config here: a model, a loss, ...; or edit train_config in the routine
            config = routine.train_config
            if arguments.variant != "full":
                config = routine.VARIANTS[arguments.variant](config)
            if arguments.data:
                override(config, arguments.overrides)  # typos are told before the data is read
                config = use_folder(config, arguments.data, Path(global_config["LOG_DIR"]) / "data_facts.json")
        problems: list[str] = []
        config = override(config, arguments.overrides, problems)
        check(config, problems)

        # <- your data here: any two data sets of (input, target) pairs
        train_dataset, test_dataset, validation_dataset = build_datasets(config)

        routine.train(train_dataset, test_dataset, config, global_config, validation_dataset)
    except KeyboardInterrupt:
        return 130  # the run has said how it goes on
    except (UserError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
