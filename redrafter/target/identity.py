"""What a target is, part by part, so that data made with another one can say what differs."""

from __future__ import annotations

from typing import Any

from redrafter.files import digest_json
from redrafter.target.model import Target

# Values of a configuration that change neither tokens nor logits.
_FREE = {"transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}


def text_identity(tokenizer: Any) -> dict[str, str | None]:
    """Digests of a tokenizer and its chat template, 16 hex digits each."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    template = getattr(tokenizer, "chat_template", None)
    return {
        "tokenizer": digest_json(content)[:16],
        "template": None if template is None else digest_json(template)[:16],
    }


def target_identity(target: Target) -> dict[str, str | None]:
    """Digests of weights, configuration, tokenizer and template; and the dtype computed in."""
    config = {
        key: value
        for key, value in target.model.config.to_dict().items()
        if key not in _FREE and not key.startswith("_")
    }
    text = {} if target.tokenizer is None else text_identity(target.tokenizer)
    return {
        "weights": target.fingerprint(),
        "config": digest_json({k: repr(v) for k, v in config.items()})[:16],
        **text,
        "computed_in": str(target.dtype).removeprefix("torch."),
    }
