"""Tiny targets with random weights in float64, and what the tests of decoding share.

The weights are drawn wide, so that the logits are peaky and depend on the whole prefix.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from redrafter.contracts import Drafter, Lookahead, TokenTree, Truth
from redrafter.decode.plain import plain
from redrafter.drafters.compose import Wrapped
from redrafter.drafters.replay import ReplayDrafter
from redrafter.targets.fused import choose_forward
from redrafter.targets.model import Target

VOCAB = 48
CONTEXT = 64
WINDOW = 8  # shorter than the texts made here
NARROW = 3  # shorter than a drafted path: a node does not see all of its ancestors
NEW = 20  # tokens per text; the windows are passed and some rows meet an EOS
SHORT = 16  # where many texts are made; test_exactness.py says that every branch still occurs
EOS = (5, 17)

_COMMON = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    intermediate_size=48, max_position_embeddings=CONTEXT, tie_word_embeddings=False,
    bos_token_id=1, eos_token_id=None, pad_token_id=0, initializer_range=0.5,
)  # fmt: skip
_FAMILIES = {
    "llama": dict(num_key_value_heads=2),
    "qwen3": dict(num_key_value_heads=2, head_dim=8),
    "gemma3_text": dict(
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=NARROW,
        initializer_range=0.2, layer_types=["sliding_attention", "full_attention"],
    ),
    "mistral": dict(num_key_value_heads=2, head_dim=8, sliding_window=WINDOW),
    "phi3": dict(num_key_value_heads=2),
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, n_inner=48),
    "gpt_neox": {},
    # Keys and values of different widths; dense layers only
    "deepseek_v3": dict(
        kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8,
        num_key_value_heads=4, first_k_dense_replace=2, n_routed_experts=2, n_group=1,
        topk_group=1, num_experts_per_tok=1, moe_intermediate_size=8,
    ),
}  # fmt: skip
FAMILIES = tuple(_FAMILIES)
#: target of `tiny` -> what was made of its rows: (row, seed, settings) -> (text, why it ended) by
#: `alone`, (rows, seeds, settings) -> texts by `endless`
_known: dict[Target, dict[tuple, Any]] = {}


def shared(make: Callable[..., Any]) -> Callable[..., Any]:
    """What makes a model that tests share: once, and an ordinary one, though the first to ask be
    in inference mode."""
    return functools.cache(torch.inference_mode(False)(make))


@shared
def tiny(family: str, **changes) -> Target:
    """One target per argument list, for the whole test run."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **{**_COMMON, **_FAMILIES.get(family, {}), **changes})
    made = Target(AutoModelForCausalLM.from_config(config, dtype=torch.float64))
    choose_forward(made, "auto", lambda _: None)  # as users decode; `check` has passed above
    _known[made] = {}
    return made


def paired(*choices: Iterable) -> list[tuple]:
    """Half of the product of three choices or more, of which the last is one of two: any two values
    of different choices stand together in some case."""
    *rest, (one, other) = map(list, choices)
    places = itertools.product(*map(range, map(len, rest)))
    return [
        (*(values[i] for values, i in zip(rest, place, strict=True)), (one, other)[sum(place) % 2])
        for place in places
    ]


def prompts(lengths: Sequence[int] = (9, 3, 14, 8), seed: int = 0) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (n,), generator=random).tolist() for n in lengths]


def settings(**changes) -> GenerationConfig:
    values = {"max_new_tokens": NEW, "eos_token_id": list(EOS), **changes}
    return GenerationConfig(**values)


def shorter(**changes) -> GenerationConfig:
    """`settings` of texts of `SHORT` tokens."""
    return settings(**{"max_new_tokens": SHORT, **changes})


def alone(target: Target, rows: list[list[int]], config: GenerationConfig, seeds=None, **more):
    """The reference: `plain` on each row by itself. Returns texts and reasons to finish.

    A target of `tiny` is everybody's and does not change: of it, the same is made once.
    """
    seeds = range(len(rows)) if seeds is None else seeds
    known, settings = _kept(target, more), config.to_json_string()
    texts, finish = [], []
    for row, seed in zip(rows, seeds, strict=True):
        key = (tuple(row), int(seed), settings)
        if key not in known:
            made = plain(target, [row], config, seeds=[seed], **more)
            known[key] = made.tokens[0], made.finish[0]
        texts.append([*known[key][0]])
        finish.append(known[key][1])
    return texts, finish


def _kept(target: Target, more: dict) -> dict[tuple, Any]:
    """What is known of a target that is everybody's; of others it is forgotten."""
    everybodys = target in _known and not more and "forward" not in vars(target)
    return _known[target] if everybodys else {}


def endless(target: Target, rows: list[list[int]], config: GenerationConfig, seeds=None, **more):
    """Whole texts (prompt included) that do not stop, for a drafter that guesses past the end. They
    are made in one batch: what drafts are right by is `alone`."""
    free = GenerationConfig(**{**config.to_dict(), "eos_token_id": -1, "stop_strings": None})
    if free.max_new_tokens is not None:
        free.max_new_tokens += NEW
    seeds = list(range(len(rows)) if seeds is None else seeds)
    known, key = _kept(target, more), (str(rows), str(seeds), free.to_json_string())
    if key not in known:
        known[key] = plain(target, rows, free, seeds=seeds, **more).tokens
    return [row + text for row, text in zip(rows, known[key], strict=True)]


def replays(texts: list[list[int]], vocab: int = VOCAB, seed: int = 0) -> dict[str, Drafter]:
    """Drafters of set acceptance that between them force every branch."""

    def replay(acceptance, depth=4, width=3, duplicates=False):
        return ReplayDrafter(texts, vocab, depth, width, acceptance, duplicates, seed)

    return {
        "never": replay(0.0),
        "half": replay(0.5, duplicates=True),
        "often": replay(0.9, depth=5, width=2, duplicates=True),
        "chain": replay(0.8, depth=3, width=1),
        "always": replay(1.0),
    }


class RandomLookahead(Lookahead):
    """Lets each row go on with probability 0.6, by its own generator."""

    def __init__(self, n_rows: int, seed: int, dynamic: bool = True):
        self.n_rows, self.dynamic = n_rows, dynamic
        self.random = torch.Generator().manual_seed(seed)

    def go_on(self, features: Tensor | None, level: int) -> Tensor:
        return torch.rand(self.n_rows, generator=self.random) < 0.6


class Recorder(Wrapped):
    """Passes everything on to another drafter and keeps the trees and truths that it saw."""

    def __init__(self, inner: Drafter, needs: Sequence[str] = ()):
        super().__init__(inner, frozenset(needs))
        self.prefill: Truth | None = None
        self.steps: list[tuple[TokenTree, Truth, list[int], list[bool]]] = []

    def start(self) -> None:
        self.before = self.seqs.length.tolist(), self.seqs.live.tolist()
        super().start()

    def tree(self) -> TokenTree:
        self.last = super().tree()
        return self.last  # the loop narrows `valid` on this very object

    def observe(self, truth: Truth) -> None:
        super().observe(truth)
        if self.prefill is None:
            self.prefill = truth
        else:
            self.steps.append((self.last, truth, *self.before))


def make_tree(tokens: list[list[int]], parents: list[int], valid=None) -> TokenTree:
    """Rows of one shape. parents[i] < i; the root is its own parent."""
    depth = [0]
    for parent in parents[1:]:
        depth.append(depth[parent] + 1)
    tokens = torch.tensor(tokens)
    shape = tokens.shape
    valid = torch.ones(shape, dtype=torch.bool) if valid is None else torch.tensor(valid)
    return TokenTree(
        tokens,
        torch.tensor(parents).expand(shape).clone(),
        torch.tensor(depth).expand(shape).clone(),
        valid.expand(shape).clone(),
    )


def random_tree(
    random: torch.Generator, rows: int, nodes: int, vocab: int = VOCAB, valid: float = 1.0
) -> TokenTree:
    """Every row its own shape; small vocabularies make equal siblings."""
    draw = functools.partial(torch.randint, generator=random)
    tokens = draw(vocab, (rows, nodes))
    parent = torch.zeros_like(tokens)
    depth = torch.zeros_like(tokens)
    for node in range(1, nodes):
        parent[:, node] = draw(node, (rows,))
        depth[:, node] = depth.gather(1, parent[:, node : node + 1])[:, 0] + 1
    keep = torch.rand(rows, nodes, generator=random) < valid
    keep[:, 0] = True
    log_q = torch.zeros(rows, nodes, dtype=torch.float64)
    for node in range(1, nodes):
        step = torch.rand(rows, generator=random, dtype=torch.float64).log()
        log_q[:, node] = log_q.gather(1, parent[:, node : node + 1])[:, 0] + step
    return TokenTree(tokens, parent, depth, keep, log_q)


def path_to(tree: TokenTree, row: int, node: int) -> list[int]:
    """Node indices from the root to `node`, by following parents one at a time."""
    path = [node]
    while path[-1] != 0:
        path.append(int(tree.parent[row, path[-1]]))
    return path[::-1]
