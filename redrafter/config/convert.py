"""`scripts/convert_head.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from redrafter.config.common import TargetConfig


@dataclass(frozen=True)
class ConvertConfig:
    """Write a draft head in another layout; its own layout is read off its folder."""

    head: str
    """Folder or Hub id of the head, in any layout that can be read here."""
    to: Literal["apple", "vllm-medusa", "mlp_speculator", "redrafter"]
    """Layout to write: `apple` is ml-recurrent-drafter's, of recurrent heads, which its code and
    TensorRT-LLM's converter read; `vllm-medusa` is that of vLLM's MedusaModel; `mlp_speculator` is
    IBM's; `redrafter` is this library's."""
    out: str
    """Folder to write; it must not exist, or be empty."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Numbers to store its weights in; none leaves them. A head in half precision is half the file,
    and computes in float32 for a target that does."""
    target: TargetConfig | None = None
    """The target that the head was trained for: its sizes and fingerprint are compared with what
    the head says, and `redrafter` records them (Apple's and vLLM's layouts have no place for
    them)."""
