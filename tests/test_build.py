"""Drafters by name: the grammar, every kind, nested names, and what errors say."""

import dataclasses

import pytest
import torch
from models import VOCAB, alone, prompts, settings, tiny

import redrafter.drafters.build as build
from redrafter.config import TreeConfig
from redrafter.contracts import Drafter, InputError, TokenTree
from redrafter.decode.speculative import speculative
from redrafter.drafters.bigram import count_bigrams
from redrafter.drafters.budget import NodeBudget
from redrafter.drafters.build import DRAFTERS, Kind, Resources, build_drafter, describe_kinds, needs
from redrafter.drafters.options import describe, options_of, parse_name, split_list
from redrafter.drafters.suffix import ReferenceTexts
from redrafter.heads.recurrent import RecurrentHead

#: One name per kind that sets what only this kind has, and what it then must be.
EXAMPLES = {
    "head:8x5:best:16": {"width": 8, "max_depth": 5, "max_nodes": 16},
    "head:8x5:beams": {"width": 8, "max_depth": 5, "max_nodes": 41},
    "head:width=3:seeded=false": {"width": 3, "max_depth": 2, "max_nodes": 7},
    "head": {"width": 2, "max_depth": 2, "max_nodes": 5},
    "bigram:2x4": {"width": 2, "max_depth": 4},
    "lookup:10x3": {"max_depth": 10, "max_ngram": 3, "occurrence": "leftmost"},
    "lookup:10x3:recent=true": {"max_depth": 10, "max_ngram": 3, "occurrence": "recent"},
    "suffix:10x2": {"max_depth": 10, "min_match": 2, "factor": 2.0},
    "suffix:depth=7:min_match=2:factor=1.5": {"max_depth": 7, "min_match": 2, "factor": 1.5},
    "consensus:8x2": {"max_depth": 8, "min_match": 2, "max_nodes": 17},
    "mix(head:4x4,consensus:8x2)": {"max_depth": 8, "max_nodes": 17},
    "model:1x3": {"width": 1, "max_depth": 3, "seeded": True, "temperature": None},
    "model:width=2:depth=4:temperature=0.7": {"width": 2, "max_depth": 4, "temperature": 0.7},
    "replay:1x4": {"width": 1, "max_depth": 4, "acceptance": 1.0},
    "replay:2x3:acceptance=0.5:duplicates=true": {"acceptance": 0.5, "duplicates": True},
    "recycling": {"max_nodes": 25, "k": 8, "warm": None},
    "recycling:children=3/21": {"max_nodes": 7, "max_depth": 2},
    "recycling:children=6": {"max_nodes": 7, "max_depth": 1},
    "ngrammys:5x3:table=counted:query=2": {"k": 5, "w": 3, "query": 2, "max_nodes": 16},
    "ngrammys:3x2:allocation=[1,2,0]": {"k": 3, "allocation": (1, 2, 0)},
    "multi:children=[2,2]:how=seeded": {"max_nodes": 7, "children": (2, 2), "how": "seeded"},
    "multi:source=both:children=[2]:how=iid": {"needs": {"hidden"}, "max_nodes": 3},
    "skip:3:fixed=[1]": {"max_depth": 3},
    "none": {"max_depth": 0, "max_nodes": 1},
    "select(none,lookup:4x2)": {"max_depth": 4},
    "select(none,lookup:4x2):policy=hedge": {"policy": "hedge"},
    "mix(none,lookup:4x2,suffix:3x1):nodes=4": {"max_nodes": 4},
    "suffix:6x1:reference=true": {"max_depth": 6},
    "head:3x4:budget=true": {"max_depth": 4, "max_nodes": 13},
    "model:2x3:budget=true:nodes=5": {"max_depth": 3, "max_nodes": 5},
}


@pytest.fixture(scope="module")
def resources():
    target, rows = tiny("llama"), prompts()
    torch.manual_seed(0)
    answers, _ = alone(target, rows, settings())
    return Resources(
        head=RecurrentHead.for_target(target),
        draft=target,
        bigrams=count_bigrams(answers, VOCAB, 10),
        probed=count_bigrams(answers, VOCAB, 10),
        reference=ReferenceTexts(answers),
        price=lambda drafter: NodeBudget({1: 1.0, 40: 1.1}, [0.1] * drafter.max_depth),
        texts=[row + answer for row, answer in zip(rows, answers, strict=True)],
        tree=TreeConfig(width=2, depth=2),
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_name_sets_its_options_and_drafts_exactly(name, resources):
    target, rows = tiny("llama"), prompts()
    drafter = build_drafter(name, target, resources)
    for key, value in EXAMPLES[name].items():
        assert getattr(drafter, key) == value, key
    config = settings(do_sample=True)
    made = speculative(target, rows, config, seeds=range(len(rows)), drafter=drafter)
    assert made.tokens == alone(target, rows, config)[0]


def test_every_kind_has_an_example_and_is_described():
    kinds = {parse_name(name).kind for name in EXAMPLES}
    assert kinds == set(DRAFTERS), "every kind has an example above"
    shown = describe_kinds(DRAFTERS)
    for name in DRAFTERS:
        assert f"\n  {name}" in f"\n{shown}"
    for said in (
        "min_match: int = 1   tokens; nothing",
        "warm: bool = false   begin",
        "shape: levels | beams | best | null = null",
        "acceptance: float = 1.0",
    ):
        assert said in shown, "type, default and the docstring's words"  # fmt: skip
    assert max(map(len, shown.splitlines())) <= 100


def test_heads_take_the_configured_tree_unless_told(resources):
    def tree(name, **default):
        configured = dataclasses.replace(resources, tree=TreeConfig(**default))
        return build_drafter(name, tiny("llama"), configured).shape

    default = dict(width=2, depth=3, shape="best", nodes=5, seeded=False)
    assert tree("head", **default) == TreeConfig(**default)
    assert tree("head:8x5", **default) == TreeConfig(8, 5, seeded=False), "a size means all levels"
    assert tree("head:seeded=true", **default) == TreeConfig(2, 3, "best", 5)
    assert tree("head:nodes=4", **default).nodes == 4
    assert tree("head:8x5:best:16") == TreeConfig(8, 5, "best", 16)
    assert tree("head:shape=beams:width=8") == TreeConfig(8, 4, "beams")


def test_warm_recycling_begins_with_the_bigrams(resources):
    target = tiny("llama")
    warm = build_drafter("recycling:warm=true", target, resources)
    assert warm.warm is resources.bigrams
    cold = build_drafter("recycling", target, resources)
    assert bool(warm.said.any()) and not bool(cold.said.any())


# ---------------------------------------------------------------- lists and brackets


def test_lists_are_split_outside_of_brackets():
    text = "head:4x3, mix(suffix:8x2,mix(a,b):n=[1,2]):nodes=17 ,x"
    assert split_list(text) == ["head:4x3", "mix(suffix:8x2,mix(a,b):n=[1,2]):nodes=17", "x"]
    assert split_list("a:b=c(d:e):f", ":") == ["a", "b=c(d:e)", "f"]
    assert split_list("") == [""]
    for bad in ("mix(a", "mix(a]", "a)", "mix(a,b))"):
        with pytest.raises(InputError, match=r"bracket|missing"):
            split_list(bad)
    parsed = parse_name("mix(head:4x3,suffix:8x2):nodes=17")
    assert (parsed.kind, parsed.members) == ("mix", ("head:4x3", "suffix:8x2"))
    assert parsed.parts == ("nodes=17",)


class Mix(Drafter):
    """Drafts as its first member does."""

    def __init__(self, members: dict[str, Drafter], nodes: int = 5):
        self.members, self.nodes = members, nodes
        self.first = next(iter(members.values()))
        self.max_depth, self.max_nodes = self.first.max_depth, self.first.max_nodes

    def start(self): ...

    def extend(self, level: int): ...

    def tree(self) -> TokenTree: ...


def mix(target, resources, members, **options) -> Mix:
    """Made of others."""
    return Mix(members, **options)


def test_a_kind_made_of_others(resources, monkeypatch):
    monkeypatch.setitem(DRAFTERS, "mix", Kind(mix, members=True))
    target = tiny("llama")
    name = "mix(suffix:8x2,mix(bigram:3x2,model:1x2):nodes=3):nodes=17"
    made = build_drafter(name, target, resources)
    assert list(made.members) == ["suffix:8x2", "mix(bigram:3x2,model:1x2):nodes=3"]
    assert made.nodes == 17 and made.max_depth == 8
    inner = list(made.members.values())[1]
    assert inner.nodes == 3 and inner.first.width == 3
    assert needs(name) == {"bigrams": 3, "draft": 1}, "of members' members too"
    assert needs("mix(bigram:3x2,bigram:5x2,head)") == {"bigrams": 5, "head": 1}
    with pytest.raises(InputError, match="needs --draft"):
        build_drafter(name, target, dataclasses.replace(resources, draft=None))
    for bad, said in (
        ("mix", "name the drafters"), ("mix()", "name the drafters"),
        ("mix(suffix,suffix)", "twice"), ("mix(suffix,warp)", "'warp' is unknown"),
        ("mix(suffix:deep=3)", "'suffix:deep=3': no option 'deep'"),
        ("suffix(lookup)", "not made of other"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            needs(bad)


class Made:
    def __init__(self, depth: int = 2, state: Resources | None = None, table: dict | None = None):
        self.depth = depth


def made(target, resources, **options) -> Made:
    return Made(**options)


def test_objects_are_no_options():
    assert [line.split()[0] for line in describe("made", made)] == ["made", "depth:"]
    with pytest.raises(InputError, match="no option 'state'; there are depth"):
        options_of("made:state=x", ["state=x"], made)


def listed(*, levels: list[int], depth: int = 2) -> None:
    """A maker that could change what it is given."""


def test_who_changes_the_options_of_a_name_changes_nobody_elses():
    found = options_of("listed:levels=[1]", ["levels=[1]"], listed)
    found["levels"].append(2)
    found["depth"] = 9
    again = options_of("listed:levels=[1]", ["levels=[1]"], listed)
    assert again == {"levels": [1], "depth": 2}


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("warp", "'warp' is unknown; choose from head, lookup"),
        ("lookup:deep=3", "'lookup:deep=3': no option 'deep'; there are recent, depth, max_ngram"),
        ("suffix:depth=x", "'suffix:depth=x': depth: 'x' is not int"),
        ("model:seeded=maybe", "seeded: 'maybe' is not bool"),
        ("head:4x4:oval", "'head:4x4:oval': shape: 'oval' is not levels | beams | best"),
        ("head:8", "'8' is neither key=value nor WIDTHxDEPTH"),
        ("head:0x4", "'0x4' is neither"),
        ("head:", "'' is neither"),
        ("head:4x4:best:x", "nodes: 'x' is not int"),
        ("head:4x4:best:4:4", "'head:4x4:best:4:4' has parts too many"),
        ("lookup:4x4:recent", "'lookup:4x4:recent' has parts too many"),
        ("bigram:4x4:width=3", "'bigram:4x4:width=3': width is set twice"),
        ("recycling:4x4", "'4x4' is not key=value"),
        ("bigram:table=x", "no option 'table'"),
        ("recycling:device=cpu", "no option 'device'"),
        ("a b", "'a b' is no name"),
        ("head(x", "missing"),
    ],
)  # fmt: skip
def test_bad_names_say_what_is_wrong_before_anything_is_built(name, said):
    with pytest.raises(InputError) as error:
        needs(name)
    assert said in str(error.value)


def test_values_that_do_not_fit_are_named_when_built(resources):
    for name, said in (
        ("head:4x4:levels:3", "nodes 3"), ("head:4x4:best", "nodes"), ("suffix:depth=0", "depth 0"),
        ("bigram:11x2", "width 11"), ("recycling:children=3/9999", "level 2"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            build_drafter(name, tiny("llama"), resources)


@pytest.mark.parametrize(
    ("name", "said"),
    [("head", "--head"), ("model", "--draft"), ("bigram", "--bigrams"), ("replay", "texts"),
     ("recycling:warm=true", "--bigrams")],
)  # fmt: skip
def test_a_missing_resource_is_named(name, said):
    with pytest.raises(InputError, match=f"'{name}' needs .*{said}"):
        build_drafter(name, tiny("llama"), Resources())
    assert set(build.MISSING) == {f.name for f in dataclasses.fields(Resources)} - {"tree"}
