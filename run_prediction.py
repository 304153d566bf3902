"""
Predicts images with a tracked run.

    python run_prediction.py NAME -i IMAGES... -o DIR      NAME: a run's name or part of it, latest, or best

Model, weights and the way images are read come from the run's record.
"""

import argparse
import sys
from pathlib import Path

from dida_tools.config.config import global_config
from dida_tools.config.errors import UserError
from dida_tools.prediction import predict
from dida_tools.utils.logging.runs import find_run, read_run_config
from dida_tools.utils.signals import EXIT_CODE, Preempted


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help="the run: its name or part of it, latest, or best")
    parser.add_argument("-i", "--images", nargs="+", required=True, metavar="IMAGE", help="files, or folders of them")
    parser.add_argument("-o", "--out-dir", required=True, metavar="DIR", help="where the predictions go")
    parser.add_argument("--output", default="classes", help="classes or probabilities (default: classes)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    parser.add_argument("--prefix", default="", help="put before the names of the images")
    parser.add_argument("--suffix", default="", help="put after the names of the images")
    arguments = parser.parse_args()
    try:
        name = find_run(global_config, arguments.name, with_weights=True)
        config = read_run_config(Path(global_config["LOG_DIR"]) / name, keys=("MODEL", "MODEL_CONFIG"))
        files = predict(
            {
                "MODEL": config["MODEL"],
                "MODEL_CONFIG": config["MODEL_CONFIG"],
                "WEIGHTS": Path(global_config["WEIGHT_DIR"]) / name / "best.pt",
                "FILES": arguments.images,
                "OUT_DIR": arguments.out_dir,
                "OUTPUT": arguments.output,
                "DEVICE": arguments.device,
                "PREFIX": arguments.prefix,
                "SUFFIX": arguments.suffix,
            }
        )
    except Preempted:
        print("Ended by a signal; what is written is whole.", file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"{len(files)} predictions of {name} are in {arguments.out_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
