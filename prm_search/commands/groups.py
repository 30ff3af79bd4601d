"""Groups of options that commands share. Each option and its help stand here once; a group checks what it was given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from ..driver.budget import Budget
from ..protocols import Sampling
from ..steps import StepRule
from . import BadInput, options
from .endpoint import is_endpoint
from .options import (
    ADVANCED,
    DATA,
    FORMAT_HELP,
    LABELS,
    MODELS,
    OPTIONS_HELP,
    OUTPUT,
    PAIR_HELP,
    POLICY_HELP,
    SAMPLING,
    SCORER_HELP,
    STEPS,
    URL_HELP,
)  # fmt: skip
from .problems import make_judge, read_problems
from .records import Item

CHAT = typer.Option("--chat", help="Prompts are user messages to a chat model.", rich_help_panel=DATA)
OUT_HELP = "Write JSON Lines here, each record as soon as it is finished."
DATA_HELP = (
    "JSON Lines (- is stdin), a name for the package datasets, with fields as GSM8K and MATH have them, or "
    "reasoning_gym:TASK?size=200."
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """The device and the dtype of models."""

    device: Annotated[
        str, typer.Option(help="Of all models: auto, cpu, cuda, cuda:1 ...", rich_help_panel=ADVANCED)
    ] = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.", rich_help_panel=ADVANCED)] = "auto"

    def options(self) -> dict[str, Any]:
        """As the functions of commands.models take them."""
        return {"device": self.device, "dtype": self.dtype}


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The engine that runs the policy. Raises BadInput for an unknown engine, or options that it does not have."""

    engine: Annotated[
        str, typer.Option(help="What runs the policy: hf, this package's own, or vllm.", rich_help_panel=MODELS)
    ] = "hf"
    engine_options: Annotated[
        str | None,
        typer.Option(help=OPTIONS_HELP, metavar="JSON", rich_help_panel=ADVANCED),
    ] = None
    base_url: Annotated[str | None, typer.Option(help=URL_HELP, metavar="URL", rich_help_panel=MODELS)] = None

    def __post_init__(self) -> None:
        self.arguments()
        if self.base_url is not None and not self.remote:
            raise BadInput("--base-url needs --policy openai:MODEL")

    @property
    def remote(self) -> bool:
        """Return True if the policy is behind a server."""
        return is_endpoint(getattr(self, "policy", None))

    def arguments(self) -> dict[str, Any]:
        """Further arguments of the engine."""
        return options.engine_options(self.engine, self.engine_options, endpoint=self.remote)

    def names(self) -> tuple[str, ...]:
        """Return what a record's key says of an engine that is not the package's own."""
        if self.engine == "hf" and not self.remote:
            return ()
        where = (self.base_url or "",) if self.remote else (self.engine,)
        return (*where, json.dumps(self.arguments(), sort_keys=True))

    def load(self, name: str, place: Place) -> Any:
        """The policy of this name, ready to sample. Raises as models.load_policy does."""
        from .models import load_policy

        return load_policy(name, self.engine, options=self.arguments(), base_url=self.base_url, **place.options())


@dataclass(frozen=True, kw_only=True)
class Policy(Engine):
    """The model that samples."""

    policy: Annotated[str, typer.Option(help=POLICY_HELP, rich_help_panel=MODELS)]


@dataclass(frozen=True, kw_only=True)
class MaybePolicy(Engine):
    """The model that samples, where there is one."""

    policy: Annotated[str | None, typer.Option(help=POLICY_HELP, rich_help_panel=MODELS)] = None


@dataclass(frozen=True, kw_only=True)
class TwoModels:
    """A pair by its two models."""

    prm: Annotated[
        str | None,
        typer.Option(help="The reward LM: hub id, folder, PEFT adapter or .gguf file.", rich_help_panel=MODELS),
    ] = None
    reference: Annotated[
        str | None,
        typer.Option(help="With --prm: the model that it was initialised from.", rich_help_panel=MODELS),
    ] = None
    beta: Annotated[
        float | None,
        typer.Option(help="Scale of the rewards. Default: the card's, else 0.05.", rich_help_panel=ADVANCED),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Pair(TwoModels):
    """One pair, by its card or by its two models. Raises BadInput where it is said in two ways."""

    pair: Annotated[str | None, typer.Option(help=PAIR_HELP, rich_help_panel=MODELS)] = None

    def __post_init__(self) -> None:
        options.check_models(self.pair, self.prm, self.reference, needed=False)

    def need(self) -> None:
        """Raises BadInput where there is none."""
        options.check_models(self.pair, self.prm, self.reference, needed=True)

    @property
    def named(self) -> bool:
        """Return True if there is one."""
        return self.pair is not None or self.prm is not None

    @property
    def title(self) -> str:
        """Return what pages and reports call it."""
        return self.pair or f"{self.prm} against {self.reference or 'its base'}"

    def load(self, place: Place) -> Any:
        """The pair, ready to score. Raises as models.load_pair does."""
        from .models import load_pair

        return load_pair(self.pair, self.prm, self.reference, beta=self.beta, **place.options())


@dataclass(frozen=True, kw_only=True)
class Scorer(Pair):
    """One reward model: a pair, or one of another kind. Raises BadInput where it is said in two ways."""

    scorer: Annotated[str | None, typer.Option(help=SCORER_HELP, rich_help_panel=MODELS)] = None
    prm_format: Annotated[str | None, typer.Option(help=FORMAT_HELP, rich_help_panel=MODELS, show_default="auto")] = (
        None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        options.check_scorer(self.scorer, self.prm_format)
        if self.scorer is not None and (self.named_pair or self.reference is not None or self.beta is not None):
            raise BadInput("--scorer names a reward model by itself: give it, or a pair with its options")

    def need(self) -> None:
        """Raises BadInput where there is none."""
        if self.scorer is None:
            super().need()

    @property
    def named_pair(self) -> bool:
        """Return True if it is said by the options of a pair."""
        return self.pair is not None or self.prm is not None

    @property
    def named(self) -> bool:
        """Return True if there is one."""
        return self.scorer is not None or self.named_pair

    @property
    def card(self) -> str | None:
        """Return what may hold a pair card."""
        return self.pair if self.scorer is None else self.scorer

    @property
    def title(self) -> str:
        """Return what pages and reports call it."""
        return super().title if self.scorer is None else self.scorer

    def key(self) -> tuple[object, ...]:
        """Return what a record's key says of it."""
        pair = (self.pair, self.prm, self.reference, self.beta)
        return pair if self.scorer is None else (*pair, self.scorer, self.prm_format)

    def about(self) -> dict[str, object]:
        """Return what reports say of it."""
        if self.scorer is not None:
            return {"scorer": self.scorer, "format": self.prm_format}
        return {"pair": self.pair or self.prm, "reference": self.reference, "beta": self.beta}

    def load(self, place: Place) -> Any:
        """The reward model, ready to score. Raises as models.load_scorer and models.load_pair do."""
        from .models import load_scorer

        if self.scorer is None:
            return super().load(place)
        return load_scorer(self.scorer, self.prm_format, **place.options())


@dataclass(frozen=True, kw_only=True)
class Chat:
    """The form in which a text becomes a prompt. Raises BadInput for a system message without a chat."""

    chat: Annotated[bool, CHAT] = False
    system: Annotated[str | None, typer.Option(help="With --chat: the system message.", rich_help_panel=ADVANCED)] = (
        None
    )

    def __post_init__(self) -> None:
        if self.system is not None and not self.chat:
            raise BadInput("--system needs --chat")


@dataclass(frozen=True, kw_only=True)
class Questions(Chat):
    """The form of the questions in a file or a data set."""

    data_config: Annotated[str | None, typer.Option(help="Of the data set.", rich_help_panel=DATA)] = None
    split: Annotated[str, typer.Option(help="Of the data set.", rich_help_panel=DATA)] = "train"
    template: Annotated[
        str | None,
        typer.Option(help=r"Text around the question, which stands for {}; \n is read as such.", rich_help_panel=DATA),
    ] = None

    def where(self) -> dict[str, Any]:
        """As read_problems and read_rows take it."""
        return {"config": self.data_config, "split": self.split}

    def form(self) -> dict[str, Any]:
        """Return how a question becomes a prompt, as read_problems takes it."""
        text = None if self.template is None else options.unescape(self.template)
        return {"template": text, "chat": self.chat, "system": self.system}

    def problems(self, data: str) -> list[Item]:
        """The problems of a file or a data set, with their answers. Raises BadInput as read_problems does."""
        return read_problems(data, **self.where(), **self.form())


@dataclass(frozen=True, kw_only=True)
class Some(Questions):
    """The first questions alone. Raises BadInput as Chat, or for a limit below 1."""

    limit: Annotated[int | None, typer.Option(help="Problems at most.", rich_help_panel=DATA)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None:
            options.at_least("--limit", self.limit)

    def where(self) -> dict[str, Any]:
        """As read_problems and read_rows take it."""
        return super().where() | {"limit": self.limit}


@dataclass(frozen=True, kw_only=True)
class Data(Some):
    """The questions of a file or a data set."""

    data: Annotated[str, typer.Option(help=DATA_HELP, rich_help_panel=DATA)]


@dataclass(frozen=True, kw_only=True)
class MaybeData(Some):
    """The questions of a file or a data set, where there is one."""

    data: Annotated[str | None, typer.Option(help=DATA_HELP, rich_help_panel=DATA)] = None
    split: Annotated[str, typer.Option(help="Of the data set.", rich_help_panel=DATA)] = "test"


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The rule by which responses are judged."""

    label: Annotated[
        str,
        typer.Option(
            help="math (math-verify), exact, or module:function of response and answer.", rich_help_panel=LABELS
        ),
    ] = "math"
    answer: Annotated[
        str | None,
        typer.Option(
            help="The answer in a response: boxed, ####, number or module:function. Default: the first of ####, boxed, "
            "number that is there.",
            rich_help_panel=LABELS,
        ),
    ] = None

    def judge(self) -> Any:
        """A Judge. Raises BadInput naming the option that makes no sense."""
        return make_judge(self.label, self.answer)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Ends of steps."""

    delimiter: Annotated[
        list[str] | None,
        typer.Option(
            help=r"Ends a step; may be repeated; \n and \t are read as such. Default: the pair card's, else \n\n.",
            rich_help_panel=STEPS,
        ),
    ] = None
    step_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a step at most; 0: no limit.", rich_help_panel=STEPS, show_default="256"),
    ] = None
    step_regex: Annotated[
        str | None, typer.Option(help="A pattern that ends a step, instead of a delimiter.", rich_help_panel=ADVANCED)
    ] = None

    def rule(self, default: str | Sequence[str] | None) -> StepRule:
        """The StepRule, with this delimiter where the options name none. Raises ValueError as StepRule does."""
        return options.make_steps(self.delimiter, self.step_tokens, self.step_regex, default=default)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Options of how tokens are drawn, but for the seed."""

    temperature: Annotated[float, typer.Option(help="0: the likeliest token.", rich_help_panel=SAMPLING)] = 1.0
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of one response.", rich_help_panel=SAMPLING)] = 1024
    top_p: Annotated[float, typer.Option(help="Nucleus; 1 keeps all.", rich_help_panel=ADVANCED)] = 1.0
    top_k: Annotated[int, typer.Option(help="0 keeps all.", rich_help_panel=ADVANCED)] = 0
    min_p: Annotated[float, typer.Option(help="0 keeps all.", rich_help_panel=ADVANCED)] = 0.0

    def fields(self) -> dict[str, Any]:
        """As Sampling and Plan take them."""
        return {
            "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p,
            "max_new_tokens": self.max_new_tokens,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SeededDraws(Draws):
    """The same with a seed."""

    seed: Annotated[int, typer.Option(help="Of every draw.", rich_help_panel=SAMPLING)] = 0
    stop: Annotated[
        list[str] | None,
        typer.Option(
            help=r"Ends a response, which does not show it; may be repeated; \n and \t are read as such.",
            rich_help_panel=SAMPLING,
        ),
    ] = None
    include_stop_str: Annotated[
        bool, typer.Option("--include-stop-str", help="Responses show it.", rich_help_panel=ADVANCED)
    ] = False

    def fields(self) -> dict[str, Any]:
        """As Sampling and SearchSettings take them."""
        stop = tuple(map(options.unescape, self.stop or ()))
        return super().fields() | {"stop": stop, "include_stop_str": self.include_stop_str}

    def sampling(self, steps: StepRule | None = None) -> Sampling:
        """A Sampling. Raises ValueError as it does."""
        return Sampling(steps or StepRule(), seed=self.seed, **self.fields())


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The budget of a prompt."""

    budget: Annotated[int | None, typer.Option(help="Sampled tokens of a prompt.", rich_help_panel=SAMPLING)] = None
    budget_nodes: Annotated[int | None, typer.Option(help="Nodes of a tree.", rich_help_panel=ADVANCED)] = None
    budget_depth: Annotated[int | None, typer.Option(help="Steps of an answer.", rich_help_panel=ADVANCED)] = None
    budget_seconds: Annotated[float | None, typer.Option(help="Wall time of a prompt.", rich_help_panel=ADVANCED)] = (
        None
    )

    def make(self) -> Budget:
        """A Budget. Raises ValueError as it does."""
        return options.make_budget(self.budget, self.budget_nodes, self.budget_depth, self.budget_seconds)


BATCH = typer.Option(help="Prompts, problems or responses at a time; changes no result.", rich_help_panel=ADVANCED)


TITLE = typer.Option(help="Of the report.", rich_help_panel=ADVANCED)
JSON = typer.Option("--json", help="JSON Lines on standard output.", rich_help_panel=OUTPUT)


@dataclass(frozen=True, kw_only=True)
class Resumable:
    """Options of how records are made. Raises BadInput for a batch below 1."""

    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what is in --out, if it exists.", rich_help_panel=OUTPUT)
    ] = False
    batch: Annotated[int, BATCH] = 32

    def __post_init__(self) -> None:
        options.at_least("--batch", self.batch)


@dataclass(frozen=True, kw_only=True)
class OutFile(Resumable):
    """A file of records."""

    out: Annotated[str, typer.Option(help=OUT_HELP, rich_help_panel=OUTPUT)]


@dataclass(frozen=True, kw_only=True)
class MaybeOutFile(Resumable):
    """A file of records, where there is to be one. Raises BadInput for --resume without it."""

    out: Annotated[str | None, typer.Option(help=OUT_HELP, rich_help_panel=OUTPUT)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.out is None:
            raise BadInput("--resume needs --out, the file to go on with")


@dataclass(frozen=True, kw_only=True)
class OutFolder(Resumable):
    """A folder with records and the report that is made of them."""

    out: Annotated[
        str,
        typer.Option(
            help="Folder for records, each as soon as it is finished, and the report.", rich_help_panel=OUTPUT
        ),
    ]
    report_only: Annotated[
        bool,
        typer.Option("--report-only", help="Make the report again from the records.", rich_help_panel=OUTPUT),
    ] = False
    title: Annotated[str, TITLE] = "Evaluation"
