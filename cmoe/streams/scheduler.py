"""Mini-batches in chunks: fast to make, and restorable from their position alone.

Each pass over the data has its own generator, seeded by (seed, experience, phase, pass); so nothing but the position
need be saved to go on with exactly the batches that would have come. A chunk is gathered and transformed at once and
then cut: the cost of a mini-batch is a few microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cmoe.streams.seeding import generator
from cmoe.streams.stream import Split
from cmoe.streams.transforms import BatchTransform, is_stochastic

CHUNK_BYTES = 8 << 20  # larger chunks leave the cache and their pages cost more than the calls they save


@dataclass(slots=True)
class Chunk:
    """Some consecutive mini-batches.

    Attributes:
        x: inputs of each mini-batch, (B, ...).
        y: targets of each, (B,) labels or (B, L) next tokens.
        task: experience of each sample, (B,) int64.
        ids: row of each sample in its experience's storage, (B,) int64.
        experience: the experience of all samples, or None where they are of several.
        first: how many steps of this segment came before.
        epoch: which pass the first mini-batch is of.
        sizes: samples in each mini-batch.
        flat: x, y, task and ids uncut.
    """

    x: tuple[Tensor, ...]
    y: tuple[Tensor, ...]
    task: tuple[Tensor, ...]
    ids: tuple[Tensor, ...]
    experience: int | None
    first: int
    epoch: int
    sizes: tuple[int, ...]
    flat: tuple[Tensor, Tensor, Tensor, Tensor]

    @classmethod
    def cut(
        cls,
        flat: tuple[Tensor, Tensor, Tensor, Tensor],
        sizes: tuple[int, ...],
        experience: int | None,
        first: int,
        epoch: int,
    ) -> Chunk:
        """A chunk whose mini-batches are views of `flat`."""
        x, y, task, ids = (t.split(sizes) for t in flat)
        return cls(x, y, task, ids, experience, first, epoch, sizes, flat)

    def __len__(self) -> int:
        return len(self.sizes)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Chunk:
        """This chunk on `device`, moved in one piece (Lightning calls this)."""
        if self.flat[0].device == torch.device(device):
            return self
        x, y, task, ids = (t.to(device, non_blocking=non_blocking) for t in self.flat)
        return Chunk.cut((x, y, task, ids), self.sizes, self.experience, self.first, self.epoch)


class BatchScheduler:
    """The mini-batches of one phase of one segment, as an iterable of chunks.

    Args:
        splits: (samples, experience) pairs whose union is trained on; all share one storage.
        transform: raw batch -> model input.
        batch_size: samples in a mini-batch; the last of a pass may have fewer.
        epochs: passes over the data (online: over each small experience).
        max_steps: stop after this many mini-batches; 0 is no limit.
        chunk: mini-batches in a chunk at most; a chunk ends with the pass and at `CHUNK_BYTES`.
        seed: the run's.
        experience: index of the segment's last experience.
        phase: which fit of the segment.
        parts: online: sizes of the small experiences, in order; their first pass keeps the order of arrival.
        drop_last: leave out the last mini-batch of a pass where it is not full.
    """

    def __init__(
        self,
        splits: Sequence[tuple[Split, int]],
        transform: BatchTransform,
        *,
        batch_size: int,
        epochs: int = 1,
        max_steps: int = 0,
        chunk: int = 32,
        seed: int = 0,
        experience: int = 0,
        phase: int = 0,
        parts: Sequence[int] | None = None,
        drop_last: bool = False,
    ) -> None:
        assert splits
        assert min(batch_size, epochs, chunk) > 0
        self.transform, self.batch_size, self.key = transform, batch_size, (seed, experience, phase)
        self.storage = splits[0][0].x
        assert all(s.x is self.storage for s, _ in splits), "the splits of a segment share one storage"
        self._rows = torch.cat([s.index for s, _ in splits])
        targets = [s.targets() for s, _ in splits]
        self._labels = None if targets[0] is None else torch.cat([t for t in targets if t is not None])
        self._experience = splits[0][1] if len({e for _, e in splits}) == 1 else None
        self._experiences = torch.cat([torch.full((len(s),), e, dtype=torch.int64) for s, e in splits])
        self.samples = len(self._rows)
        # each pass: its samples are those from start to stop, visited in its epoch's order
        if parts is None:
            self._passes = [(0, self.samples, epoch) for epoch in range(epochs)]
        else:
            assert sum(parts) == self.samples, "parts cover the samples"
            stops = torch.tensor(parts).cumsum(0).tolist()
            self._passes = [(b - n, b, epoch) for n, b in zip(parts, stops, strict=True) for epoch in range(epochs)]
        self._online = parts is not None
        self._counts = [(b - a) // batch_size if drop_last else -(-(b - a) // batch_size) for a, b, _ in self._passes]
        self.steps = sum(self._counts) if not max_steps else min(max_steps, sum(self._counts))
        sample_bytes = max(1, self.storage[0].numel() * 4) if self.samples else 1
        self.chunk = max(1, min(chunk, CHUNK_BYTES // (batch_size * sample_bytes)))
        self._position = self._begin = (0, 0, 0)
        self._loaded = False
        self._order: tuple[int, Tensor] | None = None

    @property
    def position(self) -> tuple[int, int, int]:
        """(pass, mini-batches of it that are handed out, mini-batches handed out in all)."""
        return self._position

    def state_dict(self) -> dict[str, int]:
        """The position behind the chunk handed out last, as plain numbers."""
        where, step, done = self._position
        return {"pass": where, "step": step, "done": done, "samples": self.samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration start at this position."""
        assert state["samples"] == self.samples, "the position is of other data"
        self._begin = self._position = (state["pass"], state["step"], state["done"])
        self._loaded = True

    def __len__(self) -> int:
        """Chunks that the iteration under way, or else the next one, gives in all."""
        return sum(1 for _ in self._plan(self._begin))

    def __iter__(self) -> Iterator[Chunk]:
        # decided here: what stands behind the last yield of a former iteration may not have run
        begin = self._begin if self._loaded else (0, 0, 0)
        self._position, self._begin, self._loaded = begin, begin, False
        try:
            for pieces, end in self._plan(begin):
                done, epoch = self._position[2], self._passes[pieces[0][0]][2]
                self._position = end
                yield self._make(pieces, done, epoch)
        finally:
            if self._begin is begin:  # else another position was loaded since
                self._begin = (0, 0, 0)

    def _plan(self, start: tuple[int, int, int]) -> Iterator[tuple[list[tuple[int, int, int]], tuple[int, int, int]]]:
        """For each chunk its pieces (pass, from step, to step) and the position behind it."""
        where, step, done = start
        while done < self.steps:
            pieces, room = [], min(self.chunk, self.steps - done)
            while room and where < len(self._passes):
                take = min(room, self._counts[where] - step)
                if take:
                    pieces.append((where, step, step + take))
                    step, done, room = step + take, done + take, room - take
                if step == self._counts[where]:
                    where, step = where + 1, 0
                    if not self._online and pieces:
                        break
            yield pieces, (where, step, done)

    def _order_of(self, where: int) -> Tensor:
        """The order in which a pass visits its samples; kept until another is asked for."""
        if self._order is None or self._order[0] != where:
            start, stop, epoch = self._passes[where]
            if self._online and not epoch:
                order = torch.arange(start, stop)
            else:
                order = torch.randperm(stop - start, generator=generator("order", *self.key, where)) + start
            self._order = (where, order)
        return self._order[1]

    def _make(self, pieces: list[tuple[int, int, int]], done: int, epoch: int) -> Chunk:
        chosen, sizes, b = [], [], self.batch_size
        for where, a, z in pieces:
            start, stop, _ = self._passes[where]
            last = min(z * b, stop - start)
            chosen.append(self._order_of(where)[a * b : last])
            sizes += [b] * (z - a - 1) + [last - (z - 1) * b]
        which = chosen[0] if len(chosen) == 1 else torch.cat(chosen)
        ids = self._rows.index_select(0, which)
        raw = self.storage.index_select(0, ids)
        experiences = self._experiences.index_select(0, which)
        x = self._transformed(raw, experiences, sizes, done)
        if self._labels is None:
            flat = (x[:, :-1], x[:, 1:], experiences, ids)
        else:
            flat = (x, self._labels.index_select(0, which), experiences, ids)
        return Chunk.cut(flat, tuple(sizes), self._experience, done, epoch)

    def _transformed(self, raw: Tensor, experiences: Tensor, sizes: list[int], done: int) -> Tensor:
        whose = experiences if self._experience is None else self._experience
        if not is_stochastic(self.transform):
            return self.transform(raw, whose, train=True, generator=None)
        # a generator for each mini-batch, so that where a chunk begins makes no difference
        made, start = [], 0
        for i, size in enumerate(sizes):
            part = slice(start, start + size)
            chance = generator("augment", *self.key, done + i)
            of = whose if isinstance(whose, int) else whose[part]
            made.append(self.transform(raw[part], of, train=True, generator=chance))
            start += size
        return torch.cat(made)


class Batch(NamedTuple):
    """An evaluation mini-batch.

    Attributes:
        x: (B, ...) inputs.
        y: (B,) labels or (B, L) next tokens.
        experience: whose samples they are.
        ids: (B,) rows in the storage.
    """

    x: Tensor
    y: Tensor
    experience: int
    ids: Tensor


def evaluation_batches(split: Split, experience: int, transform: BatchTransform, batch_size: int) -> Iterator[Batch]:
    """All samples of one split in order; batches never cross experiences and nothing is random."""
    for ids in split.index.split(batch_size):
        if not len(ids):  # an empty index splits into one empty piece
            continue
        x = transform(split.x.index_select(0, ids), experience, train=False, generator=None)
        if split.y is None:
            yield Batch(x[:, :-1], x[:, 1:], experience, ids)
        else:
            yield Batch(x, split.y.index_select(0, ids), experience, ids)
