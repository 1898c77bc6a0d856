"""A second model as drafter: the text is plain decoding's, and its cache is never wrong."""

from types import SimpleNamespace

import pytest
import torch
from models import (
    CONTEXT,
    NEW,
    VOCAB,
    RandomLookahead,
    Recorder,
    alone,
    endless,
    paired,
    path_to,
    prompts,
    settings,
    shared,
    tiny,
)
from transformers import DynamicCache

from redrafter.contracts import Drafter, InputError, RowState, TokenTree
from redrafter.decode.noise import gumbel
from redrafter.decode.speculative import speculative
from redrafter.drafters.model import DraftModel
from redrafter.drafters.replay import ReplayDrafter
from redrafter.targets.fused import choose_forward
from redrafter.targets.model import Target

DEPTH = 4
SMALL = dict(num_hidden_layers=1, hidden_size=16, num_attention_heads=2)
MODES = {
    "greedy": {},
    "t0.7": dict(do_sample=True, temperature=0.7),
    "t1.5": dict(do_sample=True, temperature=1.5),
}
BOTH = ("greedy", "t1.5")  # another temperature takes no other way through the code
DRAFTS = {
    "llama": lambda: tiny("llama", **SMALL, num_key_value_heads=1),
    "gpt2": lambda: tiny("gpt2"),
    "window": lambda: tiny("mistral", sliding_window=3),  # shorter than a drafted path
    "mixed windows": lambda: tiny("gemma3_text"),
    "itself": lambda: tiny("llama"),
}
FREE = dict(eos_token_id=-1)


def check(target, rows, config, drafter, **more):
    """Batched, and the last row alone, the texts are those of `plain` alone."""
    seeds = list(range(len(rows)))
    want, finish = alone(target, rows, config, seeds)
    for part in (slice(0, None), slice(-1, None)):
        got = speculative(target, rows[part], config, seeds=seeds[part], drafter=drafter, **more)
        assert (got.tokens, got.finish) == (want[part], finish[part])
    return want


@shared
def close_draft(target: Target, noise: float = 0.05) -> Target:
    """A model that agrees with the target often, not always; everybody's, as `tiny` is."""
    torch.manual_seed(2)
    other = type(target.model)(target.model.config).double()
    other.load_state_dict(target.model.state_dict())
    with torch.no_grad():
        for p in other.parameters():
            p.add_(noise * p.std() * torch.randn_like(p))
    made = Target(other)
    choose_forward(made, "auto", lambda _: None)  # as users draft
    return made


@pytest.mark.parametrize(("draft", "mode", "width"), paired(DRAFTS, BOTH, (1, 3)))
def test_text_is_plain_decoding(draft, mode, width):
    target = tiny("llama")
    check(target, prompts(), settings(**MODES[mode]), DraftModel(
        DRAFTS[draft](), target, DEPTH, width
    ))  # fmt: skip


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("options", [{"seeded": False}, {"temperature": 0.4}])
def test_options_change_the_draft_alone(options, width):
    target = tiny("llama")
    draft = DraftModel(close_draft(target), target, DEPTH, width, **options)
    check(target, prompts(), settings(**MODES["t1.5"]), draft)


@pytest.mark.parametrize("mode", BOTH)
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3_text"])
def test_the_target_drafting_for_itself_is_always_right(family, mode):
    """Rows of different lengths, windows, noise: any slip of the bookkeeping shows here.

    A chain only: a tree keeps the likeliest paths, and the target's may not be among them.
    """
    target, rows = tiny(family), prompts()
    config = settings(**MODES[mode], **FREE, max_new_tokens=1 + 4 * (DEPTH + 1))
    draft = DraftModel(target, target, DEPTH)
    got = speculative(target, rows, config, seeds=[0, 1, 2, 3], drafter=draft)
    assert got.tokens == alone(target, rows, config)[0]
    assert got.stats.accepted_at == got.stats.drafted_at == [16] * DEPTH
    assert got.stats.steps == [4] * 4 and got.stats.tokens_per_step == DEPTH + 1


def keys_of(draft: Target, text: list[int]) -> list[torch.Tensor]:
    """Per layer (heads, T, d), by transformers' own cache."""
    cache = DynamicCache()
    with torch.inference_mode():
        draft.model(input_ids=torch.tensor([text]), past_key_values=cache)
    return [layer.keys[0] for layer in cache.layers]


@pytest.mark.parametrize(("noise", "mode", "width"), paired((0.0, 0.02, 0.1), BOTH, (1, 3)))
def test_cached_keys_are_those_of_a_fresh_forward(noise, mode, width):
    target, rows = tiny("llama"), prompts()
    drafter = DraftModel(close_draft(target, noise), target, DEPTH, width)
    seen = Recorder(drafter)
    for n_tokens in (2, 9, NEW):
        config = settings(**MODES[mode], **FREE, max_new_tokens=n_tokens)
        got = speculative(
            target, rows, config, seeds=range(4), drafter=seen, lookahead=RandomLookahead(4, 5)
        )
        for b, row in enumerate(rows):
            known = int(drafter.frontier._known[b])
            assert known > len(row)
            fresh = keys_of(drafter.draft, (row + got.tokens[b])[:known])
            for layer, want in enumerate(fresh):
                keys = drafter.frontier._cache._views[layer][0][b, :, :known]
                torch.testing.assert_close(keys, want, rtol=0, atol=1e-10)


def test_accepted_lengths_vary():
    """The cases above include rows that accept nothing, something and everything, side by side."""
    target, rows = tiny("llama"), prompts()
    counts, mixed = set(), False
    for width in (1, 3):
        seen = Recorder(DraftModel(close_draft(target, 0.1), target, DEPTH, width))
        speculative(target, rows, settings(**FREE, max_new_tokens=40), drafter=seen)
        for _, truth, _, _ in seen.steps:
            row = {n for n in truth.count.tolist() if n}
            counts |= row
            mixed |= DEPTH + 1 in row and len(row) > 1
    assert counts == set(range(1, DEPTH + 2)) and mixed


@pytest.mark.parametrize("width", [1, 3])
def test_forwards_per_step(width, monkeypatch):
    """One a level, after the prompt's own; a step reads one token, or two after full acceptance."""
    target = tiny("llama")
    same = DraftModel(close_draft(target, 0.0), target, DEPTH, width)
    sizes, forward = [], same.draft.forward

    def counted(tokens, *args, **kwargs):
        sizes.append(tokens.shape[1])
        return forward(tokens, *args, **kwargs)

    monkeypatch.setattr(same.draft, "forward", counted)
    rows = prompts()
    config = settings(**FREE, max_new_tokens=1 + 2 * (DEPTH + 1))
    speculative(target, rows, config, drafter=same)
    later = [width] * (DEPTH - 1)
    first, *sizes = sizes
    assert first == max(map(len, rows))
    assert sizes[0] == 1 and sizes[1:DEPTH] == later
    reads, n_steps = sizes[::DEPTH], len(sizes) // DEPTH
    assert sizes == [size for read in reads for size in (read, *later)]
    assert set(reads) == {1, 2}
    # A chain of the target's own is always accepted, and so all but the first lack one token more.
    assert width > 1 or (reads == [1, 2] and n_steps == 2)


class Idle(Drafter):
    """Another drafter makes two steps of three; the model is not even asked."""

    def __init__(self, model: Drafter, other: Drafter):
        self.parts, self.turn = (model, other), 0
        self.max_depth, self.max_nodes = model.max_depth, max(model.max_nodes, other.max_nodes)

    def begin(self, seqs: RowState) -> None:
        for part in self.parts:
            part.begin(seqs)

    def start(self) -> None:
        self.turn += 1
        self.active = self.parts[self.turn % 3 > 0]
        self.active.start()

    def extend(self, level: int):
        return self.active.extend(level)

    def tree(self) -> TokenTree:
        return self.active.tree()


@pytest.mark.parametrize("width", [1, 3])
def test_an_idle_model_catches_up(width):
    target, rows = tiny("llama"), prompts()
    config = settings(**FREE, max_new_tokens=31)
    texts = [text + [1] * NEW for text in endless(target, rows, config)]
    model = DraftModel(close_draft(target, 0.1), target, DEPTH, width)
    other = ReplayDrafter(texts, VOCAB, DEPTH, 2, 0.6)
    got = speculative(target, rows, config, drafter=Recorder(Idle(model, other)))
    assert got.tokens == alone(target, rows, config)[0]
    for b, row in enumerate(rows):
        known = int(model.frontier._known[b])
        fresh = keys_of(model.draft, (row + got.tokens[b])[:known])
        keys = model.frontier._cache._views[1][0][b, :, :known]
        torch.testing.assert_close(keys, fresh[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@torch.inference_mode()
def test_levels_are_the_best_of_all_children(family, seeded):
    """Against a slow search that runs the draft model over every path anew."""
    target, draft, width, temperature = tiny("llama"), tiny(family), 3, 0.7
    ids = torch.randint(VOCAB, (2, 30), generator=torch.Generator().manual_seed(0))
    length = torch.tensor([5, 8])
    noise = gumbel(torch.tensor([7, 8]), length[:, None] + torch.arange(DEPTH + 1), VOCAB)
    live = torch.ones(2, dtype=torch.bool)
    drafter = DraftModel(draft, target, DEPTH, width, seeded=seeded)
    drafter.begin(RowState(ids, length, length - 1, live, noise, temperature))
    drafter.start()
    for level in range(1, DEPTH + 1):
        drafter.extend(level)
    tree = drafter.tree()
    for row, n in enumerate(length.tolist()):
        beams = [((), 0.0)]
        for depth in range(1, DEPTH + 1):
            children = []
            for path, total in beams:
                text = torch.tensor([ids[row, :n].tolist() + list(path)])
                scores = draft.project(draft.states(text))[0, -1] / temperature
                log_q = (scores + noise[row, depth - 1] * seeded).log_softmax(-1)
                children += [((*path, v), total + float(log_q[v])) for v in range(VOCAB)]
            beams = sorted(children, key=lambda child: -child[1])[:width]
            nodes = (tree.depth[row] == depth).nonzero()[:, 0].tolist()
            found = {
                tuple(tree.tokens[row, path_to(tree, row, i)[1:]].tolist()):
                float(tree.log_q[row, i]) for i in nodes
            }  # fmt: skip
            assert found == pytest.approx(dict(beams), abs=1e-9)


# ------------------------------------------------------------------------------ what differs


def named(family, vocab, name, **changes):
    target = tiny(family, **changes)
    tokenizer = SimpleNamespace(get_vocab=lambda: vocab)
    return Target(target.model, tokenizer, name)


def test_another_vocabulary_is_shown():
    vocab = {f"t{i}": i for i in range(VOCAB)}
    other = {**{k: i for k, i in vocab.items() if i not in (3, 7)}, "sea": 3, "<end>": VOCAB}
    target = named("llama", vocab, "large")
    with pytest.raises(InputError) as error:
        DraftModel(named("gpt2", other, "little"), target)
    message = str(error.value)
    for part in (
        "little", "large", f"{VOCAB} and {VOCAB} tokens", "3 ids differ",
        "3: 'sea' / 't3', 7: none / 't7', 48: '<end>' / none",
    ):  # fmt: skip
        assert part in message
    with pytest.raises(InputError, match="lm_heads have 40 and 48 ids"):
        DraftModel(tiny("gpt2", vocab_size=40), tiny("llama"))


@pytest.mark.parametrize("sizes", [(VOCAB, VOCAB + 16), (VOCAB + 16, VOCAB)])
@pytest.mark.parametrize("mode", ["greedy", "t1.5"])
def test_padded_heads(sizes, mode):
    """Tokens are equal, one lm_head is padded: ids of the padding are never drafted."""
    vocab = {f"t{i}": i for i in range(VOCAB)}
    target = named("llama", vocab, "large", vocab_size=sizes[0])
    draft = named("gpt2", vocab, "little", vocab_size=sizes[1])
    for width in (1, 3):
        seen = Recorder(DraftModel(draft, target, DEPTH, width))
        check(target, prompts(), settings(**MODES[mode]), seen)
        assert seen.steps and max(int(t.tokens[:, 1:].max()) for t, *_ in seen.steps) < VOCAB


@pytest.mark.parametrize(
    ("family", "mode", "width"), paired(("llama", "gpt2"), ("greedy", "t0.7"), (1, 3))
)
def test_a_shorter_context_ends_the_drafting(family, mode, width):
    """Prompts beyond it, rows that grow past it, rows that stay inside, in one batch."""
    context = 24
    short = dict(max_position_embeddings=context)
    short |= dict(n_positions=context) if family == "gpt2" else {}
    target, draft = tiny("llama"), tiny(family, **short)
    assert draft.max_positions == context < CONTEXT
    rows = prompts((context - 8, 3, context + 5, context, context - 1, context - 2, context - 3))
    config = settings(**MODES[mode], **FREE)
    seen = Recorder(DraftModel(draft, target, DEPTH, width))
    check(target, rows, config, seen)
    check(target, rows[2:3], config, seen)
    seen.steps.clear()
    speculative(target, rows, config, drafter=seen)
    met = set()
    for tree, _, lengths, live in seen.steps:
        for b, length in enumerate(lengths):
            # The token at position `length` is said by the one before it.
            room, left = context + 1 - length, len(rows[b]) + NEW - length
            drafted = int(torch.where(tree.valid[b], tree.depth[b], 0).max())
            if live[b]:
                assert drafted == max(0, min(DEPTH, room, left))
                met.add(drafted if room < left else "limit")
    assert met == {*range(DEPTH + 1), "limit"}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"depth": 0}, "depth 0"), ({"width": 0}, "width 0"), ({"temperature": 0.0}, "seeded")],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        DraftModel(tiny("gpt2"), tiny("llama"), **options)
