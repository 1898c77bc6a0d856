"""The MLP speculator: IBM's, trained and written in IBM's layout, and Arctic's, as a drafter.

    s_0 = c, or c / (sqrt(2) rms(c)) with scale_input
    s_k = GELU(norm_k(P_k s_{k-1} + a E_k[t_k]))            sum_rnn (IBM's, and Arctic's default)
    logits_k = O_k s_k

    f, i, o = sigmoid(P^{f,i,o}_k s_{k-1} + a E^{f,i,o}[t_k])                    sum_lstm (Arctic)
    m_k = f m_{k-1} + i GELU(norm_c(P^c_k s_{k-1} + a E^c[t_k])),  m_0 = 0
    s_k = o GELU(norm_s(m_k))

c = h_t is the hidden state that feeds the target's lm_head, t_1 the token that it predicted,
aligned as in `heads/base.py`. The embeddings E are the speculator's own. norm(x) = w x /
sqrt(mean(x^2) + 1e-6) + b. With n = n_predict and D = the inner width, a = sqrt((1 - v^2) D / 2) /
v where v = 0.5^(0.5 / n). Every level k has its own matrices, or, with tie_weights, all share them
but P_1. Depths beyond n were never trained and are not drafted.
Parameters of sum_rnn: H D + (n-1) D^2 + n (2 V D + 2 D); tied, H D + D^2 + 2 V D + 2 D.

Sources: arXiv 2404.19124; foundation-model-stack/fms-extras, models/speculator.py (training);
vllm-project/vllm, model_executor/models/mlp_speculator.py (tensor names, the form with a above);
snowflakedb/ArcticTraining, projects/mlp_speculator and arctic_lstm_speculator, and
snowflakedb/ArcticInference, vllm/spec_dec/arctic_speculator.py (sum_lstm, Arctic's names).
A new head begins as fms-extras' does: matrices normal with deviation 1 / sqrt(D), norms 1 and 0.
Refused: embeddings and projections of several layers (Arctic's "4096.4096"), which no published
configuration uses, weights that only a pickle holds, and training a sum_lstm.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from redrafter.contracts import InputError
from redrafter.files import digest_weights, write_json
from redrafter.heads.base import DraftHead, DraftHeadConfig
from redrafter.heads.reading import read_config, read_tensors, stored_shapes, weight_files
from redrafter.products import Linear

#: fields of all our heads that their files have no place for
OWN_FIELDS = (
    "target_fingerprint", "target_name", "target_base", "target_adapter", "target_probe",
    "trained_depth", "redrafter_version",
)  # fmt: skip
_EPS = 1e-6
_GATES = ("forget", "input", "output", "cell")


class SpeculatorConfig(DraftHeadConfig):
    """What a speculator is made of, beside what all heads say (`DraftHeadConfig`); `config.json`
    has IBM's keys, and this library's own beside them.

    inner_dim: D (None or 0 = H); n_predict: levels
    tie_weights, scale_input, method: see the module's docstring
    tie_lstm_embs: the four gates of sum_lstm share one embedding
    """

    model_type = "mlp_speculator"
    choices = {"method": ("sum_rnn", "sum_lstm")}  # noqa: RUF012
    least = {"inner_dim": 1, "n_predict": 1}  # noqa: RUF012

    inner_dim: int | None = None
    n_predict: int = 3
    tie_weights: bool = False
    scale_input: bool = False
    method: str = "sum_rnn"
    tie_lstm_embs: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.inner_dim = self.inner_dim or self.hidden_size
        super().__post_init__(**kwargs)

    def check(self, where: str = "head config") -> None:
        super().check(where)
        if self.draft_vocab_size is not None:
            raise InputError(f"{where}: draft_vocab_size: a speculator drafts the whole vocabulary")
        if self.prefix != "none":
            raise InputError(f"{where}: prefix: a speculator's files have no place for its layer")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> SpeculatorConfig:
        fields = dict(config_dict)
        if "emb_dim" in fields:
            fields["hidden_size"] = fields.pop("emb_dim")
        return super().from_dict(fields, **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write `config.json`. Levels of the candidate tree are asked for by IBM's own decoder."""
        own = {name: getattr(self, name) for name in OWN_FIELDS}
        n = self.n_predict
        theirs = {
            "architectures": ["MLPSpeculatorPreTrainedModel"],
            "emb_dim": self.hidden_size,
            "inner_dim": self.inner_dim,
            "model_type": self.model_type,
            "n_candidates": 5,
            "n_predict": n,
            "scale_input": self.scale_input,
            "tie_weights": self.tie_weights,
            "top_k_tokens_per_head": [max(2, 5 - level) for level in range(n)],
            "torch_dtype": str(self.dtype).removeprefix("torch."),
            "vocab_size": self.vocab_size,
        }
        write_json(Path(save_directory) / "config.json", theirs | own)


class Norm(nn.Module):
    """Root mean square norm with weight and bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, _EPS) + self.bias


class Levels(nn.Module):
    """The maps of all levels, by IBM's names: lists with one entry per level, or fewer where they
    are tied."""

    def __init__(self, config: SpeculatorConfig) -> None:
        super().__init__()
        hidden, width, n = config.hidden_size, config.inner_dim, config.n_predict
        own = 1 if config.tie_weights else n

        def embeddings(count: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Embedding(config.vocab_size, width) for _ in range(count))

        def projections(count: int) -> nn.ModuleList:
            sizes = [hidden] + [width] * (count - 1)
            return nn.ModuleList(Linear(size, width, bias=False) for size in sizes)

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


class MLPSpeculator(DraftHead):
    """See the module's docstring."""

    config_class = SpeculatorConfig
    kind = "mlp_speculator"
    paper = ("IBM's MLP speculator", "2404.19124")
    depth_field = "n_predict"
    smaller = "head.tie_weights true, or a smaller head.inner_dim"

    def __init__(self, config: SpeculatorConfig) -> None:
        super().__init__(config)
        self.speculator = Levels(config)
        state_weight = 0.5 ** (0.5 / config.n_predict)
        self.alpha = math.sqrt((1 - state_weight**2) * config.inner_dim / 2) / state_weight
        self.post_init()

    @torch.no_grad()
    def begin(self, target: Any) -> None:
        for module in self.speculator.modules():
            if isinstance(module, (nn.Embedding, nn.Linear)):
                module.weight.normal_(0.0, 1.0 / math.sqrt(self.config.inner_dim))

    @property
    def only_drafts(self) -> str | None:
        if self.config.method == "sum_rnn":
            return None
        return f"a speculator of the method {self.config.method} (trained here: sum_rnn)"

    def output_layer(self, level: int = 1) -> nn.Linear:
        return _of(self.speculator.head, level)

    def summary(self) -> str:
        config = self.config
        weights = "tied weights" if config.tie_weights else "weights of each level"
        return f"{config.n_predict} levels of width {config.inner_dim}, {weights}"

    def fingerprint(self) -> str:
        """16 hex digits over its weights; in either layout, with and without IBM's prefix, the
        same."""
        if not hasattr(self, "_fingerprint"):
            self._fingerprint = digest_weights(self.speculator.state_dict().items())
        return self._fingerprint

    def advance(
        self, target: Any, tokens: Tensor, context: Tensor, states: Tensor | None, level: int
    ) -> Tensor:
        """s_level, (..., D); of sum_lstm (..., 2D), s beside m."""
        states = self._begun(context) if states is None else states
        if self.config.method == "sum_rnn":
            return self._rnn(states, _of(self.speculator.emb, level)(tokens), level)
        return self._lstm(states, tokens, level)

    def forward(self, context: Tensor, tokens: Tensor, target: Any) -> Tensor:
        """As every head's; a table that all levels share is looked up once, as each lookup would
        bring a gradient of the size of the table."""
        if self.config.method != "sum_rnn" or not self.config.tie_weights:
            return super().forward(context, tokens, target)
        states, found = self._begun(context), []
        for level, e in enumerate(self.speculator.emb[0](tokens).unbind(-2), start=1):
            states = self._rnn(states, e, level)
            found.append(states)
        return torch.stack(found, dim=-2)

    def _begun(self, context: Tensor) -> Tensor:
        """s_0."""
        states = context.to(self.speculator.head[0].weight.dtype)
        if self.config.scale_input:
            states = F.rms_norm(states, states.shape[-1:], eps=_EPS) / math.sqrt(2)
        return states

    def _rnn(self, states: Tensor, e: Tensor, level: int) -> Tensor:
        summed = _of(self.speculator.proj, level)(states) + self.alpha * e
        return F.gelu(_of(self.speculator.ln, level)(summed))

    def features(self, context: Tensor, states: Tensor, level: int = 1) -> Tensor:
        return states if self.config.method == "sum_rnn" else states.chunk(2, dim=-1)[0]

    def _sum(self, proj: str, emb: str, states: Tensor, tokens: Tensor, level: int) -> Tensor:
        z = _of(getattr(self.speculator, emb), level)(tokens)
        return _of(getattr(self.speculator, proj), level)(states) + self.alpha * z

    def _lstm(self, states: Tensor, tokens: Tensor, level: int) -> Tensor:
        memory = None
        if level > 1:
            states, memory = states.chunk(2, dim=-1)
        x = {}
        for gate in _GATES:
            emb = "forget" if self.config.tie_lstm_embs else gate
            x[gate] = self._sum(f"{gate}_proj", f"{emb}_emb", states, tokens, level)
        new = x["input"].sigmoid() * F.gelu(_of(self.speculator.cell_ln, level)(x["cell"]))
        if memory is not None:
            new = new + x["forget"].sigmoid() * memory
        seen = x["output"].sigmoid() * F.gelu(_of(self.speculator.state_ln, level)(new))
        return torch.cat((seen, new), dim=-1)


def _of(modules: nn.ModuleList, level: int) -> nn.Module:
    """The module of a level (1, 2, ...): its own, or the last one, which the others share."""
    return modules[min(level, len(modules)) - 1]


HEAD = MLPSpeculator


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
    # Copies: files are mapped, and whoever goes on training changes weights in place.
    weights = {name: tensors[names[name][0]].clone() for name in own}
    head.load_state_dict(weights, assign=True)
    return head


def save_speculator(head: DraftHead, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors` in IBM's layout. Raises InputError for a head of
    another kind."""
    if not isinstance(head, MLPSpeculator):
        raise InputError(f"IBM's layout is for speculators; this is a {head.kind} head")
    head.save_pretrained(folder)


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
    modules = getattr(head.speculator, kind, None)
    if not isinstance(modules, nn.ModuleList) or index >= head.config.n_predict:
        return stored
    if head.config.tie_weights:
        index = min(index, len(modules) - 1)
    return f"speculator.{kind}.{index}.{end}"


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
    own = {name: fields[name] for name in OWN_FIELDS if name in fields}
    config = SpeculatorConfig(
        vocab_size=number("vocab_size"),
        hidden_size=hidden,
        inner_dim=inner,
        n_predict=number("n_predict"),
        method=method,
        tie_weights=flag("tie_weights"),
        tie_lstm_embs=flag("tie_lstm_embs") and method == "sum_lstm",
        scale_input=flag("scale_input"),
        **{"target_name": Path(str(fields.get("base_model_name_or_path", ""))).name, **own},
    )
    if method == "sum_lstm" and not config.tie_weights:
        raise InputError(f"{file}: method sum_lstm has tied weights, tie_weights is false")
    return config
