"""The processed scores at every node of a tree are transformers' own on that node's prefix."""

import pytest
import torch
from models import VOCAB, alone, endless, path_to, prompts, random_tree, replays, settings, tiny
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as hf

from redrafter.contracts import InputError, RowState
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.decode.tree import ancestors
from redrafter.decode.warp import Warp, build_processors, without_padding

SMALL = 7  # a vocabulary in which n-grams and bad words do occur
LENGTHS, PROMPTS = (9, 4, 12), (6, 4, 3)


class NoEcho(LogitsProcessor):
    """A user's own: forbids the token at twice the last one's place, weighs by the length."""

    def __call__(self, input_ids, scores):
        scores = scores + input_ids.shape[1] * torch.linspace(-0.01, 0.01, scores.shape[1])
        taboo = (2 * input_ids[:, -1:] + input_ids[:, :1]) % scores.shape[1]
        return scores.scatter(1, taboo, float("-inf"))


class Counts(LogitsProcessor):
    """Stateful: every call is another."""

    calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores + self.calls


class SaysSo(LogitsProcessor):
    stateful = True

    def __call__(self, input_ids, scores):
        return scores


def sequences() -> RowState:
    random = torch.Generator().manual_seed(3)
    # What lies past a row's length is stale and must not be read.
    ids = torch.randint(SMALL, (len(LENGTHS), 30), generator=random)
    length, prompt = torch.tensor(LENGTHS), torch.tensor(PROMPTS)
    return RowState(ids, length, prompt, torch.ones(len(LENGTHS), dtype=torch.bool))


def reference(warp: Warp, logits, tree, seqs):
    """`rows` at one node at a time, on a sequence that ends with that node's path."""
    out = torch.empty_like(logits)
    for b in range(len(logits)):
        for node in range(tree.n_nodes):
            path = [int(tree.tokens[b, i]) for i in path_to(tree, b, node)[1:]]
            prefix = seqs.ids[b, : int(seqs.length[b])].tolist() + path
            ids = torch.full((len(logits), 40), SMALL - 1)
            ids[b, : len(prefix)] = torch.tensor(prefix)
            lengths = seqs.length.clone()
            lengths[b] = len(prefix)
            one = RowState(ids, lengths, seqs.prompt_length, seqs.live)
            out[b, node] = warp.rows(logits[:, node], one)[b]
    return out


CONFIGS = {
    "nothing": {},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "reward": {"repetition_penalty": 0.6},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "no_repeat_trigram": {"no_repeat_ngram_size": 3},
    "bad_words": {"bad_words_ids": [[3], [1, 2], [4, 0, 5]]},
    "bad_words_with_eos": {"bad_words_ids": [[3], [2]]},  # transformers spares an EOS
    "sequence_bias": {"sequence_bias": [[[2], -3.0], [[0, 1], 2.5], [[5, 5, 1], 4.0]]},
    "min_new_tokens": {"min_new_tokens": 7},
    "min_length": {"min_length": 12},
    "suppress": {"suppress_tokens": [0, 6]},
    "remove_invalid": {"remove_invalid_values": True},
    "renormalize": {"renormalize_logits": True},
    "temperature": {"do_sample": True, "temperature": 0.7},
    "top_k": {"do_sample": True, "top_k": 3},
    "top_p": {"do_sample": True, "top_p": 0.6},
    "min_p": {"do_sample": True, "min_p": 0.2},
    "typical_p": {"do_sample": True, "typical_p": 0.5},
    "epsilon": {"do_sample": True, "epsilon_cutoff": 0.1},
    "eta": {"do_sample": True, "eta_cutoff": 0.1},
    "usual": {
        "do_sample": True, "temperature": 0.6, "top_k": 5, "top_p": 0.9, "min_p": 0.02,
        "repetition_penalty": 1.2,
    },
    "everything": {
        "do_sample": True, "temperature": 1.5, "top_k": 6, "top_p": 0.97, "min_p": 0.01,
        "typical_p": 0.95, "epsilon_cutoff": 0.001, "eta_cutoff": 0.001, "min_length": 12,
        "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "bad_words_ids": [[1, 2]],
        "sequence_bias": [[[0, 1], 2.5]], "suppress_tokens": [6], "renormalize_logits": True,
        "remove_invalid_values": True,
    },
}  # fmt: skip
EOS = {2, 5}


def processors(changes, extra=None) -> list:
    config = GenerationConfig(**changes)
    minimum = [
        max(config.min_new_tokens or 0, (config.min_length or 0) - length) for length in PROMPTS
    ]
    return build_processors(config, torch.tensor(minimum), EOS, extra)


def compare(steps: list, resolution: float | None = None) -> float:
    """Returns the share of the scores that the processors changed."""
    random = torch.Generator().manual_seed(5)
    seqs, warp = sequences(), Warp(steps, SMALL, len(LENGTHS))
    tree = random_tree(random, len(LENGTHS), 12, SMALL, valid=0.8)
    tree.tokens[:, 0] = seqs.root
    logits = 2 * torch.randn(len(LENGTHS), 12, SMALL, generator=random, dtype=torch.float64)
    if resolution:  # as in half precision, where equal logits are common
        logits = (logits / resolution).round() * resolution
    logits[0, 0, 3] = float("nan") if any("InfNan" in type(s).__name__ for s in steps) else 0.0
    before = logits.clone()
    got = warp.tree(logits, tree, ancestors(tree, 12), seqs)
    assert torch.equal(got, reference(warp, logits, tree, seqs))
    torch.testing.assert_close(logits, before, rtol=0, atol=0, equal_nan=True)  # not in place
    return float((got != before).double().mean())


@pytest.mark.parametrize("name", CONFIGS)
def test_tree_is_rows_at_every_node(name):
    steps = processors(CONFIGS[name])
    changed = compare(steps)
    assert (changed > 0) == (name != "nothing")


@pytest.mark.parametrize("name", CONFIGS)
def test_equal_logits_are_cut_alike(name):
    compare(processors(CONFIGS[name]), resolution=1.0)


def test_a_users_own_processor_sees_each_nodes_prefix():
    own = LogitsProcessorList([NoEcho()])
    assert compare(processors({}, own)) > 0.5
    assert compare(processors(CONFIGS["usual"], own)) > 0.5


def test_other_stateless_processors_of_transformers():
    steps = [
        hf.MinNewTokensLengthLogitsProcessor(4, 8, [2]),
        hf.ForcedEOSTokenLogitsProcessor(12, [5]),
        hf.TopHLogitsWarper(0.4),
        hf.RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=2),
    ]
    for step in steps:
        assert compare([step]) > 0
    compare(steps)


def test_a_length_for_every_row():
    """Each row has its own, as if it were alone; what a batch was padded with is not counted."""

    def penalty(length):
        return hf.RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=length)

    seqs, n = sequences(), len(LENGTHS)
    logits = torch.randn(n, SMALL, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([3, 0, 11])
    got = Warp([penalty(lengths)], SMALL, n).rows(logits, seqs)
    alone = [Warp([penalty(int(k))], SMALL, n).rows(logits, seqs)[b] for b, k in enumerate(lengths)]
    assert torch.equal(got, torch.stack(alone))
    assert compare([penalty(lengths)]) > 0
    padding = torch.tensor([2, 5, 0])
    unpadded = without_padding(penalty(lengths + padding), padding)
    assert torch.equal(Warp([unpadded], SMALL, n).rows(logits, seqs), got)
    # transformers counts the padding itself so: nothing of the rows is left out
    none = without_padding(penalty(padding), padding)
    everything = Warp([hf.RepetitionPenaltyLogitsProcessor(1.5)], SMALL, n).rows(logits, seqs)
    assert torch.equal(Warp([none], SMALL, n).rows(logits, seqs), everything)
    one = without_padding(hf.ForcedEOSTokenLogitsProcessor(14, [5]), padding)
    assert one.max_length.tolist() == [12, 9, 14] and compare([one]) > 0
    with pytest.raises(InputError, match=r"prompt_ignore_length.*batch of 2 rows"):
        Warp([penalty(lengths)], SMALL, 2)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_list_is_transformers_own(name):
    """Same processors, same order, and on one row the same scores as `generate` would use."""
    target = tiny("llama", vocab_size=SMALL)
    config = GenerationConfig(**{**CONFIGS[name], "eos_token_id": sorted(EOS)})
    config._eos_token_tensor = torch.tensor(sorted(EOS))
    own = LogitsProcessorList([NoEcho()])
    theirs = target.model._get_logits_processor(
        config, input_ids_seq_length=PROMPTS[0], logits_processor=own, device="cpu"
    )
    seqs = sequences()
    warp = Warp(processors(CONFIGS[name], own), SMALL, len(LENGTHS))
    logits = torch.randn(len(LENGTHS), SMALL, generator=torch.Generator().manual_seed(1))
    ids = seqs.ids[:1, : LENGTHS[0]]
    assert torch.equal(warp.rows(logits, seqs)[:1], theirs(ids, logits[:1].clone()))


def test_half_precision_is_warped_in_float32():
    seqs = sequences()
    logits = torch.randn(len(LENGTHS), SMALL).bfloat16()
    assert Warp([], SMALL, len(LENGTHS)).rows(logits, seqs).dtype == torch.float32


@pytest.mark.parametrize(
    "processor",
    [
        Counts(),
        SaysSo(),
        hf.PrefixConstrainedLogitsProcessor(lambda batch, ids: [1], 1),
        hf.EncoderRepetitionPenaltyLogitsProcessor(1.2, torch.zeros(1, 2).long()),
    ],
    ids=lambda p: type(p).__name__,
)
def test_a_stateful_processor_is_refused_by_name(processor):
    target = tiny("llama")
    for decode in (plain, speculative):
        with pytest.raises(InputError, match=type(processor).__name__):
            decode(target, prompts(), settings(), logits_processor=LogitsProcessorList([processor]))


PREFIXED = {
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[v] for v in range(0, VOCAB, 5)] + [[7, 8]]},
    "sequence_bias": {"sequence_bias": [[[v], 1.5] for v in range(0, VOCAB, 3)]},
    "min_new_tokens": {"min_new_tokens": 9, "do_sample": True, "temperature": 1.4},
    "min_length": {"min_length": 16},
    "own": {"do_sample": True, "temperature": 1.2},
}


@pytest.mark.parametrize("name", PREFIXED)
def test_decoding_with_processors_that_read_the_prefix(name):
    target, rows, seeds = tiny("llama"), prompts(), range(4)
    config = settings(**PREFIXED[name])
    own = LogitsProcessorList([NoEcho()] if name == "own" else [])
    want, finish = alone(target, rows, config, logits_processor=own)
    free, _ = alone(target, rows, settings(do_sample=config.do_sample, temperature=1.2))
    assert want != free  # the processors mattered
    texts = endless(target, rows, config, logits_processor=own)
    drafters = replays(texts)
    for drafter in (None, *(drafters[name] for name in ("half", "often", "chain"))):
        got = speculative(target, rows, config, seeds=seeds, drafter=drafter, logits_processor=own)
        assert (got.tokens, got.finish) == (want, finish)
