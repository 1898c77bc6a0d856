"""How much the samples of a prompt draft for each other, and how much they could at best.

    python scripts/dev/measure_samples.py --config configs/eval/samples.yaml \\
        --n_prompts 12 --max_new_tokens 96 --out eval/results/samples/gsm-stories-6m-walked.json

Texts are plain decoding's, the first n samples of each prompt for every number of samples. Of them

bounds: of every new token, in how many cases it had followed the same m tokens before, in the
    prompt or the row itself, or in a sibling alone, siblings being as far as the row is. No drafter
    that copies after m tokens can have more of its first guesses right. By thirds of the most new
    tokens, too: late rows have more to copy from.
walked: tokens per step of every method but `plain`. Under the seeded rule a text is the same
    whatever is drafted, so the drafters are walked over the known texts, all samples of a prompt a
    step at a time, with hidden states of one forward over each text: the steps are those of
    decoding, and no tree is verified. What eval/table.py decodes is the check of it.

What stands beside --out is eval/table.py's configuration.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from tqdm.auto import tqdm

from redrafter.cli.args import parse
from redrafter.config import SpeedConfig, TableConfig
from redrafter.contracts import Drafter, RowState, Truth
from redrafter.decode.noise import NoiseAhead
from redrafter.decode.plain import plain
from redrafter.drafting import strategy_maker
from redrafter.evaluation.figures import bootstrap, pooled
from redrafter.evaluation.models import load_both, load_resources
from redrafter.evaluation.prompt_sets import settings
from redrafter.evaluation.prompts import evaluation_prompts
from redrafter.evaluation.report import markdown_table, with_interval
from redrafter.evaluation.speed import decoding
from redrafter.evaluation.votes import votes
from redrafter.evaluation.walk import accepted_depth
from redrafter.files import plain_values, provenance, write_json
from redrafter.targets.model import Target

MATCHES = (1, 2, 3, 4)
PROMPT = -1  # its voice
THIRDS = 3


class Samples:
    """A prompt and what plain decoding says to it. hidden: (n, T, H), of the whole texts"""

    def __init__(self, target: Target, prompt: list[int], seeds: list[int], config: SpeedConfig):
        self.prompt, self.seeds, self.config = prompt, seeds, config
        rows = [prompt] * len(seeds)
        self.answers = plain(target, rows, decoding(config), seeds=seeds).tokens
        ids = [torch.tensor([*prompt, *answer]) for answer in self.answers]
        self.ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        with torch.inference_mode():
            out = target.backbone(input_ids=self.ids.to(target.device), use_cache=False)
        self.hidden = out.last_hidden_state


# ---------------------------------------------------------------------------------------- bounds


def count(prompt: list[int], answers: list[list[int]], m: int, most: int) -> list[list[int]]:
    """Per third of `most` new tokens: tokens, those that had followed the m tokens before them in
    the prompt or the row, and those that had in a sibling alone."""
    said: dict[tuple[int, ...], dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for end in range(m, len(prompt)):
        said[tuple(prompt[end - m : end])][prompt[end]].add(PROMPT)
    texts = [[*prompt, *answer] for answer in answers]
    counts = [[0, 0, 0] for _ in range(THIRDS)]
    for end in range(len(prompt), max(map(len, texts))):
        here = [(row, tuple(t[end - m : end]), t[end]) for row, t in enumerate(texts)
                if end < len(t)]  # fmt: skip
        for row, before, token in here:
            who = said[before][token]
            own = bool(who & {PROMPT, row})
            third = counts[(end - len(prompt)) * THIRDS // most]
            third[0] += 1
            third[1] += own
            third[2] += bool(who) and not own
        for row, before, token in here:  # a step is all rows' at once
            said[before][token].add(row)
    return counts


def bound(groups: list[Samples], n: int, m: int) -> dict[str, Any]:
    """Shares of all new tokens. n: samples; m: tokens that match"""
    most = groups[0].config.max_new_tokens
    each = [count(g.prompt, g.answers[:n], m, most) for g in groups]
    thirds = [[sum(c) for c in zip(*third, strict=True)] for third in zip(*each, strict=True)]
    tokens, own, siblings = map(sum, zip(*thirds, strict=True))
    late = [(own + sibling) / max(1, tokens) for tokens, own, sibling in thirds]
    return {"match": m, "own": own / tokens, "sibling_alone": siblings / tokens, "by_thirds": late}


# ---------------------------------------------------------------------------------------- the walk


class Walk:
    """The first n samples of a prompt, decoded without a target."""

    def __init__(self, drafter: Drafter, samples: Samples, n: int, vocab_size: int):
        self.drafter, self.samples = drafter, samples
        self.answers = samples.answers[:n]
        self.known = [0] * n
        start = len(samples.prompt)
        room = start + samples.config.max_new_tokens + drafter.max_depth + 1
        device = samples.hidden.device
        ids = torch.zeros(n, room, dtype=torch.long, device=device)
        ids[:, :start] = torch.tensor(samples.prompt)
        length = torch.full((n,), start, device=device)
        seeds = torch.tensor(samples.seeds[:n], device=device)
        self.seqs = RowState(
            ids, length, length.clone(), length > 0, temperature=samples.config.temperature,
            seeds=seeds,
        )  # fmt: skip
        self.noise = NoiseAhead(seeds, vocab_size, torch.float32)

    def steps(self) -> int:
        """Row-steps until every row is done."""
        drafter, seqs, steps = self.drafter, self.seqs, 0
        first = self._emit([answer[:1] for answer in self.answers], 1)
        drafter.begin(seqs)
        drafter.observe(first)
        while any(seqs.alive):
            steps += sum(seqs.alive)
            seqs.noise = self.noise(seqs.lengths, drafter.max_depth + 1)
            drafter.start()
            for level in range(1, drafter.max_depth + 1):
                drafter.extend(level)
            truth = self._emit(self._accept(drafter.tree()), drafter.max_depth + 1)
            drafter.observe(truth)
        return steps

    def _accept(self, tree: Any) -> list[list[int]]:
        left = self.samples.config.max_new_tokens - torch.tensor(self.known)
        tree.valid = tree.valid & (tree.depth <= left.to(tree.depth.device)[:, None])
        new = []
        for row, (answer, known) in enumerate(zip(self.answers, self.known, strict=True)):
            one = type(tree)(*(x[row : row + 1] for x in
                               (tree.tokens, tree.parent, tree.depth, tree.valid)))  # fmt: skip
            rest = answer[known:]
            new.append(rest[: accepted_depth(one, rest) + 1] if rest else [])
        return new

    def _emit(self, new: list[list[int]], width: int) -> Truth:
        seqs, hidden = self.seqs, self.samples.hidden
        tokens = torch.zeros(len(new), width, dtype=torch.long)
        led = hidden.new_zeros(len(new), width, hidden.shape[-1])
        for row, said in enumerate(new):
            at = len(self.samples.prompt) + self.known[row]
            tokens[row, : len(said)] = torch.tensor(said, dtype=torch.long)
            led[row, : len(said)] = hidden[row, at - 1 : at - 1 + len(said)]
            seqs.ids[row, at : at + len(said)] = tokens[row, : len(said)]
            self.known[row] += len(said)
        seqs.lengths = [len(self.samples.prompt) + known for known in self.known]
        seqs.alive = [k < len(a) for k, a in zip(self.known, self.answers, strict=True)]
        seqs.length = torch.tensor(seqs.lengths, device=seqs.ids.device)
        seqs.live = torch.tensor(seqs.alive, device=seqs.ids.device)
        count = [len(said) * on for said, on in zip(new, seqs.alive, strict=True)]
        device = seqs.ids.device
        return Truth(tokens.to(device), torch.tensor(count, device=device), led)


def walked(name: str, make: Any, groups: list[Samples], n: int, target: Target) -> dict[str, Any]:
    """Tokens and steps per prompt. The drafter keeps what it learns from prompt to prompt."""
    drafter = make([]).drafter
    if drafter.needs - {"hidden"} or drafter.borrows_cache:
        raise SystemExit(f"{name}: a text and its hidden states are not all that it needs")
    tokens = [sum(map(len, g.answers[:n])) - n for g in groups]
    steps = [Walk(drafter, g, n, target.vocab_size).steps() for g in groups]
    rate = bootstrap(pooled, tokens, steps)
    return {"tokens_per_step": rate, "tokens": tokens, "steps": steps}


# ---------------------------------------------------------------------------------------- all of it


def measure(config: SpeedConfig, names: list[str], numbers: list[int], target: Target,
            head: Any) -> dict[str, Any]:  # fmt: skip
    """At one temperature. numbers: of samples"""
    resources, _ = load_resources(names, config, target, head, [], decoding(config))
    n = max(numbers)
    groups = []
    for i, prompt in enumerate(tqdm(evaluation_prompts(target, config)[0], desc="plain")):
        seeds = list(range(config.seed + i * n, config.seed + (i + 1) * n))
        groups.append(Samples(target, list(prompt.ids), seeds, config))
    rows = [answer for g in groups for answer in g.answers]
    found = {"votes": votes(rows, n, target.tokenizer.decode), "bounds": {}, "walked": {}}
    for samples in numbers:
        found["bounds"][samples] = [bound(groups, samples, m) for m in MATCHES]
        of_methods = found["walked"][samples] = {}
        for name in names:
            make = strategy_maker(name, target, resources)
            of_methods[name] = walked(name, make, groups, samples, target)
            rate = with_interval(*of_methods[name]["tokens_per_step"])
            print(f"T = {config.temperature:g}, {samples} samples: {name} {rate}", flush=True)
    return found


def shown(temperature: float, bounds: dict[int, list[dict[str, Any]]]) -> list[list[Any]]:
    return [
        [temperature, samples, b["match"],
         *(f"{x:.3f}" for x in (b["own"], b["sibling_alone"], *b["by_thirds"]))]
        for samples, each in bounds.items() for b in each
    ]  # fmt: skip


def main() -> None:
    asked = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asked.add_argument("--out", required=True, help="JSON file to write")
    args, others = asked.parse_known_args()
    table = parse(TableConfig, [*others, f"--out={args.out}"], "scripts/dev/measure_samples.py")
    names = [name for name in table.methods if name != "plain"]
    numbers = sorted({1, *table.samples_per_prompt})
    parts = [c for c in settings(table).values() if c.samples_per_prompt == numbers[-1]]
    target, head = load_both(parts[0])
    body = {f"{config.prompts}, T = {config.temperature:g}":
            measure(config, names, numbers, target, head) for config in parts}  # fmt: skip
    rows = [row for config, found in zip(parts, body.values(), strict=True)
            for row in shown(config.temperature, found["bounds"])]  # fmt: skip
    columns = ["T", "samples", "match", "own", "sibling alone", "first third", "second", "last"]
    print(markdown_table(columns, rows))
    facts = provenance(target=target.fingerprint(), config=plain_values(table))
    write_json(args.out, {**body, "provenance": facts})


if __name__ == "__main__":
    main()
