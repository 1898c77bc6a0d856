"""What a GGUF file says of its model beside the weights, as transformers' configuration says it.

transformers reads some of the keys that llama.cpp writes, and leaves out the rest without a word:
how positions are stretched for longer texts (`rope.scaling.*`, and the tensor `rope_freqs.weight`
of Llama 3.1 and later), and for some architectures the base of the rotations. A model that is
loaded so computes something else. Source: ours; keys are llama.cpp's.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from redrafter.contracts import InputError

# Of all models that were published with such a tensor: wavelengths between which frequencies are
# divided by ever more, in lengths of a text of 8192.
_LLAMA3 = {
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
_OWN_YARN = [
    f"rope.scaling.{name}" for name in (
        "attn_factor", "yarn_log_multiplier", "yarn_ext_factor", "yarn_attn_factor",
        "yarn_beta_fast", "yarn_beta_slow",
    )
]  # fmt: skip
_CLOSE = 1e-4  # of stored float32 to what is computed here


def read_config(file: Path, reader: Any) -> Any:
    """transformers' configuration, with what it leaves out. reader: gguf's, of this file.

    Raises InputError where the file says what a configuration cannot.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    architecture = reader.get_field("general.architecture").contents()
    start = f"{architecture}."
    stated = {
        key.removeprefix(start): field.contents()
        for key, field in reader.fields.items() if key.startswith(start)
    }  # fmt: skip
    rope = getattr(config, "rope_parameters", None)
    if rope is not None:
        factors = [t for t in reader.tensors if t.name.startswith(("rope_freqs", "rope_factors"))]
        # Where layers with a window have their own, the file's are the others'.
        _set_rope(file, rope.get("full_attention", rope), stated, factors)
    return config


def _set_rope(file: Path, rope: dict[str, Any], stated: dict[str, Any], factors: list[Any]) -> None:
    if "rope.freq_base" in stated:
        rope["rope_theta"] = float(stated["rope.freq_base"])
    if rope.get("rope_type", "default") != "default":  # transformers has read it
        return
    if "partial_rotary_factor" in rope and "rope.dimension_count" in stated:
        dim = stated.get("attention.key_length")
        dim = dim or stated["embedding_length"] // stated["attention.head_count"]
        rope["partial_rotary_factor"] = stated["rope.dimension_count"] / dim
    kind = stated.get("rope.scaling.type", "none")
    if any(key in stated for key in _OWN_YARN):
        raise _cannot(file, "YaRN with settings of its own")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": float(stated["rope.scaling.factor"])}
        length = stated.get("rope.scaling.original_context_length")
        if kind == "yarn" and length is not None:
            rope["original_max_position_embeddings"] = int(length)
    elif kind != "none" or any(t.name != "rope_freqs.weight" for t in factors):
        raise _cannot(file, f"a way of its own ({kind!r})")
    for tensor in factors:
        stored = [float(x) for x in tensor.data.ravel()]
        found = {"rope_type": "llama3", "factor": max(stored), **_LLAMA3}
        wanted = _llama3_divisors(rope["rope_theta"], len(stored), found)
        close = (math.isclose(*pair, rel_tol=_CLOSE) for pair in zip(stored, wanted, strict=True))
        if kind != "none" or not all(close):
            raise _cannot(file, "factors of its own (rope_freqs.weight)")
        rope |= found


def _llama3_divisors(theta: float, n: int, rope: dict[str, Any]) -> list[float]:
    """Of each of n frequencies, as llama.cpp's converter computes them."""
    found, length = [], rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    for i in range(n):
        lengths = length / (2 * math.pi * theta ** (i / n))  # of the wave, in one such text
        share = min(max((lengths - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - share) / factor + share))
    return found


def _cannot(file: Path, how: str) -> InputError:
    return InputError(
        f"target.path: {file} stretches positions in {how}, which transformers does not read from "
        "a GGUF file: it would compute something else. Give the model that it was made from"
    )
