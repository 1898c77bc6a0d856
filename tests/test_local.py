"""Local distillation: all positions at once say what each would say alone (float64)."""

import pytest
import torch
from models import CONTEXT, EOS, alone, prompts, settings, tiny
from transformers import GenerationConfig

from redrafter.contracts import InputError
from redrafter.data.local import continue_greedily

N = 5
# Windows: gemma3's 3 is shorter than a chain, mistral's 8 is shorter than the rows.
CASES = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {},
    "mistral": {},
    "gpt2": {},
    "mistral, window 2": {"sliding_window": 2},
}
ROWS = prompts()


def case(name):
    return tiny(name.split(",")[0], **CASES[name])


def everywhere(rows):
    return [[True] * len(row) for row in rows]


def reference(target, rows, wanted, n=N, eos=EOS, say=None):
    """One generation per position."""
    config = settings(max_new_tokens=n, eos_token_id=list(eos) or -1)
    result = []
    for row, flags in zip(rows, wanted, strict=True):
        want = torch.full((len(row), n), -1)
        for t, flag in enumerate(flags):
            if flag and t + 1 < (target.max_positions or len(row) + n):
                prefix = row[: t + 1]
                text = say(prefix) if say else alone(target, [prefix], config)[0][0]
                want[t, : len(text)] = torch.tensor(text)
        result.append(want)
    return result


def same(got, want):
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == torch.int64 and torch.equal(ours, theirs)


@pytest.mark.parametrize("name", CASES)
def test_equals_one_generation_per_position(name):
    target, wanted = case(name), everywhere(ROWS)
    want = reference(target, ROWS, wanted)
    said = torch.cat(want)
    assert len(said.unique(dim=0)) > len(said) / 2  # the chains differ from each other
    same(continue_greedily(target, ROWS, wanted, N, eos=set(EOS)), want)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("max_nodes", [1, 7, 20])
def test_chunks_change_nothing(name, max_nodes):
    """At 7 and 20 nodes the text is read in several stretches, and the chains in several chunks."""
    target, wanted = case(name), everywhere(ROWS)
    want = continue_greedily(target, ROWS, wanted, N, eos=set(EOS))
    got = continue_greedily(target, ROWS, wanted, N, eos=set(EOS), max_nodes=max_nodes)
    same(got, want)


def test_equals_transformers():
    target = case("llama")
    config = GenerationConfig(max_new_tokens=N, eos_token_id=list(EOS), pad_token_id=0)

    def say(prefix):
        ids = torch.tensor([prefix])
        made = target.model.generate(ids, config, attention_mask=torch.ones_like(ids))
        return made[0, len(prefix) :].tolist()

    want = reference(target, ROWS, everywhere(ROWS), say=say)
    same(continue_greedily(target, ROWS, everywhere(ROWS), N, eos=set(EOS)), want)


@pytest.mark.parametrize("name", CASES)
def test_a_row_depends_on_nothing_but_itself(name):
    """Neither on other rows, nor on their number, nor on which positions are wanted."""
    target, random = case(name), torch.Generator().manual_seed(3)
    whole = continue_greedily(target, ROWS, everywhere(ROWS), N, eos=set())
    for row, said in zip(ROWS, whole, strict=True):
        same(continue_greedily(target, [row], [[True] * len(row)], N, eos=set()), [said])
    wanted = [(torch.rand(len(row), generator=random) < 0.4).tolist() for row in ROWS]
    wanted[1] = [False] * len(ROWS[1])
    want = [
        said.masked_fill(~torch.tensor(flags)[:, None], -1)
        for said, flags in zip(whole, wanted, strict=True)
    ]
    assert all(0 < sum(flags) < len(flags) for flags in wanted[::2])
    for order in ([0, 1, 2, 3], [2, 0], [3, 1, 2]):
        picked = [ROWS[i] for i in order], [wanted[i] for i in order]
        for max_nodes in (256, 5):
            got = continue_greedily(target, *picked, N, eos=set(), max_nodes=max_nodes)
            same(got, [want[i] for i in order])


def test_eos_ends_a_chain_and_stays():
    target = case("llama")
    free = continue_greedily(target, ROWS, everywhere(ROWS), N, eos=set())
    # An EOS that these chains are sure to meet, and another that ends some of them twice.
    eos = set(torch.cat(free)[:, 2].unique()[:6].tolist())
    got = continue_greedily(target, ROWS, everywhere(ROWS), N, eos=eos)
    same(got, reference(target, ROWS, everywhere(ROWS), eos=eos))
    ends = set()
    for ours, theirs in zip(got, free, strict=True):
        for said, all_said in zip(ours.tolist(), theirs.tolist(), strict=True):
            end = next((i for i, token in enumerate(all_said) if token in eos), N)
            ends.add(end)
            assert said == all_said[: end + 1] + [-1] * (N - 1 - end)
    assert ends >= {0, 2, N}


def test_eos_of_the_target():
    target = case("llama")
    free = continue_greedily(target, ROWS, everywhere(ROWS), N)
    assert target.eos_token_ids == set() and bool((torch.cat(free) >= 0).all())
    eos = int(free[0][0, 1])
    target.model.generation_config.eos_token_id = eos
    try:
        same(
            continue_greedily(target, ROWS, everywhere(ROWS), N),
            continue_greedily(target, ROWS, everywhere(ROWS), N, eos={eos}),
        )
        assert continue_greedily(target, ROWS, everywhere(ROWS), N)[0][0, 2] == -1
    finally:
        target.model.generation_config.eos_token_id = None


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_to_the_end_of_the_context(name):
    """Position CONTEXT - 1 is the last that is said; gpt2 has no embedding for more."""
    target, rows = case(name), prompts((CONTEXT, CONTEXT - 2, 5, CONTEXT - 6))
    wanted = [[t >= len(row) - 8 for t in range(len(row))] for row in rows]
    for max_nodes in (256, 9):
        got = continue_greedily(target, rows, wanted, N, eos=set(), max_nodes=max_nodes)
        same(got, reference(target, rows, wanted, eos=()))
    for row, said in zip(rows, got, strict=True):
        t = torch.arange(len(row))[:, None]
        past = t + torch.arange(1, N + 1) >= CONTEXT
        assert torch.equal(said == -1, past | ~(t >= len(row) - 8))
    assert (got[0][-1] == -1).all() and (got[1][-1] == -1).tolist() == [False] * 2 + [True] * 3


def test_nothing_wanted():
    target = case("llama")
    none = continue_greedily(target, ROWS, [[False] * len(row) for row in ROWS], N)
    assert [tuple(said.shape) for said in none] == [(len(row), N) for row in ROWS]
    assert all(bool((said == -1).all()) for said in none)
    assert continue_greedily(target, [], [], N) == []
    empty, some = continue_greedily(target, [[], ROWS[1]], [[], [True] * 3], N)
    assert empty.shape == (0, N) and empty.dtype == torch.int64
    same([some], continue_greedily(target, [ROWS[1]], [[True] * 3], N))


def test_one_token_is_the_prediction_itself():
    target = case("llama")
    said = continue_greedily(target, ROWS, everywhere(ROWS), 1, eos=set())
    for row, ours in zip(ROWS, said, strict=True):
        logits = target.project(target.states(torch.tensor([row])))
        assert torch.equal(ours, logits[0].argmax(-1)[:, None])


@pytest.mark.parametrize("max_nodes", [256, 14, 1])
def test_forwards_are_few_and_bounded(max_nodes):
    """ceil(T / width) over the text and n - 1 per chunk of positions, however many positions."""
    target, rows = case("llama"), prompts((30, 40))
    calls = []
    handle = target.backbone.register_forward_hook(
        lambda module, args, kwargs, out: calls.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    try:
        continue_greedily(target, rows, everywhere(rows), N, max_nodes=max_nodes)
    finally:
        handle.remove()
    stretches = -(-40 // max(1, max_nodes // 2))
    assert len(calls) == stretches + (N - 1) * stretches
    assert all(rows == 2 and rows * nodes <= max(2, max_nodes) for rows, nodes in calls)


def test_bad_input_is_named():
    target, row = case("llama"), [1, 2, 3]
    for rows, wanted, n, message in (
        ([row], [], N, "1 rows, but `wanted` is given for 0"),
        ([row, row], [[True] * 3, [True]], N, "row 1 has 3 tokens, its `wanted` has 1"),
        ([row], [[True] * 3], 0, "n = 0 and max_nodes = 256 must be at least 1"),
        ([[1] * (CONTEXT + 1)], [[True] * (CONTEXT + 1)], N, f"the context of .* is {CONTEXT}"),
    ):
        with pytest.raises(InputError, match=message):
            continue_greedily(target, rows, wanted, n)
