"""What a training wrote down as it went: its log, and what was measured on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Curve = list[tuple[float, float]]


def read_logs(folder: Path, names: tuple[str, ...]) -> dict[str, Curve]:
    """Of TensorBoard's files below RUN/logs: name -> (step, value), in order of the steps; a name
    that was not logged is missing. Of a step that was trained twice, after a kill, the later one
    counts.

    folder: of the run
    """
    places = sorted({path.parent for path in (folder / "logs").rglob("events.out.tfevents.*")})
    if not places:
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, tuple[float, float]]] = {}
    for place in places:
        events = EventAccumulator(str(place), size_guidance={"scalars": 0})
        events.Reload()
        for name in set(names) & set(events.Tags()["scalars"]):
            own = found.setdefault(name, {})
            for event in events.Scalars(name):
                if event.step not in own or own[event.step][0] <= event.wall_time:
                    own[event.step] = (event.wall_time, event.value)
    return {
        name: [(float(step), own[step][1]) for step in sorted(own)]
        for name in names if (own := found.get(name))
    }  # fmt: skip


def measured(history: list[dict[str, Any]], key: str) -> dict[str, Curve]:
    """Of provenance.json's history: way of decoding -> (step, value). key: `tokens_per_step`"""
    names = dict.fromkeys(name for entry in history for name in entry[key])
    return {
        name: [(entry["step"], entry[key][name]) for entry in history if name in entry[key]]
        for name in names
    }
