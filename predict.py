"""
Predicts images with an explicit config.

    python predict.py -i IMAGES... -o DIR          images or folders of them, with the predict_config below

To predict with a tracked run, its name is enough: see run_prediction.py.
"""

import argparse
import sys
from functools import partial

from torch.nn import GroupNorm

from dida_tools.config.errors import UserError
from dida_tools.models import UNET
from dida_tools.prediction import predict
from dida_tools.utils.signals import EXIT_CODE, Preempted

predict_config = {
    "MODEL": UNET,  # <- your model here
    "MODEL_CONFIG": {"ch_in": 12, "ch_out": 5, "bulk_ch": 16, "n_recursions": 3, "norm": partial(GroupNorm, 8)},
    "WEIGHTS": "weights/model.pt",  # <- your weights here
    "DEVICE": "auto",
    "OUTPUT": "classes",  # or probabilities
    "PREFIX": "",
    "SUFFIX": "",
}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", "--images", nargs="+", required=True, metavar="IMAGE", help="files, or folders of them")
    parser.add_argument("-o", "--out-dir", required=True, metavar="DIR", help="where the predictions go")
    parser.add_argument("--weights", metavar="FILE", help="another weights file than that of the config")
    arguments = parser.parse_args()
    config = predict_config | {"FILES": arguments.images, "OUT_DIR": arguments.out_dir}
    if arguments.weights:
        config["WEIGHTS"] = arguments.weights
    try:
        files = predict(config)
    except Preempted:
        print("Ended by a signal; what is written is whole.", file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"{len(files)} predictions are in {arguments.out_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
