"""``python -m gpudia``: the command line."""

import sys

from gpudia.cli import main

sys.exit(main())
