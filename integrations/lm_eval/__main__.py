"""The harness's own command line, with ``--model prm_search``."""

from __future__ import annotations

import sys

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    sys.exit(cli_evaluate())
