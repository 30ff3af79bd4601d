"""`--policy openai:MODEL`: a policy behind an OpenAI-compatible server."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from . import BadInput

PREFIX = "openai:"
OWN = ("base_url", "model", "api_key", "sleep", "self")  # that other options, or nobody, may give


def is_endpoint(policy: str | None) -> bool:
    """Return True if `--policy` names a model behind a server."""
    return policy is not None and policy.startswith(PREFIX)


def load_endpoint(name: str, base_url: str | None, options: Mapping[str, Any]) -> Any:
    """The OpenAIPolicy of that name; says on standard error what its server can do. The key is OPENAI_API_KEY.

    Args:
        name: as `--policy` has it.
        base_url: as `--base-url` has it.
        options: further arguments of OpenAIPolicy, by name; "backoff" as an object of Backoff's.

    Raises:
        BadInput: the name is empty, or an option is unknown or of the wrong kind.
        ConnectionError, ImportError, ValueError: see OpenAIPolicy.
    """
    from ..policies.endpoint.policy import OpenAIPolicy
    from ..policies.endpoint.retry import Backoff

    model = name.removeprefix(PREFIX)
    if not model:
        raise BadInput(f"--policy {name}: the server's name for the model is needed, as openai:MODEL")
    known = [option for option in inspect.signature(OpenAIPolicy).parameters if option not in OWN]
    for option in options:
        if option not in known:
            raise BadInput(f"--engine-options: {option} is unknown; with --policy openai:... it has {', '.join(known)}")
    arguments = dict(options)
    try:
        if isinstance(arguments.get("backoff"), dict):
            arguments["backoff"] = Backoff(**arguments["backoff"])
        policy = OpenAIPolicy(base_url, model, **arguments)
    except TypeError as error:
        raise BadInput(f"--engine-options: {error}") from error
    print(f"prm-search: {policy.endpoint.base_url}, {model}: {policy.facts}", file=sys.stderr)
    return policy
