"""What the last verification says of the step to come, before anything is drafted."""

from __future__ import annotations

import torch
from torch import Tensor

from redrafter.contracts import Truth

#: of the target's distribution that the root was chosen from: the root's own probability, the
#: entropy, and how far the likeliest token is ahead of the next one
CONTEXT_FEATURES = ("root_p", "root_entropy_nats", "root_margin")


def context_features(truth: Truth, temperature: float) -> Tensor:
    """(B, F) `CONTEXT_FEATURES`; of a row that is not live they mean nothing. Ours.

    truth: with `logits`; temperature: what they are divided by (processors other than that one are
    left out: this only informs a guess)
    """
    row = torch.arange(len(truth.count), device=truth.count.device)
    last = (truth.count - 1).clamp(min=0)
    logits = truth.logits[row, last].float()
    if temperature != 1.0:
        logits = logits / temperature
    p = logits.softmax(-1)
    top, place = p.topk(2, dim=-1)
    total = logits.gather(1, place[:, :1]) - top[:, :1].log()  # logsumexp
    entropy = total - torch.linalg.vecdot(p, logits.clamp(min=-1e4))[:, None]
    root = p.gather(1, truth.tokens[row, last][:, None])
    return torch.cat([root, entropy, top[:, :1] - top[:, 1:]], 1)
