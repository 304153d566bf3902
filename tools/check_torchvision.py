"""
Removes a torchvision that cannot be imported beside the installed torch.

It comes with other packages, and in a build for another torch its import fails, and with it that of torchmetrics, which
works without torchvision.
"""

import importlib.metadata
import importlib.util
import subprocess
import sys


def main() -> None:
    """Tries the import in a process of its own."""
    if importlib.util.find_spec("torchvision") is None:
        return
    if (
        subprocess.run(
            [sys.executable, "-c", "import torchvision"], capture_output=True, check=False
        ).returncode
        == 0
    ):
        return
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision")}
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)
    print(
        f"torchvision {versions['torchvision']} cannot be imported beside torch {versions['torch']} and was removed; "
        "nothing in this project needs it."
    )


if __name__ == "__main__":
    main()
