"""A conversation, streamed, with what was accepted of each answer.

  python examples/chat.py TARGET HEAD ["mix(head:6x5,suffix:16x1):nodes=17"]

`redrafter chat` does the same and more; this is how little it takes.
"""

import sys

from redrafter import TextStream, generate, load_strategy, load_target


def acceptance(stats) -> str:
    """Of each depth, how many of the drafts that went so deep were right to there."""
    pairs = zip(stats.accepted_at, stats.drafted_at, strict=True)
    return ", ".join(f"{right}/{drafted}" for right, drafted in pairs if drafted)


def main(target_path: str, head_path: str, name: str = "head:4x4", most: int = 200) -> None:
    target = load_target(target_path)
    strategy = load_strategy(target, name, head=head_path)
    messages = []
    print("One line is one message; Ctrl-D ends.")
    for line in sys.stdin:
        messages.append({"role": "user", "content": line.strip()})
        stream = TextStream(target.tokenizer, lambda text: print(text, end="", flush=True))
        made = generate(
            target, messages=messages, draft=strategy, streamer=stream, max_new_tokens=most
        )
        messages.append({"role": "assistant", "content": made.extra["texts"][0]})
        stats = made.stats
        rate = "" if stats.tokens_per_step is None else f"{stats.tokens_per_step:.2f} per step, "
        print(f"\n[{len(made.tokens[0])} tokens, {rate}by depth {acceptance(stats)}]\n")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
