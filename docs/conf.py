"""Settings of Sphinx, which make doc runs."""

import importlib.util
import os
import pkgutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dida_core.config.keys import KEYS, REQUIRED  # noqa: E402  # pylint: disable=wrong-import-position

import dida_tools  # noqa: E402  # pylint: disable=wrong-import-position

project = "dida tools"
author = copyright = f"{project} contributors"  # pylint: disable=redefined-builtin
version = release = dida_tools.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = project
html_show_sourcelink = False
exclude_patterns = ["_build"]

# Docstrings are reST with :param x:, defaults are shown as they are written.
autoclass_content = "both"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
add_module_names = False
# A name such as train, which many modules have, is linked to one of them.
suppress_warnings = ["ref.python"]
# Show routines and parts also where their libraries are not installed.
OPTIONAL = ("fastai", "ignite", "lightning", "onnx", "onnxruntime", "onnxscript", "optuna", "safetensors")
autodoc_mock_imports = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
os.environ.setdefault("MPLBACKEND", "agg")


PAGES = {"api/project": dida_tools.__name__, "api/library": "dida_core"}


def api_of(package: str) -> str:
    """Return a section for each module of a package."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin
    modules = {
        one.name: one.ispkg for one in pkgutil.walk_packages([Path(spec.origin).parent], f"{package}.")
    }
    sections = []
    for name in sorted(name for name in modules if not name.endswith("__main__")):
        members = (
            "" if modules[name] else "   :members:\n"
        )  # a package's names are shown where they are defined
        sections.append(f"## {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n{members}```\n")
    return "\n".join(sections)


def table_of_keys() -> str:
    """Return all keys of the config."""
    lines = ["| key | default | what it is for |", "| --- | --- | --- |"]
    for key, entry in KEYS.items():
        default = "*required*" if entry.default is REQUIRED else f"`{entry.default!r}`"
        lines.append(f"| `{key}` | {default} | {entry.about} |")
    return "\n".join(lines)


def add_what_is_derived(_: Any, page: str, source: list[str]) -> None:
    """Fill pages from the code: the API reference with a package's modules, config_keys with the keys."""
    if page in PAGES:
        source[0] += "\n" + api_of(PAGES[page])
    if page == "config_keys":
        source[0] += "\n" + table_of_keys()


def setup(app: Any) -> None:
    """Register with Sphinx."""
    app.connect("source-read", add_what_is_derived)
