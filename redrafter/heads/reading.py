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

_WEIGHTS = "model.safetensors"
#: to be run by whoever trusts the file; tied matrices share memory, which safetensors refuses
_CONVERT = (
    'python -c "import torch, safetensors.torch as s; '
    "s.save_file({k: v.clone() for k, v in torch.load('pytorch_model.bin', "
    "weights_only=True).items()}, 'model.safetensors')\""
)


def read_config(folder: str | Path) -> dict[str, Any]:
    """`config.json` of a head's folder. Raises InputError naming the file."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise InputError(f"{file} does not exist: {folder} is not the folder of a draft head")
    return _read_json(file)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not valid JSON ({error}): save the head again") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no JSON object: save the head again")
    return content


def weight_files(folder: str | Path) -> list[Path]:
    """`model.safetensors` of a folder, or the shards that its index names.

    Raises InputError where there is neither; what only a pickle holds is not read.
    """
    folder = Path(folder)
    index = folder / f"{_WEIGHTS}.index.json"
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        names = sorted(set(shards.values())) if isinstance(shards, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise InputError(f"{index} names no shards beside it: save the head again")
        return [folder / name for name in names]
    if (folder / "pytorch_model.bin").is_file():
        raise InputError(
            f"{folder} has its weights in pytorch_model.bin alone, a pickle, which could run any "
            f"code and is not read. If you trust it, convert it in that folder: {_CONVERT}"
        )
    raise InputError(
        f"{folder / _WEIGHTS} does not exist: save the head again or give another folder"
    )


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
