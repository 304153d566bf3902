"""
Predict images of any size with a run.

    python run_prediction.py NAME -i IMAGES... -o DIR     NAME: a run's name or part of it, latest, or best
    python run_prediction.py best -i 'tiles/*.tif' -o maps --output classes confidence

Model, weights and the way images are read come from the run's record. Options are those of predict.py.
"""

import sys

from dida_core.errors import exit_code

from predict import given_keys, make_parser


def main() -> int:
    """Predict with the best weights of a run."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "name", metavar="NAME", help="the run: its name or part of it, latest, best, or best:METRIC"
    )
    arguments = parser.parse_args()
    from dida_core.prediction.predict import predict, run_config

    predict(run_config(arguments.name, package="dida_tools") | given_keys(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main, of_each_process=True))
