"""A plan: what a job needs beside what there is. Plain arithmetic and text; no tensors here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from redrafter.contracts import InputError
from redrafter.data.states import minutes, readable

Place = Literal["device", "host"]
_REMEDIES = 3  # items whose remedies a refusal names


@dataclass(frozen=True)
class Item:
    """Something that takes memory of one process. place: where it lies; on a CPU the two are one.
    remedy: what makes it less"""

    name: str
    n_bytes: int
    place: Place = "device"
    remedy: str = ""


@dataclass(frozen=True)
class Phase:
    """A stretch of the job, with all that is in memory at its peak."""

    name: str
    items: tuple[Item, ...]

    def total(self, *places: Place) -> int:
        return sum(i.n_bytes for i in self.items if i.place in places)

    def remedies(self, *places: Place) -> str:
        """What to change for the largest items, the most of it first."""
        found = sorted((i for i in self.items if i.place in places), key=lambda i: -i.n_bytes)
        found = [i for i in found if i.remedy and i.n_bytes][:_REMEDIES]
        return "; ".join(f"{i.name} ({readable(i.n_bytes)}): {i.remedy}" for i in found)


@dataclass(frozen=True)
class Disk:
    """Something that is written. free_bytes: what the folder's disk has left (None: unknown);
    refusal: why it is refused, where another rule than that of the free bytes refuses it"""

    name: str
    n_bytes: int
    free_bytes: int | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class Duration:
    """seconds: on this device with these processes; None where it was not measured (`note` says
    why)"""

    name: str
    seconds: float | None
    note: str = ""


@dataclass(frozen=True)
class Memory:
    """Memory of one place. free_bytes: what a process like this one may take now, shared by the
    `sharers` processes that lie there; given: by an option, not asked of the machine"""

    name: str
    total_bytes: int
    free_bytes: int
    sharers: int = 1
    given: bool = False


@dataclass
class Plan:
    """What a job needs.

    head: lines about model and launch; one_memory: device and host are the same (a CPU)
    phases, disk, hours, notes: see above; tail: lines that stand at the end
    """

    job: str
    head: list[str]
    one_memory: bool
    device: Memory | None
    host: Memory | None
    phases: list[Phase] = field(default_factory=list)
    disk: list[Disk] = field(default_factory=list)
    hours: list[Duration] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)

    def peak(self, place: Place) -> tuple[int, Phase | None]:
        """Bytes of one process at most, and when. On a CPU everything counts as "device"."""
        if self.one_memory and place == "host":
            return 0, None
        found = [(phase.total(*self._places(place)), phase) for phase in self.phases]
        return max(found, key=lambda pair: pair[0], default=(0, None))

    def _places(self, place: Place) -> tuple[Place, ...]:
        return ("device", "host") if self.one_memory else (place,)

    def refusals(self) -> list[str]:
        """Why the job cannot run, one line each: the number, the limit, what to change."""
        found = []
        for place, memory in (("device", self.device), ("host", self.host)):
            need, phase = self.peak(place)
            if memory is None or phase is None or need * memory.sharers <= memory.free_bytes:
                continue
            each = "" if memory.sharers == 1 else f" for each of {memory.sharers} processes"
            found.append(
                f"memory ({phase.name}): {readable(need)} needed{each}, {memory.name} has "
                f"{readable(memory.free_bytes)}"
                + ("" if memory.given else f" free of {readable(memory.total_bytes)}")
                + (f". {remedies}" if (remedies := phase.remedies(*self._places(place))) else "")
            )
        by_disk: dict[int, list[Disk]] = {}
        for disk in self.disk:
            if disk.refusal is not None:
                found.append(disk.refusal)
            elif disk.free_bytes is not None:
                by_disk.setdefault(disk.free_bytes, []).append(disk)
        for free, disks in by_disk.items():
            need = sum(d.n_bytes for d in disks)
            if need > free:
                names = ", ".join(f"{d.name} ({readable(d.n_bytes)})" for d in disks)
                found.append(
                    f"{readable(need)} are to be written, {names}; the disk has {readable(free)} "
                    "left: free some, or write elsewhere"
                )
        return found

    def check(self) -> None:
        """Raises InputError where something cannot fit."""
        if refused := self.refusals():
            raise InputError(f"{self.job} cannot run here:" + "".join(f"\n- {r}" for r in refused))

    def show(self) -> str:
        lines = [f"plan of {self.job}", *(f"  {line}" for line in self.head)]
        lines += ["", *self._table()]
        if self.disk:
            lines += ["", "disk"]
            lines += [_line(d.name, readable(d.n_bytes)) for d in self.disk]
        if self.hours:
            lines += ["", "time"]
            for d in self.hours:
                shown = "unknown" if d.seconds is None else minutes(d.seconds)
                lines.append(_line(d.name, shown, d.note))
        if self.tail:
            lines += ["", *self.tail]
        lines += ["", *self._verdict(), *(f"note: {note}" for note in self.notes)]
        return "\n".join(lines)

    def _table(self) -> list[str]:
        """Items down, phases across."""
        rows: dict[tuple[str, Place], list[int]] = {}
        for number, phase in enumerate(self.phases):
            for item in phase.items:
                row = rows.setdefault((item.name, item.place), [0] * len(self.phases))
                row[number] += item.n_bytes
        lines = [_row("memory of one process", [phase.name for phase in self.phases])]
        places: tuple[Place, ...] = ("device", "host")
        groups = [places] if self.one_memory else [("device",), ("host",)]
        for group in groups:
            own = {name: row for (name, place), row in rows.items() if place in group and any(row)}
            head = "" if self.one_memory else f"{group[0]}: "
            lines += [_row(f"  {head}{name}", [readable(n) if n else "-" for n in row])
                      for name, row in own.items()]  # fmt: skip
            lines.append(_row(f"  {head}all", [readable(p.total(*group)) for p in self.phases]))
        return lines

    def _verdict(self) -> list[str]:
        lines = []
        for place, memory in (("device", self.device), ("host", self.host)):
            need, phase = self.peak(place)
            if phase is None:
                continue
            have = "its memory is not known here"
            if memory is not None:
                free = "" if memory.given else " free"
                shared = "" if memory.sharers == 1 else f" for {memory.sharers} processes"
                have = f"{memory.name} has {readable(memory.free_bytes)}{free}{shared}"
            lines.append(f"peak {place if not self.one_memory else 'memory'} {readable(need)} "
                         f"({phase.name}); {have}")  # fmt: skip
        return lines


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<42}" + "".join(f"{cell:>12}" for cell in cells)


def _line(name: str, value: str, note: str = "") -> str:
    return f"  {name:<44}{value:>10}  {note}".rstrip()
