"""Kinds of reward models by name, as load_scorer and `--prm-format` take them. No torch."""

from __future__ import annotations

AUTO = "auto"
PAIR = "pair"  # an ImplicitPRM
OUTCOME = "outcome"  # an OutcomeRM
#: Formats of StepPRM; `explicit.formats.FORMATS` has what each is.
STEP_FORMATS = (
    "qwen_math", "reasonflux", "math_shepherd", "math_psa", "er_prm", "versaprm", "rlhflow", "granite", "skywork",
    "trl", "trl_blank_line", "pure", "universal",
)  # fmt: skip
KINDS = (AUTO, *STEP_FORMATS, OUTCOME, PAIR)


def check_kind(argument: str, kind: object) -> str:
    """Return the name of a kind.

    Raises:
        ValueError: it is not one; argument is named, and what there is.
    """
    if kind not in KINDS:
        raise ValueError(f"{argument}={kind!r} is unknown; it is one of {', '.join(KINDS)}")
    return str(kind)
