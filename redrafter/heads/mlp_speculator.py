"""IBM's and Arctic's speculators (`model_type` mlp_speculator), as drafters.

    s_0 = c, or c / (sqrt(2) rms(c)) with scale_input
    s_k = GELU(norm_k(P_k s_{k-1} + a E_k[t_k]))            sum_rnn (IBM's, and Arctic's default)
    logits_k = O_k s_k

    f, i, o = sigmoid(P^{f,i,o}_k s_{k-1} + a E^{f,i,o}[t_k])                    sum_lstm (Arctic)
    m_k = f m_{k-1} + i GELU(norm_c(P^c_k s_{k-1} + a E^c[t_k])),  m_0 = 0
    s_k = o GELU(norm_s(m_k))

c = h_t is the hidden state that feeds the target's lm_head, t_1 the token that it predicted: as in
`heads/recurrent.py`, (h_t, t_1) first predicts token t+2. The embeddings E are the speculator's
own. norm(x) = w x / sqrt(mean(x^2) + 1e-6) + b. With n = n_predict and D = the inner width,
a = sqrt((1 - v^2) D / 2) / v where v = 0.5^(0.5 / n). Every level k has its own matrices, or, with
tie_weights, all share them but P_1. Depths beyond n were never trained and are not drafted.

Sources: arXiv 2404.19124; foundation-model-stack/fms-extras, models/speculator.py (training);
vllm-project/vllm, model_executor/models/mlp_speculator.py (tensor names, the form with a above);
snowflakedb/ArcticTraining, projects/mlp_speculator and arctic_lstm_speculator, and
snowflakedb/ArcticInference, vllm/spec_dec/arctic_speculator.py (sum_lstm, Arctic's names).
Refused: embeddings and projections of several layers (Arctic's "4096.4096"), which no published
configuration uses, and weights that only a pickle holds.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from redrafter.contracts import InputError
from redrafter.files import digest_weights
from redrafter.heads.reading import read_config, read_tensors, stored_shapes, weight_files

_EPS = 1e-6
_GATES = ("forget", "input", "output", "cell")


@dataclass(frozen=True)
class SpeculatorConfig:
    """What a speculator's `config.json` says, and what a target is compared with.

    hidden_size: H, of the target (emb_dim; Arctic: input_hidden_dim); inner_dim: D
    n_predict: levels; tie_lstm_embs: the four gates share one embedding
    The rest is as in `RecurrentHeadConfig`; whose head it is, their files do not say.
    """

    vocab_size: int
    hidden_size: int
    inner_dim: int
    n_predict: int
    method: str = "sum_rnn"
    tie_weights: bool = False
    tie_lstm_embs: bool = False
    scale_input: bool = False
    draft_vocab_size: int | None = None
    target_fingerprint: str = ""
    target_name: str = ""
    target_base: str = ""
    target_adapter: str = ""
    target_probe: None = None


class Norm(nn.Module):
    """Root mean square norm with weight and bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, _EPS) + self.bias


class MLPSpeculator(nn.Module):
    """See the module's docstring. Lists have one entry per level, or fewer where they are tied."""

    def __init__(self, config: SpeculatorConfig) -> None:
        super().__init__()
        self.config = config
        hidden, width, n = config.hidden_size, config.inner_dim, config.n_predict
        own = 1 if config.tie_weights else n

        def embeddings(count: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Embedding(config.vocab_size, width) for _ in range(count))

        def projections(count: int) -> nn.ModuleList:
            sizes = [hidden] + [width] * (count - 1)
            return nn.ModuleList(nn.Linear(size, width, bias=False) for size in sizes)

        def norms(count: int) -> nn.ModuleList:
            return nn.ModuleList(Norm(width) for _ in range(count))

        tied = min(2, n) if config.tie_weights else n
        if config.method == "sum_rnn":
            self.emb, self.proj, self.ln = embeddings(own), projections(tied), norms(own)
        else:
            for gate in _GATES:
                setattr(self, f"{gate}_proj", projections(tied))
            for gate in _GATES[:1] if config.tie_lstm_embs else _GATES:
                setattr(self, f"{gate}_emb", embeddings(own))
            self.cell_ln, self.state_ln = norms(own), norms(own)
        self.head = nn.ModuleList(
            nn.Linear(width, config.vocab_size, bias=False) for _ in range(own)
        )
        state_weight = 0.5 ** (0.5 / n)
        self.alpha = math.sqrt((1 - state_weight**2) * width / 2) / state_weight

    @property
    def max_depth(self) -> int:
        """Levels that it can draft."""
        return self.config.n_predict

    @property
    def draft_vocab_size(self) -> int:
        return self.config.vocab_size

    def to_vocab_ids(self, draft_ids: Tensor) -> Tensor:
        return draft_ids

    def bind(self, target: Any) -> MLPSpeculator:
        """It borrows nothing from the target."""
        return self

    def fingerprint(self) -> str:
        """16 hex digits over its weights."""
        if not hasattr(self, "_fingerprint"):
            self._fingerprint = digest_weights(self.state_dict().items())
        return self._fingerprint

    def read(
        self, target: Any, tokens: Tensor, context: Tensor, states: Tensor | None, level: int
    ) -> tuple[Tensor, Tensor]:
        """As `RecurrentHead.read`; states: (B, w, D), of sum_lstm (B, w, 2D), s beside m."""
        if states is None:
            states = context.to(self.head[0].weight.dtype)
            if self.config.scale_input:
                states = F.rms_norm(states, states.shape[-1:], eps=_EPS) / math.sqrt(2)
        if self.config.method == "sum_rnn":
            summed = self._sum("proj", "emb", states, tokens, level)
            states = seen = F.gelu(_of(self.ln, level)(summed))
        else:
            states, seen = self._lstm(states, tokens, level)
        return states, _of(self.head, level)(seen)

    def _sum(self, proj: str, emb: str, states: Tensor, tokens: Tensor, level: int) -> Tensor:
        z = _of(getattr(self, emb), level)(tokens)
        return _of(getattr(self, proj), level)(states) + self.alpha * z

    def _lstm(self, states: Tensor, tokens: Tensor, level: int) -> tuple[Tensor, Tensor]:
        memory = None
        if level > 1:
            states, memory = states.chunk(2, dim=-1)
        x = {}
        for gate in _GATES:
            emb = "forget" if self.config.tie_lstm_embs else gate
            x[gate] = self._sum(f"{gate}_proj", f"{emb}_emb", states, tokens, level)
        new = x["input"].sigmoid() * F.gelu(_of(self.cell_ln, level)(x["cell"]))
        if memory is not None:
            new = new + x["forget"].sigmoid() * memory
        seen = x["output"].sigmoid() * F.gelu(_of(self.state_ln, level)(new))
        return torch.cat((seen, new), dim=-1), seen


def _of(modules: nn.ModuleList, level: int) -> nn.Module:
    """The module of a level (1, 2, ...): its own, or the last one, which the others share."""
    return modules[min(level, len(modules)) - 1]


def load_mlp_speculator(folder: str | Path) -> MLPSpeculator:
    """Read a speculator, in the dtype that it is stored in.

    Raises InputError naming the file, and what does not fit or is not supported.
    """
    folder = Path(folder)
    config = parse_config(read_config(folder), folder / "config.json")
    files = weight_files(folder)
    with torch.device("meta"):
        head = MLPSpeculator(config)
    own = {name: tuple(p.shape) for name, p in head.named_parameters()}
    names: dict[str, list[str]] = defaultdict(list)  # own name -> those in the files
    for stored in stored_shapes(files):
        names[_own_name(stored, head)].append(stored)
    missing, unknown = sorted(set(own) - set(names)), sorted(set(names) - set(own))
    if missing or unknown:
        raise InputError(
            f"{folder}: missing tensors {missing}, unknown tensors {unknown}; the weights do not "
            "belong to the config.json beside them"
        )
    tensors = read_tensors(files, {copy: own[name] for name in own for copy in names[name]})
    for copies in names.values():
        first = tensors[copies[0]]
        if any(not torch.equal(tensors[copy], first) for copy in copies[1:]):
            raise InputError(
                f"{folder}: {', '.join(copies)} differ, but config.json says that they are tied"
            )
    head.load_state_dict({name: tensors[names[name][0]] for name in own}, assign=True)
    return head.requires_grad_(False)


def _own_name(stored: str, head: MLPSpeculator) -> str:
    """The name here of a tensor in a file, where tied ones may all stand: IBM's begin with
    `speculator.`, Arctic's are inside of a sequence of one."""
    name = stored.removeprefix("speculator.")
    found = re.fullmatch(r"(\w+)\.(\d+)(?:\.0)?\.(weight|bias)", name)
    if not found:
        return stored
    kind, index, end = found[1], int(found[2]), found[3]
    if head.config.tie_lstm_embs and kind in [f"{gate}_emb" for gate in _GATES]:
        kind = "forget_emb"
    modules = getattr(head, kind, None)
    if not isinstance(modules, nn.ModuleList) or index >= head.config.n_predict:
        return stored
    if head.config.tie_weights:
        index = min(index, len(modules) - 1)
    return f"{kind}.{index}.{end}"


def parse_config(fields: dict[str, Any], file: Path) -> SpeculatorConfig:
    """Raises InputError naming the file and the field that is missing, wrong or not supported."""

    def number(name: str, least: int = 1) -> int:
        value = fields.get(name)
        if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)+", value):
            raise InputError(
                f"{file}: {name} = {value!r}: speculators with several layers there are not "
                "supported; train one with a single width"
            )
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{file}: {name} is {value!r}; it must be an integer from {least} on")
        return value

    def flag(name: str) -> bool:
        value = fields.get(name, False)
        if not isinstance(value, bool):
            raise InputError(f"{file}: {name} is {value!r}; it must be true or false")
        return value

    method = fields.get("method", "sum_rnn")
    if method not in ("sum_rnn", "sum_lstm"):
        raise InputError(f"{file}: method {method!r} is neither sum_rnn nor sum_lstm")
    if "input_hidden_dim" in fields:  # Arctic's: emb_dim is the speculator's own
        hidden, inner = number("input_hidden_dim"), number("inner_dim")
        for name in ("emb_dim", "proj_dim"):
            if number(name) != inner:
                raise InputError(
                    f"{file}: {name} is {fields[name]!r} and inner_dim {inner}; they are added up "
                    "and must be equal"
                )
    else:
        hidden = number("emb_dim")
        inner = (number("inner_dim", least=0) if "inner_dim" in fields else 0) or hidden
    config = SpeculatorConfig(
        vocab_size=number("vocab_size"),
        hidden_size=hidden,
        inner_dim=inner,
        n_predict=number("n_predict"),
        method=method,
        tie_weights=flag("tie_weights"),
        tie_lstm_embs=flag("tie_lstm_embs") and method == "sum_lstm",
        scale_input=flag("scale_input"),
        target_name=Path(str(fields.get("base_model_name_or_path", ""))).name,
    )
    if method == "sum_lstm" and not config.tie_weights:
        raise InputError(f"{file}: method sum_lstm has tied weights, tie_weights is false")
    return config
