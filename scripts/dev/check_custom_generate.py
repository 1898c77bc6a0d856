"""Check an exported head as a user of transformers alone has it: same tokens, how much faster.

    python -m venv .stock && .stock/bin/pip install -c constraints.txt torch transformers
    .stock/bin/python scripts/dev/check_custom_generate.py --model MODEL --head HEAD \
        --prompts PROMPTS.jsonl --out custom_generate.json

Decodes the last prompts of a file (`question` or `text`) with and without `custom_generate`, in
turns, in batches of each size, greedily. Nothing of this repository is imported. Of a row that
differs, every token is then compared with the model's own logits for that text: it must be their
argmax, or closer to it than twice what float32 and float64 differ there. Speed is given by the
clock, and by the CPU time of this process, which other work on the machine hardly touches.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of the target")
    parser.add_argument("--head", required=True, help="folder or Hub id of the exported head")
    parser.add_argument("--prompts", required=True, help="JSON lines with question or text")
    parser.add_argument("--n_prompts", type=int, default=50)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--batches", default="1,4", help="batch sizes, comma-separated")
    parser.add_argument("--tree", type=json.loads, default=None, help='e.g. {"width": 3}')
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default=None, help="JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    texts = read_prompts(args.prompts, args.n_prompts, tokenizer)
    # The options say which files, by name alone: results are shared.
    options = {k: Path(v).name if k in ("model", "head", "prompts") else v
               for k, v in vars(args).items() if k != "out"}  # fmt: skip
    found = {
        "options": options,
        "redrafter_installed": importlib.util.find_spec("redrafter") is not None,
        "versions": {n: importlib.metadata.version(n) for n in ("torch", "transformers")},
        "device": platform.machine(),
        "batches": [compare(model, tokenizer, texts, int(b), args)
                    for b in args.batches.split(",")],
    }  # fmt: skip
    text = json.dumps(found, indent=2)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    if any(batch["unexplained_tokens"] for batch in found["batches"]):
        raise SystemExit("tokens differ from plain generate's, and are no near-ties")


def read_prompts(path: str, n: int, tokenizer) -> list[str]:
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()][-n:]
    texts = []
    for row in rows:
        if "question" in row and tokenizer.chat_template:
            chat = [{"role": "user", "content": row["question"]}]
            texts.append(
                tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            )
        else:
            texts.append(row.get("question") or " ".join(row["text"].split()[:12]))
    return texts


def compare(model, tokenizer, texts: list[str], batch: int, args) -> dict:
    """Both ways over all prompts, `batch` at a time."""
    options = dict(max_new_tokens=args.max_new_tokens, do_sample=False,
                   pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    ours = dict(custom_generate=args.head, trust_remote_code=True)
    if args.tree:
        ours["tree"] = args.tree
    groups = [texts[i : i + batch] for i in range(0, len(texts), batch)]
    inputs = [tokenizer(g, return_tensors="pt", padding=True, add_special_tokens=not
                        g[0].startswith(tokenizer.bos_token or "\0")) for g in groups]  # fmt: skip
    model.generate(**inputs[0], **options), model.generate(**inputs[0], **options, **ours)
    forwards = Counter(model)
    seconds, cpu_seconds = {"plain": [], "ours": []}, {"plain": [], "ours": []}
    counts = {"plain": 0, "ours": 0}
    tokens = differing = unexplained = 0
    reference = copy.deepcopy(model).double()
    for i, group in enumerate(inputs):
        made = {}
        for way in ("plain", "ours") if i % 2 else ("ours", "plain"):
            forwards.n, clock, cpu = 0, time.perf_counter(), time.process_time()
            made[way] = model.generate(**group, **options, **(ours if way == "ours" else {}))
            seconds[way].append(time.perf_counter() - clock)
            cpu_seconds[way].append(time.process_time() - cpu)
            counts[way] += forwards.n
        width = group.input_ids.shape[1]
        same = made["plain"].shape == made["ours"].shape
        for row in range(len(group.input_ids)):
            tokens += int((made["ours"][row, width:] != tokenizer.pad_token_id).sum())
            if same and torch.equal(made["plain"][row], made["ours"][row]):
                continue
            differing += 1
            prompt = group.input_ids[row][group.attention_mask[row].bool()]
            unexplained += far_off(model, reference, prompt, made["ours"][row, width:])
    forwards.handle.remove()
    return {
        "batch": batch, "prompts": len(texts), "tokens": tokens, "rows_that_differ": differing,
        "unexplained_tokens": unexplained, "forwards": counts,
        "clock": speed(seconds), "cpu_time": speed(cpu_seconds),
    }  # fmt: skip


def speed(seconds: dict[str, list[float]]) -> dict:
    """Total seconds, and plain over ours: of the totals, and the median over batches."""
    ratios = [p / o for p, o in zip(seconds["plain"], seconds["ours"], strict=True)]
    plain, ours = sum(seconds["plain"]), sum(seconds["ours"])
    return {
        "plain_s": round(plain, 2), "ours_s": round(ours, 2),
        "speedup_total": round(plain / ours, 3),
        "speedup_median": round(statistics.median(ratios), 3),
    }  # fmt: skip


class Counter:
    """Forward passes of the model."""

    def __init__(self, model):
        self.n = 0
        self.handle = model.base_model.register_forward_hook(self._count)

    def _count(self, *args) -> None:
        self.n += 1


@torch.no_grad()
def far_off(model, reference, prompt, new) -> int:
    """Tokens of a row that are not what the model says there, nor a near-tie with it."""
    ids = torch.cat([prompt, new])[None]
    eos = model.generation_config.eos_token_id
    first = len(prompt) - 1
    ours = model(ids[:, :-1]).logits[0, first:].double()
    exact = reference(ids[:, :-1]).logits[0, first:]
    error = (ours - exact).abs().amax(-1)
    gap = exact.amax(-1) - exact.gather(1, new[:, None])[:, 0]
    ended = (new == eos).cumsum(0) - (new == eos).long() > 0  # behind the first EOS: padding
    return int(((gap > 2 * error) & ~ended).sum())


if __name__ == "__main__":
    main()
