"""`redrafter.generate`: every drafter by its name, every kind of prompt, and what it refuses."""

import ast
import copy
import inspect

import pytest
import torch
from launching import run_copy
from models import alone, prompts, settings, tiny
from test_build import EXAMPLES
from test_build import resources as resources  # the fixture
from test_text import TEMPLATE, sentencepiece_like
from transformers import BatchEncoding, GenerationConfig, TextStreamer

import redrafter
from redrafter import TextStream, generate, load_strategy
from redrafter.config import TreeConfig
from redrafter.contracts import InputError
from redrafter.decode import request, warp
from redrafter.decode.plain import plain
from redrafter.decode.speculative import speculative
from redrafter.drafters.bigram import save_bigrams
from redrafter.drafters.build import DRAFTERS
from redrafter.drafters.options import parse_name
from redrafter.drafters.suffix import SuffixDrafter
from redrafter.drafting import LOOKAHEADS, Strategy
from redrafter.heads.recurrent import RecurrentHead
from redrafter.lookahead.static import StaticLookahead
from redrafter.targets.model import Target

LOOKS = {
    "static": "static(depth=2)", "exit": "exit(threshold=0.4)", "heuristic": "heuristic",
    "confidence": "confidence", "roc": "roc", "oracle": "oracle",
}  # fmt: skip
FREE = dict(eos_token_id=-1, max_new_tokens=12)


@pytest.fixture(scope="module")
def told() -> Target:
    """A tiny target that reads text."""
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(3)
    return Target(copy.deepcopy(tiny("llama").model), tokenizer, name="told")


def wanted(rows, temperature=0.0, seeds=None) -> list[list[int]]:
    sampled = {"do_sample": True, "temperature": temperature} if temperature else {}
    return alone(tiny("llama"), rows, GenerationConfig(**FREE, **sampled), seeds)[0]


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_drafter_goes_by_its_name(name, resources):
    for temperature in (0.0, 1.0):
        made = generate(
            tiny("llama"), prompts(), draft=name, resources=resources, temperature=temperature,
            seeds=range(4), **FREE,
        )  # fmt: skip
        assert made.tokens == wanted(prompts(), temperature, seeds=range(4))


def test_every_kind_is_among_them():
    assert {parse_name(name).kind for name in EXAMPLES} == set(DRAFTERS)


@pytest.mark.parametrize("look", LOOKS)
def test_lookaheads_and_rules_stand_in_the_name(look, resources):
    any_drafter = ("model:1x3", "suffix:6x1", "multi:children=[2,2]:rule=ratio")
    fits = {"exit": ("skip:3",), "confidence": ("model:1x3",), "roc": ("model:1x3",),
            "oracle": any_drafter[:2]}  # fmt: skip
    for name in fits.get(look, any_drafter):
        name = f"{name}:lookahead={LOOKS[look]}"
        made = generate(tiny("llama"), prompts(), draft=name, resources=resources, **FREE)
        assert made.tokens == wanted(prompts())


def test_every_lookahead_is_among_them():
    assert set(LOOKS) == set(LOOKAHEADS) - {"disco"}, "disco needs a file: see its own page"


def test_what_knows_the_answer_is_told_it():
    made = generate(tiny("llama"), prompts(), draft="replay:1x4", **FREE)
    assert made.tokens == wanted(prompts())
    assert made.stats.lengths == [[5, 5, 1]] * 4, "all that it drafts is right"


def test_what_a_budget_needs_is_measured():
    head = RecurrentHead.for_target(tiny("llama"))
    strategy = load_strategy(tiny("llama"), "head:2x2:budget=true", head=head)
    assert strategy.drafter.budget is not None
    assert generate(tiny("llama"), prompts(), draft=strategy, **FREE).tokens == wanted(prompts())


def test_nothing_drafts_by_any_of_its_names():
    for draft in (None, "plain"):
        made = generate(tiny("llama"), prompts(), draft=draft, **FREE)
        assert made.tokens == wanted(prompts())
        assert "drafter" not in made.extra
    assert load_strategy(tiny("llama")) is load_strategy(tiny("llama"), "plain") is None


def test_a_head_alone_drafts_with_its_tree(tmp_path):
    head = RecurrentHead.for_target(tiny("llama"))
    made = generate(tiny("llama"), prompts(), head, tree=TreeConfig(2, 3), **FREE)
    assert made.tokens == wanted(prompts())
    assert len(made.stats.drafted_at) == 3
    assert load_strategy(tiny("llama"), head=head).drafter.max_depth == TreeConfig.depth
    named = load_strategy(tiny("llama"), "head", head=head, tree=TreeConfig(2, 3)).drafter
    assert (named.width, named.max_depth) == (2, 3)


def test_objects_draft_too():
    drafter = SuffixDrafter(6, 1)
    strategy = Strategy(drafter, lookahead=StaticLookahead(2))
    for draft in (drafter, strategy):
        made = generate(tiny("llama"), prompts(), draft=draft, **FREE)
        assert made.tokens == wanted(prompts())
    assert len([n for n in made.stats.drafted_at if n]) <= 2


def test_resources_may_be_paths(resources, tmp_path):
    table = tmp_path / "bigrams.safetensors"
    save_bigrams(table, resources.bigrams, {"kind": "bigrams"})
    made = generate(tiny("llama"), prompts(), draft="bigram:2x3", bigrams=table, **FREE)
    assert made.tokens == wanted(prompts())
    with pytest.raises(InputError, match="bigrams: a int is neither"):
        generate(tiny("llama"), prompts(), draft="bigram:2x3", bigrams=3)
    with pytest.raises(InputError, match="head: 'nowhere' does not exist"):
        generate(tiny("llama"), prompts(), head="nowhere")


@pytest.mark.parametrize(
    ("draft", "said"),
    [
        ("hed:4x4", "draft: 'hed:4x4' is unknown; choose from head"),
        ("head:4x4", "draft: 'head:4x4' needs head=..., the folder"),
        ("mix(suffix,model:1x2)", r"needs draft_model=\.\.\., a smaller model"),
        ("bigram:4x4", "needs bigrams="),
        ("ngrammys:4x2", "needs probed="),
        ("suffix:reference=true", "needs reference="),
        ("suffix:dept=3", "draft: .*no option 'dept'"),
        ("suffix:lookahead=disc", "lookahead 'disc' is not one of"),
        ("stock", "'stock' is unknown"),
        (4, "draft: a int is neither"),
    ],
)
def test_names_that_cannot_draft(draft, said):
    with pytest.raises(InputError, match=said):
        generate(tiny("llama"), prompts(), draft=draft, **FREE)


def test_an_object_takes_no_resources():
    with pytest.raises(InputError, match="tree: for names"):
        generate(tiny("llama"), [1], draft=SuffixDrafter(), tree=TreeConfig())


# ---------------------------------------------------------------- samples


@pytest.mark.parametrize("draft", ["plain", "consensus", "replay:1x4", "suffix:6x1"])
def test_samples_are_what_each_is_alone(draft):
    """So whatever is made of them, a majority's answer say, is what it was."""
    rows, target = prompts((9, 3, 14)), tiny("llama")
    options = dict(draft=draft, temperature=0.7, samples_per_prompt=4, **FREE)
    of_rows = {
        5: [5, 6, 7, 8] * 3,  # one for all prompts,
        (5, 90, 7): [5, 6, 7, 8, 90, 91, 92, 93, 7, 8, 9, 10],  # one for each,
        tuple(range(20, 32)): range(20, 32),  # or one for every row
    }
    for seeds, each in of_rows.items():
        made = generate(target, rows, seeds=seeds, **options)
        repeated = [row for row in rows for _ in range(4)]
        for row, seed, tokens in zip(repeated, each, made.tokens, strict=True):
            assert [tokens] == wanted([row], 0.7, seeds=[seed])
        assert len({tuple(text) for text in made.tokens}) > 3, "samples of a prompt differ"
    greedy = generate(target, rows, **{**options, "temperature": 0.0}).tokens
    assert greedy == [text for text in wanted(rows) for _ in range(4)]


def test_samples_have_their_prompts_texts(told):
    made = generate(told, ["a b c", "c a"], temperature=1, samples_per_prompt=2, **FREE)
    for i, text in enumerate(["a b c", "a b c", "c a", "c a"]):
        same = generate(told, text, temperature=1, seeds=i % 2, **FREE)
        assert same.extra["texts"] == made.extra["texts"][i : i + 1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"samples_per_prompt": 0}, "samples_per_prompt: 0 is not a whole number above 0"),
        ({"samples_per_prompt": 1.5}, "samples_per_prompt: 1.5 is not a whole number"),
        ({"num_return_sequences": 4}, "num_return_sequences: it is called samples_per_prompt"),
        ({"samples_per_prompt": 4, "seeds": [1, 2, 3]}, "3 given for 2 prompts of 4 samples; give"),
        ({"samples_per_prompt": 4, "seeds": ["a", "b"]}, "neither an integer nor one for each"),
        ({"samples_per_prompt": 4, "seeds": 0.5}, "0.5 is neither an integer"),
        ({"samples_per_prompt": 2, "seeds": 2**63 - 1}, "is not a signed 64-bit integer"),
    ],
)
def test_samples_that_cannot_be(given, said):
    with pytest.raises(InputError, match=said):
        generate(tiny("llama"), prompts((3, 4)), temperature=1, **given, **FREE)


# ---------------------------------------------------------------- prompts


def test_token_ids_come_as_lists_tensors_or_a_tokenizers_own(told):
    target, (row, other) = tiny("llama"), prompts((4, 6))
    expected = wanted([row])
    same = [row, [row], torch.tensor(row), torch.tensor([row]), tuple(row)]
    same += [BatchEncoding({"input_ids": row}), {"input_ids": [row], "attention_mask": [[1] * 4]}]
    same.append({"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, 4).long()})
    same.append(torch.tensor([row]).numpy())
    for given in same:
        assert generate(target, given, **FREE).tokens == expected
    padded = torch.tensor([[0, 0, *row], other])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    encoding = BatchEncoding({"input_ids": padded, "attention_mask": mask})
    assert generate(target, encoding, **FREE).tokens == wanted([row, other])
    assert speculative(target, encoding, GenerationConfig(**FREE)).tokens == wanted([row, other])
    told.tokenizer.pad_token = "</s>"
    for options in ({}, {"padding": True}, {"padding": True, "return_tensors": "pt"}):
        texts = ["a b c", "a"] if options else ["a b c"]
        encoded = told.tokenizer(texts, **options)
        assert generate(told, encoded, **FREE).tokens == generate(told, texts, **FREE).tokens


def test_text_is_text_in_and_out(told):
    one, two = "a b c", "c a"
    made = generate(told, [one, two], **FREE)
    rows = [told.tokenizer(text).input_ids for text in (one, two)]
    assert made.tokens == plain(told, rows, GenerationConfig(**FREE)).tokens
    for row, tokens, text in zip(rows, made.tokens, made.extra["texts"], strict=True):
        whole = told.tokenizer.decode([*row, *tokens], skip_special_tokens=True)
        assert whole == told.tokenizer.decode(row, skip_special_tokens=True) + text
    assert generate(told, one, **FREE).extra["texts"] == made.extra["texts"][:1]
    assert "texts" not in generate(tiny("llama"), [1, 2], **FREE).extra, "no tokenizer"


def test_rendered_text_has_its_bos_once(told):
    chat = [{"role": "user", "content": "a b"}]
    rendered = told.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = told.tokenizer(rendered, add_special_tokens=False).input_ids
    assert told.tokenizer(rendered).input_ids == [1, *ids], "doubled, were it encoded as it is"
    expected = plain(told, [ids], GenerationConfig(**FREE)).tokens
    for given in ({"prompt": rendered}, {"prompt": chat}, {"messages": chat},
                  {"messages": [chat]}):  # fmt: skip
        assert generate(told, **given, **FREE).tokens == expected
    two = [chat, [*chat, {"role": "assistant", "content": "c"}, *chat]]
    made = generate(told, messages=two, **FREE).tokens
    assert len(made) == 2 and made[0] == expected[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give prompt .* or messages"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "one of the two"),
        ({"messages": "a"}, "messages: neither"),
        ({"messages": []}, "messages: neither"),
        ({"messages": [{"role": "user"}]}, r"conversation 1\): message 1 needs"),
        ({"messages": [{"role": "user", "content": "a"}, "b"]}, "message 2 needs .* but is 'b'"),
        ({"messages": [{"role": "usr", "content": "a"}]}, "unknown role 'usr'"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "assistant spoke last"),
        ({"prompt": ["a", [1]]}, "prompt 0 is 'a', no row of token ids"),
        ({"prompt": [[1], ["a"]]}, r"prompt 1 is .*no row of token ids"),
        ({"prompt": [1.5]}, "no row of token ids"),
        ({"prompt": torch.tensor([[1.5]])}, "no row of token ids"),
        ({"prompt": {"ids": [1]}}, "no input_ids among 'ids'"),
        ({"prompt": 3}, "a int is neither text"),
        ({"prompt": []}, "no prompts were given"),
        ({"prompt": [[]]}, "prompt 0 is empty"),
    ],
)
def test_prompts_that_are_none(told, given, said):
    with pytest.raises(InputError, match=said):
        generate(told, **given, **FREE)


def test_text_needs_a_tokenizer():
    with pytest.raises(InputError, match="prompt is text, and Llama"):
        generate(tiny("llama"), "a")


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temprature": 1}, "temprature: generate has no such argument; did you mean 'temperat"),
        ({"max_tokens": 5}, "did you mean 'max_new_tokens'"),
        ({"drafter": "suffix:16x1"}, "did you mean 'draft'"),
        ({"topp": 0.9}, "did you mean 'top_p'"),
        ({"nonsense": 0.9}, "nonsense: generate has no such argument$"),
        ({"texts": "a"}, "texts: it is called prompt"),
        ({"do_sample": True}, "temperature says it"),
        ({"max_length": 9}, "give max_new_tokens"),
        ({"lookahead": "static"}, "write it into the name"),
        ({"partners": None}, "partners: they are called resources now"),
        ({"output_scores": True}, "output_scores: nothing here reads it"),
        ({"num_beams": 4}, "num_beams=4 is not supported"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 is not a whole number above 0"),
        ({"max_new_tokens": "5"}, "max_new_tokens: '5'"),
        ({"temperature": -1}, "temperature: -1"),
        ({"temperature": "hot"}, "temperature: 'hot'"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"temperature": 1, "seeds": "one"}, "seeds: 'one' is neither"),
        ({"temperature": 1, "seeds": [0, 1]}, "seeds: 2 given for 1 prompts"),
        ({"temperature": 1.0, "top_k": "x"}, "generation_config: .*top_k"),
    ],
)
def test_options_that_nobody_reads_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        generate(tiny("llama"), [1, 2], **options)


def test_names_of_earlier_versions_say_what_they_are_called_now():
    names = [("load_plan", "load_strategy"), ("Partners", "Resources")]
    for name, now in (*names, ("RecurrentDrafter", "HeadDrafter")):
        with pytest.raises(AttributeError, match=f"'{name}'; it is called {now} now"):
            getattr(redrafter, name)
        assert now in redrafter.__all__ and name not in dir(redrafter)


def test_options_reach_the_loop():
    row = prompts()[0]
    made = generate(
        tiny("llama"), row, max_new_tokens=9, temperature=0.7, top_p=0.9, seeds=3, eos_token_id=-1
    )
    config = settings(do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=9, eos_token_id=-1)
    assert made.tokens == plain(tiny("llama"), [row], config, seeds=3).tokens


@pytest.mark.parametrize("decode", [plain, speculative])
def test_a_misspelt_field_of_a_generation_config_is_refused(decode):
    with pytest.raises(InputError, match="temprature: transformers has no such field; did you"):
        decode(tiny("llama"), [[1]], GenerationConfig(max_new_tokens=2, temprature=1.0))


def test_fields_of_a_models_own_configuration_are_let_through(monkeypatch):
    target = tiny("llama")
    monkeypatch.setattr(target.model.generation_config, "chat_format", "x", raising=False)
    config = GenerationConfig(max_new_tokens=2, chat_format="y")
    assert plain(target, [[1]], config).tokens


def test_fields_that_are_said_to_be_read_are_read():
    """Of the code: what is asked of a configuration, and what is listed, are the same."""
    found = set()
    for module in (request, warp):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            of_config = isinstance(node, ast.Attribute) and ast.unparse(node.value) == "config"
            found |= {node.attr} if of_config else set()
    assert found == set(request.FIELDS) - set(request._REFUSED)
    assert set(request.FIELDS) <= set(vars(GenerationConfig()))


# ---------------------------------------------------------------- streaming


def test_a_stream_is_the_text(told):
    pieces = []
    stream = TextStream(told.tokenizer, pieces.append)
    for draft in (None, "suffix:6x1", "suffix:6x1:lookahead=oracle"):
        pieces.clear()
        made = generate(told, "a b c", draft=draft, streamer=stream, **FREE)
        assert "".join(pieces) == made.extra["texts"][0]


def test_a_stream_of_transformers_will_do(told, capsys):
    streamer = TextStreamer(told.tokenizer, skip_prompt=True)
    made = generate(told, "a b c", streamer=streamer, **FREE)
    assert capsys.readouterr().out.strip() == told.tokenizer.decode(made.tokens[0]).strip()
    with pytest.raises(InputError, match="a streamer takes one prompt"):
        generate(told, ["a", "b"], streamer=streamer, **FREE)


# ---------------------------------------------------------------- a program of its own


def test_a_program_decodes_by_name(tiny_target, tmp_path):
    code = (
        "from redrafter import generate, load_target\n"
        f"target = load_target({str(tiny_target)!r})\n"
        "drafts = ['mix(lookup:8x2,suffix:16x1):nodes=9', 'select(none,suffix:16x1)', 'plain']\n"
        "print(*{generate(target, 'the ', draft=d, max_new_tokens=12).extra['texts'][0]\n"
        "        for d in drafts}, sep='|')\n"
    )
    (tmp_path / "program.py").write_text(code)
    status, said = run_copy(tmp_path / "program.py", [], tmp_path / "said.txt")
    assert status == 0, said
    text = said.strip().splitlines()[-1]
    assert text and "|" not in text, "one text by all names"
