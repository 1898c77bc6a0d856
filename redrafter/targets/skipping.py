"""Running the target without some of its attention sub-blocks, and seeing which ones matter least.

Nothing is copied: a skipped attention's `forward` is replaced for as long as it is skipped, by one
that gives back zero. It then is the identity on the residual stream: no queries, keys, values or
output projection, and nothing written to the cache or read from it.

Which module is an attention is found out by running the model, not by a name: it is the child of a
decoder layer in which the cache is written. That the layer may be run without it is tried with
random numbers: h -> G(h + attention), and nothing else of the layer may look at the attention.

Sources: attention only, chosen by cosine similarity, Draft on the Fly (arXiv 2410.01028); the
target as its own draft, Draft & Verify (2309.08168). The probing is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import RLock, get_ident
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from redrafter.contracts import InputError
from redrafter.targets.model import Target

_LARGE = 3.0  # a constant that no normalisation leaves as it is
_AGREE = 1e-3  # share of the MLP's own change; an additive residual gives 0 in every dtype


@dataclass(frozen=True)
class _Block:
    """A decoder layer and its attention. as_tuple: outputs of the attention, 0 where it gives a
    bare tensor."""

    layer: nn.Module
    attention: nn.Module
    as_tuple: int


class Cosines:
    """What `AttentionSkipping.measure` gives: sees forwards between `__enter__` and `__exit__`."""

    def __init__(self, blocks: list[_Block]):
        self._blocks = blocks
        self._values: list[Tensor | None] = [None] * len(blocks)
        self._hooks = ExitStack()

    def __enter__(self) -> Cosines:
        for index, block in enumerate(self._blocks):
            for handle in self._watch(block, index):
                self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *error) -> None:
        self._hooks.close()

    def stacked(self) -> Tensor | None:
        """(L, B, T) float32 of the last forward: entry t belongs to its t-th token, padding
        included. None if there was no complete one."""
        if any(v is None for v in self._values):
            return None
        return torch.stack([v.to(self._values[0].device) for v in self._values])

    def _watch(self, block: _Block, index: int) -> list:
        stream, here = {}, get_ident()

        def before(module, args, kwargs):
            if get_ident() == here:
                stream["in"] = _first(args, kwargs)

        def after(module, args, kwargs, output):
            if get_ident() != here:
                return
            hidden = stream.pop("in").float()
            added = (output[0] if block.as_tuple else output).float()
            self._values[index] = torch.cosine_similarity(hidden, hidden + added, dim=-1)

        return [
            block.layer.register_forward_pre_hook(before, with_kwargs=True),
            block.attention.register_forward_hook(after, with_kwargs=True),
        ]


class AttentionSkipping:
    """The attention sub-blocks of a target.

    n_layers: L; weights: numbers that a forward of one token multiplies by (lm_head counted,
    embeddings not); attention_weights: those of each layer's attention
    Raises InputError where the target is not built so that attentions can be left out (parallel
    residuals, norms behind the attention, scaled residuals).
    """

    def __init__(self, target: Target):
        self._blocks = _find_blocks(target)
        self.n_layers = len(self._blocks)
        looked_up = {
            id(p)
            for module in target.backbone.modules()
            if isinstance(module, nn.Embedding)
            for p in module.parameters()
        }
        head = {id(p) for p in target.lm_head.parameters()}
        every = {id(p): p for m in (target.backbone, target.lm_head) for p in m.parameters()}
        self.weights = sum(p.numel() for i, p in every.items() if i in head or i not in looked_up)
        self.attention_weights = [
            sum(p.numel() for p in block.attention.parameters()) for block in self._blocks
        ]

    def check(self, layers: Iterable[int]) -> tuple[int, ...]:
        """Ascending, once each. Raises InputError for one that the target has not."""
        layers = tuple(sorted(set(layers)))
        for layer in layers:
            if not 0 <= layer < self.n_layers:
                raise InputError(
                    f"layer skipping: there is no layer {layer}; the target's are 0 to "
                    f"{self.n_layers - 1}"
                )
        return layers

    def weights_skipped(self, layers: Iterable[int]) -> float:
        """Share of `weights` that is not read without these attentions: the saving of a forward
        that is bound by memory, and of its products too; keys not read come on top."""
        return sum(self.attention_weights[layer] for layer in layers) / self.weights

    @contextmanager
    def without_attention(self, layers: Iterable[int]) -> Iterator[None]:
        """Whatever runs the target inside runs without the attentions of these layers, in
        whichever way it is called; afterwards, and after an error, all is as it was.

        The norm before a skipped attention and an addition of zero remain: with 6 layers of 288
        on one x86-64 core, 17 and 2 us a layer, where an attention is 330. To leave the norm out
        too would ask who else reads it. Other threads run the target as it is; those that would
        leave something out, too, wait.
        """
        with _patching, ExitStack() as stack:
            for layer in self.check(layers):
                block = self._blocks[layer]
                nothing = _gives(torch.zeros_like, block.as_tuple)
                stack.enter_context(_replaced(block.attention, nothing))
            yield

    def measure(self) -> Cosines:
        """Sees the cosine of the residual stream before and after every layer's attention,
        cos(h_in, h_in + attention), in the forwards that are made inside.

        A forward cannot tell real tokens from padding, nor accepted nodes from others. So a
        cosine is kept for every one of its (B, T) tokens, and whoever averages takes those that
        turned out real: below a row's length in a right-padded prefill, on the accepted path in
        a verification. Causal attention keeps the padding out of real positions.
        """
        return Cosines(self._blocks)


# ------------------------------------------------------------------------------------ patching


#: held by who has replaced a forward: of two, the first would put back what is the second's
_patching = RLock()


@contextmanager
def _replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """`module.forward` is another function for a while, for this thread. A module may have one of
    its own already (accelerate's hooks), which is put back."""
    own, here, usual = vars(module), get_ident(), module.forward
    before = own.get("forward")
    own["forward"] = lambda *a, **k: (forward if get_ident() == here else usual)(*a, **k)
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


def _first(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among a layer's or an attention's arguments."""
    if not args and "hidden_states" not in kwargs:
        raise InputError(
            f"layer skipping: a layer is called with {', '.join(kwargs)}, none of which is known "
            "to be the hidden states; draft another way"
        )
    return args[0] if args else kwargs["hidden_states"]


def _gives(value: Callable[[Tensor], Tensor], as_tuple: int) -> Callable:
    def forward(*args, **kwargs):
        out = value(_first(args, kwargs))
        return (out, *[None] * (as_tuple - 1)) if as_tuple else out

    return forward


# ------------------------------------------------------------------------------------- probing


@dataclass
class _Found:
    """What one forward showed of a layer."""

    attention: nn.Module | None = None
    writes: int = 0
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    as_tuple: int = 0


class _Trace:
    """Which modules are running, what the layers are given, and where the cache is written."""

    def __init__(self, layers: nn.ModuleList):
        self.running: list[nn.Module] = []
        self.layers = {id(layer): index for index, layer in enumerate(layers)}
        self.found = [_Found() for _ in layers]

    def _above(self) -> tuple[_Found | None, int]:
        """The layer that runs, and its place among the running modules."""
        for place, module in enumerate(self.running):
            if id(module) in self.layers:
                return self.found[self.layers[id(module)]], place
        return None, 0

    def enter(self, module, args, kwargs):
        self.running.append(module)
        found, place = self._above()
        if found and place == len(self.running) - 1:
            found.args, found.kwargs = args, kwargs

    def leave(self, module, args, kwargs, output):
        found, _ = self._above()
        self.running.pop()
        if found and module is found.attention:
            found.as_tuple = len(output) if isinstance(output, tuple) else 0

    def cache_written(self):
        found, place = self._above()
        if found:
            found.writes += 1
            inside = self.running[place + 1 :]
            found.attention = inside[0] if inside else None


class _TracedCache(DynamicCache):
    def __init__(self, trace: _Trace):
        super().__init__()
        self._trace = trace

    def update(self, *args, **kwargs):
        self._trace.cache_written()
        return super().update(*args, **kwargs)


@torch.inference_mode()
def _find_blocks(target: Target) -> list[_Block]:
    """One forward of two tokens shows where the attentions are; see the module's docstring."""
    lists = [
        m for m in target.backbone.modules()
        if isinstance(m, nn.ModuleList) and len(m) == target.n_layers
    ]  # fmt: skip
    for layers in lists:
        trace = _Trace(layers)
        with ExitStack() as stack:
            for module in target.backbone.modules():
                for handle in (
                    module.register_forward_pre_hook(trace.enter, with_kwargs=True),
                    module.register_forward_hook(trace.leave, with_kwargs=True),
                ):
                    stack.callback(handle.remove)
            ids = torch.tensor([[0, min(1, target.vocab_size - 1)]], device=target.device)
            target.backbone(input_ids=ids, past_key_values=_TracedCache(trace), use_cache=True)
        if all(f.writes == 1 and f.attention is not None for f in trace.found):
            pairs = list(zip(layers, trace.found, strict=True))
            blocks = [_Block(layer, found.attention, found.as_tuple) for layer, found in pairs]
            for index, found in enumerate(trace.found):
                _check_residual(target, index, blocks[index], found)
            return blocks
    raise InputError(
        f"layer skipping: {target.name} ({target.config.model_type}) has no list of layers with "
        "one attention each that writes the cache; draft another way"
    )


def _check_residual(target: Target, index: int, block: _Block, found: _Found) -> None:
    """Let F(h, a) be the layer whose attention says a. It must be G(h + a): F(h, c) = F(h + c, 0)
    for random h and c. Raises InputError otherwise."""
    hidden = _first(found.args, found.kwargs)
    random = torch.Generator().manual_seed(index)
    h, c = torch.randn(2, *hidden.shape, generator=random).to(hidden)
    c = c * _LARGE

    def run(stream: Tensor, said: Tensor) -> Tensor:
        args, kwargs = found.args, found.kwargs
        if args:
            args = (stream, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": stream}
        with _replaced(block.attention, _gives(lambda _: said, block.as_tuple)):
            out = block.layer(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    zero = torch.zeros_like(c)
    given, added = run(h, c), run(h + c, zero)
    # What the rest of the layer makes of the difference c: a layer that ignores it is told apart.
    change = ((added - (h + c)) - (run(h, zero) - h)).abs().max()
    if (given - added).abs().max() > _AGREE * change:
        raise InputError(
            f"layer skipping: layer {index} of {target.name} ({target.config.model_type}) is not "
            "h -> x + mlp(norm(x)) with x = h + attention (a parallel residual, a norm behind the "
            "attention, or a scaled residual); draft another way"
        )
