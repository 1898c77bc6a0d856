"""What a target is, part by part, so that data made with another one can say what differs."""

from __future__ import annotations

import copy
from typing import Any

from redrafter.files import digest_json
from redrafter.targets.model import Target

# Values of a configuration that change neither tokens nor logits.
_FREE = {"transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}


def text_identity(tokenizer: Any) -> dict[str, str | None]:
    """Digests of a tokenizer and its chat template, 16 hex digits each."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = sorted(tokenizer.get_vocab().items())
    else:
        # A file may ask for truncation or padding; transformers switches them off when the
        # tokenizer is first called, and a digest must not depend on whether it was.
        backend = copy.deepcopy(backend)
        backend.no_truncation()
        backend.no_padding()
        content = backend.to_str()
    template = getattr(tokenizer, "chat_template", None)
    return {
        "tokenizer": digest_json(content)[:16],
        "template": None if template is None else digest_json(template)[:16],
    }


def computed_in(target: Target) -> str:
    """dtype, and what differs from the usual way of computing in it."""
    dtype = str(target.dtype).removeprefix("torch.")
    wide = [] if target.wide_head is None else ["logits in float32"]
    return ", ".join([dtype, *wide, *([] if target.invariant is None else [str(target.invariant)])])


def target_identity(target: Target) -> dict[str, str | None]:
    """Digests of weights, configuration, tokenizer and template; the tokens that end a text (they
    may stand in generation_config.json alone), and the dtype computed in."""
    # Only what differs from the defaults: a new version of transformers adds keys.
    config = {
        key: value
        for key, value in target.model.config.to_diff_dict().items()
        if key not in _FREE and not key.startswith("_")
    }
    text = {} if target.tokenizer is None else text_identity(target.tokenizer)
    return {
        "weights": target.fingerprint(),
        "config": digest_json({k: repr(v) for k, v in config.items()})[:16],
        **text,
        "eos": sorted(target.eos_token_ids),
        "computed_in": computed_in(target),
    }
