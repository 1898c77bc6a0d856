#!/usr/bin/env python
"""What reading and writing cost beside the computing that they serve.

    python scripts/dev/measure_rates.py --target MODEL --texts TEXTS.jsonl

Two shares, each over pieces that are timed in turn, so that a busy machine slows both alike:

  training   optimiser steps on batches from a store, against the same steps on the same batches
             held in memory
  states     rows to a store of hidden states (padding, forward, checksums, writing), against the
             bare forwards of the target on the same padded batches

Exit status 1 where a share is below 0.9. The time is the processor's, of all threads: on a machine
that does other things too, the only one that repeats.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from accelerate import Accelerator

from redrafter.config import LossConfig, OptimConfig, SourceConfig, StatesConfig
from redrafter.data.build_rows import build_rows
from redrafter.data.reading import Stored
from redrafter.data.rows import batches_by_length, right_padded
from redrafter.data.states import StateMaker, groups_of, state_columns, unique_rows
from redrafter.data.store import Job, Store
from redrafter.heads.recurrent import RecurrentHead
from redrafter.targets.load import load_target
from redrafter.targets.model import Target
from redrafter.training.engine import Engine
from redrafter.training.feed import Feed
from redrafter.training.loop import make_optimizer
from redrafter.training.step import StepLoss, total_weight


def states_share(target: Target, texts: Store, folder: Path) -> tuple[float, float, int]:
    """(seconds of the bare forwards, seconds of making the store, its tokens)."""
    maker, rows = StateMaker(target, StatesConfig()), unique_rows(texts)
    sizes = texts.lengths[rows] * maker.bytes_per_token()
    groups = groups_of(sizes, int(sizes.sum()) // 8)
    job = Job(folder, "states", {**maker.identity(), "rows": texts.digest})
    bare = whole = 0.0
    for index, group in enumerate(groups):
        clock = time.process_time()
        job.write(index, *state_columns(maker, texts, rows[group]))
        whole += time.process_time() - clock
        read = texts.rows(rows[group])
        padded = [
            right_padded(read, batch)[0]
            for batch in batches_by_length(
                read.lengths(), range(read.n_rows), maker.config.forward_tokens
            )
        ]
        clock = time.process_time()
        for tokens in padded:
            target.states(tokens)
        bare += time.process_time() - clock
    job.finish(len(groups))
    return bare, whole, int(texts.lengths[rows].sum())


def training_share(
    target: Target, store: Store, positions: int, steps: int, piece: int = 20
) -> tuple[float, float]:
    """(seconds of the steps on batches in memory, seconds of the steps from the store)."""
    optim, loss = OptimConfig(), LossConfig(cross_entropy=1.0)
    head = RecurrentHead.for_target(target)
    engine = Engine(
        Accelerator(cpu=True), StepLoss(head, target, loss), make_optimizer(head, optim), optim
    )
    feed = Feed(target, [Stored(store)], positions=positions, depth=optim.depth, seed=0)

    def train(batch) -> None:
        engine.step([batch], total_weight(batch, loss), optim.lr)

    train(feed.step(0))
    bare = whole = 0.0
    for first in range(1, steps, piece):
        batches = []
        clock = time.process_time()
        for step in range(first, first + piece):
            batches.append(feed.step(step))
            train(batches[-1])
        whole += time.process_time() - clock
        clock = time.process_time()
        for batch in batches:
            train(batch)
        bare += time.process_time() - clock
    print(f"  {steps / feed.steps_per_epoch:.1f} epochs of {feed.steps_per_epoch} steps")
    return bare, whole


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True)
    parser.add_argument("--texts", required=True, help="rows with text or a conversation")
    parser.add_argument("--rows", type=int, default=400, help="of them")
    parser.add_argument("--positions", type=int, default=128, help="per optimiser step")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    target = load_target(given.target)
    with tempfile.TemporaryDirectory(prefix="rates-") as base:
        source = SourceConfig(given.texts, n_rows=given.rows)
        rows = build_rows(
            source, target.tokenizer, "texts", Path(base) / "t", max_tokens=target.max_positions
        )
        bare, whole, tokens = states_share(target, rows, Path(base) / "s")
        made = bare / whole
        print(
            f"states: {tokens} tokens, bare forwards {bare:.1f} s, to a store {whole:.1f} s: "
            f"{made:.1%} of the bare rate"
        )
        store = Store(Path(base) / "s")
        bare, whole = training_share(target, store, given.positions, given.steps)
    trained = bare / whole
    print(
        f"training: {given.steps} steps of {given.positions} positions, in memory {bare:.1f} s, "
        f"from the store {whole:.1f} s: {trained:.1%} of the bare rate"
    )
    return int(min(made, trained) < 0.9)


if __name__ == "__main__":
    sys.exit(main())
