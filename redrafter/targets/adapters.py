"""A target that is a base model plus an adapter, in a folder as peft saves it.

    adapter_config.json         names the base and the method (LoRA, IA3, LoHa, ...)
    adapter_model.safetensors   the adapter's weights; a pickled adapter_model.bin is not read

The adapter is merged into the base when it is loaded: a forward then costs what the base's costs,
and whatever works on a model (layer skipping, trees, another library) works on it. The weights are
rounded once to the dtype computed in; the merged model *is* the target, so decoding stays exact.
A quantised base would be rounded again to its few values, so there the adapter is kept: every
adapted layer then makes its small products on top. `Target(peft_model)` keeps it as well.

What identifies such a target is read off before anything is merged: base and adapter, each by its
own weights. So it is the same in every dtype, merged or kept, from a folder or from memory, and it
is neither that of the base nor that of a merged copy. Source: ours.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from redrafter.config import TargetConfig
from redrafter.contracts import InputError
from redrafter.files import digest_json, digest_weights

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Share of the adapter's own effect that merging it may be off by, where rounding is less.
_MERGE_ERROR = 0.1
_LM_HEAD = "outputs of the lm_head"
# Values of an adapter's configuration that do not change what it computes, or that its tensors'
# names and shapes tell already.
_FREE = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode",
    "init_lora_weights", "init_weights", "layers_pattern", "layers_to_transform", "lora_dropout",
    "modules_to_save", "peft_version", "revision", "runtime_config", "target_modules",
    "target_parameters", "task_type",
}  # fmt: skip


@dataclass(frozen=True)
class Adapter:
    """A readable adapter. folder: local, of both files; base, base_revision: what it sits on;
    vocab_rows: of the embeddings saved with it (a vocabulary that was resized), else None."""

    folder: Path
    base: str
    base_revision: str | None
    vocab_rows: int | None

    def base_config(self, config: TargetConfig) -> TargetConfig:
        """The target's configuration, of the bare base."""
        return replace(config, path=self.base, base=None, revision=self.base_revision)


@dataclass(frozen=True)
class WeightDigests:
    """Digests of a base's weights and of an adapter (empty where there is none), 16 digits each."""

    base: str
    adapter: str = ""


def import_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise InputError(
            "adapters need peft, which is not installed: pip install peft"
        ) from None
    return peft


def find_adapter(config: TargetConfig) -> Adapter | None:
    """The adapter that target.path is the folder (or Hub id) of; None for a whole model.

    Raises InputError naming the file where it cannot be used: pickled, damaged, no base.
    """
    from transformers.utils import find_adapter_config_file

    try:
        found = None
        if not config.path.endswith(".gguf"):
            found = find_adapter_config_file(config.path, revision=config.revision)
    except (OSError, ValueError):  # no such repository: whoever loads a model says so
        found = None
    if found is None:
        if config.base is not None:
            raise InputError(
                f"target.base is given, but target.path {config.path!r} has no {CONFIG}: give the "
                "adapter's folder as target.path, or no target.base"
            )
        return None
    file = Path(found)
    if (file.parent / "config.json").is_file():
        raise InputError(
            f"target.path: {file.parent} holds a whole model (config.json) and an adapter "
            f"({CONFIG}), and which of them is meant cannot be told: move one of them away"
        )
    import_peft()
    fields = _read_config(file)
    weights = _find_weights(config, file.parent)
    base = config.base or fields.get("base_model_name_or_path")
    remedy = f"correct base_model_name_or_path in {file}, or give target.base"
    if not base:
        raise InputError(f"target.path: {file} names no base model: {remedy}")
    if not os.path.exists(base) and not _HUB_ID.fullmatch(base):
        raise InputError(f"target.path: the base {base!r} named in {file} does not exist: {remedy}")
    if os.path.isfile(os.path.join(base, CONFIG)):
        raise InputError(
            f"target.path: the base {base!r} of {file} is an adapter itself: merge that one into "
            "its own base (peft's merge_and_unload), save it, and give it as target.base"
        )
    revision = None if config.base else fields.get("revision")
    return Adapter(file.parent, str(base), revision, _vocab_rows(weights))


def _read_config(file: Path) -> dict[str, Any]:
    """Raises InputError where peft does not know what is in it, or the loop could not run it."""
    peft = import_peft()
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        config = peft.PeftConfig.from_pretrained(str(file.parent))
    except Exception as error:  # as many classes as there are ways to be wrong
        raise InputError(
            f"{file} cannot be read as an adapter's configuration ({error}): save the adapter "
            "again with a peft that is not newer than this one"
        ) from None
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise InputError(
            f"{file}: {config.peft_type.value} puts tokens of its own before the text instead of "
            "changing weights; a token tree cannot be verified with it. Use an adapter of weights "
            "(LoRA, IA3, LoHa, ...)"
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise InputError(
            f"{file}: an activated LoRA switches on where certain tokens stand; it is no fixed "
            "model, and cannot be a target"
        )
    return fields


def _find_weights(config: TargetConfig, folder: Path) -> Path:
    """The safetensors file, downloaded where the adapter lies on the Hub."""
    weights = folder / WEIGHTS
    if weights.is_file():
        return weights
    if not os.path.isdir(config.path):
        from transformers.utils import cached_file

        try:
            return Path(cached_file(config.path, WEIGHTS, revision=config.revision))
        except OSError:
            pass  # it has none
    if (folder / PICKLED).is_file() or not os.path.isdir(config.path):
        raise InputError(
            f"{weights} does not exist; pickled weights ({folder / PICKLED}) are not read, as that "
            "can run any code: load the adapter with peft where you trust it, and save it again "
            "with save_pretrained(..., safe_serialization=True)"
        )
    raise InputError(f"{weights} does not exist: save the adapter again, or give another folder")


def _shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    import safetensors

    try:
        with safetensors.safe_open(weights, framework="pt") as opened:
            return {n: tuple(opened.get_slice(n).get_shape()) for n in opened.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise InputError(f"{weights} is damaged ({error}): copy or save it again") from None


def _vocab_rows(weights: Path) -> int | None:
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    # Of an adapted embedding its base_layer is saved.
    ends = tuple(f".{n}{of}.weight" for n in EMBEDDING_LAYER_NAMES for of in ("", ".base_layer"))
    rows = [shape[0] for name, shape in _shapes(weights).items() if name.endswith(ends)]
    return max(rows, default=None)


# ------------------------------------------------------------------------------------ loading


def apply_adapter(model: Any, adapter: Adapter) -> tuple[Any, WeightDigests]:
    """The base with its adapter, merged where that can be done, and what the two are.

    Raises InputError where the adapter does not fit the base, tensor by tensor: peft itself leaves
    out in silence what it finds no place for.
    """
    peft = import_peft()
    weights = adapter.folder / WEIGHTS
    rows = model.get_input_embeddings().weight.shape[0]
    # A base that is padded beyond its tokenizer shrinks as readily as others grow.
    if adapter.vocab_rows not in (None, rows):
        model.resize_token_embeddings(adapter.vocab_rows, mean_resizing=False)
        if adapter.vocab_rows > rows:
            _check_new_rows(model, weights, rows)
    try:
        adapted = peft.PeftModel.from_pretrained(model, str(adapter.folder))
    except Exception as error:  # ValueError, RuntimeError, KeyError, ..., by what does not fit
        first = " ".join(str(error).split("\n\t")[:2])  # it lists every tensor
        raise InputError(_misfit(weights, adapter, first)) from None
    expected = {name: tuple(t.shape) for name, t in _adapter_tensors(adapted).items()}
    # Resized embeddings are saved as the base's, and by some versions twice.
    there = expected.keys() | adapted.state_dict().keys()
    found = _shapes(weights)
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(n for n in found if n.replace(".modules_to_save.", ".") not in there)
    wrong = sorted(n for n in expected.keys() & found.keys() if expected[n] != found[n])
    if missing or unknown or wrong:
        why = "; ".join(
            f"{what} {names[:3]}{' ...' if len(names) > 3 else ''}"
            for what, names in (("no tensors for", missing), ("no place for", unknown),
                                ("other shapes of", wrong))
            if names
        )  # fmt: skip
        raise InputError(_misfit(weights, adapter, why))
    parts = digests_of(adapted)
    if getattr(model, "is_quantized", False):
        warnings.warn(
            f"{weights}: the base {adapter.base!r} is quantised, so the adapter is kept beside it "
            "instead of being merged: every forward pays for it",
            stacklevel=2,
        )
        return adapted.get_base_model(), parts
    return _merge(adapted, weights), parts


def _check_new_rows(model: Any, weights: Path, rows: int) -> None:
    """Raises InputError where the rows of a grown vocabulary are not in the file: they would be
    random. peft saves those of an adapted matrix, and then not those of the other one."""
    saved, ends = _shapes(weights), _ends(model).values()
    tied = len({id(module.weight) for module in ends}) == 1
    names = {name for name, module in model.named_modules() if module in ends}
    found = {
        name for name in names for of in ("", ".base_layer", ".modules_to_save")
        if f"{_PREFIX}{name}{of}.weight" in saved
    }  # fmt: skip
    for name in sorted(names - found):
        if not (tied and found):
            raise InputError(
                f"{weights} has more tokens than the {rows} of its base, but holds no "
                f"{name}.weight for the new ones: save "
                'the adapter with both matrices (modules_to_save=["embed_tokens", "lm_head"])'
            )


def _misfit(weights: Path, adapter: Adapter, why: str) -> str:
    return (
        f"{weights} does not fit the base {adapter.base!r} ({why}): it was trained for a model of "
        f"another architecture or size; correct base_model_name_or_path in "
        f"{adapter.folder / CONFIG}, or give target.base"
    )


def _merge(adapted: Any, weights: Path) -> Any:
    """The base with the adapter added to its weights, compared with the adapter applied."""
    adapted.eval()
    ends, applied = _ends(adapted), _said(adapted)
    with adapted.disable_adapter():
        bare = _said(adapted)
    try:
        model = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # each method has its own
        raise InputError(f"{weights} cannot be merged into its base: {error}") from None
    # What has no adapter is the module that it was, and must say what it said.
    same = {what for what, module in _ends(model).items() if module is ends[what]}
    dtype = model.get_input_embeddings().weight.dtype
    for what, merged in _said(model).items():
        size, effect = applied[what].norm(), (applied[what] - bare[what]).norm()
        error = (merged - applied[what]).norm()
        rounding = 0 * size if what in same else _rounding(dtype, what) * size
        if not bool(error.isfinite()):
            raise InputError(
                f"{weights}: with it, the {what} of the base are not finite in {dtype}: take a "
                "wider target.dtype"
            )
        if error > max(rounding, _MERGE_ERROR * effect):
            raise InputError(
                f"{weights}: merged into its base, the adapter computes something else: it changes "
                f"the {what} by {float(effect / size):.2g} of their size, merging by another "
                f"{float(error / size):.2g}, of which rounding is {float(rounding / size):.2g} at "
                f"most. Of two tied matrices peft {import_peft().__version__} merges an adapter on "
                "the lm_head into the embeddings too, with ensure_weight_tying twice: train with "
                'modules_to_save=["lm_head"] instead, which unties them, or on a base saved untied '
                "(tie_word_embeddings false), which also takes the adapters made without "
                "ensure_weight_tying: give it as target.base"
            )
    return model


def _rounding(dtype: torch.dtype, what: str) -> float:
    """The most that rounding merged weights once may change numbers by, relatively (ours): four
    times what was measured, which is half an eps for one product, 1 to 2.2 for the logits of 2 to
    16 layers, and 1.6 to 5 of float32's for the order of the sums. A lookup makes no sums: half an
    eps is what one rounding is at most."""
    eps = torch.finfo(dtype).eps
    sums = min(eps, torch.finfo(torch.float32).eps)
    return {"embeddings": 0.5, _LM_HEAD: 2, "logits": 8}[what] * eps + 20 * sums


def _ends(model: Any) -> dict[str, Any]:
    """The modules at both ends of a model; what it lacks, whoever loads it says."""
    ends = {"embeddings": model.get_input_embeddings(), _LM_HEAD: model.get_output_embeddings()}
    return {what: module for what, module in ends.items() if module is not None}


@torch.inference_mode()
def _said(model: Any) -> dict[str, torch.Tensor]:
    """What merging must not change, in float64: the logits of some tokens, and by themselves the
    two ends of the model, of which a small adapter's share is lost in the rounding of the whole."""
    ends = _ends(model)
    weight = ends["embeddings"].weight
    ids = probe_tokens(weight.shape[0], 8).to(weight.device)
    said = {"embeddings": ends["embeddings"](ids)}
    if _LM_HEAD in ends:
        random = torch.Generator().manual_seed(0)
        hidden = torch.randn(8, ends[_LM_HEAD].weight.shape[1], generator=random)
        said[_LM_HEAD] = ends[_LM_HEAD](hidden.to(weight.device, weight.dtype))
    said["logits"] = model(input_ids=ids, use_cache=False).logits
    return {what: numbers.double() for what, numbers in said.items()}


def probe_tokens(vocab_size: int, n: int) -> torch.Tensor:
    """(1, n) int64, ids spread over a vocabulary, the same everywhere."""
    return torch.arange(1, n + 1)[None] * 2654435761 % vocab_size


# ----------------------------------------------------------------------------------- identity


def plain_model(model: Any) -> Any:
    """A PeftModel as the transformers model inside, adapted layers and all; others as they are."""
    inside = getattr(model, "get_base_model", None)
    return inside() if callable(inside) and hasattr(model, "peft_config") else model


def digests_of(model: Any) -> WeightDigests:
    """What a model is made of; `model` as it is in memory, its adapter (if any) not merged.

    Raises InputError where there are several adapters.
    """
    configs = getattr(model, "peft_config", None)
    if not configs:
        return WeightDigests(digest_weights(model.named_parameters()))
    if len(configs) > 1:
        raise InputError(
            f"the model has several adapters ({', '.join(configs)}): delete all but one"
        )
    (config,) = configs.values()
    own = import_peft().mapping.PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type, "lora_")
    base = []
    for name, parameter in model.named_parameters():
        if own in name or ".modules_to_save." in name:
            continue
        for inside in (".base_layer.", ".original_module."):
            name = name.replace(inside, ".")
        base.append((name.removeprefix(_PREFIX), parameter))
    tensors = [(name.removeprefix(_PREFIX), t) for name, t in _adapter_tensors(model).items()]
    default = type(config)().to_dict()
    fields = {
        key: value
        for key, value in config.to_dict().items()
        if key not in _FREE and value != default.get(key)
    }
    return WeightDigests(digest_weights(base), digest_weights(tensors, digest_json(_plain(fields))))


def _plain(value: Any) -> Any:
    """JSON without sets."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else repr(value)


def _adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """As they are saved, without the adapter's name in memory."""
    (name,) = model.peft_config
    return import_peft().get_peft_model_state_dict(
        model, adapter_name=name, save_embedding_layers=False
    )
