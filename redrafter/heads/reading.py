"""Reading the folders of draft heads: `config.json`, and tensors that must be the expected ones.

Weights are safetensors, in one file or in shards as transformers writes them. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import safetensors
from torch import Tensor, nn

from redrafter.contracts import InputError

Head = TypeVar("Head", bound=nn.Module)

_PICKLES = {"model": "pytorch_model.bin"}  # of others: their own name, .pt
#: to be run by whoever trusts the file; tied matrices share memory, which safetensors refuses
_CONVERT = (
    'python -c "import torch, safetensors.torch as s; '
    "s.save_file({{k: v.clone() for k, v in torch.load('{pickle}', "
    "weights_only=True).items()}}, '{stem}.safetensors')\""
)


def read_config(folder: str | Path) -> dict[str, Any]:
    """`config.json` of a head's folder. Raises InputError naming the file."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise InputError(f"{file} does not exist: {folder} is not the folder of a draft head")
    return read_json(file)


def read_json(file: Path, remedy: str = "save the head again") -> dict[str, Any]:
    """The object in a file. Raises InputError naming it and the remedy where it holds none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not valid JSON ({error}): {remedy}") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no JSON object: {remedy}")
    return content


def weight_files(folder: str | Path, *stems: str) -> list[Path]:
    """`model.safetensors` of a folder, or the shards that its index names.

    stems: other names that its file may have in place of `model`, looked for first
    Raises InputError where there is none of them; what only a pickle holds is not read.
    """
    folder = Path(folder)
    names = [*stems, "model"]
    for stem in names:
        if (folder / f"{stem}.safetensors").is_file():
            return [folder / f"{stem}.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        found = sorted(set(shards.values())) if isinstance(shards, dict) else []
        if not found or any(Path(name).name != name for name in found):
            raise InputError(f"{index} names no shards beside it: save the head again")
        return [folder / name for name in found]
    for stem in names:
        pickle = _PICKLES.get(stem, f"{stem}.pt")
        if (folder / pickle).is_file():
            raise InputError(
                f"{folder} has its weights in {pickle} alone, a pickle, which could run any "
                "code and is not read. If you trust it, convert it in that folder: "
                + _CONVERT.format(pickle=pickle, stem=stem)
            )
    missing = folder / f"{names[0]}.safetensors"
    raise InputError(f"{missing} does not exist: save the head again or give another folder")


def stored_shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in safetensors files, by name; no tensor is read.

    Raises InputError naming a file that is missing or damaged.
    """
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        if not file.is_file():
            raise InputError(f"{file} does not exist: save the head again or give another folder")
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - no mapping
                    found[name] = tuple(opened.get_slice(name).get_shape())
        except safetensors.SafetensorError as error:
            raise InputError(f"{file} is damaged ({error}): copy or save it again") from None
    return found


def read_tensors(
    files: Path | Sequence[Path], expected: dict[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Tensors of safetensors files whose names and shapes must be the expected ones.

    Raises InputError naming the file where one is missing, damaged, or holds something else.
    """
    files = [files] if isinstance(files, Path) else list(files)
    found, where = stored_shapes(files), ", ".join(map(str, files))
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        raise InputError(
            f"{where}: missing tensors {missing}, unknown tensors {unknown}; "
            "the weights do not belong to the config.json beside them"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise InputError(
                f"{where}: tensor {name} has shape {found[name]}, config.json says {shape}"
            )
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safetensors.safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                tensors[name] = opened.get_tensor(name)
    return {name: tensors[name] for name in expected}


def with_weights(head: Head, folder: Path) -> Head:
    """The head with the weights of a folder, in the dtype that they are stored in."""
    expected = {name: tuple(t.shape) for name, t in head.state_dict().items()}
    tensors = read_tensors(weight_files(folder), expected)
    stored = next(t.dtype for t in tensors.values() if t.is_floating_point())
    head.to(stored).load_state_dict(tensors)
    return head
