"""Hidden states between a folder of speculators 0.9 and a store, either way.

    FOLDER/                            a data set of `datasets` (save_to_disk): a row i has
                                       input_ids, loss_mask, seq_len
    FOLDER/hidden_states/hs_I.safetensors   of row i: token_ids (T,), hidden_states (T, layers, H),
                                       in 8 bits with hidden_states_scales (T, 1, 1)

The last of the layers is the stream before the target's final norm, whatever the others are; a
store holds it behind that norm, which is applied here. On the way back the norm is undone. Source:
the format of speculators 0.9 (its trainer reads `hidden_states[:, -1]` as the verifier's last).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from redrafter.bars import Bar
from redrafter.config import StatesConfig
from redrafter.contracts import InputError
from redrafter.data.build_rows import need_rows
from redrafter.data.filling import Shard, fill, open_filled
from redrafter.data.finite import finite_rows, left_out, rows_kept
from redrafter.data.rows import row_digest
from redrafter.data.states import StateMaker, check_target, decoded, groups_of, refuse_size
from redrafter.data.store import Store, open_job
from redrafter.data.vocabulary import check_ids
from redrafter.files import digest_json, write_tensors
from redrafter.processes import by_main
from redrafter.targets.final_norm import final_norm, undo
from redrafter.targets.model import Target

_COLUMNS = {"input_ids", "loss_mask"}
#: median relative difference of states up to which they are the target's; another layer's, another
#: position's or another checkpoint's differ by several tenths
CLOSE = 0.1


class SpeculatorsFolder:
    """Reads it; of a row's file only what is asked for.

    hidden_states: where the hs_I files lie, if not in FOLDER/hidden_states
    Raises InputError where it is no such folder.
    """

    def __init__(self, folder: str | Path, hidden_states: str | Path | None = None):
        from datasets import Dataset, load_from_disk

        self.folder = Path(folder)
        self.files = Path(hidden_states) if hidden_states else self.folder / "hidden_states"
        try:
            self.data = load_from_disk(str(folder))
        except (OSError, ValueError) as error:  # each of its own kinds
            raise InputError(f"{folder} is no data set of `datasets` on disk ({error})") from None
        found = set(self.data.column_names) if isinstance(self.data, Dataset) else set()
        if not found >= _COLUMNS:
            raise InputError(
                f"{folder} has the columns {sorted(found)}, where speculators puts input_ids and "
                "loss_mask: is it the folder of its prepared data?"
            )
        if not self.files.is_dir():
            raise InputError(
                f"{self.files} does not exist: name the folder of the hs_*.safetensors with "
                "--hidden_states"
            )

    def file(self, row: int) -> Path:
        return self.files / f"hs_{row}.safetensors"

    def stream(self, row: int, ids: list[int]) -> Tensor:
        """(T, layers, H) as stored, float32 where it is in 8 bits. Raises InputError where the
        file is not that row's."""
        path = self.file(row)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                made = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            tokens, stream = made["token_ids"], made["hidden_states"]
        except (OSError, safetensors.SafetensorError, KeyError) as error:
            raise InputError(f"{path} cannot be read ({error!r})") from None
        if tokens.tolist() != ids or stream.dim() != 3 or len(stream) != len(ids):
            raise InputError(
                f"{path} holds {len(tokens)} tokens and states {tuple(stream.shape)}, which are "
                f"not those of the row's {len(ids)} tokens"
            )
        if stream.element_size() > 1:
            return stream
        if "hidden_states_scales" not in made:
            raise InputError(f"{path}: states in 8 bits without hidden_states_scales")
        return stream.float() * made["hidden_states_scales"].float()


def import_states(
    target: Target,
    source: SpeculatorsFolder,
    config: StatesConfig,
    folder: str | Path,
    *,
    check_rows: int = 8,
    progress: bool = True,
) -> Store:
    """A store of states from a speculators folder, or open what was imported before.

    check_rows: rows whose states are compared with the target's own first; 0 trusts the folder
    Rows without a file or anything to learn, and duplicates, are skipped; a file that is not its
    row's makes the row a failed one. Raises InputError where the states are not this target's.
    """
    maker = StateMaker(target, config)
    rows, unused = _rows_of(source, target)
    names = [[row, source.file(row).stat().st_size] for row in rows]
    content = digest_json([[digest.hex() for _, _, digest in rows.values()], names])
    identity = {
        **maker.identity(), "rows": content, "shard_bytes": config.shard_bytes,
        "imported_from": "speculators",
    }  # fmt: skip
    job = open_job(folder, "states", identity, named=False)
    if job.complete:
        return need_rows(open_filled(job), str(source.folder))
    numbers = list(rows)
    lengths = torch.tensor([len(rows[row][0]) for row in numbers])
    groups = groups_of(lengths * maker.bytes_per_token(), config.shard_bytes)
    sizes = [int(lengths[group].sum()) for group in groups]
    left = sum(size for i, size in enumerate(sizes) if i not in job.receipts)
    by_main(lambda: refuse_size(maker, job.folder, sum(sizes), left,
                                shutil.disk_usage(job.folder).free))  # fmt: skip
    norm = final_norm(target)
    step = max(1, len(numbers) // max(1, check_rows))
    check_states(target, source, norm, {r: rows[r][0] for r in numbers[::step][:check_rows]})

    def make(index: int, bar: tqdm) -> Shard:
        chosen = [numbers[i] for i in groups[index].tolist()]
        columns, failed = _columns(maker, source, norm, {r: rows[r] for r in chosen}, bar)
        good = finite_rows(columns, columns["length"].long())
        bad = left_out(columns["source_row"][~good], maker.overflow())
        return rows_kept(columns, good), [*failed, *bad, *(unused if index == 0 else ())]

    origin = {
        "kind": "source", "name": source.folder.name, "on_hub": False, "digest": content,
        "n_rows": None, "holdout_rows": 0,
    }  # fmt: skip
    store = fill(
        job, sizes, make, what="hidden states", unit="token", progress=progress,
        input=len(rows) + len(unused), made_from=[origin],
    )  # fmt: skip
    return need_rows(store, str(source.folder))


RowOf = tuple[list[int], list[bool], bytes]  # ids, mask, digest


def _rows_of(
    source: SpeculatorsFolder, target: Target
) -> tuple[dict[int, RowOf], list[dict[str, Any]]]:
    """({row: its tokens}, those that are left out). Raises InputError where none is left."""
    rows, unused, seen = {}, [], set()
    room = target.max_positions
    for row, found in enumerate(source.data.with_format(None)):
        ids = [int(token) for token in found["input_ids"]]
        mask = [bool(flag) for flag in found["loss_mask"]]
        digest = row_digest(torch.tensor(ids).numpy().tobytes(), bytes(mask))
        where, reason = f"{source.folder}, row {row}", None
        check_ids(ids, target.vocab_size, target.tokenizer, where)
        if not source.file(row).is_file():
            reason = "no hidden states"
        elif len(mask) != len(ids) or not any(mask[1:]):
            reason = "nothing of it is learned"
        elif room is not None and len(ids) > room:
            reason = f"longer than the target's context of {room}"
        elif digest in seen:
            reason = "duplicate"
        if reason is None:
            rows[row] = (ids, mask, digest)
            seen.add(digest)
        else:
            unused.append({"source_row": row, "failed": False, "reason": reason})
    if not rows:
        why = sorted({entry["reason"] for entry in unused})
        raise InputError(f"{source.folder}: none of its {len(unused)} rows can be used ({why})")
    return rows, unused


def _columns(
    maker: StateMaker, source: SpeculatorsFolder, norm: nn.Module, rows: dict[int, RowOf], bar: tqdm
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Columns of a shard (see `states.py`), and the rows whose files are not theirs."""
    kept, parts, failed = [], [], []
    for row, (ids, _, _) in rows.items():
        try:
            states = behind_norm(maker.target, norm, source.stream(row, ids)[:, -1])
            parts.append({name: part.cpu() for name, part in maker.encode(states).items()})
            kept.append(row)
        except InputError as error:
            failed.append({"source_row": row, "failed": True, "reason": str(error)})
        bar.update(len(ids))
    columns = {
        "row": torch.tensor(kept, dtype=torch.long),
        "source_row": torch.tensor(kept, dtype=torch.long),
        "length": torch.tensor([len(rows[row][0]) for row in kept], dtype=torch.int32),
        "tokens": torch.tensor([t for row in kept for t in rows[row][0]], dtype=torch.int32),
        "supervised": torch.tensor([m for row in kept for m in rows[row][1]], dtype=torch.bool),
    }
    names = parts[0] if parts else ()
    return {**columns, **{n: torch.cat([p[n] for p in parts]) for n in names}}, failed


@torch.inference_mode()
def behind_norm(target: Target, norm: nn.Module, stream: Tensor) -> Tensor:
    """(T, H) states that feed lm_head, computed as the target does."""
    if stream.shape[-1] != target.hidden_size:
        raise InputError(f"states of {stream.shape[-1]} numbers; {target.name} has "
                         f"{target.hidden_size}")  # fmt: skip
    return norm(stream.to(target.device, target.dtype)[None])[0]


@torch.inference_mode()
def check_states(
    target: Target, source: SpeculatorsFolder, norm: nn.Module, rows: dict[int, list[int]]
) -> None:
    """Raises InputError where the states of some rows are not the target's own, with what they
    would be closer to: another layer, the states behind the norm, another position."""
    for row, ids in rows.items():
        own = target.pick(target.states(torch.tensor([ids], device=target.device))[0], ())
        try:
            stream = source.stream(row, ids)
        except InputError:  # left out, and named
            continue
        difference = _difference(behind_norm(target, norm, stream[:, -1]), own)
        if not difference > CLOSE:  # nan: left out, too
            continue
        readings = {"the states behind the norm": stream[:, -1].to(own)}
        for layer in range(stream.shape[1] - 1):
            readings[f"column {layer}"] = behind_norm(target, norm, stream[:, layer])
        for shift in (-1, 1):
            readings[f"those {shift:+d} position away"] = behind_norm(
                target, norm, stream[:, -1].roll(shift, 0)
            )
        best = min(readings, key=lambda name: _difference(readings[name], own))
        closest = _difference(readings[best], own)
        as_what = f"; {best} would fit ({closest:.2g})" if closest <= CLOSE else ""
        raise InputError(
            f"{source.file(row)}: the last states, put through the final norm, differ from the "
            f"target's own by {difference:.2g} (median, relative){as_what}. Were they made with "
            "this checkpoint? --check_rows 0 takes them as they are"
        )


def _difference(states: Tensor, own: Tensor) -> float:
    """Median over positions of |states - own| / |own|."""
    states, own = states.float(), own.float()
    return float(((states - own).norm(dim=-1) / own.norm(dim=-1).clamp(min=1e-30)).median())


def export_states(target: Target, store: Store, folder: str | Path, progress: bool = True) -> int:
    """A store of states as a speculators folder of one layer; returns the rows written.

    The layers between are not known here, so it serves what reads the last one alone. The stream is
    one that the final norm turns into the stored states. Raises InputError where `folder` exists,
    or the norm cannot be undone.
    """
    from datasets import Dataset

    check_target(store, target)
    folder, norm = Path(folder), final_norm(target)
    if folder.exists():
        raise InputError(f"{folder} exists: give another folder")
    wanted = [name for name in ("tokens", "supervised", "states", "scale") if name in store.columns]
    rows = []
    for row in Bar(range(store.n_rows), desc="rows", unit="row", disable=not progress):
        read = store.read([row], wanted)
        tokens = read["tokens"].long()
        index = torch.arange(len(tokens))
        states = decoded(read, index, target.dtype, target.hidden_size).to(target.device)
        with torch.inference_mode():
            stream = undo(norm, states[None])[0]
        name = f"hs_{row}.safetensors"
        (folder / "hidden_states").mkdir(parents=True, exist_ok=True)
        write_tensors(
            folder / "hidden_states" / name,
            {"hidden_states": stream[:, None].cpu().contiguous(), "token_ids": tokens},
        )
        rows.append({
            "input_ids": tokens.tolist(), "loss_mask": read["supervised"].long().tolist(),
            "seq_len": len(tokens),
        })  # fmt: skip
    Dataset.from_list(rows).save_to_disk(str(folder))
    return len(rows)
