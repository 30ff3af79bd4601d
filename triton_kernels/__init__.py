"""The kernels of prm_search: fused, with an eager oracle each, usable on their own.

Every op takes `backend="auto" | "torch" | "triton"`; `choice(op, *args)` says what "auto" would run and why. Importing
this package does not import Triton.
"""

from prm_search.triton_kernels.calls import SharedPrefix
from prm_search.triton_kernels.guide_logits import guide_logits
from prm_search.triton_kernels.launch import Choice, choice
from prm_search.triton_kernels.linear_logprob import linear_logprob
from prm_search.triton_kernels.sample_rows import Drawn, sample_rows
from prm_search.triton_kernels.tree_attention import tree_attention, write_kv

__all__ = [
    "Choice",
    "Drawn",
    "SharedPrefix",
    "choice",
    "guide_logits",
    "linear_logprob",
    "sample_rows",
    "tree_attention",
    "write_kv",
]
