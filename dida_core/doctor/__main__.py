"""The command python -m dida_core.doctor."""

import sys

from ..errors import exit_code
from .doctor import main

sys.exit(exit_code(main))
