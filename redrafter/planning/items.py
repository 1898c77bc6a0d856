"""Items and lines that several jobs share."""

from __future__ import annotations

from pathlib import Path

from redrafter.config import PlanConfig, StatesConfig
from redrafter.contracts import InputError
from redrafter.data.states import StateMaker, refuse_size
from redrafter.heads.base import DraftHead
from redrafter.planning.machine import free_disk, memories, resident_bytes
from redrafter.planning.memory import decode_memory, states_memory
from redrafter.planning.meta import MetaTarget, borrowed_copy_bytes
from redrafter.planning.plan import Disk, Item, Phase, Plan, readable
from redrafter.planning.speed import Bound
from redrafter.planning.texts import Texts
from redrafter.planning.world import World


class PlanBuilder:
    """What every plan stands on: the target without content, the launch, and this process as it
    is before any tensor is made (interpreter and libraries, as the job will have them)."""

    def __init__(self, job: str, target: MetaTarget, world: World, wanted: PlanConfig, base: int):
        self.target, self.world, self.wanted = target, world, wanted
        device = target.real_device
        on_device, host = memories(device, wanted, world)
        self.plan = Plan(
            job, [], device.type == "cpu", on_device, host,
        )  # fmt: skip
        dtype = str(target.dtype).removeprefix("torch.")
        self.plan.head += [
            f"target {target.name}: {target.n_parameters:,} parameters, "
            f"{readable(target.weight_bytes)} in {dtype}",
            f"on {device}, {world.describe()}",
        ]
        self.items = [
            Item("interpreter and libraries", base, "host"),
            *_target_items(target, world),
        ]

    def phase(self, name: str, *items: Item) -> None:
        self.plan.phases.append(Phase(name, (*self.items, *items)))

    def disk(self, name: str, n_bytes: int, folder: str | Path, refusal: str | None = None) -> None:
        self.plan.disk.append(Disk(name, n_bytes, free_disk(folder, self.wanted), refusal))


def _target_items(target: MetaTarget, world: World) -> list[Item]:
    """Raises InputError where the target is to be split and the launch cannot do it."""
    if target.wanted.device_map != "none":
        there, host, brought = target.placed_bytes()
        return [
            Item("target's weights on the device", there, remedy="lower target.device_bytes"),
            Item("target's weights in host memory", host, "host", "lower target.host_bytes"),
            Item("target's weights, brought for a forward", brought),
        ]
    if target.wanted.shard == "none":
        own = Item("target's weights", target.weight_bytes, remedy=_smaller_target(target))
        copies = Item("target's weights, packed for several rows", target.copied_bytes,
                      remedy="target.dtype bfloat16, or target.forward model")  # fmt: skip
        return [own, copies]
    if not world.deepspeed:
        raise InputError(
            f"target.shard {target.wanted.shard} needs a launch by DeepSpeed, this plan is for "
            f"{world.describe()}: launch it with configs/accelerate/zero3.yaml (or say "
            "--plan_for.sharding zero3), or leave it out"
        )
    held, gathered = target.split_bytes(world.processes)
    return [
        Item("target's weights, this process's part", held, remedy="more processes"),
        Item("target's weights, gathered in a forward", gathered),
    ]


def _smaller_target(target: MetaTarget) -> str:
    if target.dtype.itemsize > 2:
        return "target.dtype bfloat16, or a smaller target"
    return "a device with more memory, or a smaller target"


def start() -> int:
    """Call it before anything is made: bytes of the bare process."""
    return resident_bytes()


def head_items(head: DraftHead, target: MetaTarget) -> list[Item]:
    """A head that drafts, as it lies in its folder."""
    n_bytes = sum(p.numel() * p.element_size() for p in head.parameters())
    copy = borrowed_copy_bytes(head, target)
    return [Item("head's weights", n_bytes), Item("head's copy of rows of lm_head", copy)]


def answers_items(
    target: MetaTarget, rows: int, prompt: int, new: int, temperature: float, drafter=None,
    keys: str = "answers.batch_size",
) -> list[Item]:  # fmt: skip
    """Decoding a batch."""
    found = decode_memory(target, rows, prompt, new, temperature, drafter)
    remedy = f"lower {keys}"
    return [
        Item("keys and values of a batch", found.cache, remedy=remedy),
        Item("forward, logits and noise of a batch", found.working, remedy=remedy),
    ]


def states_items(maker: StateMaker, texts: Texts, held_bytes: int, keys: str) -> list[Item]:
    """Making states; held_bytes: of the columns that are kept on the host meanwhile."""
    longest = max(1, min(texts.longest, maker.target.max_positions or texts.longest))
    rows = max(1, maker.config.forward_tokens // longest)
    if texts.rows is not None:
        rows = min(rows, max(1, texts.rows))
    return [
        Item("teacher-forced forward", states_memory(maker, rows, longest),
             remedy=f"lower {keys}.forward_tokens"),
        Item("hidden states of a shard", held_bytes, "host", f"lower {keys}.shard_bytes"),
    ]  # fmt: skip


def shard_of_states(maker: StateMaker, texts: Texts, config: StatesConfig) -> int:
    """Bytes of the columns of one shard."""
    whole = None if texts.tokens is None else texts.tokens * maker.bytes_per_token()
    return config.shard_bytes if whole is None else min(config.shard_bytes, whole)


def states_on_disk(
    builder: PlanBuilder, maker: StateMaker, texts: Texts, folder: str | Path
) -> None:
    """Their bytes, by the rule that refuses them before they are made."""
    tokens = texts.tokens
    if tokens is None:
        builder.plan.notes.append(
            f"hidden states: {readable(maker.bytes_per_token())} per token; how many tokens is not "
            "known (--plan_for.rows)"
        )
        return
    free, refusal = free_disk(folder, builder.wanted), None
    try:
        refuse_size(maker, folder, tokens, tokens, free)
    except InputError as error:
        refusal = str(error)
    builder.disk(f"hidden states of {tokens:,} tokens", tokens * maker.bytes_per_token(), folder,
                refusal)  # fmt: skip


def bound_lines(found: Bound, target: MetaTarget) -> list[str]:
    """For the end of a plan."""
    k = found.depth
    once = f"the context {readable(found.context_bytes)} a step, " * bool(found.context_bytes)
    return [
        f"speed bound, were reading weights all that takes time (one row, {k} levels)",
        f"  {once}a level reads {readable(found.level_bytes)}, a forward of the target "
        f"{readable(found.target_bytes)}",
        f"  drafting breaks even at {found.break_even:.2f} tokens per step, gives at most "
        f"{found.most:.2f}x (all {k} accepted), and tokens per step / {found.break_even:.2f} "
        "between",
    ]
