"""Memory and waiting of a training that reads a large store.

    python scripts/dev/measure_reading.py --gigabytes 2 --steps 3000

Writes a store of synthetic hidden states (random numbers; the trainer cannot tell), trains a head
on it through the trainer's own feed and step, and prints the resident memory at intervals and the
share of the time that went by waiting for data. Exit status 1 if memory grew by more than 5 % after
the first buffers, or more than 10 % of the time was spent waiting.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from redrafter.config import LossConfig, OptimConfig
from redrafter.data.reading import Stored
from redrafter.data.store import Job, Store
from redrafter.heads.recurrent import RecurrentHead
from redrafter.targets.model import Target
from redrafter.training.feed import Feed
from redrafter.training.loop import make_optimizer
from redrafter.training.step import batch_loss, total_weight


def small_target(hidden: int, vocab: int) -> Target:
    """Untrained; only its embedding and lm_head are used."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=1, intermediate_size=hidden,
        num_attention_heads=4, max_position_embeddings=512,
    )  # fmt: skip
    return Target(LlamaForCausalLM(config))


def write_store(folder: Path, size: int, target: Target, row_tokens: int = 200) -> Store:
    """About `size` bytes of random states, in shards of 256 MB."""
    width, random = target.hidden_size, torch.Generator().manual_seed(0)
    n_rows = size // (row_tokens * width * 4)
    per_shard = max(1, 268_435_456 // (row_tokens * width * 4))
    job = Job(folder, "states", {"synthetic": True})
    for index, first in enumerate(range(0, n_rows, per_shard)):
        n = min(per_shard, n_rows - first)
        total = n * row_tokens
        place = torch.arange(total) % row_tokens
        job.write(
            index,
            {
                "row": torch.arange(first, first + n),
                "source_row": torch.arange(first, first + n),
                "length": torch.full((n,), row_tokens, dtype=torch.int32),
                "tokens": torch.randint(
                    target.vocab_size, (total,), generator=random, dtype=torch.int32
                ),
                "supervised": place >= row_tokens // 4,
                "states": torch.randn(total, width, generator=random),
            },
        )
    job.finish(index + 1)
    return Store(folder)


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--buffer_rows", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    target = small_target(given.hidden, given.vocab)
    with tempfile.TemporaryDirectory(prefix="reading-") as base:
        store = write_store(Path(base) / "store", int(given.gigabytes * 1e9), target)
        print(f"store: {store.counts['bytes'] / 1e9:.2f} GB, {len(store.shards)} shards")
        feed = Feed(
            target, [Stored(store)], positions=given.positions, depth=5, seed=0,
            buffer_rows=given.buffer_rows,
        )  # fmt: skip
        head = RecurrentHead.for_target(target)
        optimizer = make_optimizer(head, OptimConfig())
        loss_config, memory, waited, seconds = LossConfig(cross_entropy=1.0), [], 0.0, 0.0
        # The first two buffers are there before anything can be waited for in parallel.
        warm = max(20, given.steps // 10)
        for step in range(given.steps):
            if step == warm:
                waited, seconds = feed.wait_s, time.perf_counter()
            batch = feed.step(step)
            loss, _ = batch_loss(
                head, head, target, batch, loss_config, total_weight(batch, loss_config)
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step >= warm and step % max(1, given.steps // 200) == 0:
                memory.append(resident_bytes())
        seconds, waited = time.perf_counter() - seconds, feed.wait_s - waited
    # Buffers come and go: compare thirds, not single moments.
    third = len(memory) // 3
    first, last = sorted(memory[:third]), sorted(memory[-third:])
    growth, share = last[third // 2] / first[third // 2] - 1, waited / seconds
    print(
        f"{given.steps - warm} steps in {seconds:.0f} s ({(given.steps - warm) / seconds:.1f} "
        f"steps/s), {given.steps / feed.steps_per_epoch:.2f} epochs\n"
        f"resident memory: {min(memory) / 1e6:.0f} to {max(memory) / 1e6:.0f} MB; last third over "
        f"the first: median {growth:+.2%}, peak {last[-1] / first[-1] - 1:+.2%}\n"
        f"waiting for data: {share:.2%} of the time"
    )
    return int(growth > 0.05 or share > 0.10)


if __name__ == "__main__":
    sys.exit(main())
