"""
Remove a torchvision that cannot be imported beside the installed torch, unless it is the user's.

It comes with other packages. A build for another torch fails on import, and with it torchmetrics, which works
without torchvision. One that was installed by name (pip records that), or that a package needs which is not
in constraints.txt, such as timm, stays; report how it can be fixed.
"""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Try the import in a process of its own."""
    if importlib.util.find_spec("torchvision") is None:
        return
    attempt = [sys.executable, "-c", "import torchvision"]
    if subprocess.run(attempt, capture_output=True, check=False).returncode == 0:
        return
    torch, torchvision = (importlib.metadata.distribution(name) for name in ("torch", "torchvision"))
    found = f"torchvision {torchvision.version} cannot be imported beside torch {torch.version}"
    others = sorted(users() - known())
    if torchvision.read_text("REQUESTED") is not None or others:
        build = torch.version.partition("+")[2]
        index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
        print(f"{found}. It stays{', for ' * bool(others)}{', '.join(others)}. Install the build that fits:")
        print(f"  {sys.executable} -m pip install --upgrade torch=={torch.version} torchvision{index}")
        return
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)
    print(f"{found} and was removed; nothing in this project needs it.")


def users() -> set[str]:
    """Return the installed packages that need torchvision."""
    needs = re.compile(r"torchvision\b(?!.*extra ==)")
    distributions = importlib.metadata.distributions()
    return {one.name.lower() for one in distributions if any(map(needs.match, one.requires or ()))}


def known() -> set[str]:
    """Return the packages that this project has brought."""
    lines = Path(__file__).resolve().parents[1].joinpath("constraints.txt").read_text("utf-8").splitlines()
    return {line.partition("==")[0].strip().lower() for line in lines}


if __name__ == "__main__":
    main()
