"""From raw logits to the target's processed distribution p, at one node or at all of a tree.

`rows` applies transformers' own processors to one position per row, each prefix as it is: the
reference. `tree` gives the same scores at every node of a tree. Processors that ignore the prefix
take all nodes at once; the repetition penalty and the minimum length are vectorised here; any
other stateless one runs on flattened (node, prefix) rows; stateful ones are refused by name.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as hf

from redrafter.contracts import InputError, RowState, TokenTree

# These never look at input_ids.
_PREFIX_FREE = (
    hf.TemperatureLogitsWarper, hf.TopKLogitsWarper, hf.TopPLogitsWarper, hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper, hf.EpsilonLogitsWarper, hf.EtaLogitsWarper, hf.TopHLogitsWarper,
    hf.SuppressTokensLogitsProcessor, hf.LogitNormalization, hf.InfNanRemoveLogitsProcessor,
)  # fmt: skip
# These keep a state from call to call, or tie their rows to the rows of a batch.
_STATEFUL = (
    hf.UnbatchedClassifierFreeGuidanceLogitsProcessor, hf.ClassifierFreeGuidanceLogitsProcessor,
    hf.SynthIDTextWatermarkLogitsProcessor, hf.PrefixConstrainedLogitsProcessor,
    hf.WhisperTimeStampLogitsProcessor, hf.WhisperNoSpeechDetection,
    hf.EncoderRepetitionPenaltyLogitsProcessor, hf.EncoderNoRepeatNGramLogitsProcessor,
)  # fmt: skip
#: What of a processor counts tokens from where a row begins: one number for all rows of the batch,
#: or (B,) one for each.
_LENGTHS = {
    hf.RepetitionPenaltyLogitsProcessor: "prompt_ignore_length",
    hf.MinLengthLogitsProcessor: "min_length",
    hf.MinNewTokensLengthLogitsProcessor: "prompt_length_to_skip",
    hf.SuppressTokensAtBeginLogitsProcessor: "begin_index",
    hf.ForcedEOSTokenLogitsProcessor: "max_length",
    hf.ExponentialDecayLengthPenalty: "regulation_start",
    hf.AlternatingCodebooksLogitsProcessor: "input_start_len",
}


class MinNewTokens:
    """No EOS before a row has its minimum of new tokens (rows differ in prompt length)."""

    def __init__(self, minimum: Tensor, eos: set[int]):
        self.minimum, self.eos = minimum, sorted(eos)  # (B,) tokens

    def __call__(self, scores: Tensor, n_new: Tensor) -> Tensor:
        """scores: (B, ..., V); n_new: (B, ...) tokens emitted before the one being chosen."""
        minimum = self.minimum.view(-1, *[1] * (n_new.dim() - 1))
        token = torch.arange(scores.shape[-1], device=scores.device)
        # isin and not an index: a config may name an EOS that the model's vocabulary lacks
        blocked = torch.isin(token, torch.tensor(self.eos, device=scores.device))
        return scores.masked_fill((n_new < minimum)[..., None] & blocked, float("-inf"))


def build_processors(
    config: GenerationConfig,
    minimum: Tensor | None,
    eos: set[int],
    extra: LogitsProcessorList | None,
) -> list[LogitsProcessor | MinNewTokens]:
    """transformers' processors for a GenerationConfig, in transformers' order."""
    steps: list = []
    if config.sequence_bias is not None:
        steps.append(hf.SequenceBiasLogitsProcessor(config.sequence_bias))
    if config.repetition_penalty not in (None, 1.0):
        steps.append(hf.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        steps.append(hf.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.bad_words_ids is not None:
        # As in transformers, an EOS among the bad words is let through.
        steps.append(hf.NoBadWordsLogitsProcessor(config.bad_words_ids, sorted(eos) or None))
    if minimum is not None and eos:
        steps.append(MinNewTokens(minimum, eos))
    if config.remove_invalid_values:
        steps.append(hf.InfNanRemoveLogitsProcessor())
    if config.suppress_tokens is not None:
        steps.append(hf.SuppressTokensLogitsProcessor(config.suppress_tokens))
    steps += list(extra or [])
    if config.do_sample:
        if config.temperature not in (None, 1.0):
            steps.append(hf.TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            steps.append(hf.TopKLogitsWarper(config.top_k))
        if config.top_p is not None and config.top_p < 1.0:
            steps.append(hf.TopPLogitsWarper(config.top_p))
        if config.min_p is not None:
            steps.append(hf.MinPLogitsWarper(config.min_p))
        if config.typical_p is not None and config.typical_p < 1.0:
            steps.append(hf.TypicalLogitsWarper(config.typical_p))
        if config.epsilon_cutoff:
            steps.append(hf.EpsilonLogitsWarper(config.epsilon_cutoff))
        if config.eta_cutoff:
            steps.append(hf.EtaLogitsWarper(config.eta_cutoff))
    if config.renormalize_logits:
        steps.append(hf.LogitNormalization())
    return steps


def without_padding(p: LogitsProcessor, padding: Tensor) -> LogitsProcessor:
    """A processor made for padded rows, for the rows as they are. padding: (B,) tokens before each.

    Lengths that none of transformers' own processors counts are not known here.
    """
    name, length = _length_of(p)
    if length is None:
        return p
    return _with_length(p, name, (torch.as_tensor(length).cpu() - padding.cpu()).clamp(min=0))


def _length_of(p) -> tuple[str, int | Tensor | None]:
    name = next((name for kind, name in _LENGTHS.items() if isinstance(p, kind)), None)
    return name, None if name is None else getattr(p, name)


def _with_length(p, name: str, length: int | Tensor):
    other = copy.copy(p)
    setattr(other, name, length)
    return other


def _by_row(p, n_rows: int) -> list:
    """A processor for each row, whose length is its own; the same one where they do not differ."""
    name, length = _length_of(p)
    if not isinstance(length, Tensor):
        return [p] * n_rows
    if length.shape != (n_rows,):
        raise InputError(
            f"logits processor {type(p).__name__}: {name} is {tuple(length.shape)} for a batch of "
            f"{n_rows} rows; give one number, or one for every row"
        )
    made = {n: _with_length(p, name, n) for n in set(length.tolist())}
    return [made[n] for n in length.tolist()]


class Warp:
    """Applies a list of processors; see the module's docstring. n_rows: B"""

    def __init__(self, processors: list, vocab_size: int, n_rows: int):
        for p in processors:
            _refuse_stateful(p, vocab_size)
        self._rows = [_by_row(p, n_rows) for p in processors]
        self.processors = processors = [rows[0] for rows in self._rows]
        #: whether any of them looks at the tokens before the one being chosen
        self.reads_prefix = any(type(p) not in (*_PREFIX_FREE, MinNewTokens) for p in processors)

    def rows(self, logits: Tensor, seqs: RowState) -> Tensor:
        """logits: (B, V) for the token at position L of every row. Returns (B, V) scores."""
        scores = _scores(logits)
        for p, own in zip(self.processors, self._rows, strict=True):
            if isinstance(p, MinNewTokens):
                scores = p(scores, seqs.length - seqs.prompt_length)
            elif type(p) in _PREFIX_FREE:
                scores = p(None, scores)
            else:
                lengths = seqs.length.tolist()
                scores = torch.cat(
                    [
                        own[b](seqs.ids[b : b + 1, :n].clone(), scores[b : b + 1].clone())
                        for b, n in enumerate(lengths)
                    ]
                )
        return scores

    def tree(self, logits: Tensor, tree: TokenTree, seen: Tensor, seqs: RowState) -> Tensor:
        """logits: (B, N, V) for the token after every node. Returns (B, N, V) scores.

        seen: (B, N, N) bool from `tree.ancestors`
        """
        scores = _scores(logits)
        for p, own in zip(self.processors, self._rows, strict=True):
            if isinstance(p, MinNewTokens):
                n_new = (seqs.length - seqs.prompt_length)[:, None] + tree.depth
                scores = p(scores, n_new)
            elif type(p) in _PREFIX_FREE:
                scores = p(None, scores.flatten(0, 1)).view_as(scores)
            elif all(map(_is_plain_penalty, own)):
                penalised = torch.where(scores < 0, scores * p.penalty, scores / p.penalty)
                scores = torch.where(_tokens_seen(tree, seen, seqs, scores), penalised, scores)
            else:
                scores = _per_prefix(own, scores, tree, seen, seqs)
        return scores


def score_dtype(logits_dtype: torch.dtype) -> torch.dtype:
    """Scores are float64 for a float64 target, float32 for every other."""
    return logits_dtype if logits_dtype == torch.float64 else torch.float32


def _scores(logits: Tensor) -> Tensor:
    return logits.to(score_dtype(logits.dtype))


def _is_plain_penalty(p) -> bool:
    return type(p) is hf.RepetitionPenaltyLogitsProcessor and not p.prompt_ignore_length


def _tokens_seen(tree: TokenTree, seen: Tensor, seqs: RowState, scores: Tensor) -> Tensor:
    """(B, N, V) bool: tokens in the prefix of every node, the node itself included."""
    batch, n, vocab = scores.shape
    known = torch.arange(seqs.ids.shape[1], device=scores.device) < seqs.length[:, None]
    context = torch.zeros(batch, vocab + 1, dtype=torch.bool, device=scores.device)
    context.scatter_(1, torch.where(known, seqs.ids, vocab), True)  # stale ids: dropped column
    drafted = torch.zeros(batch, n, vocab + 1, dtype=torch.bool, device=scores.device)
    tokens = tree.tokens[:, None, :].expand(batch, n, n)
    drafted.scatter_(2, torch.where(seen, tokens, vocab), True)
    return (context[:, None] | drafted)[..., :vocab]


def _per_prefix(own: list, scores: Tensor, tree: TokenTree, seen: Tensor, seqs: RowState) -> Tensor:
    """Any stateless processor, each row's own: nodes of a row at one depth have prefixes of one
    length."""
    out = scores.clone()
    for b, length in enumerate(seqs.length.tolist()):
        context = seqs.ids[b, :length]
        for depth in tree.depth[b].unique().tolist():
            nodes = (tree.depth[b] == depth).nonzero()[:, 0]
            paths = [tree.tokens[b, seen[b, i]][1:] for i in nodes.tolist()]  # root: in context
            prefix = torch.stack([torch.cat([context, path]) for path in paths])
            out[b, nodes] = own[b](prefix, scores[b, nodes].clone())
    return out


def _refuse_stateful(p, vocab_size: int) -> None:
    name = type(p).__name__
    if isinstance(p, _STATEFUL) or getattr(p, "stateful", False):
        raise InputError(
            f"logits processor {name} keeps a state from call to call; drafting would call it on "
            "tokens that are never emitted. Use plain decoding of transformers for it"
        )
    if isinstance(p, MinNewTokens) or type(p).__module__ == hf.__name__:
        return
    # A user's own class: equal calls must give equal results.
    ids = torch.zeros(1, 3, dtype=torch.long)
    scores = torch.linspace(-1, 1, vocab_size)[None]
    try:
        p(ids, scores.clone())  # some classes prepare themselves at the first call
        once, twice = p(ids, scores.clone()), p(ids, scores.clone())
    except Exception:
        return  # it wants other inputs than this probe's; its own error will tell
    if not torch.equal(once, twice):
        raise InputError(
            f"logits processor {name} gives different results for equal inputs; a processor must "
            "be stateless here (set `stateful = True` on it to state that it is not)"
        )
