"""The one place where drafters are chosen by name: `suffix:10x2:factor=1.5` and the like.

To add a drafter: write a builder below and its line in `DRAFTERS`. A builder is

    def name(target, resources, *, option: type = default, ...) -> TheDrafter

and its options are what users may write (see `options.py`; `**options` are those of the class that
they are passed on to). One that is made of other drafters takes `members` third.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from redrafter.config import TreeConfig
from redrafter.contracts import Drafter, InputError, NoDraft
from redrafter.drafters.bigram import BigramTable, CountedBigrams
from redrafter.drafters.budget import NodeBudget
from redrafter.drafters.consensus import Consensus
from redrafter.drafters.frontier import Frontier, HeadFrontier, ModelFrontier
from redrafter.drafters.head import HeadDrafter
from redrafter.drafters.lookup import PromptLookup
from redrafter.drafters.mixture import Mixture
from redrafter.drafters.model import DraftModel
from redrafter.drafters.multi import MultiCandidate, n_nodes
from redrafter.drafters.ngrammys import NGrammys
from redrafter.drafters.options import Name, describe, options_of, parse_name
from redrafter.drafters.recycling import TokenRecycling
from redrafter.drafters.replay import ReplayDrafter
from redrafter.drafters.selector import Selector
from redrafter.drafters.skipping import LayerSkipping
from redrafter.drafters.suffix import ReferenceTexts, SuffixDrafter
from redrafter.heads.base import DraftHead
from redrafter.targets.model import Target


@dataclass(frozen=True)
class Resources:
    """What drafters are made from besides the target; None where no name asks for it (see `needs`).

    draft: a smaller model of this vocabulary
    bigrams: counted, at least as wide as `needs` says; probed: from the target, likewise
    reference: texts to copy from beside a row's own
    price: of a drafter, what its levels and the target's forwards cost here
    texts: per row of the batch, prompt and plain answer, for the drafter that knows them
    tree: of a head whose name has no size
    """

    head: DraftHead | None = None
    draft: Target | None = None
    bigrams: BigramTable | None = None
    probed: BigramTable | None = None
    reference: ReferenceTexts | None = None
    price: Callable[[Drafter], NodeBudget] | None = None
    texts: list[list[int]] | None = None
    tree: TreeConfig = field(default_factory=TreeConfig)


#: A resource -> what a user must give for it.
MISSING = {
    "head": "--head, the folder of a trained draft head",
    "draft": "--draft, a smaller model of this vocabulary",
    "bigrams": "--bigrams, a table of counted bigrams",
    "probed": "--probed, a table of bigrams that data/probe.py made from this target",
    "reference": "--reference, a store of texts to copy from",
    "price": "costs of this device, measured",
    "texts": "texts that are already known",
}


# ------------------------------------------------------------------------------------ builders


def head(
    target: Target,
    resources: Resources,
    *,
    width: int | None = None,
    depth: int | None = None,
    shape: Literal["levels", "beams", "best"] | None = None,
    nodes: int | None = None,
    seeded: bool | None = None,
    rounded: bool | None = None,
    budget: bool = False,
) -> HeadDrafter:
    """The trained head.

    What is not given is --tree's; a size alone means the shape `levels`.
    width: W, nodes kept per level
    depth: K, drafted levels
    shape: which nodes are verified
    nodes: N for the shape `best`, the root counted
    seeded: when sampling, propose with the verifier's own noise
    rounded: by matrices in bfloat16, where this CPU's kernels multiply
    budget: the best nodes and levels, as many per step as pay by what they cost here
    """
    tree = resources.tree
    if (width or depth) and not shape:
        shape = "levels"
    if shape:
        tree = replace(tree, shape=shape, nodes=None)
    given = {
        "width": width, "depth": depth, "nodes": nodes, "seeded": seeded, "rounded": rounded,
    }  # fmt: skip
    tree = replace(tree, **{key: value for key, value in given.items() if value is not None})
    if nodes is not None and tree.shape != "best":
        raise InputError(f"head: nodes {nodes} is for the shape best, not {tree.shape}")
    drafter = HeadDrafter(resources.head, target, tree)
    if not budget:
        return drafter
    return HeadDrafter(resources.head, target, tree, resources.price(drafter))


def lookup(
    target: Target, resources: Resources, *, recent: bool = False, **options
) -> PromptLookup:
    """Prompt lookup.

    recent: copy from the most recent earlier occurrence, not from the leftmost one
    """
    return PromptLookup(occurrence="recent" if recent else "leftmost", **options)


def suffix(
    target: Target, resources: Resources, *, reference: bool = False, **options
) -> SuffixDrafter:
    """The longest repetition, by a suffix automaton.

    reference: copy from --reference too, where the match there is the longer one
    """
    return SuffixDrafter(reference=resources.reference if reference else None, **options)


def consensus(target: Target, resources: Resources, **options) -> Consensus:
    """What the other samples of the prompt said after the same text."""
    return Consensus(**options)


def bigram(target: Target, resources: Resources, **options) -> CountedBigrams:
    """Counted bigrams."""
    return CountedBigrams(resources.bigrams, device=target.device, **options)


def recycling(
    target: Target, resources: Resources, *, warm: bool = False, **options
) -> TokenRecycling:
    """The target's own last opinions.

    warm: begin with counted bigrams
    children: the tree, one digit per node and a slash between levels
    k: successors kept per token
    """
    table = resources.bigrams if warm else None
    return TokenRecycling(target.vocab_size, warm=table, device=target.device, **options)


def model(target: Target, resources: Resources, *, budget: bool = False, **options) -> DraftModel:
    """A smaller model.

    budget: the best nodes and levels, as many per step as pay by what they cost here
    """
    drafter = DraftModel(resources.draft, target, **options)
    if not budget:
        return drafter
    return DraftModel(resources.draft, target, budget=resources.price(drafter), **options)


def ngrammys(
    target: Target,
    resources: Resources,
    *,
    table: Literal["probed", "counted"] = "probed",
    **options,
) -> NGrammys:
    """N-grams of the context, then of a table.

    table: probed from the target (--probed), or counted on answers (--bigrams)
    """
    bigrams = resources.probed if table == "probed" else resources.bigrams
    return NGrammys(bigrams, device=target.device, **options)


def skip(target: Target, resources: Resources, **options) -> LayerSkipping:
    """The target itself, without some attentions."""
    return LayerSkipping(target, **options)


def multi(
    target: Target,
    resources: Resources,
    *,
    source: Literal["model", "head", "both"] = "model",
    children: list[int] = [4, 2, 2],  # noqa: B006 - read only
    **options,
) -> MultiCandidate:
    """Children drawn below every node, for the ratio rules.

    source: who is drawn from: the smaller model, the head, or both in turn (SpecInfer)
    children: of the root, of each of these, and so on
    how: iid, without (replacement), top or seeded
    """
    frontiers: list[Frontier] = []
    if source != "head":
        frontiers.append(ModelFrontier(resources.draft, target, n_nodes(children)))
    if source != "model":
        frontiers.append(HeadFrontier(resources.head, target))
    return MultiCandidate(frontiers, children, **options)


def none(target: Target, resources: Resources) -> NoDraft:
    """No draft: for `select`, where not drafting may pay best."""
    return NoDraft()


def mix(target: Target, resources: Resources, members: Mapping[str, Drafter], **options) -> Mixture:
    """The best nodes of several drafters, in one tree."""
    return Mixture(members, **options)


def select(
    target: Target, resources: Resources, members: Mapping[str, Drafter], **options
) -> Selector:
    """One of several drafters per step: the one that pays."""
    return Selector(members, **options)


def replay(
    target: Target, resources: Resources, *, width: int = 1, depth: int | None = None, **options
) -> ReplayDrafter:
    """A drafter that knows the answer: the ceiling of its depth.

    width: siblings per level
    depth: K, by default --tree's
    """
    depth = resources.tree.depth if depth is None else depth
    return ReplayDrafter(resources.texts, target.vocab_size, width=width, depth=depth, **options)


# ------------------------------------------------------------------------------------ the list


@dataclass(frozen=True)
class Kind:
    """How a name makes a drafter.

    build: see the top of the file
    size: the options that `AxB` (or `A`) sets, more: those that the parts behind it set
    needs: of the options, the resources that the drafter is made from, and how wide each must be
        (bigrams: successors per token; 1 where width means nothing)
    members: it is made of the drafters named in its brackets; `build` takes {name: Drafter} third
    """

    build: Callable[..., Drafter]
    size: tuple[str, ...] | None = None
    more: tuple[str, ...] = ()
    needs: Callable[[dict[str, Any]], dict[str, int]] = field(default=lambda options: {})
    members: bool = False


def _needs_of_head(options: dict[str, Any]) -> dict[str, int]:
    return {"head": 1, **({"price": 1} if options["budget"] else {})}


def _needs_of_model(options: dict[str, Any]) -> dict[str, int]:
    return {"draft": 1, **({"price": 1} if options["budget"] else {})}


def _needs_of_ngrammys(options: dict[str, Any]) -> dict[str, int]:
    return {"probed" if options["table"] == "probed" else "bigrams": 2 * options["k"]}


def _needs_of_multi(options: dict[str, Any]) -> dict[str, int]:
    both = {"model": 1, "head": 1} if options["source"] == "both" else {options["source"]: 1}
    return {"draft" if name == "model" else name: width for name, width in both.items()}


DRAFTERS: dict[str, Kind] = {
    "head": Kind(head, ("width", "depth"), ("shape", "nodes"), _needs_of_head),
    "lookup": Kind(lookup, ("depth", "max_ngram")),
    "suffix": Kind(
        suffix, ("depth", "min_match"), needs=lambda o: {"reference": 1} if o["reference"] else {}
    ),
    "consensus": Kind(consensus, ("depth", "min_match")),
    "bigram": Kind(bigram, ("width", "depth"), needs=lambda o: {"bigrams": o["width"]}),
    "ngrammys": Kind(ngrammys, ("k", "w"), needs=_needs_of_ngrammys),
    "recycling": Kind(recycling, needs=lambda o: {"bigrams": o["k"]} if o["warm"] else {}),
    "model": Kind(model, ("width", "depth"), needs=_needs_of_model),
    "multi": Kind(multi, needs=_needs_of_multi),
    "skip": Kind(skip, ("depth",)),
    "none": Kind(none),
    "mix": Kind(mix, members=True),
    "select": Kind(select, members=True),
    "replay": Kind(replay, ("width", "depth"), needs=lambda o: {"texts": 1}),
}


def build_drafter(name: str, target: Target, resources: Resources) -> Drafter:
    """The drafter of a name. Raises InputError naming what is wrong with it or missing."""
    parsed, kind, options = parse_kind(name, DRAFTERS)
    require(name, [resource for resource in MISSING if getattr(resources, resource) is not None])
    if not kind.members:
        return kind.build(target, resources, **options)
    members = {member: build_drafter(member, target, resources) for member in parsed.members}
    return kind.build(target, resources, members, **options)


def needs(name: str) -> dict[str, int]:
    """The resources that a drafter and its members are made from, and how wide each must be.

    Nothing is loaded or built. Raises InputError naming what is wrong with the name.
    """
    parsed, kind, options = parse_kind(name, DRAFTERS)
    found = dict(kind.needs(options))
    for member in parsed.members or ():
        for resource, width in needs(member).items():
            found[resource] = max(width, found.get(resource, 0))
    return found


def require(name: str, there: Sequence[str]) -> None:
    """Raises InputError naming a resource that a drafter needs and that is not `there`."""
    for resource in needs(name):
        if resource not in there:
            raise InputError(f"{name!r} needs {MISSING[resource]}")


def parse_kind(name: str, kinds: dict[str, Kind]) -> tuple[Name, Kind, dict[str, Any]]:
    """A name of one of these kinds, taken apart, and its options. Raises InputError."""
    parsed = parse_name(name)
    kind = kinds.get(parsed.kind)
    if kind is None:
        raise InputError(f"{name!r} is unknown; choose from {', '.join(kinds)}")
    if kind.members:
        _check_members(parsed)
    elif parsed.members is not None:
        raise InputError(f"{name!r}: {parsed.kind} is not made of other drafters")
    return parsed, kind, options_of(name, parsed.parts, kind.build, kind.size, kind.more)


def _check_members(parsed: Name) -> None:
    if not parsed.members:
        example = f"{parsed.kind}(lookup:10x3,suffix:10x2)"
        raise InputError(f"{parsed.text!r}: name the drafters that it is made of, e.g. {example}")
    if len(set(parsed.members)) < len(parsed.members):
        raise InputError(f"{parsed.text!r} names a drafter twice")


def describe_kinds(kinds: dict[str, Kind]) -> str:
    """Every kind with its options, for help texts."""
    lines = []
    for name, kind in kinds.items():
        lines += describe(name + "(NAME,NAME,...)" * kind.members, kind.build, kind.size, kind.more)
    return "\n".join(lines)
