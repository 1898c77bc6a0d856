"""Every configuration dataclass, and the one way they are read: YAML, then `--section.key value`.

Unknown keys and wrong types are errors that name the key (jsonargparse). `None` means off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DType = Literal["auto", "float32", "float64", "bfloat16", "float16"]


@dataclass(frozen=True)
class TargetConfig:
    """The frozen language model."""

    path: str
    """Folder or Hub id of a Hugging Face causal language model."""
    device: str = "auto"
    """`auto` takes an accelerator if there is one; else e.g. `cpu`, `cuda:0`."""
    dtype: DType = "auto"
    """`auto` is float32 on a CPU and the checkpoint's own dtype elsewhere."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention kernel; `auto` lets transformers choose between sdpa and eager."""
    revision: str | None = None
    """Hub revision."""


@dataclass(frozen=True)
class TreeConfig:
    """The shape of what is drafted per step."""

    width: int = 4
    """W, nodes kept per level."""
    depth: int = 4
    """K, drafted levels (the token that is sure anyway is not counted)."""
    shape: Literal["levels", "beams", "best"] = "levels"
    """`levels` verifies every level's top W (N = 1 + W*K), `beams` only the prefixes of the final
    W beams (Apple's), `best` the `nodes` nodes of highest cumulative score over all levels."""
    nodes: int | None = None
    """N for shape `best`, the root counted."""
    seeded: bool = True
    """At temperature > 0, propose with the verifier's own noise (accepts more, stays exact)."""
