"""What scoring a tree once saves, from counts alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..driver.result import Result


@dataclass(frozen=True)
class Savings:
    """Tokens that one reward model encodes for finished searches.

    Attributes:
        encoded: what it did encode.
        again: what it would encode by reading prompt and response anew for every step that it scores.
        cached: the same with the prompt kept from step to step.
        reference: what the reference encoded beside it; 0 where the policy is the reference.
    """

    encoded: int
    again: int
    cached: int
    reference: int

    @classmethod
    def of(cls, results: Iterable[Result]) -> Savings:
        """Read them off results: each distinct step of a tree is scored once, at its end."""
        encoded = again = cached = reference = 0
        for result in results:
            usage, prompt = result.usage, len(result.tree.prompt_ids)
            encoded += usage.encoded_tokens.get("prm", 0) + usage.reencoded_tokens.get("prm", 0)
            reference += usage.encoded_tokens.get("reference", 0) + usage.reencoded_tokens.get("reference", 0)
            ends = [node.end for node in result.tree.nodes[1:]]
            again += sum(prompt + end for end in ends)
            cached += prompt + sum(ends)
        return cls(encoded, again, cached, reference)

    def record(self) -> dict[str, int]:
        """As `--json` has it."""
        return {
            "encoded": self.encoded,
            "reencoding_every_step": self.again,
            "reencoding_with_cached_prompt": self.cached,
            "reference": self.reference,
        }

    def line(self) -> str:
        """The sentence that is shown."""
        if not self.encoded:
            return "The reward model encoded no tokens."
        own = f"{self.reference:,} tokens" if self.reference else "no tokens: it is the policy, run once for both"
        return (
            f"The reward model encoded {self.encoded:,} tokens, the reference {own}. Reading prompt and response anew "
            f"for every step, the reward model would encode {self.again:,} ({self.again / self.encoded:.1f} times as "
            f"many; with the prompt cached {self.cached:,}, {self.cached / self.encoded:.1f} times)."
        )
