"""redrafter: train draft heads that make language models faster without changing what they say.

Letters used for shapes, everywhere:

    B  sequences in a batch          K  drafted depth (levels below the root of a tree)
    T  positions                     W  beam width (nodes kept per level)
    H  hidden width of the target    N  nodes of a token tree, the root counted
    V  vocabulary                    L  tokens a row knows so far, prompt included

A tree's *root* (node 0) is the last emitted token, not yet in the target's cache. A node at
depth d is a guess for the token at absolute position L - 1 + d of its row.

The main path: `redrafter.targets` (the frozen model) -> `redrafter.decode.speculative` (the loop)
-> `redrafter.drafters` (who proposes) -> `redrafter.heads` (what is trained).
"""

from importlib import import_module

__version__ = "0.1.0.dev0"

# Public names are imported on first use, so that `import redrafter` stays instant.
_PUBLIC = {
    "Target": "redrafter.targets.model",
    "load_target": "redrafter.targets.load",
    "DraftHead": "redrafter.heads.base",
    "RecurrentHead": "redrafter.heads.recurrent",
    "RecurrentHeadConfig": "redrafter.heads.recurrent",
    "HeadDrafter": "redrafter.drafters.head",
    "plain": "redrafter.decode.plain",
    "speculative": "redrafter.decode.speculative",
    "generate": "redrafter.generation",
    "load_strategy": "redrafter.generation",
    "Resources": "redrafter.drafters.build",
    "TextStream": "redrafter.targets.text",
    "load_head": "redrafter.heads.load",
    "Learner": "redrafter.learning.learner",
}

#: names of earlier versions -> what they are called now
_RENAMED = {
    "load_plan": "load_strategy", "Partners": "Resources", "RecurrentDrafter": "HeadDrafter",
}  # fmt: skip

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    now = f"; it is called {_RENAMED[name]} now" if name in _RENAMED else ""
    raise AttributeError(f"module 'redrafter' has no attribute {name!r}{now}")


def __dir__():
    return sorted(__all__)
