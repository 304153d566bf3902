"""Sphinx's settings: make doc."""

import importlib.util
import os
import pkgutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import dida_tools  # noqa: E402  # pylint: disable=wrong-import-position
from dida_core.config.keys import KEYS, REQUIRED  # noqa: E402  # pylint: disable=wrong-import-position

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
# Routines and parts whose libraries are not installed are shown all the same.
OPTIONAL = ("fastai", "ignite", "lightning", "onnx", "onnxruntime", "onnxscript", "optuna", "safetensors")
autodoc_mock_imports = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
os.environ.setdefault("MPLBACKEND", "agg")


def modules_of(name: str) -> list[str]:
    """A package, and all modules in it; none where this project is without it."""
    spec = importlib.util.find_spec(f"dida_tools.{name}")
    if spec is None or not spec.origin:
        return []
    return [
        spec.name,
        *sorted(one.name for one in pkgutil.walk_packages([Path(spec.origin).parent], f"{spec.name}.")),
    ]


def api_of(name: str) -> str:
    """A section for each module of a package."""
    sections = []
    for module in modules_of(name):
        is_package = (ROOT / Path(*module.split("."))).is_dir()  # its names are shown where they are defined
        members = "" if is_package else "   :members:\n"
        sections.append(f"## {module}\n\n```{{eval-rst}}\n.. automodule:: {module}\n{members}```\n")
    return "\n".join(sections)


def table_of_keys() -> str:
    """All keys of the config."""
    lines = ["| key | default | what it is for |", "| --- | --- | --- |"]
    for key, entry in KEYS.items():
        default = "*required*" if entry.default is REQUIRED else f"`{entry.default!r}`"
        lines.append(f"| `{key}` | {default} | {entry.about} |")
    return "\n".join(lines)


def add_what_is_derived(_: Any, page: str, source: list[str]) -> None:
    """Fills pages from the code: api/NAME with the package's part of that name, config_keys with the keys."""
    if page.startswith("api/"):
        source[0] += "\n" + api_of(page.removeprefix("api/"))
    if page == "config_keys":
        source[0] += "\n" + table_of_keys()


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", add_what_is_derived)
