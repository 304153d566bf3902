"""
Predict images of any size with an explicit config.

    python predict.py -i IMAGES... -o DIR               files, folders or patterns, with the config below
    python predict.py -i SCENES... -o DIR --bands '*_B02.tif' '*_B03.tif' '*_B04.tif'  a folder is an image
    python predict.py -i IMAGES... -o DIR --output classes confidence --augment flips --tile 512
    torchrun --nproc-per-node 2 predict.py -i IMAGES... -o DIR                two processes share the files

To predict with a run, its name is enough: see run_prediction.py, which has the same options.
After an interruption, repeat the call: finished images are skipped, an unfinished one starts again.
"""

import argparse
import sys
from typing import Any

from dida_core.config.prediction_keys import PREDICT_KEYS
from dida_core.errors import exit_code


def predict_config() -> dict[str, Any]:
    """Return what is predicted with, and how. Options of the command line come on top."""
    from functools import partial

    from torch.nn import GroupNorm

    from dida_tools.models import UNET

    norm = partial(GroupNorm, 8)
    return {
        "MODEL": UNET,  # <- your model here
        "MODEL_CONFIG": {"ch_in": 12, "ch_out": 5, "bulk_ch": 16, "n_recursions": 3, "norm": norm},
        "WEIGHTS": "weights/model.pt",  # <- your weights here
        "DEVICE": "auto",
        "OUTPUT": "classes",  # or probabilities, confidence, entropy; or several: ["classes", "confidence"]
        "PREFIX": "",
        "SUFFIX": "",
        # further keys and their defaults: PREDICT_KEYS in dida_core/config/prediction_keys.py
    }


# Keys that are options, named after them: BATCH_SIZE is --batch-size.
OPTIONS = ("BANDS", "OUTPUT", "OUTPUT_DTYPE", "FORMAT", "PREFIX", "SUFFIX", "TILE", "OVERLAP", "BATCH_SIZE")
OPTIONS += ("AUGMENT", "DEVICE", "PRECISION", "MASKS")
TYPES: dict[str, Any] = {"TILE": int, "BATCH_SIZE": int, "OVERLAP": float, "FORMAT": ".{}".format}


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options; those that are left out stay as the config has them."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    about = {key: entry.about for key, entry in PREDICT_KEYS.items()}
    parser.add_argument("-i", "--images", dest="FILES", nargs="+", required=True, help=about["FILES"])
    parser.add_argument("-o", "--out-dir", dest="OUT_DIR", required=True, help=about["OUT_DIR"])
    for key in OPTIONS:
        option, nargs = "--" + key.lower().replace("_", "-"), "+" if key in ("BANDS", "OUTPUT") else None
        parser.add_argument(option, dest=key, nargs=nargs, type=TYPES.get(key, str), help=about[key])
    no_check = "predict images whose values are unlike those of training"
    parser.add_argument("--no-check", dest="CHECK_VALUES", action="store_false", default=None, help=no_check)
    return parser


def given_keys(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the keys of a predict_config that were given as options."""
    return {key: value for key, value in vars(arguments).items() if key in PREDICT_KEYS and value is not None}


def main() -> int:
    """Predict with the config of this file."""
    parser = make_parser(__doc__)
    parser.add_argument("--weights", dest="WEIGHTS", metavar="FILE", help="instead of those of the config")
    arguments = parser.parse_args()
    from dida_core.prediction import predict

    predict(predict_config() | given_keys(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main, of_each_process=True))
