"""``prm-search serve``: reward-guided search behind OpenAI's chat and completion routes."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from ..demo import pair_dir
from . import BadInput, options
from .options import make_steps

_SERVER, _LIMITS = "Server", "Limits"
_KEY = "PRM_SEARCH_API_KEY"  # environment variable


def serve(
    context: typer.Context,
    policy: Annotated[
        str,
        typer.Option(
            help="The model that samples: hub id, folder, PEFT adapter, .gguf file, or 'demo'.",
            rich_help_panel=options.MODELS,
        ),
    ],
    pair: options.Pair = None,
    prm: options.Prm = None,
    reference: options.Reference = None,
    beta: options.Beta = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    engine: Annotated[
        str,
        typer.Option(
            help="hf: this package's own. vllm: vLLM's server, with prm_guidance; words after -- are its own options.",
            rich_help_panel=_SERVER,
        ),
    ] = "hf",
    host: Annotated[str, typer.Option(help="Address to listen at.", rich_help_panel=_SERVER)] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.", rich_help_panel=_SERVER)] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="What requests call the policy. Default: --policy.", rich_help_panel=_SERVER)
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=_KEY,
            help="Requests need it as a bearer token. Better in the variable, since everybody can read command lines.",
            show_envvar=True,
            rich_help_panel=_SERVER,
        ),
    ] = None,
    delimiter: options.Delimiter = None,
    step_tokens: options.StepTokens = None,
    step_regex: options.StepRegex = None,
    max_searches: Annotated[
        int, typer.Option(help="Prompts searched at a time; beyond: 429.", rich_help_panel=_LIMITS)
    ] = 64,
    max_tokens: Annotated[int, typer.Option(help="Of one response.", rich_help_panel=_LIMITS)] = 4096,
    max_children: Annotated[int, typer.Option(help="Of a prompt, drawn at once.", rich_help_panel=_LIMITS)] = 256,
    max_sampled: Annotated[int, typer.Option(help="Tokens sampled for a prompt, in all.", rich_help_panel=_LIMITS)] = 1
    << 20,
    max_body: Annotated[int, typer.Option(help="Bytes of a request.", rich_help_panel=_LIMITS)] = 1 << 20,
    timeout: Annotated[
        float,
        typer.Option(help="Seconds; then the best that was found is the answer.", rich_help_panel=_LIMITS),
    ] = 600.0,
    allow_regex: Annotated[
        bool,
        typer.Option(
            "--allow-regex",
            help="Requests may give prm_guidance.steps.regex. A bad pattern stops the server: for friends only.",
            rich_help_panel=_LIMITS,
        ),
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Serve reward-guided search over HTTP, as OpenAI's API with a field prm_guidance."""
    options.one_of("--engine", engine, ("hf", "vllm"))
    options.check_models(pair, prm, reference, needed=True)
    for option, given in (
        ("--max-searches", max_searches), ("--max-tokens", max_tokens), ("--max-children", max_children),
        ("--max-sampled", max_sampled), ("--max-body", max_body),
    ):  # fmt: skip
        options.at_least(option, given)
    if not timeout > 0:
        raise BadInput(f"--timeout {timeout}: more than 0 is needed")
    if not 0 <= port < 1 << 16:
        raise BadInput(f"--port {port}: a number from 0 to 65535 is needed")
    if context.args and engine != "vllm":
        raise BadInput(f"{' '.join(context.args)}: words after -- are for --engine vllm")
    steps = make_steps(delimiter, step_tokens, step_regex, default=options.card_delimiter(pair))
    try:
        from ..serving.config import ServeConfig
        from ..serving.keys import check_key
        from ..serving.request import Limits
        from ..serving.run import claim, listen, run
    except ImportError as error:
        raise BadInput(f"serving needs more packages ({error.name}): pip install 'prm-search[serve]'") from error

    limits = Limits(
        searches=max_searches,
        body_bytes=max_body,
        max_tokens=max_tokens,
        children=max_children,
        sampled_tokens=max_sampled,
        seconds=timeout,
        patterns=allow_regex,
    )
    config = ServeConfig(pair, prm, reference, beta, device, dtype, steps, limits)
    name = served_model_name or policy
    if api_key is not None or _KEY in os.environ:  # a variable that is set to nothing is no option for typer
        check_key(f"--api-key or ${_KEY}", api_key or "")
    if engine == "vllm":
        from ..serving.vllm_command import vllm_command

        claimed = claim(host, port)  # noqa: F841  # held by the program that replaces this one
        model = str(pair_dir() / "policy") if policy == "demo" else policy
        words, environment = vllm_command(
            model, config, host=host, port=port, name=name, api_key=api_key, extra=context.args
        )
        os.execve(words[0], words, environment)
    sock = listen(host, port)
    from ..serving.app import make_app
    from ..serving.backend import ThreadEngine
    from .models import load_pair, load_policy, quiet

    quiet()
    try:
        sampler = load_policy(policy, device=device, dtype=dtype)
        scorer = load_pair(pair, prm, reference, beta=beta, device=device, dtype=dtype)
        app = make_app(
            lambda: ThreadEngine.of_hf(sampler, scorer),
            [name],
            limits=limits,
            steps=steps,
            api_keys=[api_key] if api_key else [],
        )
        run(app, sock)
    finally:
        sock.close()
