"""What the command line does, one module a command; `prm_search.cli` is the entry point.

Importing this package imports neither torch nor transformers: a command does that once its arguments are in order.
"""

from __future__ import annotations


class BadInput(ValueError):
    """What the user gave cannot be used; the message is the one line that is shown."""
