"""The cost of a search: tokens by model, forward calls and seconds by phase."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

Kind = Literal["sampled", "encoded", "cached", "reencoded"]


class Meter:
    """Token counts of one tree, by kind and model id. Engines write, the driver reads it out as Usage.

    Kinds: "sampled" (drawn by a policy, cut or not), "encoded" (first forward of a token through a model), "reencoded"
    (a further forward, after the token's KV was evicted), "cached" (prefix tokens that a forward found encoded).
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[Kind, Hashable]] = Counter()
        self.notes: dict[str, None] = {}  # what a reader of the counts should know, in order

    def add(self, kind: Kind, model: Hashable, tokens: int) -> None:
        """Count tokens of a kind for the model with this id."""
        if tokens:
            self.counts[kind, model] += tokens

    def note(self, sentence: str) -> None:
        """Keep a sentence for readers of the counts, once."""
        self.notes[sentence] = None


@dataclass
class Usage:
    """The price of a result.

    The token counts are the result's own. Each is a dict keyed "policy", "prm", "reference" (and "<pair>.prm",
    "<pair>.reference" for further pairs). A model that plays two parts counts once, under the first of them.
    forward_calls and seconds (by phase: "policy", "scorer") belong to the whole batch the result was made in.

    rescored_tokens and rescored_cached_tokens are not costs of this search but comparisons. rescored_tokens: what the
    scorer's model would have encoded by reading prompt and response anew for each distinct step.
    rescored_cached_tokens: the same with the prompt kept from step to step, so only the response is read anew.

    notes: sentences on what the counts are, where they are not what they seem: a server's own count, for instance.
    """

    sampled_tokens: dict[str, int] = field(default_factory=dict)
    encoded_tokens: dict[str, int] = field(default_factory=dict)
    cached_tokens: dict[str, int] = field(default_factory=dict)
    reencoded_tokens: dict[str, int] = field(default_factory=dict)
    forward_calls: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    rescored_tokens: int = 0
    rescored_cached_tokens: int = 0
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, meter: Meter, roles: Mapping[str, Hashable]) -> Usage:
        """Token counts of a meter by role; roles maps names to model ids, most important first."""
        names: dict[Hashable, str] = {}
        for role, model in roles.items():
            names.setdefault(model, role)
        usage = cls(notes=tuple(meter.notes))
        tables = {
            "sampled": usage.sampled_tokens,
            "encoded": usage.encoded_tokens,
            "cached": usage.cached_tokens,
            "reencoded": usage.reencoded_tokens,
        }
        for (kind, model), tokens in dict(meter.counts).items():  # a copy: engines may count on, in their thread
            role = names.get(model, str(model))
            tables[kind][role] = tables[kind].get(role, 0) + tokens
        return usage

    def of_role(self, role: str) -> int:
        """Tokens that the model of a role encoded, those whose KV was evicted in between once more."""
        return self.encoded_tokens.get(role, 0) + self.reencoded_tokens.get(role, 0)

    def __add__(self, other: Usage) -> Usage:
        """The two together, name by name."""
        total = Usage()
        for part in fields(Usage):
            mine, theirs = getattr(self, part.name), getattr(other, part.name)
            if isinstance(mine, dict):
                both: object = {name: mine.get(name, 0) + theirs.get(name, 0) for name in {**mine, **theirs}}
            elif isinstance(mine, tuple):
                both = tuple(dict.fromkeys(mine + theirs))
            else:
                both = mine + theirs
            setattr(total, part.name, both)
        return total
