"""Does a head compute here what it computed when it was exported? One check after the other.

    files      digests of what was exported, and of the golden batch itself
    target     weights and adapter, by their digests
    tokenizer  the same texts become the same tokens
    template   the chat template, and what it makes of fixed conversations
    dtype      of target and head
    hidden     the target's hidden states at the last positions of the prompts
    draft      the head's logits along a fixed path, from the *stored* hidden states
    accepted   drafted tokens accepted by each step, greedily and sampled with a seed
    text       the tokens themselves

The last four are only made where files, target and dtype are right: other numbers say nothing then.

What counts as equal. Digests, tokens and counts are compared as they are; numbers may differ by
rounding (`rounding.py`: a bound by dtype, or by what is measured here).
A differing token is a fault unless it is a *near-tie*: where the two texts part, and then at every
later position along the stored text (teacher-forced),

    gap (its choice here - the stored token, by the scores here) <= 2 * difference,

difference being that of the stored scores (the best few of then) to those here, itself no more than
rounding; a choice that was not among the best few is a fault. So is a step that accepts another
number of tokens of the same text, unless its draft is a near-tie: at the first level with other
tokens, the sorted scores of both drafts are equal up to rounding. Sources: the rule for tokens, the
design; that for drafts, ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from redrafter.contracts import InputError
from redrafter.export.golden import (
    Golden,
    describe_target,
    draft_context,
    draft_logits,
    dtype_name,
    hidden_states,
    read_golden,
)
from redrafter.export.rounding import rounding
from redrafter.export.texts import template_fault, tokenizer_fault
from redrafter.export.verify_decode import check_decodes
from redrafter.heads.base import DraftHead
from redrafter.heads.load import load_head
from redrafter.targets.model import Target

NAMES = (
    "files", "target", "tokenizer", "template", "dtype", "hidden", "draft", "accepted", "text"
)  # fmt: skip


@dataclass(frozen=True)
class Check:
    """passed: None where it was not made; text: what was found, or why it was not made."""

    name: str
    passed: bool | None
    text: str


def first_difference(checks: Sequence[Check]) -> Check | None:
    return next((check for check in checks if check.passed is False), None)


@torch.inference_mode()
def compare(folder: Path, target: Target, facts: dict[str, Any], faults: list[str]) -> list[Check]:
    """All checks of a head's folder, in order.

    facts: its golden.json; faults: `golden.file_faults` of it
    """
    found = [files_check(facts, faults), _target_check(target, facts["target"])]
    found += _text_checks(target, facts)
    head, reason = _load(folder, target, found[1])
    found.append(_dtype_check(target, head, facts, reason))
    wrong = next((c.name for c in found if c.passed is False and c.name in _NEEDED), None)
    if wrong is not None:
        return found + skipped(NAMES[5:], f"not made, as {wrong} differs")
    golden = read_golden(folder)
    found.append(_hidden_check(head, target, golden))
    draft, drift = _draft_check(head, target, golden)
    accepted, text = check_decodes(head, target, golden, drift)
    return [*found, draft, Check("accepted", *accepted), Check("text", *text)]


_NEEDED = ("files", "target", "dtype")


def skipped(names: Sequence[str], reason: str) -> list[Check]:
    return [Check(name, None, reason) for name in names]


# ------------------------------------------------------------------------------- what is loaded


def files_check(facts: dict[str, Any] | None, faults: list[str]) -> Check:
    """facts: None where golden.json cannot be read"""
    n = 0 if facts is None else len(facts["files"]) + 1
    return Check("files", not faults, "; ".join(faults) or f"{n} files as they were exported")


def _target_check(target: Target, then: dict[str, Any]) -> Check:
    here = describe_target(target)
    about = [f"{x['name']} ({x['weights']}{'+' + x['adapter'] if x['adapter'] else ''})"
             for x in (here, then)]  # fmt: skip
    if all(here[key] == then[key] for key in ("weights", "adapter")):
        # What else may differ is shown by the numbers, if it matters.
        other = [key for key in ("config", "eos") if here[key] != then[key]]
        note = f"; but its {' and '.join(other)} differ from then" if other else ""
        return Check("target", True, about[0] + note)
    if here["dtype"] != then["dtype"]:
        return Check("target", None, f"not made, as weights are others in {here['dtype']}")
    return Check(
        "target", False,
        f"another target: {about[0]} here, the golden batch was made with {about[1]}; give the "
        "folder or Hub id of that one as --target.path",
    )  # fmt: skip


def _text_checks(target: Target, facts: dict[str, Any]) -> list[Check]:
    then, made_with = facts["text"], facts["versions"]["tokenizers"]
    tokens = tokenizer_fault(target.tokenizer, then, made_with)
    template = template_fault(target.tokenizer, then)
    n = 0 if then is None else len(then["texts"])
    none = then is None or then["template"] is None
    return [
        Check("tokenizer", tokens is None, tokens or f"{n} texts become the same tokens"),
        Check("template", template is None, template or ("none" if none else "the same")),
    ]


def _load(folder: Path, target: Target, same_target: Check) -> tuple[DraftHead | None, str | None]:
    """The head, or why it cannot be loaded."""
    try:
        return load_head(folder, target if same_target.passed else None, True), None
    except InputError as error:
        return None, str(error)


def _dtype_check(
    target: Target, head: DraftHead | None, facts: dict[str, Any], reason: str | None
) -> Check:
    then, wrong = facts["target"]["dtype"], []
    if (here := dtype_name(target.dtype)) != then:
        wrong.append(
            f"the target computes in {here}, the golden batch was made in {then}: give "
            f"--target.dtype {then}, or leave it out"
        )
    if head is not None and (own := dtype_name(head.dtype)) != facts["head"]["dtype"]:
        wrong.append(
            f"the head's weights are {own}, exported were {facts['head']['dtype']}: its file was "
            "converted; take the exported one"
        )
    if head is None:
        wrong.append(f"the head cannot be loaded ({reason})")
    return Check(
        "dtype", not wrong,
        "; ".join(wrong) or f"{then}, the head {facts['head']['dtype']}",
    )  # fmt: skip


# ------------------------------------------------------------------------------- numbers


def _hidden_check(head: DraftHead, target: Target, golden: Golden) -> Check:
    prompts, then = golden.facts["prompts"], golden.tensors["hidden"].double()
    last = then.shape[1]
    alone = hidden_states(head, target, prompts, last).double().cpu()
    batch = pad_sequence([torch.tensor(p) for p in prompts], batch_first=True)
    padded = target.pick(target.states(batch.to(target.device)), head.aux_layers).double().cpu()
    again = torch.stack(
        [row[len(p) - last : len(p)] for row, p in zip(padded, prompts, strict=True)]
    )
    bound = rounding(target.dtype, _largest(then), _largest(alone - again))
    off = (alone - then).abs().amax(-1)
    about = f"({bound:.1e} is rounding in {dtype_name(target.dtype)})"
    if (place := _first_above(off, bound)) is None:
        return Check("hidden", True, f"{off.numel()} positions, up to {float(off.max()):.1e} apart "
                     f"{about}")  # fmt: skip
    row, i = place
    return Check(
        "hidden", False,
        f"prompt {row}, position {len(prompts[row]) - last + i}: hidden states are "
        f"{float(off[row, i]):.1e} apart {about}",
    )  # fmt: skip


def _draft_check(head: DraftHead, target: Target, golden: Golden) -> tuple[Check, float]:
    """The check, and how far a draft's scores may drift: by rounding in the head, and by what
    rounding in the target makes of them."""
    path, stored, prompts = golden.facts["path"], golden.tensors, golden.facts["prompts"]
    hidden = stored["hidden"].to(target.device)
    context = draft_context(head, target, hidden, prompts, path)
    logits = draft_logits(head, target, context, path)
    rows = zip(context, path, strict=True)
    alone = torch.cat([draft_logits(head, target, c[None], [p]) for c, p in rows])
    own = hidden_states(head, target, prompts, hidden.shape[1])
    from_here = draft_logits(head, target, draft_context(head, target, own, prompts, path), path)
    ids = stored["draft_ids"].long().to(logits.device)
    in_full = logits.float()  # as they were kept
    here = torch.cat((in_full.gather(-1, ids), in_full.logsumexp(-1, keepdim=True)), -1)
    then = torch.cat((stored["draft_logits"], stored["draft_logsumexp"][..., None]), -1)
    bound = rounding(logits.dtype, _largest(then), _largest(logits - alone))
    drift = max(bound, 4 * _largest(from_here - logits))
    off = (here.double().cpu() - then.double()).abs().amax(-1)
    about = f"({bound:.1e} is rounding in {dtype_name(logits.dtype)})"
    if (place := _first_above(off, bound)) is None:
        found = f"{off.numel()} places, up to {float(off.max()):.1e} apart {about}"
        return Check("draft", True, found), drift
    row, level = place
    found = (
        f"prompt {row}, depth {level + 1}: the head's logits are {float(off[row, level]):.1e} "
        f"apart {about}, computed from the stored hidden state"
    )
    return Check("draft", False, found), drift


def _largest(x: Tensor) -> float:
    return float(x.double().abs().max())


def _first_above(off: Tensor, bound: float) -> list[int] | None:
    """Indices of the first entry that is not within the bound (NaN is not), None where all are."""
    above = (~(off <= bound)).nonzero()
    return above[0].tolist() if len(above) else None
