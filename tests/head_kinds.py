"""Heads of every kind, small ones, and what each computes written out from its paper alone."""

import math

import torch
from torch.nn import functional as F

from redrafter.heads.load import head_class

#: name of a case -> kind, and fields of its configuration; every kind of `config.KINDS` has some
CASES = {
    "recurrent": ("recurrent", {"embedding_scale": "rms"}),
    "recurrent-normed": ("recurrent", {"state_norm": True, "exit_dim": 9}),  # a matrix of rank 9
    "medusa": ("medusa", {"num_heads": 3}),
    "medusa-target": ("medusa", {"num_heads": 3, "num_draft_layers": 2, "output": "target"}),
    "medusa-pruned": ("medusa", {"num_heads": 2, "draft_ids": torch.arange(3, 40, 3)}),
    "hydra": ("hydra", {"num_heads": 3, "embedding_scale": "rms"}),
    "hydra-target": ("hydra", {"num_heads": 3, "num_draft_layers": 2, "output": "target"}),
    "hydra-pruned": ("hydra", {"num_heads": 2, "draft_ids": torch.arange(3, 40, 3)}),
    "mlp_speculator": ("mlp_speculator", {"n_predict": 3, "inner_dim": 24, "scale_input": True}),
    "mlp_speculator-tied": ("mlp_speculator", {"n_predict": 3, "tie_weights": True}),
}
KIND_CASES = {kind: name for name, (kind, _) in reversed(CASES.items())}


def make_head(target, case, seed=3, scale=1.0):
    """A head of that case in float64 whose weights are all moved from where they begin."""
    kind, fields = CASES[case]
    torch.manual_seed(seed)
    head = head_class(kind).for_target(target, **fields).double()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(torch.randn_like(p) * scale / p.shape[-1] ** 0.5)
    return head.eval()


def written_out(head, target, c, tokens):
    """Logits after each of the tokens. c: (H,); tokens: a list. Returns as many (Vd,) tensors."""
    formula = {
        "recurrent": _recurrent, "medusa": _medusa, "hydra": _hydra, "mlp_speculator": _speculator,
    }[head.kind]  # fmt: skip
    weights = dict(head.state_dict())
    weights["target"] = target.lm_head_weight
    if "draft_ids" in weights:
        weights["target"] = weights["target"][weights["draft_ids"]]
    return formula(weights, target.embed(torch.tensor(tokens)), c, tokens, head.config)


def _block(weights, name, x):
    return x + F.silu(weights[f"{name}.linear.weight"] @ x + weights[f"{name}.linear.bias"])


def _recurrent(weights, embedded, c, tokens, config):
    state, found = None, []
    for e in embedded * weights.get("inverse_rms", 1.0):
        z = weights["rnn_w.weight"] @ e + weights["rnn_u.bias"]
        state = F.silu(z if state is None else z + weights["rnn_u.weight"] @ state)
        if config.state_norm:
            mean_square = (state * state).mean() + 1e-6
            state = state / mean_square.sqrt() * weights["state_norm.weight"]
        x = torch.cat((c, state))
        if config.exit_dim != 2 * config.hidden_size:
            x = weights["input_proj.weight"] @ x + weights["input_proj.bias"]
        for i in range(config.num_draft_layers):
            x = _block(weights, f"lm_head.{i}", x)
        found.append(weights[f"lm_head.{config.num_draft_layers}.weight"] @ x)
    return found


def _medusa(weights, embedded, c, tokens, config):
    found = []
    for k in range(len(tokens)):
        x = c
        for j in range(config.num_draft_layers):
            x = _block(weights, f"blocks.{k}.{j}", x)
        found.append(weights.get(f"lm_heads.{k}.weight", weights["target"]) @ x)
    return found


def _hydra(weights, embedded, c, tokens, config):
    found = []
    for k in range(len(tokens)):
        x = torch.cat((c, *(embedded[: k + 1] * weights.get("inverse_rms", 1.0))))
        first = f"hydra_mlp.{k}.0"
        y = weights[f"{first}.res_connection.weight"] @ x
        y = y + weights[f"{first}.res_connection.bias"]
        inner = weights[f"{first}.linear.weight"] @ x + weights[f"{first}.linear.bias"]
        y = y + F.silu(inner)
        for j in range(1, config.num_draft_layers):
            y = _block(weights, f"hydra_mlp.{k}.{j}", y)
        found.append(weights.get(f"hydra_lm_head.{k}.weight", weights["target"]) @ y)
    return found


def _speculator(weights, embedded, c, tokens, config):
    """fms-extras, MLPSpeculator; of tied weights the last one stands for those behind it."""

    def of(name, k):
        while f"speculator.{name[0]}.{k}.{name[1]}" not in weights:
            k -= 1
        return weights[f"speculator.{name[0]}.{k}.{name[1]}"]

    state_weight = 0.5 ** (0.5 / config.n_predict)
    emb_weight = math.sqrt((1 - state_weight**2) * (config.inner_dim / 2))
    state, found = c, []
    if config.scale_input:
        state = state / torch.sqrt((state * state).mean() + 1e-6) / math.sqrt(2)
    for k, token in enumerate(tokens):
        z = of(("emb", "weight"), k)[token] * emb_weight / state_weight
        state = of(("proj", "weight"), k) @ state + z
        state = state / torch.sqrt((state * state).mean() + 1e-6)
        state = F.gelu(state * of(("ln", "weight"), k) + of(("ln", "bias"), k))
        found.append(of(("head", "weight"), k) @ state)
    return found
