"""
Predicts images of any size with an explicit config.

    python predict.py -i IMAGES... -o DIR           files, folders or patterns, with the predict_config below
    python predict.py -i SCENES... -o DIR --bands '*_B02.tif' '*_B03.tif' '*_B04.tif'       a folder is an image then
    python predict.py -i IMAGES... -o DIR --output classes confidence --augment flips --tile 512 --overlap 0.5
    torchrun --nproc-per-node 2 predict.py -i IMAGES... -o DIR                              the files are shared out

To predict with a tracked run, its name is enough: see run_prediction.py, which has the same options.
A call that was interrupted is simply repeated: what is done is not done again, and a large image is gone on with.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch.nn import GroupNorm

from dida_tools.config.errors import UserError
from dida_tools.models import UNET
from dida_tools.prediction import predict
from dida_tools.prediction.outputs import DTYPES, KINDS
from dida_tools.prediction.predictor import AUGMENTATIONS
from dida_tools.utils.signals import EXIT_CODE, Preempted

predict_config = {
    "MODEL": UNET,  # <- your model here
    "MODEL_CONFIG": {
        "ch_in": 12,
        "ch_out": 5,
        "bulk_ch": 16,
        "n_recursions": 3,
        "norm": partial(GroupNorm, 8),
    },
    "WEIGHTS": "weights/model.pt",  # <- your weights here
    "DEVICE": "auto",
    "OUTPUT": "classes",  # or probabilities, confidence, entropy; or several: ["classes", "confidence"]
    "PREFIX": "",
    "SUFFIX": "",
    # further keys and their defaults: DEFAULTS in dida_tools/prediction/predict.py
}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument(
        "--weights", metavar="FILE", type=Path, help="another weights file than that of the config"
    )
    arguments = parser.parse_args()
    given = {} if arguments.weights is None else {"WEIGHTS": arguments.weights}
    return report(lambda: predict(predict_config | config_of(arguments) | given), arguments.out_dir)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what is predicted, and how; those that are left out stay as the config has them."""
    parser.add_argument(
        "-i", "--images", nargs="+", required=True, metavar="IMAGE", help="files, folders or patterns"
    )
    parser.add_argument("-o", "--out-dir", required=True, metavar="DIR", help="where the predictions go")
    parser.add_argument(
        "--bands", nargs="+", metavar="PATTERN", help="files of a folder that are one image's channels"
    )
    parser.add_argument("--output", nargs="+", choices=KINDS, metavar="KIND", help=f"{', '.join(KINDS)}")
    parser.add_argument(
        "--output-dtype", choices=DTYPES, help="of all but classes; uint8: 0 to 254 instead of 0 to 1"
    )
    parser.add_argument(
        "--format", choices=("npy", "png", "tif"), help="of the outputs (default: that of the image)"
    )
    parser.add_argument("--prefix", help="put before the names of the images")
    parser.add_argument("--suffix", help="put after the names of the images")
    parser.add_argument("--tile", type=int, metavar="PIXELS", help="edge of the windows")
    parser.add_argument(
        "--overlap", type=float, metavar="PART", help="part of a window that the next one shares"
    )
    parser.add_argument("--batch-size", type=int, metavar="NUMBER", help="windows that are computed at once")
    parser.add_argument(
        "--augment", choices=AUGMENTATIONS, help="average over flips (4 x the time), or all (8 x)"
    )
    parser.add_argument("--device", help="auto, cpu, cuda, mps")
    parser.add_argument("--precision", help="auto, fp32, bf16, fp16")
    parser.add_argument("--masks", metavar="DIR", help="masks of the images, to tell what the maps are worth")
    parser.add_argument(
        "--no-check", action="store_true", help="predict images whose values are unlike the training's"
    )


def config_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keys of a predict_config that were given as options."""
    config = {"FILES": arguments.images, "OUT_DIR": arguments.out_dir}
    named = (
        "bands",
        "output",
        "output_dtype",
        "prefix",
        "suffix",
        "tile",
        "overlap",
        "batch_size",
        "augment",
        "masks",
    )
    options = {name: getattr(arguments, name) for name in (*named, "device", "precision")}
    options["format"] = f".{arguments.format}" if arguments.format else None
    options["check_values"] = False if arguments.no_check else None
    return config | {name.upper(): value for name, value in options.items() if value is not None}


def report(run: Callable[[], list[Path]], out_dir: str) -> int:
    """Runs a prediction, and says how it ended. Returns the exit code: 75 after a signal, as train.py does."""
    try:
        files = run()
    except Preempted:
        print("Ended by a signal; what is written is whole. The same command goes on.", file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"{len(files)} prediction{'s' * (len(files) != 1)} in {out_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
