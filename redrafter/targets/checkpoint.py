"""Loading a causal LM so that it is the one in the checkpoint, and runs in its dtype; called by
`load_target` (load.py)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from redrafter.contracts import InputError

#: dtypes that torch's grouped products know, with which transformers computes experts by default
_GROUPED = (torch.float32, torch.bfloat16, torch.float16)
_NAMED = 3  # keys that a message shows


def load_complete(path: str, **kwargs: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained`, all of whose weights come from the checkpoint.

    transformers draws what a checkpoint lacks at random: another model at every load. Weights that
    are tied to others, and what a class can do without, are not missing.
    Raises InputError naming the folder and the missing weights.
    """
    from transformers import AutoModelForCausalLM

    with _one_report():
        # Other shapes are no error here, so that they are told of as what is missing is.
        model, found = AutoModelForCausalLM.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    kind = type(model).__name__
    if found["missing_keys"]:
        raise InputError(
            f"target.path: {path!r} lacks {_some(found['missing_keys'])}, which a {kind} needs and "
            "which would be drawn at random: give the folder of a whole causal LM (not of a bare "
            "backbone, a classifier or a checkpoint that was cut short)"
        )
    if found["mismatched_keys"]:
        names = [f"{n} ({tuple(a)}, not {tuple(b)})" for n, a, b in found["mismatched_keys"]]
        raise InputError(
            f"target.path: {path!r} has other shapes than its config.json says of {_some(names)}: "
            "its weights and its config.json do not belong together"
        )
    if found["unexpected_keys"]:
        warnings.warn(
            f"target.path: {path!r} has {_some(found['unexpected_keys'])}, for which a {kind} has "
            "no place; they are not used",
            stacklevel=2,
        )
    return model


@contextmanager
def _one_report() -> Iterator[None]:
    """transformers' table of missing and unused keys is not shown: the same is said here, without
    its advice to train what is missing. Where loading fails, its error may mean the table."""
    logger = logging.getLogger("transformers.modeling_utils")
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        reports = "LOAD REPORT" in record.getMessage()
        held.extend([record] * reports)
        return not reports

    logger.addFilter(hold)
    try:
        yield
    except Exception:
        logger.removeFilter(hold)
        for record in held:
            logger.handle(record)
        raise
    finally:
        logger.removeFilter(hold)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f", ... ({len(names)} in all)" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def choose_experts(model: Any, dtype: torch.dtype) -> None:
    """Experts are computed one by one where the grouped product lacks the dtype (float64)."""
    chosen = getattr(model, "get_experts_implementation", dict)()  # older versions have none
    if dtype not in _GROUPED and "grouped_mm" in chosen.values():
        model.set_experts_implementation("eager")
