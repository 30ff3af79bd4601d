"""A model of lm-evaluation-harness whose generations are searched for: ``--model prm_search``.

    python -m prm_search.integrations.lm_eval run --model prm_search --tasks gsm8k_cot --apply_chat_template \\
        --model_args pretrained=org/policy,scorer=org/prm,strategy=beam,width=4,expansions=4

The harness finds models that were imported. This module is a launcher that imports ours and then is the harness's own
command line; in Python, ``import prm_search.integrations.lm_eval`` does the same for `lm_eval.simple_evaluate`.
"""

from __future__ import annotations

from prm_search.integrations.lm_eval.model import PRMSearchLM

__all__ = ["PRMSearchLM"]
