"""What is the project's own: where its files live, and what its records may name."""

import os
from pathlib import Path

# Modules that a record may name besides the project's own and torch's, such as "timm.layers.mlp". A library's
# gives the classes of models, losses, ... that it defines, and nothing else. None is trusted by default: a
# class may download, import or write when it is built.  # <- your libraries here
ALLOWED_ROOTS: tuple[str, ...] = ()

# Old names of what was renamed or moved, so that old records are still read.  # <- your renamed objects here
_OF_2021 = {
    "layers.conv": ("ConvLayer", "DeconvLayer", "TransConvLayer"),
    "models.unet": ("UNET",),
    "utils.data.datasets": ("NpyDataset", "NpyPredictionDataset"),
    "utils.loss": (
        *("smooth_dice_loss", "smooth_dice_beta_loss", "dice_bce_sum", "multi_class_smooth_dice_loss"),
        *("multi_class_dice_ce_sum", "precision", "recall", "f1"),
        *("masked_smooth_dice_loss", "masked_precision", "masked_recall", "masked_f1"),
    ),
}
ALIASES = {f"{home}:{name}": f".{home}:{name}" for home, names in _OF_2021.items() for name in names}
ALIASES |= {
    f"training.{name}_training": f".training.{name}_training" for name in ("pytorch", "ignite", "fastai")
}


def make_global_config(root_path: str | os.PathLike | None = None) -> dict[str, str]:
    """
    Make the global config. Folders are not created here, but by whatever first writes into them.

    Each value can be redirected by the environment variable of the same name; a relative one is taken from
    the working directory.

    :param root_path: the folder that holds the others by default
    """
    root = Path(os.environ.get("ROOT_PATH") or root_path or _root_path()).absolute()
    folders = {"WEIGHT_DIR": "weights", "LOG_DIR": "logs", "DATA_DIR": "data"}  # <- your folders here
    paths = {key: Path(os.environ.get(key) or root / folder).absolute() for key, folder in folders.items()}
    return {"ROOT_PATH": str(root)} | {key: str(path) for key, path in paths.items()}


def _root_path() -> Path:
    # Where the package is installed, the working directory: nothing is written beside it.
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()


global_config = make_global_config()
