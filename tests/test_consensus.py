"""Samples that draft for each other: their automaton against brute force, and the text."""

import itertools

import pytest
import torch
from models import Recorder, alone, path_to, prompts, settings, tiny
from test_draft_model import MODES
from test_head_drafter import make_head
from test_suffix import STRINGS, random_text

from redrafter.config import TreeConfig
from redrafter.contracts import InputError, RowState, Truth
from redrafter.decode.speculative import speculative
from redrafter.drafters.consensus import Consensus, SharedTexts
from redrafter.drafters.head import HeadDrafter
from redrafter.drafters.mixture import Mixture
from redrafter.drafters.selector import Selector
from redrafter.lookahead.confidence import ConfidenceLookahead

# ---------------------------------------------------------------- the automaton


def cases(count: int = 30):
    """(prompt, texts behind it), over 1 to 4 letters, grown in a random order."""
    for seed in range(count):
        letters = 1 + seed % 4
        prompt = random_text(seed % 6, letters, seed)
        texts = [random_text(4 + 3 * i, letters, 100 * seed + i) for i in range(1 + seed % 3)]
        if seed % 5 == 0:
            texts.append(texts[0][:-2])  # one that another has got past
        shared, left = SharedTexts(prompt, len(texts)), [list(t) for t in texts]
        random = torch.Generator().manual_seed(seed)
        while any(left):
            i = int(torch.randint(len(left), (), generator=random))
            if left[i]:
                shared.extend(i, left[i].pop(0))
        yield shared, prompt, texts


def voices(prompt: list[int], texts: list[list[int]], string: list[int]) -> int:
    """Bits of the texts in which a string ends, of the last one for the prompt; by looking."""
    bits, n = 0, len(string)
    for i, whole in enumerate([*(prompt + t for t in texts), prompt]):
        first = 0 if i == len(texts) else len(prompt)
        ends = range(max(n, first + 1), len(whole) + 1)
        bits |= any(whole[e - n : e] == string for e in ends) << i
    return bits


def substrings(prompt: list[int], texts: list[list[int]]) -> set[tuple[int, ...]]:
    wholes = [prompt + t for t in texts]
    return {tuple(w[a:b]) for w in wholes for a, b in itertools.combinations(range(len(w) + 1), 2)}


def test_every_substring_is_known_and_by_whom():
    for shared, prompt, texts in cases():
        strings = substrings(prompt, texts)
        for string in strings:
            state = 0
            for token in string:
                state = shared.next[state][token]
            assert shared.said_by[state] == voices(prompt, texts, list(string)) > 0
            for token in set(range(4)) - shared.next[state].keys():
                assert (*string, token) not in strings


def test_the_match_is_the_longest_suffix_that_something_followed():
    lengths = set()
    for shared, prompt, texts in cases():
        strings = substrings(prompt, texts)
        for i, text in enumerate(texts):
            whole = prompt + text
            followed = [
                n for n in range(len(whole) + 1)
                if any((*whole[len(whole) - n :], t) in strings for t in range(4))
            ]  # fmt: skip
            assert shared.match(i)[1] == max(followed)
            lengths.add(max(followed))
    assert lengths >= set(range(1, 9))


def test_what_more_siblings_said_comes_first():
    shared = SharedTexts([1, 2], 4)
    for i, text in enumerate([[3, 4, 5, 9], [3, 4, 6, 9], [3, 4, 5, 8], [3, 4]]):
        for token in text:
            shared.extend(i, token)
    assert shared.match(3)[1] == 4
    root, *found = shared.guesses(3, 9, 8, 1)
    # Two of three went on with 5, then one each with 9 and 8; then what one said, and then 9.
    assert [guess.token for guess in found] == [5, 6, 9, 8, 9]
    assert [guess.parent for guess in found] == [0, 0, 1, 1, 2]
    assert [guess.depth for guess in found] == [1, 1, 2, 2, 2]
    p = [torch.tensor(guess.log_q).exp().item() for guess in found]
    half, one = 3 + 1 + 3 / 4, 2 + 1 + 3 / 5
    assert p == pytest.approx([2 / half, 1 / half, 2 / half / one, 2 / half / one, 1 / half / 2.6])
    assert shared.guesses(3, 3, 8, 1) == [root, *found[:2]], "the best ones"
    assert shared.guesses(3, 9, 1, 1) == [root, *found[:2]], "no deeper"
    assert shared.guesses(3, 9, 8, 5) == [root], "the match is too short"
    # A row's own words have a voice, and the prompt has one, not one of every row.
    own = SharedTexts([7, 1, 7], 2)
    for token in (2, 7):
        own.extend(0, token)
    assert [(g.token, round(g.log_q, 4)) for g in own.guesses(0, 3, 1, 1)[1:]] == [
        (1, round(torch.tensor(1 / 6).log().item(), 4)),
        (2, round(torch.tensor(1 / 6).log().item(), 4)),
    ]


@pytest.mark.parametrize("name", STRINGS)
def test_operations_are_linear(name):
    """Per token of all texts: what one automaton takes, and two marks."""
    for n in (1000, 10_000):
        text = STRINGS[name](n)
        shared = SharedTexts(text[: n // 10], 4)
        turns = [text[n // 10 :], text[n // 5 :], text[: n // 2], text[::-1]]
        for tokens in itertools.zip_longest(*turns):
            for i, token in enumerate(tokens):
                if token is not None:
                    shared.extend(i, token)
        total = n // 10 + sum(map(len, turns))
        assert shared.operations <= 14 * total
        assert len(shared.next) <= 2 * total


# ---------------------------------------------------------------- the drafter


def family(n: int = 3) -> list[list[int]]:
    """Ragged prompts, samples of one not all side by side."""
    rows = [rows * 2 for rows in prompts((5, 3, 7))]
    return [*rows, *([rows[0]] * (n - 1)), *([rows[2]] * (n - 1))]


def known_texts(seqs: RowState, row: int) -> list[list[int]]:
    """What stands in the batch of a row's prompt at this moment."""

    def prompt(i: int) -> list[int]:
        return seqs.ids[i, : seqs.prompt_length[i]].tolist()

    same = [i for i in range(len(seqs.ids)) if prompt(i) == prompt(row)]
    return [seqs.ids[i, : seqs.length[i]].tolist() for i in same]


class Watched(Consensus):
    """Checks every tree against the texts that are known when it is drafted."""

    nodes = 0

    def tree(self):
        tree = super().tree()
        for row in range(len(tree.tokens)):
            texts = known_texts(self.seqs, row)
            own = self.seqs.ids[row, : self.seqs.length[row]].tolist()
            shared, i = self.texts[row]
            assert len(shared.ends) == 1 + len(texts), "every sibling, and no other"
            matched = shared.match(i)[1]
            for node in tree.valid[row].nonzero()[:, 0].tolist()[1:]:
                path = [tree.tokens[row, n].item() for n in path_to(tree, row, node)[1:]]
                string = own[len(own) - matched :] + path
                joined = [t[k : k + len(string)] for t in texts for k in range(len(t))]
                assert string in joined, "nobody has said that of this prompt"
                self.nodes += 1
        return tree

    def observe(self, truth: Truth) -> None:
        """What the automaton holds is the text so far, of every row, ended ones too."""
        super().observe(truth)
        for row, (shared, i) in self.texts.items():
            text = self.seqs.ids[row, : self.seqs.length[row]].tolist()
            state = 0
            for token in text:
                state = shared.next[state][token]
            assert state == shared.ends[i] and shared.longest[state] == len(text)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", ["llama", "mistral", "gemma3_text"])
def test_text_is_plain_decoding_of_the_row_alone(which, mode):
    target, rows, config = tiny(which), family(), settings(**MODES[mode])
    want = alone(target, rows, config)
    drafter = Watched(6, nodes=9)
    made = speculative(target, rows, config, seeds=range(len(rows)), drafter=drafter)
    assert (made.tokens, made.finish) == want
    assert drafter.nodes > 0
    if mode != "greedy":
        assert len({tuple(text) for text in made.tokens}) > 3, "samples of a prompt differ"


def test_ends_come_early_and_the_words_stay():
    """A row that has ended goes on drafting for its siblings, with its last step's tokens too."""
    target, row = tiny("llama"), prompts((6,))[0]
    config = settings(do_sample=True, temperature=0.6)
    want, finish = alone(target, [row] * 12, config, seeds=range(12))
    short, long = (f(range(12), key=lambda i: len(want[i])) for f in (min, max))
    assert finish[short] == "eos" and len(want[short]) < len(want[long]) - 5
    drafter = Watched(6)
    seeds = [short, long]
    made = speculative(target, [row] * 2, config, seeds=seeds, drafter=drafter)
    assert made.tokens == [want[short], want[long]]
    shared, i = drafter.texts[0]
    whole, state = row + want[short], 0
    for token in whole:
        state = shared.next[state][token]
    assert state == shared.ends[i] != shared.ends[1]


def test_a_sibling_ahead_is_followed_to_full_depth():
    """Two rows of one seed, one of which has been drafted for: the other copies it."""
    target, row = tiny("llama"), prompts((9,))[0]
    config = settings(do_sample=True, eos_token_id=-1, max_new_tokens=40)
    (text,), _ = alone(target, [row], config, seeds=[3])
    drafter = Consensus(8)
    seqs = RowState(
        torch.tensor([row + text, row + text]), torch.tensor([len(row) + 1, len(row) + 1]),
        torch.tensor([len(row)] * 2), torch.tensor([True, True]),
    )  # fmt: skip
    drafter.begin(seqs)
    drafter.observe(Truth(torch.tensor([[text[0]], [text[0]]]), torch.tensor([1, 1])))
    seqs.length = seqs.length + torch.tensor([20, 0])
    drafter.observe(Truth(torch.tensor([text[1:21]] * 2), torch.tensor([20, 0])))
    assert drafter._ended == [False, True]
    drafter._ended[1] = False  # it was only slow
    drafter.start()
    for level in range(1, 9):
        drafter.extend(level)
    tree = drafter.tree()
    chains = [
        [tree.tokens[1, n].item() for n in path_to(tree, 1, node)[1:]]
        for node in tree.valid[1].nonzero()[:, 0].tolist()
    ]
    assert text[1:9] in chains


def test_more_samples_are_drafted_better():
    target, row = tiny("llama"), prompts((9,))[0] * 2
    config = settings(do_sample=True, temperature=0.2, eos_token_id=-1, max_new_tokens=30)
    seeds = range(5)
    both = speculative(target, [row] * 5, config, seeds=seeds, drafter=Consensus(6))
    each = [
        speculative(target, [row], config, seeds=[s], drafter=Consensus(6)).stats for s in seeds
    ]
    assert both.stats.tokens_per_step > sum(s.tokens_per_step for s in each) / 5


def test_it_mixes_and_is_selected():
    target, rows, config = tiny("llama"), family(), settings(do_sample=True)
    want = alone(target, rows, config)
    torch.manual_seed(0)
    head = HeadDrafter(make_head(target, "own"), target, TreeConfig(4, 4))
    mixed = Mixture({"head": head, "consensus": Watched(8, 2)}, 17)
    clock = itertools.count().__next__
    chosen = Selector({"head": head, "consensus": Watched(8)}, clock=clock)
    stopped = ConfidenceLookahead.of(Consensus(), threshold=0.3)
    for drafter, lookahead in ((mixed, None), (chosen, None), (Consensus(), stopped)):
        recorder = Recorder(drafter)
        made = speculative(
            target, rows, config, seeds=range(len(rows)), drafter=recorder, lookahead=lookahead
        )
        assert (made.tokens, made.finish) == want
        assert made.stats.drafted_at[0] > 0
    assert mixed.members["consensus"].nodes > 0
    assert mixed.report()["consensus"]["judged_nodes"] > 0


@pytest.mark.parametrize("wrong", [dict(depth=0), dict(min_match=0), dict(nodes=1)])
def test_options_are_checked(wrong):
    with pytest.raises(InputError, match="must be"):
        Consensus(**wrong)
