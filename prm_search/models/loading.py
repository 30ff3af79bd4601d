"""Models and tokenizers by hub id or path: checkpoints, PEFT adapter folders, GGUF files.

What is loaded is shared: the same checkpoint, asked for again with the same options while it is still in use, is the
same module, so that policy, PRM and reference run as one model wherever they are one. Adapters are put into the one
copy of their base, switched off, and switched on for the time of a forward that wants them.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..engine.adapters import refuse_kind
from ..engine.language_model import LanguageModel
from .checkpoint import Checkpoint
from .heads import tensor_files
from .load_report import check_report

_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "token", "trust_remote_code")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")

_modules: weakref.WeakValueDictionary[tuple[object, ...], nn.Module] = weakref.WeakValueDictionary()
_tokenizers: weakref.WeakValueDictionary[tuple[object, ...], Any] = weakref.WeakValueDictionary()
_loading = threading.RLock()


class Loaded(NamedTuple):
    """A model ready to run, and its tokenizer (None where none was found)."""

    lm: LanguageModel
    tokenizer: Any


def load(
    model: str | PathLike[str] | Checkpoint,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    base: Any = None,
    tokenizer: Any = None,
    capacity: int | None = None,
    heads: tuple[str, ...] = (),
    **options: Any,
) -> Loaded:
    """Load a model by name, or find it loaded already.

    Args:
        model: hub id, folder of a checkpoint or of a PEFT adapter, or path of a GGUF file.
        revision: of the hub repository.
        gguf_file: name of a GGUF file in the folder; needs the packages gguf and accelerate. Weights are dequantised.
        base: what an adapter sits on, instead of the base model its config names: an id, a path or a Checkpoint, a
            module, an HFPolicy or a LanguageModel. A module carries the adapter's layers from then on, switched off.
        tokenizer: a tokenizer, or where to load it from; None for the model's own, an adapter's else its base's.
        capacity: tokens of KV; see LanguageModel.
        heads: beginnings of the names of tensors that belong to heads which the caller reads by itself; such a model
            may lack an output embedding.
        options: for transformers' from_pretrained: dtype, device_map, attn_implementation, quantization_config,
            trust_remote_code, token, ...

    Raises:
        OSError: there is no such model, or a file of it is missing or unreadable; the path is said.
        ValueError: the checkpoint is corrupt or incomplete, or the model is not served (see LanguageModel.of).
        ImportError: a package that this kind of checkpoint needs is missing.
    """
    source = model if isinstance(model, Checkpoint) else Checkpoint.of(model, revision, gguf_file)
    hub = hub_options(options)
    with _loading:
        adapter = None if source.gguf_file else source.file("adapter_config.json", hub)
        if adapter is not None:
            lm, model_tokenizer = _load_adapter(source, Path(adapter), base, capacity, options, heads)
        elif base is not None:
            raise ValueError(f"base={base!r}: {source.name!r} is no adapter, so there is nothing to put on a base")
        else:
            lm = LanguageModel.of(_load_module(source, options, heads), adapter=None, capacity=capacity)
            model_tokenizer = None
        if isinstance(tokenizer, str | PathLike):
            model_tokenizer = _load_tokenizer(Checkpoint.of(tokenizer), hub)
        elif tokenizer is not None:
            model_tokenizer = tokenizer
        else:
            model_tokenizer = _own_tokenizer(source, hub) or model_tokenizer
    return Loaded(lm, model_tokenizer)


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of from_pretrained's options that say how files are fetched."""
    return {key: options[key] for key in _HUB if key in options}


def _load_module(source: Checkpoint, options: Mapping[str, Any], heads: tuple[str, ...] = ()) -> nn.Module:
    """A checkpoint's module; the same one while it is in use."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if source.local and source.gguf_file is None and source.file("config.json", {}) is None:
        raise FileNotFoundError(f"there is no model in {source.path!r}: no config.json")
    source.check_config()
    options = _normal(options)
    key = (*_key(source, options), heads)
    module = _modules.get(key)
    if module is not None:
        return module
    arguments = dict(options) | source.where() | ({"gguf_file": source.gguf_file} if source.gguf_file else {})
    with _named("the model", source):
        if heads:  # the body of another class: what would be its output embedding stands in for one that is missing
            config = AutoConfig.from_pretrained(source.path, **hub_options(options), **source.where())
            config.tie_word_embeddings = not any(name.startswith("lm_head.") for name in tensor_files(source, options))
            arguments["config"] = config
        made, report = AutoModelForCausalLM.from_pretrained(source.path, output_loading_info=True, **arguments)
    check_report(source.name, made, report, heads)
    made.eval()
    if source.gguf_file is not None:  # plain weights by now, though they still say otherwise and refuse to be saved
        made.hf_quantizer, made.is_quantized = None, False
        if hasattr(made.config, "quantization_config"):
            del made.config.quantization_config
    _modules[key] = made
    return made


def _load_adapter(
    source: Checkpoint,
    config_file: Path,
    base: Any,
    capacity: int | None,
    options: Mapping[str, Any],
    heads: tuple[str, ...] = (),
) -> tuple[LanguageModel, Any]:
    """An adapter, put switched off into its base, and the base's tokenizer."""
    try:
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict
        from peft.utils import load_peft_weights
    except ImportError as error:
        raise ImportError(f"{source.name!r} is a PEFT adapter: pip install peft") from error

    folder = str(config_file.parent)
    with _named("the adapter", source):
        config = PeftConfig.from_pretrained(folder)
    refuse_kind(repr(source.name), config)
    if base is None and not config.base_model_name_or_path:
        raise ValueError(f"{source.name!r} names no base model: pass base=")
    tokenizer = getattr(base, "tokenizer", None)
    if base is None or isinstance(base, str | PathLike | Checkpoint):
        named = config.base_model_name_or_path if base is None else base
        below = named if isinstance(named, Checkpoint) else Checkpoint.of(named)
        if below.gguf_file is None and below.file("adapter_config.json", hub_options(options)):
            raise ValueError(f"the base {below.name!r} of {source.name!r} is an adapter itself; merge it first")
        module, tokenizer = _load_module(below, options, heads), _own_tokenizer(below, hub_options(options))
    else:
        lm = base if isinstance(base, LanguageModel) else getattr(base, "lm", None)
        module = lm.module if isinstance(lm, LanguageModel) else base
        if not isinstance(module, nn.Module):
            raise TypeError(f"base must be an id, a path or a model, got {type(base).__name__}")

    # The wrapper goes with the module: it can take further adapters in later.
    host = module.__dict__.get("_prm_search_adapters")
    names: dict[object, str] = {} if host is None else host.prm_search_names
    key = (os.path.realpath(folder), Checkpoint(folder).stamp())
    if key not in names:
        name = f"{Path(source.name).name.replace('.', '_') or 'adapter'}_{len(names)}"
        training = module.training
        with _named("the adapter", source):
            if host is None:
                host = PeftModel.from_pretrained(module, folder, adapter_name=name)
            else:
                host.load_adapter(folder, adapter_name=name)
            host.base_model.disable_adapter_layers()
            module.train(training)
            there = get_peft_model_state_dict(host, adapter_name=name, save_embedding_layers=False)
            stored = set(load_peft_weights(folder, device="cpu"))
            lacking, leftover = sorted(set(there) - stored), sorted(stored - set(there) - set(host.state_dict()))
        if lacking:
            raise ValueError(f"{source.name!r} is incomplete: {len(lacking)} weights are missing, {lacking[0]!r} first")
        if leftover:
            raise ValueError(
                f"{source.name!r} does not fit its config: {len(leftover)} weights have no place, {leftover[0]!r} first"
            )
        host.prm_search_names = names
        module.__dict__["_prm_search_adapters"] = host
        names[key] = name
    return LanguageModel.of(module if host is None else host, adapter=names[key], capacity=capacity), tokenizer


def _normal(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with one spelling for each dtype, so that equal ones find the same module."""
    normal = dict(options)
    dtype = normal.pop("torch_dtype", None)
    dtype = normal.pop("dtype", dtype)
    if isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype):
        dtype = getattr(torch, dtype)
    if dtype not in (None, "auto"):  # what transformers does by itself
        normal["dtype"] = dtype
    return normal


def _own_tokenizer(source: Checkpoint, hub: Mapping[str, Any]) -> Any:
    """The tokenizer that lies beside a checkpoint, or None."""
    if source.gguf_file or any(source.file(name, hub) for name in _TOKENIZER_FILES):
        return _load_tokenizer(source, hub)
    return None


def _load_tokenizer(source: Checkpoint, hub: Mapping[str, Any]) -> Any:
    """A tokenizer; the same one while it is in use (a GGUF file's takes as long to read as its weights)."""
    from transformers import AutoTokenizer

    key = _key(source, hub)
    tokenizer = _tokenizers.get(key)
    if tokenizer is None:
        arguments = dict(hub) | source.where() | ({"gguf_file": source.gguf_file} if source.gguf_file else {})
        with _named("the tokenizer", source):
            tokenizer = AutoTokenizer.from_pretrained(source.path, **arguments)
        _tokenizers[key] = tokenizer
    return tokenizer


def _key(source: Checkpoint, options: Mapping[str, Any]) -> tuple[object, ...]:
    """Equal for what would be loaded alike."""
    place = os.path.realpath(source.path) if source.local else source.path
    return (place, *source.where().items(), source.gguf_file, source.stamp(), repr(sorted(options.items(), key=str)))


@contextmanager
def _named(what: str, source: Checkpoint) -> Iterator[None]:
    """Errors of loading say what could not be loaded from where."""
    try:
        yield
    except OSError as error:
        if source.path in str(error):
            raise
        raise OSError(f"cannot load {what} from {source.name!r}: {error}") from error
    except (ImportError, TypeError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # safetensors, json, size mismatches, unknown architectures: each has its own class
        raise ValueError(f"cannot load {what} from {source.name!r}: {type(error).__name__}: {error}") from error
