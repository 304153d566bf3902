"""
Remove a torchvision that cannot be imported beside the installed torch.

It comes with other packages. A build for another torch fails on import, and with it torchmetrics, which works
without torchvision. One that was installed by name (pip records that) stays; report how it can be fixed.
"""

import importlib.metadata
import importlib.util
import subprocess
import sys


def main() -> None:
    """Try the import in a process of its own."""
    if importlib.util.find_spec("torchvision") is None:
        return
    attempt = [sys.executable, "-c", "import torchvision"]
    if subprocess.run(attempt, capture_output=True, check=False).returncode == 0:
        return
    torch, torchvision = (importlib.metadata.distribution(name) for name in ("torch", "torchvision"))
    found = f"torchvision {torchvision.version} cannot be imported beside torch {torch.version}"
    if torchvision.read_text("REQUESTED") is not None:
        print(f"{found}: install the build for that torch (https://pytorch.org/get-started).")
        return
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)
    print(f"{found} and was removed; nothing in this project needs it.")


if __name__ == "__main__":
    main()
