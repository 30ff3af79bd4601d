"""The commands of the command line, one module a command; `prm_search.cli` is the entry point.

Importing this package imports neither torch nor transformers: a command does that once its arguments are in order.
"""

from __future__ import annotations


class BadInput(ValueError):
    """Raised where the user's input cannot be used; the message is the one line that is shown."""
