"""
Measure memory and time of predicting large images, each in a process of its own.

    python benchmarks/prediction.py                            8192 x 8192 x 12, 2, 10 classes; also MONAI
    python benchmarks/prediction.py --size 20000 --only ours   larger; --height 2048 for some of its rows

The model is one small convolution: this measures cutting, blending, reading and writing. Overlap: 50 %.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CHANNELS = 12
TILE = 256


class Net(nn.Module):
    """The cheapest model that sees its surroundings."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(CHANNELS, classes, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return self.layer(x)


def make_image(path: Path, height: int, size: int) -> None:
    """Write (height, size, CHANNELS) uint16, as .npy or as GeoTIFF."""
    rng = np.random.default_rng(0)
    tile = rng.integers(1, 10_000, (256, size, CHANNELS), np.uint16)
    if path.suffix == ".npy":
        image = np.lib.format.open_memmap(path, "w+", np.uint16, (height, size, CHANNELS))
        for top in range(0, height, 256):
            image[top : top + 256] = tile[: height - top]
        return
    import rasterio
    from rasterio.transform import from_origin

    profile = {"driver": "GTiff", "dtype": "uint16", "count": CHANNELS, "tiled": True, "bigtiff": "yes"}
    profile |= {
        "crs": "EPSG:32633",
        "transform": from_origin(0, 0, 10, 10),
        "compress": "deflate",
        "zlevel": 1,
    }
    with rasterio.open(path, "w", height=height, width=size, **profile) as raster:
        for top in range(0, height, 256):
            rows = tile[: height - top]
            raster.write(np.moveaxis(rows, -1, 0), window=((top, top + len(rows)), (0, size)))


def ours(path: Path, classes: int, folder: Path) -> None:
    """Run predict(), from file to file."""
    from dida_tools.prediction import predict
    from dida_tools.utils.data.contract import DataContract
    from dida_tools.utils.weights import save_weights

    contract = DataContract(CHANNELS, dtype="uint16", scale=1e-4, outputs=classes)
    save_weights(folder / "net.pt", {"model": Net(classes).state_dict(), "contract": contract.to_dict()})
    config = {
        "MODEL": Net,
        "MODEL_CONFIG": {"classes": classes},
        "WEIGHTS": folder / "net.pt",
        "FILES": [path],
    }
    config |= {"OUT_DIR": folder / "out", "TILE": TILE, "OVERLAP": 0.5, "DEVICE": "cpu", "PRECISION": "fp32"}
    predict(config)


def monai(path: Path, classes: int, folder: Path) -> None:
    """Run MONAI's sliding_window_inference, whose input and output lie in memory."""
    from monai.inferers.utils import sliding_window_inference

    model = Net(classes)
    with torch.no_grad():
        image = torch.from_numpy(
            np.ascontiguousarray(np.moveaxis(np.load(path, mmap_mode="r"), -1, 0)).astype("f4")
        )
        image = image.mul_(1e-4)[None]
        options = {"overlap": 0.5, "mode": "gaussian", "progress": False}
        answer = sliding_window_inference(image, (TILE, TILE), 4, lambda x: model(x).softmax(1), **options)
        np.save(folder / "out.npy", answer.argmax(1)[0].to(torch.uint8).numpy())


METHODS = {"ours": ours, "monai": monai}


def measure(method: str, path: Path, classes: int) -> None:
    """Print seconds and GiB above the start, in a process of its own."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    __import__("monai.inferers.utils" if method == "monai" else "dida_tools.prediction")
    __import__("rasterio")
    Net(2)(torch.zeros(1, CHANNELS, 32, 32))
    before = resident()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        METHODS[method](path, classes, Path(folder))
    seconds = time.perf_counter() - started
    print(f"{seconds} {(resident('VmHWM') - before) / 2**30}")


def resident(key: str = "VmRSS") -> int:
    """Return the bytes that this process holds; VmHWM: the most so far (ru_maxrss would be the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def main() -> None:
    """Measure all methods and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--height", type=int, help="default: square; memory does not depend on it")
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 10])
    parser.add_argument("--only", choices=METHODS)
    parser.add_argument("--format", choices=("npy", "tif"), default="npy")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        method, path, classes = arguments.measure
        measure(method, Path(path), int(classes))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"image.{arguments.format}"
        height = arguments.height or arguments.size
        make_image(path, height, arguments.size)
        print(f"{height} x {arguments.size} x {CHANNELS}, uint16 .{arguments.format}, windows of {TILE}")
        print(f"{'':8}{'classes':>8}{'GiB above start':>18}{'seconds':>10}{'MP/s':>8}")
        for classes in arguments.classes:
            for method in [arguments.only] if arguments.only else METHODS:
                command = [sys.executable, __file__, "--measure", method, str(path), str(classes)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    print(f"{method:8}{classes:>8}  failed: {done.stderr.strip().splitlines()[-1]}")
                    continue
                seconds, gib = map(float, done.stdout.splitlines()[-1].split())
                speed = height * arguments.size / 1e6 / seconds
                print(f"{method:8}{classes:>8}{gib:>18.2f}{seconds:>10.1f}{speed:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
