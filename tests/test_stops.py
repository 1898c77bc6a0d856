"""When a row ends: judged token by token along the accepted path, whatever was drafted."""

import pytest
import torch
from models import (
    EOS,
    NEW,
    VOCAB,
    alone,
    endless,
    paired,
    prompts,
    replays,
    settings,
    tiny,
)
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.targets.model import Target

FREE = settings(eos_token_id=-1)


def check(target, rows, config, want, finish, texts, **more):
    """`plain` batched and every drafter end every row where `want` does."""
    got = plain(target, rows, config, seeds=range(len(rows)), **more)
    assert (got.tokens, got.finish) == (want, finish)
    for name, drafter in {**replays(texts), "none": None}.items():
        got = speculative(target, rows, config, seeds=range(len(rows)), drafter=drafter, **more)
        assert (got.tokens, got.finish) == (want, finish), name
        assert got.stats.emitted == [len(w) - 1 for w in want]
        assert [sum(steps) for steps in got.stats.lengths] == got.stats.emitted
        assert [len(steps) for steps in got.stats.lengths] == got.stats.steps
        assert sum(got.stats.accepted_at) <= sum(got.stats.emitted)


def cut(text: list[int], stops: set[int]) -> list[int]:
    ends = [i for i, token in enumerate(text) if token in stops]
    return text[: ends[0] + 1] if ends else text


@pytest.fixture(scope="module")
def free():
    """A target, prompts, what follows them where nothing stops it, and that with the prompts."""
    target, rows = tiny("llama"), prompts()
    return target, rows, alone(target, rows, FREE)[0], endless(target, rows, FREE)


def test_any_of_several_eos_ends_a_row(free):
    target, rows, text, texts = free
    for stops in ({text[0][6]}, {text[0][3], text[2][7], text[3][11]}, {text[1][0]}):
        want = [cut(t, stops) for t in text]
        finish = ["eos" if w[-1] in stops else "length" for w in want]
        assert "eos" in finish
        check(target, rows, settings(eos_token_id=sorted(stops)), want, finish, texts)
    one = settings(eos_token_id=text[0][6])  # not in a list
    assert plain(target, rows, one).tokens == [cut(t, {text[0][6]}) for t in text]


def test_the_models_own_eos_is_the_default(free):
    target, rows, text, _ = free
    eos = text[0][6]
    own = Target(target.model)
    before = own.model.generation_config
    own.model.generation_config = GenerationConfig(eos_token_id=[eos])
    try:
        want = [cut(t, {eos}) for t in text]
        assert plain(own, rows, GenerationConfig(max_new_tokens=NEW)).tokens == want
        assert plain(own, rows, FREE).tokens == text  # -1 switches it off
    finally:
        own.model.generation_config = before


def test_eos_on_the_last_allowed_token_is_eos(free):
    target, rows, text, texts = free
    stop = next(t for i, t in enumerate(text[0]) if i > 4 and t not in text[0][:i])
    n = text[0].index(stop) + 1
    config = settings(max_new_tokens=n, eos_token_id=stop)
    check(target, rows[:1], config, [text[0][:n]], ["eos"], texts[:1])


@pytest.mark.parametrize("n", range(1, 12))
def test_the_length_limit_cuts_any_path(free, n):
    target, rows, text, texts = free
    config = settings(max_new_tokens=n, eos_token_id=-1)
    check(target, rows, config, [t[:n] for t in text], ["length"] * 4, texts)


def test_max_length_counts_the_prompt(free):
    target, rows, text, texts = free
    longest = max(map(len, rows))
    config = settings(max_new_tokens=None, max_length=longest + 3, eos_token_id=-1)
    free_of_limit = alone(target, rows, settings(max_new_tokens=longest, eos_token_id=-1))[0]
    want = [t[: longest + 3 - len(r)] for t, r in zip(free_of_limit, rows, strict=True)]
    check(target, rows, config, want, ["length"] * 4, texts)
    # Where both are set, max_new_tokens is the one that counts, as in transformers.
    both = settings(max_new_tokens=4, max_length=longest + 9, eos_token_id=-1)
    assert plain(target, rows, both).tokens == [t[:4] for t in text]


@pytest.mark.parametrize("sampled", [False, True])
def test_min_new_tokens_hold_the_eos_back(sampled):
    target, rows = tiny("llama"), prompts()
    eos = list(range(0, VOCAB, 2))  # half of the vocabulary ends a row: it would end at once
    early, late = (
        settings(eos_token_id=eos, do_sample=sampled, min_new_tokens=n) for n in (None, 9)
    )
    assert min(len(t) for t in alone(target, rows, early)[0]) < 9
    want, finish = alone(target, rows, late)
    assert min(map(len, want)) > 9 and "eos" in finish
    assert all(t % 2 for w in want for t in w[:9])
    check(target, rows, late, want, finish, endless(target, rows, late))
    # An EOS that the vocabulary does not have holds nothing back and breaks nothing.
    foreign = settings(eos_token_id=[VOCAB + 7], min_new_tokens=4)
    assert plain(target, rows, foreign).tokens == alone(target, rows, FREE)[0]


class Ends(StoppingCriteria):
    """A user's own: stops when the sum of all tokens, prompt included, is divisible."""

    def __init__(self, by: int = 7):
        self.by = by

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.sum(1) % self.by == 0


class EndsAll(Ends):
    """As older ones do: one bool for the whole batch, which is a single row here."""

    def __call__(self, input_ids, scores, **kwargs):
        return bool(super().__call__(input_ids, scores).all())


@pytest.mark.parametrize("kind", [Ends, EndsAll])
def test_a_users_criterion_is_asked_after_every_token(free, kind):
    target, rows, text, texts = free
    criteria = StoppingCriteriaList([kind()])
    want = []
    for row, t in zip(rows, text, strict=True):
        ends = [n for n in range(1, NEW + 1) if sum(row + t[:n]) % 7 == 0]
        want.append(t[: ends[0]] if ends else t)
    lengths = {len(w) for w in want}
    assert len(lengths) > 2 and max(n for n in lengths if n < NEW) > 1
    finish = ["criteria" if sum(r + w) % 7 == 0 else "length"
              for r, w in zip(rows, want, strict=True)]  # fmt: skip
    check(target, rows, FREE, want, finish, texts, stopping_criteria=criteria)


LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGH"
SPELLED = [*LETTERS, *(a + b for a, b in zip("badcfehgjilknm", "abcdefghijklmn", strict=True))]


@pytest.fixture(scope="module")
def spoken():
    """A target whose tokens are one letter or two, so a stop string may begin inside a token."""
    assert len(SPELLED) == VOCAB
    pairs = [tuple(token) for token in SPELLED if len(token) == 2]
    raw = Tokenizer(BPE({token: i for i, token in enumerate(SPELLED)}, pairs))
    raw.decoder = Fuse()
    return Target(tiny("llama").model, PreTrainedTokenizerFast(tokenizer_object=raw))


def spell(tokens: list[int]) -> str:
    return "".join(SPELLED[t] for t in tokens)


def test_stop_strings(free, spoken):
    _, rows, text, texts = free
    across = spell(text[0][5:8])
    assert max(map(len, (SPELLED[t] for t in text[0][5:8]))) == 2
    long = next(t for t in text[3] if len(SPELLED[t]) == 2)
    inside = SPELLED[long][0]  # its token goes on after the string has ended
    for strings in ([across], [across[1:-1]], [across, inside], inside, "never"):
        config = settings(eos_token_id=-1, stop_strings=strings)
        listed = [strings] if isinstance(strings, str) else strings
        want = []
        for t in text:
            ends = [n for n in range(1, NEW + 1) if any(x in spell(t[:n]) for x in listed)]
            want.append(t[: ends[0]] if ends else t)
        assert (strings == "never") == (want == text)
        finish = ["stop_string" if w != t else "length" for w, t in zip(want, text, strict=True)]
        check(spoken, rows, config, want, finish, texts)


def test_an_eos_wins_over_a_stop_string_on_the_same_token(free, spoken):
    _, rows, text, texts = free
    stop = text[0][6]
    config = settings(eos_token_id=stop, stop_strings=[SPELLED[stop]])
    got = speculative(spoken, rows[:1], config, drafter=replays(texts[:1])["always"])
    assert got.finish == ["eos"] and got.tokens == [cut(text[0], {stop})]


class Tape(BaseStreamer):
    def __init__(self):
        self.chunks, self.ends = [], 0

    def put(self, value):
        assert not self.ends
        self.chunks.append(value.flatten().tolist())

    def end(self):
        self.ends += 1


def test_a_streamer_gets_every_token_once_and_in_order(free):
    target, rows, text, texts = free
    stop = text[0][8]
    config = settings(eos_token_id=stop)
    want = cut(text[0], {stop})
    for name, drafter in {**replays(texts[:1]), "none": None, "plain": None}.items():
        tape = Tape()
        decode = plain if name == "plain" else speculative
        got = decode(target, rows[:1], config, drafter=drafter, streamer=tape)
        assert got.tokens == [want]
        assert tape.chunks[0] == rows[0], "the prompt comes first, as from `generate`"
        assert tape.chunks[1:] == [[t] for t in want]
        assert tape.ends == 1


def test_text_streamer_prints_the_text(free, spoken, capsys):
    _, rows, text, texts = free
    streamer = TextStreamer(spoken.tokenizer, skip_prompt=True)
    drafter = replays(texts[:1])["often"]
    speculative(spoken, rows[:1], FREE, drafter=drafter, streamer=streamer)
    assert capsys.readouterr().out.strip() == spell(text[0])


@pytest.mark.parametrize(
    ("pad", "side", "kind"),
    paired([0, EOS[0], VOCAB - 1], ["left", "right"], [torch.long, torch.bool]),
)
def test_padding_is_known_by_the_mask_alone(pad, side, kind):
    """The pad id may be a real token, the EOS included, in prompts and in texts."""
    target, rows = tiny("llama"), prompts()
    rows[0][0] = rows[0][-1] = rows[1][1] = pad
    # Where a row starts or ends with the pad id, only the mask can tell.
    config = settings(pad_token_id=pad, eos_token_id=-1, do_sample=True, temperature=1.5)
    want, finish = alone(target, rows, config)
    if pad == 0:
        assert pad in {t for text in want for t in text}
    texts = endless(target, rows, config)
    width = max(map(len, rows)) + 2  # no row is without padding
    ids = torch.full((4, width), pad)
    mask = torch.zeros(4, width, dtype=kind)
    for b, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[b, where], mask[b, where] = torch.tensor(row), 1
    check(target, ids, config, want, finish, texts, attention_mask=mask)


def test_a_tensor_without_a_mask_has_no_padding(free):
    target, rows, text, _ = free
    assert plain(target, torch.tensor(rows[:1]), FREE).tokens == text[:1]


def test_rows_end_on_their_own(free):
    """A row that ended is not touched by the steps of the others."""
    target, rows, text, texts = free
    stop = text[0][2]
    got = speculative(target, rows, settings(eos_token_id=stop), drafter=replays(texts)["half"])
    want = [cut(t, {stop}) for t in text]
    assert got.tokens == want and len({len(w) for w in want}) > 1
    steps = dict(zip(map(len, want), got.stats.steps, strict=True))
    assert steps[3] < steps[NEW]
    assert got.stats.nodes_verified == sum(got.stats.steps) * replays(texts)["half"].max_nodes
