"""``prm-search serve``: reward-guided search behind OpenAI's chat and completion routes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..models.placement import DEMO, shipped
from . import BadInput, groups, options
from .config import Common
from .endpoint import is_endpoint, load_endpoint
from .grouped import grouped
from .options import ADVANCED, MODELS, POLICY_HELP, URL_HELP

if TYPE_CHECKING:
    from ..serving.backend import Backend
    from ..serving.config import ServeConfig
    from ..serving.limits import Limits

_SERVER, _LIMITS = "Server", "Limits"
_KEY = "PRM_SEARCH_API_KEY"  # environment variable


@dataclass(frozen=True, kw_only=True)
class Server:
    """The policy, and where it is served. Raises BadInput for an unknown engine or a port that is none."""

    policy: Annotated[str, typer.Option(help=POLICY_HELP, rich_help_panel=MODELS)]
    engine: Annotated[
        str,
        typer.Option(
            help="hf: this package's own. vllm: vLLM's server, with prm_guidance; words after -- are its own options.",
            rich_help_panel=_SERVER,
        ),
    ] = "hf"
    base_url: Annotated[str | None, typer.Option(help=URL_HELP, metavar="URL", rich_help_panel=MODELS)] = None
    engine_options: Annotated[
        str | None,
        typer.Option(
            help="With --policy openai:MODEL: arguments of OpenAIPolicy, as a JSON object.",
            metavar="JSON",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    host: Annotated[str, typer.Option(help="Address to listen at.", rich_help_panel=_SERVER)] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="0: any that is free.", rich_help_panel=_SERVER)] = 8000
    served_model_name: Annotated[
        str | None, typer.Option(help="What requests call the policy. Default: --policy.", rich_help_panel=_SERVER)
    ] = None
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=_KEY,
            help="Requests need it as a bearer token. Better in the variable, since everybody can read command lines.",
            show_envvar=True,
            rich_help_panel=_SERVER,
        ),
    ] = None
    ui: Annotated[
        bool, typer.Option("--ui/--no-ui", help="Serve the page /ui, to watch searches.", rich_help_panel=_SERVER)
    ] = True

    guidance: Annotated[
        str | None,
        typer.Option(
            help="guidance.yaml, as tune writes it, for requests without prm_guidance or with strategy: tuned.",
            metavar="FILE",
            rich_help_panel=_SERVER,
        ),
    ] = None

    def __post_init__(self) -> None:
        options.one_of("--engine", self.engine, ("hf", "vllm"))
        if self.base_url is not None and not is_endpoint(self.policy):
            raise BadInput("--base-url needs --policy openai:MODEL")
        self.arguments()
        if not 0 <= self.port < 1 << 16:
            raise BadInput(f"--port {self.port}: a number from 0 to 65535 is needed")

    def arguments(self) -> dict[str, Any]:
        """Further arguments of a policy behind a server. Raises BadInput where there is none to take them."""
        if self.engine_options is not None and not is_endpoint(self.policy):
            raise BadInput("--engine-options needs --policy openai:MODEL; vLLM's own options stand after --")
        return options.engine_options(self.engine, self.engine_options, endpoint=is_endpoint(self.policy))


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Bounds of a request. Raises BadInput for a number out of range."""

    max_searches: Annotated[
        int, typer.Option(help="Prompts searched at a time; beyond: 429.", rich_help_panel=_LIMITS)
    ] = 64
    max_tokens: Annotated[int, typer.Option(help="Of one response.", rich_help_panel=_LIMITS)] = 4096
    max_children: Annotated[int, typer.Option(help="Of a prompt, drawn at once.", rich_help_panel=ADVANCED)] = 256
    max_sampled: Annotated[int, typer.Option(help="Tokens sampled for a prompt, in all.", rich_help_panel=ADVANCED)] = (
        1 << 20
    )
    max_body: Annotated[int, typer.Option(help="Bytes of a request.", rich_help_panel=ADVANCED)] = 1 << 20
    timeout: Annotated[
        float,
        typer.Option(help="Seconds; then the best that was found is the answer.", rich_help_panel=_LIMITS),
    ] = 600.0
    allow_regex: Annotated[
        bool,
        typer.Option(
            "--allow-regex",
            help="Requests may give prm_guidance.steps.regex. A bad pattern stops the server: for friends only.",
            rich_help_panel=ADVANCED,
        ),
    ] = False

    def __post_init__(self) -> None:
        for name in ("max_searches", "max_tokens", "max_children", "max_sampled", "max_body"):
            options.at_least("--" + name.replace("_", "-"), getattr(self, name))
        if not self.timeout > 0:
            raise BadInput(f"--timeout {self.timeout}: more than 0 is needed")

    def make(self) -> Limits:
        """A serving.Limits."""
        from ..serving.limits import Limits

        return Limits(
            searches=self.max_searches,
            body_bytes=self.max_body,
            max_tokens=self.max_tokens,
            children=self.max_children,
            sampled_tokens=self.max_sampled,
            seconds=self.timeout,
            patterns=self.allow_regex,
        )


@grouped
def serve(
    context: typer.Context,
    server: Server,
    pair: groups.Scorer,
    place: groups.Place,
    steps: groups.Steps,
    bounds: Bounds,
    common: Common,
) -> None:
    """Serve reward-guided search over HTTP, as OpenAI's API with a field prm_guidance."""
    pair.need()
    if context.args and server.engine != "vllm":
        raise BadInput(f"{' '.join(context.args)}: words after -- are for --engine vllm")
    rule = steps.rule(options.card_delimiter(pair.card))
    try:
        from ..serving.config import ServeConfig
        from ..serving.keys import check_key
        from ..serving.run import listen, run
    except ImportError as error:
        raise BadInput(f"serving needs more packages ({error.name}): pip install 'prm-search[serve]'") from error

    config = ServeConfig(
        pair.pair, pair.prm, pair.reference, pair.beta, place.device, place.dtype, rule, bounds.make(),
        scorer=pair.scorer, format=pair.prm_format, ui=server.ui,
        guidance=options.guidance_content(server.guidance),
    )  # fmt: skip
    if server.api_key is not None or _KEY in os.environ:  # a variable that is set to nothing is no option for typer
        check_key(f"--api-key or ${_KEY}", server.api_key or "")
    if server.engine == "vllm":
        _become_vllm(server, config, context.args)
    sock = listen(server.host, server.port)
    try:
        run(_app(server, pair, place, config), sock)
    finally:
        sock.close()


def _become_vllm(server: Server, config: ServeConfig, extra: Sequence[str]) -> None:
    """Replace this process by vLLM's server."""
    from ..serving.run import claim
    from ..serving.vllm_command import vllm_command

    claimed = claim(server.host, server.port)  # noqa: F841  # held by the program that replaces this one
    model = str(shipped() / "policy") if server.policy == DEMO else server.policy
    command, environment = vllm_command(
        model, config, host=server.host, port=server.port, name=server.served_model_name or server.policy,
        api_key=server.api_key, extra=extra,
    )  # fmt: skip
    os.execve(command[0], command, environment)


def _app(server: Server, pair: groups.Scorer, place: groups.Place, config: ServeConfig) -> Any:
    """The application, with its models loaded."""
    from ..serving.app import make_app
    from ..serving.backend import ThreadEngine
    from .models import load_policy, quiet

    quiet()
    if is_endpoint(server.policy):
        make_engine = _in_front(server, pair.load(place))
    else:
        sampler, scorer = load_policy(server.policy, **place.options()), pair.load(place)
        make_engine = partial(ThreadEngine.of_hf, sampler, scorer)
    return make_app(
        make_engine,
        [server.served_model_name or server.policy],
        limits=config.limits,
        steps=config.steps,
        tuned=config.tuned(),
        api_keys=[server.api_key] if server.api_key else [],
        ui=config.ui,
    )


def _in_front(server: Server, scorer: Any) -> Callable[[], Backend]:
    """Make the engine over a policy behind a server, to which requests without prm_guidance are handed on."""
    from ..serving.backend import AsyncEngine
    from ..serving.upstream import Upstream

    policy = load_endpoint(server.policy, server.base_url, server.arguments())
    return lambda: AsyncEngine(policy, scorer, policy.token_text, upstream=Upstream(policy.endpoint))
