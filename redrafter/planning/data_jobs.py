"""The plans of `data/answers.py`, `data/states.py`, `data/lookahead.py` and `data/probe.py`."""

from __future__ import annotations

from dataclasses import replace

import torch

from redrafter.config import (
    MakeAnswersConfig,
    MakeStatesConfig,
    PlanConfig,
    ProbeConfig,
    RecordsConfig,
    SourceConfig,
    TargetConfig,
)
from redrafter.data.states import StateMaker
from redrafter.data.store import Store
from redrafter.drafters.head import HeadDrafter
from redrafter.drafters.options import parse_name
from redrafter.planning.items import (
    PlanBuilder,
    answers_items,
    bound_lines,
    head_items,
    shard_of_states,
    start,
    states_items,
    states_on_disk,
)
from redrafter.planning.memory import forward_memory
from redrafter.planning.meta import MetaTarget, load_meta_head
from redrafter.planning.plan import Duration, Item, Plan
from redrafter.planning.probe import decode_seconds, repeated, states_seconds, why_not
from redrafter.planning.speed import bound
from redrafter.planning.texts import Texts, assumed, texts_of_source, texts_of_store
from redrafter.planning.world import world_of
from redrafter.tables.probed import top_successors
from redrafter.targets.load import load_target

_ROW_BYTES = 5  # per token of a row: id and mask


def unmeasured(
    builder: PlanBuilder,
    target: TargetConfig,
    wanted: PlanConfig,
    name: str,
    unknown: str | None = None,
) -> bool:
    """Whether this cannot be timed, which the plan then says. unknown: what else is missing"""
    reason = why_not(builder.plan, target, wanted) or unknown
    if reason is not None:
        builder.plan.hours.append(Duration(name, None, reason))
    return reason is not None


def plan_answers(config: MakeAnswersConfig, wanted: PlanConfig) -> Plan:
    base, how = start(), config.answers
    target, world = MetaTarget(config.target), world_of(wanted)
    builder = PlanBuilder("data/answers.py", target, world, wanted, base)
    if config.prompts:
        prompts = texts_of_store(Store(config.prompts, "prompts"))
    elif config.source is not None:  # of conversations what their rows hold, not what is answered
        prompts = texts_of_source(config.source, config.target, "prompts", None, wanted)
    else:
        prompts = assumed(wanted)
    builder.plan.head.append(f"data: {prompts.how}")
    drafter, items = None, []
    if config.head is not None:
        head = load_meta_head(config.head, target)
        drafter, items = HeadDrafter(head, target, config.tree), head_items(head, target)
        builder.plan.tail = bound_lines(bound(head, target, config.tree.depth), target)
    served = how.server is not None
    batch = 1 if served else how.batch_size  # of a server's answers a sample is compared here
    rows = batch if prompts.rows is None else min(batch, prompts.rows)
    builder.phase("answers", *items, *answers_items(
        target, rows, prompts.longest, how.max_new_tokens, max(how.temperatures), drafter
    ))  # fmt: skip
    passes = sum(how.samples_per_prompt if t > 0 else 1 for t in how.temperatures)
    answers = prompts.answered(passes, how.max_new_tokens)
    if answers.tokens is not None:
        builder.disk("answers", answers.tokens * _ROW_BYTES, config.output_dir)
    unknown = None if answers.rows is not None else "how many prompts: --plan_for.rows"
    unknown = "as fast as the server is" if served else unknown
    if unmeasured(builder, config.target, wanted, "answers", unknown):
        return builder.plan
    one = decode_seconds(load_target(config.target), rows, round(prompts.mean),
                         how.max_new_tokens, max(how.temperatures), wanted.probe_s)  # fmt: skip
    seconds = one * -(-answers.rows // rows) / world.processes
    note = "by plain decoding, as if none ended early"
    builder.plan.hours.append(Duration(f"{answers.rows} answers", seconds, note))
    return builder.plan


def plan_states(config: MakeStatesConfig, wanted: PlanConfig) -> Plan:
    base = start()
    target, world = MetaTarget(config.target), world_of(wanted)
    target.show(config.states.aux_layers or ())
    builder = PlanBuilder("data/states.py", target, world, wanted, base)
    texts = texts_of_store(Store(config.rows)) if config.rows else assumed(wanted)
    builder.plan.head.append(f"data: {texts.how}")
    maker = StateMaker(target, config.states, config.continuation)
    held = shard_of_states(maker, texts, config.states)
    builder.phase("states", *states_items(maker, texts, held, "states"))
    states_on_disk(builder, maker, texts, config.output_dir)
    unknown = None if texts.tokens is not None else "how many rows is not known (--plan_for.rows)"
    if unmeasured(builder, config.target, wanted, "hidden states", unknown):
        return builder.plan
    target = load_target(config.target)
    target.show(config.states.aux_layers or ())
    maker = StateMaker(target, config.states, config.continuation)
    each = states_seconds(maker, max(1, round(texts.mean)), wanted.probe_s)
    seconds = each * texts.tokens / world.processes
    builder.plan.hours.append(Duration(f"{texts.tokens:,} tokens", seconds))
    return builder.plan


def plan_records(config: RecordsConfig, wanted: PlanConfig) -> Plan:
    base = start()
    target, world = MetaTarget(config.target), world_of(wanted)
    builder = PlanBuilder("data/lookahead.py", target, world, wanted, base)
    prompts = _last_prompts(config, wanted)
    new, rows = config.max_new_tokens, min(config.batch_size, config.n_prompts)
    builder.plan.head.append(f"data: {prompts.how}")
    items = []
    if config.head is not None and parse_name(config.drafter.split("(")[0]).kind == "head":
        head = load_meta_head(config.head, target)
        items = head_items(head, target)
        builder.plan.tail = bound_lines(bound(head, target, config.tree.depth), target)
    else:
        builder.plan.notes.append(f"{config.drafter}: what the drafter itself holds is not counted")
    builder.phase("answers", *items, *answers_items(
        target, rows, prompts.longest, new, config.temperature, keys="batch_size"
    ))  # fmt: skip
    longest = prompts.longest + new
    logits = rows * (new + 1) * target.vocab_size * target.dtype.itemsize
    builder.phase(
        "walk", *items,
        Item("teacher-forced forward", forward_memory(target, rows, longest),
             remedy="lower batch_size"),
        Item("logits of all answers, twice while stacked", 2 * logits,
             remedy="lower batch_size or max_new_tokens"),
    )  # fmt: skip
    if unmeasured(builder, config.target, wanted, "answers"):
        return builder.plan
    one = decode_seconds(load_target(config.target), rows, round(prompts.mean), new,
                         config.temperature, wanted.probe_s)  # fmt: skip
    seconds = one * -(-config.n_prompts // rows) / world.processes
    note = "at most; the drafter's own walk over them comes on top"
    builder.plan.hours.append(Duration(f"{config.n_prompts} answers", seconds, note))
    return builder.plan


def _last_prompts(config: RecordsConfig, wanted: PlanConfig) -> Texts:
    if not config.prompts:
        return replace(assumed(wanted), rows=config.n_prompts)
    source = SourceConfig(
        path=config.prompts, format=config.prompt_format,
        text_prompt_tokens=config.text_prompt_tokens, prompt_column=config.prompt_column,
    )  # fmt: skip
    found = texts_of_source(source, config.target, "prompts", None, wanted)
    return replace(found, rows=config.n_prompts)


def plan_probe(config: ProbeConfig, wanted: PlanConfig) -> Plan:
    base = start()
    target, world = MetaTarget(config.target), world_of(wanted)
    builder = PlanBuilder("data/probe.py", target, world, wanted, base)
    tokens, rows = 2 if config.bos else 1, config.batch_size
    table = target.vocab_size * config.width * (8 + 4)  # ids int64, log-probabilities float32
    builder.phase(
        "probe",
        Item("forward, logits and their logarithms",
             forward_memory(target, rows, tokens, (rows, 1)), remedy="lower batch_size"),
        Item("the table, in parts and joined", 2 * table, "host", "lower width"),
    )  # fmt: skip
    builder.disk("the table, in parts and joined", 2 * table, config.out)
    if unmeasured(builder, config.target, wanted, "the table"):
        return builder.plan
    real = load_target(config.target)
    ids = torch.arange(min(rows, real.vocab_size), device=real.device)
    bos = 0 if config.bos else None
    one = repeated(
        wanted.probe_s, lambda: top_successors(real, ids, config.width, bos), real.device
    )
    seconds = one * -(-real.vocab_size // rows)
    builder.plan.hours.append(Duration(f"{real.vocab_size} tokens", seconds))
    return builder.plan
