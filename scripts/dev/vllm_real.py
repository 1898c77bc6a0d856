"""The head in a real vLLM, held against plain vLLM and this library's own chain; see test_vllm.sh.

    python scripts/dev/vllm_real.py --model MODEL --head HEAD --rows rows.json

Runs all engines in this process, one after the other, so that the parts of one can be looked at.
Every line is a finding; the exit status is 1 if one of them is wrong. Rows that differ go into
--differing.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm_findings import end, failed, near, same, say

from redrafter.serve.vllm import ReDrafterProposer
from redrafter.serve.vllm_sampling import fault

_DRAWS, BATCH, _LAW_BATCH = 4000, 8, 64
_MOST_TOKENS, _BLOCK = 256, 32  # of a row, and of a block of the cache where those are few
PROPOSER = "redrafter.serve.vllm.ReDrafterProposer"


class Engine:
    """One vLLM in this process, with or without a drafter; gone when left."""

    def __init__(self, model: str, speculative: dict | None, extra: dict | None = None, **options):
        if extra is not None:
            options["additional_config"] = extra
        if speculative is not None:
            options["speculative_config"] = speculative
        options = {"max_num_seqs": BATCH, **options}
        self.llm = LLM(
            model=model, dtype="float32", max_model_len=_MOST_TOKENS, enforce_eager=True, seed=0,
            disable_log_stats=False, **options,
        )  # fmt: skip

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: Any) -> None:
        guard = getattr(self.drafter, "guard", None)
        if guard is not None:
            guard.remove()
        del self.llm
        gc.collect()

    @property
    def drafter(self) -> Any:
        """The proposer of the runner; None where nothing drafts."""
        return self.llm.collective_rpc(
            lambda worker: getattr(worker.model_runner, "drafter", None)
        )[0]  # fmt: skip

    def metrics(self) -> Counter[str]:
        """`vllm:spec_decode_*` so far; per position as NAME.0, NAME.1, ..."""
        found: Counter[str] = Counter()
        for metric in self.llm.get_metrics():
            name = metric.name.removeprefix("vllm:spec_decode_")
            if name != metric.name:
                for index, value in enumerate(getattr(metric, "values", [])):
                    found[f"{name}.{index}"] += value
                found[name] += getattr(metric, "value", 0)
        return found

    def run(self, rows: list[list[int]], params: Any) -> tuple[list, float, Counter[str]]:
        """Texts, seconds, and what the metrics of drafts counted meanwhile."""
        before, clock = self.metrics(), time.perf_counter()
        prompts = [TokensPrompt(prompt_token_ids=row) for row in rows]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - clock
        after = self.metrics()
        after.subtract(before)
        return [list(o.outputs[0].token_ids) for o in outputs], seconds, after


def with_head(args: argparse.Namespace, **extra: Any) -> tuple[dict, dict]:
    speculative = {
        "method": "custom_class", "model": PROPOSER, "num_speculative_tokens": args.depth
    }  # fmt: skip
    return speculative, {"redrafter_head": args.head, **extra}


def plain_texts(args: argparse.Namespace, rows: dict, greedy: SamplingParams) -> list[list[int]]:
    """Plain vLLM's greedy texts, which are to be ours, and its tokens per second."""
    with Engine(args.model, None) as engine:
        engine.run(rows["prompts"][:BATCH], greedy)  # the first steps set things up
        plain, seconds, _ = engine.run(rows["prompts"], greedy)
    say(f"plain: {sum(map(len, plain)) / seconds:.1f} tokens/s")
    same("plain vLLM and redrafter's own text", rows["prompts"], plain, rows["texts"])
    return plain


def ngram(args: argparse.Namespace, rows: dict, plain: list, greedy: SamplingParams) -> None:
    """vLLM's own drafter in this run. Last: it loads llvmlite, and with that in the process
    vLLM 0.32 makes no further engine on a CPU (AttributeError: _lib_fn_wrapper)."""
    speculative = {"method": "ngram", "num_speculative_tokens": args.depth}
    speculative |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    with Engine(args.model, speculative) as engine:
        engine.run(rows["prompts"][:BATCH], greedy)
        texts, seconds, _ = engine.run(rows["prompts"], greedy)
    say(f"ngram: {sum(map(len, texts)) / seconds:.1f} tokens/s")
    same("ngram and plain", rows["prompts"], texts, plain)


def head_greedy(args: argparse.Namespace, rows: dict, plain: list, greedy: SamplingParams) -> None:
    """Texts, counts against our own chain, speed."""
    with Engine(args.model, *with_head(args)) as engine:
        engine.run(rows["prompts"][:BATCH], greedy)
        texts, seconds, counted = engine.run(rows["prompts"], greedy)
    say(f"head: {sum(map(len, texts)) / seconds:.1f} tokens/s")
    same(f"head and plain, at batch {BATCH}", rows["prompts"], texts, plain)
    counts(rows, counted, 0.01)


def counts(rows: dict, counted: Counter[str], share: float, planted: bool = False) -> None:
    """The engine's metrics of drafts against our own chain's, up to a share of them."""
    theirs = [counted[f"num_accepted_tokens_per_pos.{i}"] for i in range(rows["depth"])]
    near("accepted by position", theirs, rows["accepted"], share, planted)
    if planted:
        return
    drafts = counted["num_drafts"]
    near("steps with a draft", [drafts], [rows["steps"]], share)
    length = 1 + counted["num_accepted_tokens"] / max(1, drafts)
    say(f"mean acceptance length {length:.3f}, drafted {counted['num_draft_tokens']} tokens")


def law(engine: Engine, rows: dict, drafted: bool) -> None:
    """4000 draws at temperature 1: inside the band of the exact sampler; drafts only if allowed."""
    cells = list(rows["law"]["cells"])
    exact = torch.tensor(list(rows["law"]["cells"].values()), dtype=torch.float64)
    wanted = len(cells[0].split())
    params = SamplingParams(
        temperature=1.0, top_k=rows["law"]["top_k"], max_tokens=wanted, ignore_eos=True
    )
    texts, _, counted = engine.run([rows["law"]["prompt"]] * _DRAWS, params)
    place = {cell: i for i, cell in enumerate(cells)}
    found = [place.get(" ".join(map(str, text)), len(cells)) for text in texts]
    share = torch.bincount(torch.tensor(found), minlength=len(cells) + 1).double() / len(texts)
    distance = 0.5 * float((share[:-1] - exact).abs().sum() + share[-1])
    torch.manual_seed(0)
    draws = torch.multinomial(exact.expand(2000, -1), _DRAWS, replacement=True)
    simulated = torch.stack([torch.bincount(d, minlength=len(cells)) for d in draws]).double()
    band = float((0.5 * (simulated / _DRAWS - exact).abs().sum(1)).quantile(0.99))
    n = counted["num_draft_tokens"]
    name = "repaired" if fault(torch.device("cpu")) is None else "as it is"
    say(
        f"law at temperature 1, sampler {name}: total variation {distance:.4f} of {_DRAWS} draws "
        f"over {len(cells)} cells, exact sampler's 99 % band {band:.4f}", distance <= band
    )  # fmt: skip
    say(f"drafted there: {n} tokens", (n > 0) == drafted)


def mixed(engine: Engine, rows: dict, plain: list, greedy: SamplingParams) -> None:
    """Greedy rows beside sampled ones that join while drafts are verified: no text changes."""
    sampled = SamplingParams(temperature=1.0, max_tokens=5, ignore_eos=True)
    prompts, params, n = [], [], min(24, len(plain))
    for i, row in enumerate(rows["prompts"][:n]):
        prompts += [row, rows["law"]["prompt"]]
        params += [greedy, sampled if i % 3 == 0 else greedy]
    texts, _, _ = engine.run(prompts, params)
    same("greedy rows in batches that also sample", prompts[::2], texts[::2], plain[:n])


def few_blocks(prompts: list[list[int]]) -> int:
    """So many that a batch's prompts fit into the cache and what follows them does not, however
    long they are: some must be preempted. One more is vLLM's own."""
    shortest = sorted(map(len, prompts))[:BATCH]
    return 1 + max(_MOST_TOKENS // _BLOCK, sum(length // _BLOCK + 1 for length in shortest))


def hard_cases(args: argparse.Namespace, rows: dict, plain: list, greedy: SamplingParams) -> None:
    """Chunked prefill, preemption, prefix caching on and off, aborted requests; states checked."""
    speculative, extra = with_head(args, redrafter_serve_check=1)
    prompts, wanted = rows["prompts"][:32], plain[:32]
    blocks = few_blocks(prompts)
    for cached in (True, False):
        with Engine(
            args.model, speculative, extra, enable_prefix_caching=cached, block_size=_BLOCK,
            enable_chunked_prefill=True, max_num_batched_tokens=48, num_gpu_blocks_override=blocks,
        ) as engine:  # fmt: skip
            name = (
                f"chunked prefill of 48, {blocks} blocks of {_BLOCK}, "
                f"prefix caching {'on' if cached else 'off'}"
            )
            proposer = engine.drafter
            for what in (name, "  again"):
                same(what, prompts, engine.run(prompts, greedy)[0], wanted)
            preempted = sum(
                m.value for m in engine.llm.get_metrics() if m.name == "vllm:num_preemptions"
            )
            say(f"  {preempted} preemptions", preempted > 0)
            checked, missing = proposer.counts["checked"], proposer.counts["without_state"]
            say(f"  {checked} states checked, {missing} rows without a state", checked > 100)
            if cached:
                aborted(engine, prompts, wanted, greedy)


def aborted(engine: Engine, prompts: list, wanted: list, greedy: SamplingParams) -> None:
    core, done = engine.llm.llm_engine, {}
    for i, row in enumerate(prompts[:16]):
        core.add_request(f"a{i}", TokensPrompt(prompt_token_ids=row), greedy)
    steps = 0
    while core.has_unfinished_requests():
        for output in core.step():
            if output.finished:
                done[int(output.request_id[1:].split("-")[0])] = list(output.outputs[0].token_ids)
        steps += 1
        if steps in (4, 9):
            core.abort_request([f"a{steps - 3}", f"a{steps}"])
    kept = [i for i in done if len(done[i]) == len(wanted[i])]
    say(f"  {16 - len(kept)} requests of 16 were aborted", 0 < len(kept) < 16)
    same(
        "  the others", [prompts[i] for i in kept], [done[i] for i in kept],
        [wanted[i] for i in kept],
    )  # fmt: skip


def planted(args: argparse.Namespace, rows: dict, plain: list, greedy: SamplingParams) -> None:
    """The state one position too early: the check must stop the engine, and without the check the
    texts are the same but the counts are not those of our chain."""
    find = ReDrafterProposer._find

    def off_by_one(self, kept, wanted, lengths):
        hidden, index, usable = find(self, kept, wanted, lengths)
        return hidden, (index - 1).clamp(min=0), usable

    ReDrafterProposer._find = off_by_one
    stopped = ""
    try:
        with Engine(args.model, *with_head(args, redrafter_serve_check=1)) as engine:
            engine.run(rows["prompts"][:BATCH], greedy)
    except Exception as error:
        stopped = f"{type(error).__name__}: {error}"
    say(f"planted off-by-one is found: {stopped[:160]}", "REDRAFTER_SERVE_CHECK" in stopped)
    try:
        with Engine(args.model, *with_head(args)) as engine:
            texts, _, counted = engine.run(rows["prompts"], greedy)
    finally:
        ReDrafterProposer._find = find
    same("planted off-by-one, unchecked", rows["prompts"], texts, plain)
    counts(rows, counted, 0.01, planted=True)


def sampled(
    args: argparse.Namespace, rows: dict, plain: list, greedy: SamplingParams, repair: int
) -> None:
    """The sampler as it is, where it may lose the law and then nothing is drafted; or repaired,
    which it stays in this process."""
    speculative, extra = with_head(args, redrafter_serve_repair=repair)
    with Engine(args.model, speculative, extra, max_num_seqs=_LAW_BATCH) as engine:
        law(engine, rows, drafted=engine.drafter.drafts_sampled)
        mixed(engine, rows, plain, greedy)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "head", "rows", "differing"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--parts", default="plain,head,hard,planted,law,repaired,ngram")
    args = parser.parse_args()
    rows = json.loads(Path(args.rows).read_text())
    args.depth = rows["depth"]
    parts = args.parts.split(",")
    say(
        f"vLLM {vllm.__version__}, torch {torch.__version__}, {rows['model']}, "
        f"{len(rows['prompts'])} prompts x {rows['new_tokens']} tokens, chains of {args.depth}"
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=rows["new_tokens"], ignore_eos=True)
    plain = plain_texts(args, rows, greedy) if "plain" in parts else rows["texts"]
    if "head" in parts:
        head_greedy(args, rows, plain, greedy)
    if "hard" in parts:
        hard_cases(args, rows, plain, greedy)
    if "planted" in parts:
        planted(args, rows, plain, greedy)
    for repair, part in enumerate(("law", "repaired")):
        if part in parts:
            sampled(args, rows, plain, greedy, repair)
    if "ngram" in parts:
        ngram(args, rows, plain, greedy)
    say(f"{len(failed)} findings are wrong", not failed)
    return end(args.differing)


if __name__ == "__main__":
    logging.getLogger("vllm").setLevel(logging.WARNING)
    sys.exit(main())
