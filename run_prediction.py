"""
Predicts images of any size with a tracked run.

    python run_prediction.py NAME -i IMAGES... -o DIR      NAME: a run's name or part of it, latest, best, or best:iou
    python run_prediction.py best -i 'tiles/*.tif' -o maps --output classes confidence

Model, weights and the way images are read come from the run's record. Options are those of predict.py.
"""

import argparse
import sys

from dida_tools.prediction import predict_run
from predict import add_options, config_of, report


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "name", metavar="NAME", help="the run: its name or part of it, latest, best, or best:METRIC"
    )
    add_options(parser)
    arguments = parser.parse_args()
    options = config_of(arguments)
    files, out_dir = options.pop("FILES"), options.pop("OUT_DIR")
    return report(lambda: predict_run(arguments.name, files, out_dir, **options), arguments.out_dir)


if __name__ == "__main__":
    sys.exit(main())
