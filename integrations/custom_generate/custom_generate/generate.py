"""Reward-guided decoding as a decoding method that transformers loads: `generate(custom_generate=PATH_OR_REPO)`."""

from typing import Any

from prm_search.integrations.huggingface import generate as decode


def generate(model: Any, *args: Any, prm_guidance: Any = None, do_sample: bool | None = None, **kwargs: Any) -> Any:
    """Search for responses by step rewards; see `prm_search.generate`, which decodes.

    Args:
        model, args, kwargs: as `model.generate` has them.
        prm_guidance: a prm_search.PRMGuidance: the reward model and the strategy.
        do_sample: None for True, since a search draws.

    Raises:
        TypeError, ValueError: as `prm_search.generate` does.
    """
    for name in ("custom_generate", "trust_remote_code"):
        kwargs.pop(name, None)
    sampled = True if do_sample is None else do_sample
    return model.generate(*args, custom_generate=decode, do_sample=sampled, prm_guidance=prm_guidance, **kwargs)
