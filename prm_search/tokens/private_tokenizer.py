"""A tokenizer that nobody else sets to truncate or to pad.

A fast tokenizer of transformers keeps truncation and padding as a state of its backend. Another thread's call with
`truncation=True`, between our setting and our encoding, would cut our prompt. So prompts are encoded by a backend of
our own.
"""

from __future__ import annotations

import copy
import threading
from typing import Any
from weakref import WeakKeyDictionary

_lock = threading.Lock()
_backends: WeakKeyDictionary[Any, tuple[object, Any]] = WeakKeyDictionary()  # tokenizer -> what it was then, its copy


def private_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer over a backend of its own, for calls without truncation and padding.

    The backend is copied once a tokenizer (.3 s for 49,000 tokens), and again after tokens were added or the
    post-processor changed. Everything else is read from the tokenizer as it is now.

    Args:
        tokenizer: a transformers tokenizer. A tokenizer without a backend keeps no such state and is returned itself.
            So is a tokenizer whose backend cannot be copied, because parts of the backend are written in Python.
    """
    backend = getattr(tokenizer, "_tokenizer", None)
    if backend is None or not hasattr(backend, "no_truncation"):
        return tokenizer
    processor = backend.post_processor
    try:
        state = (backend.get_vocab_size(True), None if processor is None else processor.__getstate__())
        with _lock:
            known, own = _backends.get(tokenizer, (None, None))
            if known != state:
                own = copy.deepcopy(backend)
                own.no_truncation()
                own.no_padding()
                _backends[tokenizer] = state, own
    except Exception:  # tokenizers raises no narrower type for what is written in Python
        return tokenizer
    twin = copy.copy(tokenizer)
    twin._tokenizer = own
    return twin
