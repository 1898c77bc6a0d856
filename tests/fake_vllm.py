"""A stand-in for vLLM's V1 runner: what it calls of a proposer, in the order and with the arguments
of vllm 0.32 (`v1/worker/gpu_model_runner.py`, `v1/spec_decode/custom_class_proposer.py`).

`modules()` are what `redrafter.serve.vllm` imports; `Engine` reads prompts in chunks, verifies
drafts, moves rows about in its batch, preempts and aborts, on a tiny target in float64.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from redrafter.targets.model import Target

VERSION = "0.32.0+stand.in"
PADDING = 3  # rows that graphs of fixed sizes add behind a batch


def lost(x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from=0, replace_to=0):
    """As on vLLM 0.32's CPU backend: whatever lay in memory."""
    return torch.full((num_tokens,), 3e-19, dtype=torch.float32).to(x.dtype)


def expanded(x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from=0, replace_to=0):
    counts = torch.diff(cu_num_tokens.long(), prepend=torch.zeros(1, dtype=torch.long))
    x = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return x.repeat_interleave(counts)


def modules(expand=expanded) -> dict[str, ModuleType]:
    """{name: module} for sys.modules; `expand` is right (`expanded`) or not (`lost`)."""
    names = (
        "vllm", "vllm.forward_context", "vllm.logger", "vllm.v1", "vllm.v1.sample",
        "vllm.v1.sample.sampler", "vllm.v1.sample.rejection_sampler",
    )  # fmt: skip
    made = {name: ModuleType(name) for name in names}
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        module.__path__ = []
        if parent:
            setattr(made[parent], child, module)
    made["vllm"].__version__ = VERSION
    context = made["vllm.forward_context"]
    context.current = SimpleNamespace(attn_metadata=None)
    context.get_forward_context = lambda: context.current

    def init_logger(name: str) -> logging.Logger:
        logger = logging.getLogger(name)
        logger.warning_once = logger.warning
        return logger

    made["vllm.logger"].init_logger = init_logger
    rejection = made["vllm.v1.sample.rejection_sampler"]
    rejection.expand_batch_to_tokens = expand

    class Sampler(nn.Module):
        def forward(self, logits, sampling_metadata, predict_bonus_token=False):
            temperature = sampling_metadata.temperature
            best = logits.argmax(-1)
            if temperature is None:
                return SimpleNamespace(sampled_token_ids=best[:, None].int())
            warped = _top_k(logits, sampling_metadata.top_k) / temperature.clamp(min=1e-5)[:, None]
            drawn = warped.softmax(-1).multinomial(1)[:, 0]
            best = torch.where(temperature == 0, best, drawn)
            return SimpleNamespace(sampled_token_ids=best[:, None].int())

    def apply_sampling_constraints(logits, cu_num_draft_tokens, sampling_metadata):
        if sampling_metadata.all_greedy:
            return logits
        values = (sampling_metadata.temperature, cu_num_draft_tokens, len(logits))
        temperature = rejection.expand_batch_to_tokens(*values, 0, 1)
        logits.div_(temperature[:, None])
        if sampling_metadata.top_k is None:
            return logits
        top_k = rejection.expand_batch_to_tokens(
            sampling_metadata.top_k, cu_num_draft_tokens, len(logits)
        )
        return _top_k(logits, top_k)

    def rejection_sample(
        drafts, counts, max_spec_len, ends, draft_probs, logits, bonus, sampling_metadata
    ):  # fmt: skip
        p = logits.nan_to_num(0.0).softmax(-1)
        best = logits.argmax(-1)
        x = drafts.long()
        accept = torch.rand(len(x)) < p.gather(1, x[:, None])[:, 0]
        rest = p.scatter(1, x[:, None], 0.0) + 1e-30
        instead = rest.multinomial(1)[:, 0]
        temperature = sampling_metadata.temperature
        made, at = torch.full((len(counts), max_spec_len + 1), -1, dtype=torch.int32), 0
        for row, n in enumerate(counts):
            greedy = temperature is None or temperature[row] == 0
            for level in range(n):
                i, at = at, at + 1
                if -1 in made[row, :level]:
                    continue
                ok = x[i] == best[i] if greedy else accept[i]
                made[row, level] = x[i] if ok else (best[i] if greedy else instead[i])
                if not ok:
                    at += n - level - 1
                    break
            else:
                made[row, n] = bonus[row, 0]
        return made

    class RejectionSampler(nn.Module):
        def __init__(self, sampler):
            super().__init__()
            self.sampler = sampler

        def forward(self, metadata, draft_probs, logits, sampling_metadata):
            ends = metadata.cu_num_sampled_tokens.long() - 1
            bonus = self.sampler(
                logits=logits[ends], sampling_metadata=sampling_metadata, predict_bonus_token=True
            )
            draft_rows = torch.ones(len(logits), dtype=torch.bool)
            draft_rows[ends] = False
            cu = torch.tensor(metadata.num_draft_tokens).cumsum(0)
            warped = rejection.apply_sampling_constraints(
                logits[draft_rows].clone(), cu, sampling_metadata
            )
            made = rejection.rejection_sample(
                metadata.draft_token_ids, metadata.num_draft_tokens, max(metadata.num_draft_tokens),
                cu, None, warped, bonus.sampled_token_ids, sampling_metadata,
            )  # fmt: skip
            return SimpleNamespace(sampled_token_ids=made)

    made["vllm.v1.sample.sampler"].Sampler = Sampler
    rejection.RejectionSampler = RejectionSampler
    rejection.apply_sampling_constraints = apply_sampling_constraints
    rejection.rejection_sample = rejection_sample
    return made


def _top_k(logits: Tensor, top_k: Tensor | None) -> Tensor:
    if top_k is None:
        return logits
    k = top_k.clamp(1, logits.shape[1]).long()
    least = logits.sort(-1, descending=True).values.gather(1, k[:, None] - 1)
    return logits.masked_fill(logits < least, -torch.inf)


def config(target: Target, depth: int, max_model_len: int = 64, extra=None, **changes):
    """What of a VllmConfig a proposer may read."""
    values = dict(
        additional_config=extra or {},
        speculative_config=SimpleNamespace(num_speculative_tokens=depth),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        compilation_config=SimpleNamespace(cudagraph_mode=None),
        model_config=SimpleNamespace(
            model=target.name, max_model_len=max_model_len, uses_mrope=False,
            dtype=target.lm_head_weight.dtype,
            hf_text_config=target.config, get_hidden_size=lambda: target.hidden_size,
            get_vocab_size=lambda: target.vocab_size,
        ),
    )  # fmt: skip
    return SimpleNamespace(**values | changes)


class Model(nn.Module):
    """vLLM's module: flat tokens in, flat states out, an lm_head with padded rows."""

    def __init__(self, target: Target):
        super().__init__()
        self.target = [target]
        weight = target.lm_head_weight.detach()
        self.lm_head = nn.Linear(1, 1, bias=False)
        padded = torch.cat((weight, torch.full((16, weight.shape[1]), 99.0, dtype=weight.dtype)))
        self.lm_head.weight = nn.Parameter(padded, requires_grad=False)
        self.rows: list[tuple[list[int], int, int]] = []

    def embed_input_ids(self, tokens: Tensor) -> Tensor:
        return self.target[0].model.get_input_embeddings()(tokens)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self.target[0].project(hidden)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        states = [
            self.target[0].states(torch.tensor([ids]))[0, start : start + n]
            for ids, start, n in self.rows
        ]
        return torch.cat([*states, torch.full((PADDING, states[0].shape[1]), 7.0)])


@dataclass
class Row:
    """known: prompt and answer; computed: of these, in the cache; drafts: to be verified next"""

    name: int
    known: list[int]
    prompt: int
    limit: int
    temperature: float = 0.0
    top_k: int | None = None
    computed: int = 0
    drafts: list[int] = field(default_factory=list)
    accepted: int = 0
    steps: int = 0

    @property
    def answer(self) -> list[int]:
        return self.known[self.prompt :][: self.limit]


class Engine:
    """Steps as the V1 runner makes them. `budget`: tokens per step, which chunks prompts."""

    def __init__(self, modules, target: Target, proposer, budget: int = 64, cached: int = 0):
        self.modules, self.target, self.proposer = modules, target, proposer
        self.budget, self.cached, self.max_len = budget, cached, 64
        self.model = Model(target)
        self.sampler = modules["vllm.v1.sample.sampler"].Sampler()
        self.rejection = modules["vllm.v1.sample.rejection_sampler"].RejectionSampler(self.sampler)
        self.batch: list[Row] = []
        self.done: dict[int, Row] = {}
        if proposer is not None:
            proposer.load_model(self.model)

    def add(
        self, name: int, prompt: list[int], limit: int = 20, temperature: float = 0.0,
        top_k: int | None = None,
    ) -> None:  # fmt: skip
        row = Row(name, list(prompt), len(prompt), limit, temperature, top_k)
        row.computed = min(self.cached, len(prompt) - 1)  # a prefix that was cached
        self.batch.append(row)

    def run(self) -> dict[int, list[int]]:
        while self.batch:
            self.step()
        return {name: row.answer for name, row in self.done.items()}

    def preempt(self, index: int) -> None:
        """Its cache is given away: prompt and answer so far are read again."""
        row = self.batch.pop(index)
        row.computed, row.drafts = 0, []
        self.batch.append(row)

    def abort(self, index: int) -> None:
        self.batch[index] = self.batch[-1]  # vLLM closes the gap with the last row
        self.batch.pop()

    def step(self) -> None:
        rows, left, counts, positions = [], self.budget, [], []
        for row in self.batch:
            ids = (row.known + row.drafts)[: row.computed + left]
            if len(ids) > row.computed:
                n = len(ids) - row.computed
                rows.append(row)
                self_rows = (ids, row.computed, n)
                counts.append(self_rows)
                positions += range(row.computed, len(ids))
                left -= n
        self.batch = rows + [r for r in self.batch if r not in rows]
        self.model.rows = counts
        starts = torch.tensor([0] + [n for _, _, n in counts]).cumsum(0).int()
        current = self.modules["vllm.forward_context"].current
        current.attn_metadata = {"layer.0": SimpleNamespace(query_start_loc=starts)}
        tokens = torch.tensor([t for ids, start, _ in counts for t in ids[start:]])
        positions = torch.tensor([*positions, *[0] * PADDING])
        with torch.inference_mode():
            hidden = self.model(input_ids=tokens, positions=positions)
        sampled = self._sample(rows, counts, starts.tolist(), hidden)
        self._propose(rows, sampled)
        for row in [r for r in rows if len(r.known) - r.prompt >= r.limit]:
            self.done[row.name] = row
            self.batch.remove(row)

    def _sample(self, rows, counts, starts, hidden) -> list[list[int]]:
        wanted, n_drafts = [], []
        for row, (ids, _, n), start in zip(rows, counts, starts, strict=False):
            drafted = max(0, len(ids) - len(row.known))
            n_drafts.append(drafted)
            wanted += range(start + n - 1 - drafted, start + n)
        logits = self.model.compute_logits(hidden[wanted])
        temperature = torch.tensor([r.temperature for r in rows])
        greedy = bool((temperature == 0).all())
        top_k = [r.top_k or logits.shape[1] for r in rows]
        settings = SimpleNamespace(
            temperature=None if greedy else temperature, all_greedy=greedy,
            top_k=torch.tensor(top_k) if any(r.top_k for r in rows) else None,
        )  # fmt: skip
        if self.proposer is not None:  # also where nothing was drafted
            metadata = SimpleNamespace(
                num_draft_tokens=n_drafts,
                cu_num_sampled_tokens=(torch.tensor(n_drafts) + 1).cumsum(0).int(),
                draft_token_ids=torch.tensor(
                    [t for r, n in zip(rows, n_drafts, strict=True) for t in r.drafts[:n]],
                    dtype=torch.int32,
                ),
            )
            made = self.rejection(metadata, None, logits, settings).sampled_token_ids
        else:
            made = self.sampler(logits=logits, sampling_metadata=settings).sampled_token_ids
        sampled = []
        made = zip(rows, counts, made.tolist(), n_drafts, strict=True)
        for row, (ids, _, _), new, drafted in made:
            new = [t for t in new if t != -1] if len(ids) >= len(row.known) else []
            if new:
                row.steps += drafted > 0
                row.accepted += len(new) - 1
                row.computed = len(row.known) + len(new) - 1
                row.known += new
            else:
                row.computed = len(ids)
            row.drafts = []
            sampled.append(new)
        return sampled

    def _propose(self, rows, sampled) -> None:
        if self.proposer is None:
            return
        known = np.zeros((len(rows) + 2, self.max_len + 8), dtype=np.int32)
        lengths = np.zeros(len(rows) + 2, dtype=np.int32)  # vLLM's arrays are as long as its limit
        for i, row in enumerate(rows):
            known[i, : len(row.known)] = row.known
            lengths[i] = len(row.known)
        drafts = self.proposer.propose(sampled, lengths, known, slot_mappings=None)
        assert len(drafts) == len(rows)
        for row, new, draft in zip(rows, sampled, drafts, strict=True):
            assert new or not draft, "a row whose prompt is not all read must not draft"
            row.drafts = draft
