"""The command python -m dida_core.export."""

import sys

from ..errors import exit_code
from .export import main

sys.exit(exit_code(main))
