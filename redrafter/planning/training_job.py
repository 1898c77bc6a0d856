"""The plan of `train/redrafter.py`: from prompts to a head."""

from __future__ import annotations

from dataclasses import replace

from redrafter.config import (
    HeadConfig,
    LossConfig,
    OptimConfig,
    PlanConfig,
    TrainConfig,
    TreeConfig,
)
from redrafter.data.reading import read_weights
from redrafter.data.states import StateMaker
from redrafter.data.store import Store
from redrafter.drafters.head import HeadDrafter
from redrafter.export import golden
from redrafter.heads.base import DraftHead
from redrafter.heads.load import load_trainable
from redrafter.planning.items import (
    PlanBuilder,
    answers_items,
    bound_lines,
    shard_of_states,
    start,
    states_items,
    states_on_disk,
)
from redrafter.planning.memory import (
    averages_per_element,
    batch_bytes,
    meta_batch,
    meta_rows,
    normalizer_bytes,
    step_memory,
)
from redrafter.planning.meta import MetaTarget, borrowed_copy_bytes, meta_head
from redrafter.planning.plan import Duration, Item, Plan, readable
from redrafter.planning.probe import (
    decode_seconds,
    states_seconds,
    step_seconds,
    why_not,
)
from redrafter.planning.speed import bound
from redrafter.planning.texts import Texts, assumed, texts_of_source, texts_of_store
from redrafter.planning.world import Shares, shares, world_of
from redrafter.targets.load import load_target
from redrafter.targets.model import Target
from redrafter.training.data import check_settings, continuation_tokens, data_folder
from redrafter.training.normalizers import needs_normalizers
from redrafter.training.refusals import check_depths, check_prefix
from redrafter.training.step import needed_teacher

# Bytes per token of a buffer beside its columns: where the row ends, and a start, int64 each.
_PER_POSITION = 16


class TrainingPlan:
    """`TrainingPlan(config, wanted).make()`; nothing is loaded, and nothing written."""

    def __init__(self, config: TrainConfig, wanted: PlanConfig):
        base = start()
        self.config, self.wanted = config, wanted
        if config.data.stores or config.data.source is not None:
            check_settings(config)
        self.world = world_of(wanted)
        self.target = MetaTarget(config.target)
        self.head = meta_head(config.head, self.target, config.optim.depth)
        check_depths(config, self.head.max_depth)
        check_prefix(config, self.head.reads_prefix)
        self.builder = PlanBuilder("train/redrafter.py", self.target, self.world, wanted, base)
        n = continuation_tokens(config.data, config.optim.depth)
        self.maker = StateMaker(self.target, config.data.states, n)
        self.prompts, self.texts = self._texts()

    def make(self) -> Plan:
        plan, config = self.builder.plan, self.config
        trained, frozen, _ = elements(self.head)
        some = "all trained" if not frozen else f"{trained:,} of them trained"
        plan.head.append(
            f"head: {trained + frozen:,} parameters, "
            f"{readable(4 * (trained + frozen))} in float32, {some}"
        )
        plan.head.append(f"data: {self.texts.how}")
        if not config.data.stores:
            self._data_phases()
        self._step_phase()
        self._evaluation_phase()
        self._export_phase()
        self._disk()
        plan.tail = bound_lines(bound(self.head, self.target, config.eval.tree.depth), self.target)
        probe_training(self)
        return plan

    # -- data ------------------------------------------------------------------------------

    def _texts(self) -> tuple[Texts | None, Texts]:
        """(prompts to answer or None, texts to learn from)."""
        data, target, wanted = self.config.data, self.target, self.wanted
        if data.stores:
            stores = [Store(path) for path, _ in read_weights(data.stores)]
            each = [texts_of_store(store) for store in stores]
            rows = sum(t.rows for t in each)
            mean = sum(t.rows * t.mean for t in each) / max(1, rows)
            names = ", ".join(s.name for s in stores)
            return None, Texts(rows, mean, max(t.longest for t in each), f"{rows} rows of {names}")
        context = target.max_positions
        if data.text == "source" and data.source is not None:
            return None, texts_of_source(data.source, self.config.target, "texts", context, wanted)
        new = data.answers.max_new_tokens
        room = None if context is None else max(1, context - new)
        if data.source is None:
            prompts = assumed(wanted)
        else:
            prompts = texts_of_source(data.source, self.config.target, "prompts", room, wanted)
        return prompts, prompts.answered(self.passes, new)

    @property
    def passes(self) -> int:
        """Answers per prompt."""
        answers = self.config.data.answers
        return sum(answers.samples_per_prompt if t > 0 else 1 for t in answers.temperatures)

    def _data_phases(self) -> None:
        data = self.config.data
        if self.prompts is not None:
            how = data.answers
            rows = how.batch_size
            if self.prompts.rows is not None:
                rows = min(rows, self.prompts.rows)
            self.builder.phase("answers", *answers_items(
                self.target, rows, self.prompts.longest, how.max_new_tokens,
                max(how.temperatures), keys="data.answers.batch_size",
            ))  # fmt: skip
        if data.mode == "offline":
            held = shard_of_states(self.maker, self.texts, data.states)
            items = states_items(self.maker, self.texts, held, "data.states")
            self.builder.phase("states", *items)
        else:  # between two steps, beside what is trained
            items = states_items(self.maker, self.texts, self._buffer_bytes(), "data.states")
            self.builder.phase("states", *self._kept(), *items)

    def _buffer_bytes(self) -> int:
        """Of the rows that are held in memory at a time."""
        rows = self.config.data.buffer_rows
        rows = rows if self.texts.rows is None else min(rows, self.texts.rows)
        return round(rows * self.texts.mean) * (self.maker.bytes_per_token() + _PER_POSITION)

    # -- training --------------------------------------------------------------------------

    def _shares(self) -> Shares:
        trained, frozen, largest = elements(self.head)
        averages = averages_per_element(self.config.optim)
        return shares(self.world, trained, frozen, largest, averages)

    @property
    def own_optim(self) -> OptimConfig:
        """Positions are shared out over the processes."""
        optim = self.config.optim
        return replace(optim, batch_positions=-(-optim.batch_positions // self.world.processes))

    def _kept(self) -> list[Item]:
        """Of head and optimizer between two steps, and what is held beside them."""
        own = self._shares()
        at = ("host" if self.world.offload_optimizer else "device",
              "host" if self.world.offload_parameters else "device")  # fmt: skip
        smaller = self.head.smaller
        items = [
            Item("head's weights", own.parameters, at[1], smaller),
            Item("head's copy of rows of lm_head", borrowed_copy_bytes(self.head, self.target)),
            Item("weights in float32 (DeepSpeed)", own.master, at[0], "more processes"),
            Item("optimizer's averages", own.averages, at[0],
                 f"ZeRO stage 1 and more processes; {smaller}"),
            Item("rows of the current buffer", self._buffer_bytes(), "host", "data.buffer_rows"),
        ]  # fmt: skip
        measured = self.config.eval
        if measured.prompts:
            positions = -(-measured.prompts // self.world.processes) * measured.max_new_tokens
            tokens_alone = LossConfig(cross_entropy=1.0)  # measuring compares with no distribution
            held = meta_batch(self.target, tokens_alone, positions, self.config.optim.depth)
            if self.head.reads_prefix:
                new, longest = measured.max_new_tokens, self.texts.longest
                held.rows = meta_rows(self.target, positions, new, longest)
            one = batch_bytes(held)
            items.append(Item("held-out batches", one * len(measured.temperatures),
                              remedy="eval.prompts, eval.max_new_tokens"))  # fmt: skip
        return items

    def _step_phase(self) -> None:
        config, own = self.config, self._shares()
        step = step_memory(
            self.head, self.target, config.loss, self.own_optim,
            config.data.states.teacher_top_k or 0, self.texts.longest,
        )  # fmt: skip
        lower = "lower optim.batch_positions and raise optim.accumulation"
        zero = "ZeRO stage 2 and more processes"
        # The next buffer is read while this one is learned from.
        ahead = self._buffer_bytes() * (config.data.mode == "offline")
        common = [*self._kept(), Item("rows read ahead", ahead, "host", "data.buffer_rows"),
                  Item("weights gathered for a layer", own.gathered),
                  Item("communication buckets", own.buckets),
                  Item("batch", step.batch, remedy=lower)]  # fmt: skip
        for name, moment in (("step: loss", step.loss), ("step: back", step.backward)):
            gradients = own.gradients
            if self.world.stage < 2:  # those that are there then, in their own width
                gradients = moment.gradients * own.gradients // max(1, step.gradients)
            self.builder.phase(
                name, *common, Item("gradients", gradients, remedy=zero),
                Item("activations", moment.activations, remedy=lower),
                Item("logits chunk and loss", moment.logits,
                     remedy=f"lower loss.chunk_rows; {self.head.smaller}"),
                Item("backward pass", moment.backward, remedy=lower),
            )  # fmt: skip
        pruned = self.head.config.draft_vocab_size is not None
        if needs_normalizers(self.target, pruned, needed_teacher(config.loss)):
            every = Item("logits of all tokens", normalizer_bytes(self.target))
            self.builder.phase("normalizers", *common, every)
        self.builder.phase(
            "update", *common, Item("gradients", own.gradients, remedy=zero),
            Item("gradients in float32 (DeepSpeed)", own.update),
        )  # fmt: skip
        if self.world.mixed != "no":
            self.builder.plan.notes.append(
                f"{self.world.mixed}: activations are planned in float32, so this is the most"
            )

    def _evaluation_phase(self) -> None:
        measured = self.config.eval
        if not measured.prompts:
            return
        # The shape `beams` reads how many nodes are left; it never has more than `levels`.
        tree = measured.tree
        tree = replace(tree, shape="levels") if tree.shape == "beams" else tree
        drafter = HeadDrafter(self.head.eval(), self.target, tree)
        prompt = self.prompts.longest if self.prompts else self.wanted.prompt_tokens
        self.builder.phase("measuring", *self._kept(), *answers_items(
            self.target, min(measured.batch_size, measured.prompts), prompt,
            measured.max_new_tokens, max(measured.temperatures), drafter, "eval.batch_size",
        ))  # fmt: skip

    def _export_phase(self) -> None:
        """The golden batch, all scores of which are there until it is written."""
        target = self.target
        if target.wanted.shard != "none":  # then there is none
            return
        tree = TreeConfig(width=golden.WIDTH, depth=golden.drafted_depth(self.head))
        drafter = HeadDrafter(self.head.eval(), target, tree)
        rows, new = golden.PROMPTS, golden.NEW_TOKENS
        prompt = golden.PROMPT_TOKENS if self.config.eval.prompts else new
        # Logits of one decoding, then the scores of both.
        scores = 3 * rows * new * target.vocab_size * max(4, target.dtype.itemsize)
        self.builder.phase(
            "export", *self._kept(),
            *answers_items(target, rows, prompt, new, 1.0, drafter, "head.draft_vocab_size"),
            Item("scores of the golden batch", scores),
        )  # fmt: skip

    def _disk(self) -> None:
        config, folder = self.config, data_folder(self.config)
        if self.prompts is not None and self.texts.tokens is not None:
            per_token = 5  # id and mask
            self.builder.disk("answers", self.texts.tokens * per_token, folder)
        if not config.data.stores and config.data.mode != "online":
            states_on_disk(self.builder, self.maker, self.texts, folder)
        trained, frozen, _ = elements(self.head)
        averages = averages_per_element(config.optim)
        one = 4 * (trained + frozen + averages * trained)
        kept = config.keep_checkpoints + 2  # the best one, and the one that is being written
        self.builder.disk(f"{kept} checkpoints of {readable(one)}, and the head",
                         kept * one + 4 * (trained + frozen), config.output_dir)  # fmt: skip


def new_head(wanted: HeadConfig, meta: DraftHead, target: Target) -> DraftHead:
    """A real head of a meta head's shape."""
    if wanted.init_from is not None:
        return load_trainable(wanted.init_from, target, allow_other_target=True).float()
    return type(meta)(meta.config).to(target.device).bind(target)


def elements(head: DraftHead) -> tuple[int, int, int]:
    """(trained, frozen, of the largest parameter) of a head; what it borrows is not its own."""
    trained = sum(p.numel() for p in head.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in head.parameters() if not p.requires_grad)
    return trained, frozen, max(p.numel() for p in head.parameters())


def probe_training(job: TrainingPlan) -> None:
    """Adds the hours of a training to its plan."""
    plan, config, wanted = job.builder.plan, job.config, job.wanted
    names = ["answers", "hidden states", f"{config.optim.steps} steps", "evaluations"]
    if (reason := why_not(plan, config.target, wanted)) is not None:
        plan.hours += [Duration(f"{config.optim.steps} steps", None, reason)]
        return
    target, most = load_target(config.target), wanted.probe_s
    target.show(job.head.aux_layers)
    n = job.world.processes
    data, how, found = config.data, config.data.answers, []
    if job.prompts is not None and job.prompts.rows is not None:
        batches = -(-job.prompts.rows * job.passes // how.batch_size)
        one = decode_seconds(target, min(how.batch_size, job.prompts.rows),
                             round(job.prompts.mean), how.max_new_tokens,
                             max(how.temperatures), most)  # fmt: skip
        found.append(Duration(names[0], batches * one / n, "at most: as if none ended early"))
    if not data.stores and job.texts.tokens is not None:
        maker = StateMaker(target, data.states, job.maker.continuation)
        each = states_seconds(maker, max(1, round(job.texts.mean)), most)
        times = 1 if data.mode != "online" else None
        note = "" if times else "made anew in every epoch; this is one"
        found.append(Duration(names[1], each * job.texts.tokens / n, note))
    head = new_head(config.head, job.head, target)
    one = step_seconds(head, target, config.loss, job.own_optim,
                       data.states.teacher_top_k or 0, most,
                       max(1, round(job.texts.mean)))  # fmt: skip
    steps = config.optim.steps
    found.append(Duration(names[2], one * steps, f"{one:.3g} s each"))
    measured = config.eval
    if measured.prompts:
        rows = min(measured.batch_size, measured.prompts)
        prompt = round(job.prompts.mean) if job.prompts else wanted.prompt_tokens
        one = decode_seconds(target, rows, prompt, measured.max_new_tokens,
                             max(measured.temperatures), most)  # fmt: skip
        times = -(-steps // measured.every_steps) * -(-measured.prompts // rows)
        times *= len(measured.temperatures)
        note = "as if nothing were gained by drafting, nor lost"
        found.append(Duration(names[3], one * times, note))
    total = sum(d.seconds for d in found)
    plan.hours += [*found, Duration("all of it", total)]


def plan_training(config: TrainConfig, wanted: PlanConfig) -> Plan:
    return TrainingPlan(config, wanted).make()
