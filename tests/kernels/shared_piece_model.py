"""A model of how the waves of a cluster wait for each other that takes pieces in turns (arch/sm90_shared_piece.h).

Waves come in random order, and what they store or have copied lands at random times: an order that a GPU takes once in
a million calls is one of a few thousand here. It says so where waves wait for ever, and where something is overwritten
that somebody has yet to read or read before it is there. Names are those of the kernel. A block has a piece of its own,
so that its waves share memory with others' only for parts. It knows nothing of numbers, columns and instructions.

Who changes how waves wait changes it here first: several ways to hang were found by it and by no run on a GPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

OUTPUT_WAVES = SCORE_WAVES = 4
Wait = Callable[[], bool] | None  # a wave goes on when it is true; None: others may come first


class Race(Exception):
    """Memory is not what its reader or writer takes it for."""


class Barrier:
    """An mbarrier: a phase is complete with its arrivals and with the bytes that it expects."""

    def __init__(self, arrivals: int) -> None:
        self.arrivals = self.pending = arrivals
        self.bytes = self.phase = 0

    def _look(self) -> None:
        if self.pending < 0:
            raise Race("more arrivals than a phase has")
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.arrivals

    def arrive(self, count: int = 1) -> None:
        self.pending -= count
        self._look()

    def arrive_and_expect(self, count: int) -> None:
        self.bytes += count
        self.arrive()

    def land(self, count: int = 1) -> None:
        self.bytes -= count
        self._look()

    def passed(self, parity: int) -> Wait:
        return lambda: self.phase & 1 != parity & 1


@dataclass(frozen=True)
class Call:
    """A row tile's pieces. tiles: of each but the first and the last one; key_lines, value_lines: units of a tile."""

    pieces: int
    at_once: int
    tiles: int
    first_tiles: int
    last_tiles: int
    key_lines: int
    value_lines: int
    stages: int
    small_cap: bool

    @property
    def turns(self) -> int:
        return (self.pieces + self.at_once - 1) // self.at_once

    def senders(self, to: int) -> set[int]:
        """Waves of each block that send something to block `to` of a turn: strips of 16 columns, or points of rows."""
        strips = OUTPUT_WAVES * self.value_lines
        of_block = max(strips.bit_length() - 1 - (min(self.at_once, 8).bit_length() - 1), 0)  # powers of two
        return {to % OUTPUT_WAVES} | {strip % OUTPUT_WAVES for strip in range(strips) if strip >> of_block == to}

    def tiles_of(self, piece: int) -> int:
        return self.first_tiles if piece == 0 else self.last_tiles if piece == self.pieces - 1 else self.tiles

    @classmethod
    def drawn(cls, rng: random.Random) -> Call:
        at_once, tiles = rng.randint(2, 8), rng.choice([4, 8, 11])
        key_lines, value_lines = rng.choice([(1, 1), (2, 2), (1, 2), (2, 1)])
        short = [rng.choice([tiles, rng.randint(1, tiles)]) for _ in "fl"]
        pieces = rng.randint(at_once + 1, 4 * at_once)
        return cls(pieces, at_once, tiles, *short, key_lines, value_lines, rng.randint(5, 12), rng.random() < 0.4)


class Block:
    """Barriers, and what is in memory now."""

    def __init__(self, call: Call) -> None:
        tiles = range(call.tiles)
        self.have_keys = [[Barrier(1) for _ in range(call.key_lines)] for _ in tiles]
        self.have_tops, self.have_all = ([Barrier(1) for _ in tiles] for _ in "ta")
        self.have_read = [Barrier(OUTPUT_WAVES) for _ in tiles]
        self.empty = [Barrier(OUTPUT_WAVES) for _ in range(call.stages)]
        self.have_parts = [Barrier(1), Barrier(1)]
        self.tops_passed = Barrier(SCORE_WAVES + 1)
        self.meetings = self.met = 0
        self.ring: list[tuple | None] = [None] * call.stages
        self.tops: list[int | None] = [None] * call.tiles  # the turn they are of
        self.weights: list[tuple[int, int] | None] = [None] * call.tiles  # that, and who has yet to read them
        self.parts = [[(0, 0)] * call.at_once for _ in "ab"]  # that, and how many of the sender's waves have come


class Way:
    def __init__(self, call: Call, rank: int) -> None:
        self.call, self.piece, self.turn, self.first_unit, self.here = call, rank, 0, 0, True
        self.tiles = self.first_tiles = call.tiles_of(rank)

    def go_on(self) -> None:
        self.turn += 1
        self.first_unit += self.tiles * (self.call.key_lines + self.call.value_lines)
        self.piece += self.call.at_once
        self.here = self.piece < self.call.pieces
        if self.here:
            self.tiles = self.call.tiles_of(self.piece)

    def parity(self, tile: int) -> int:
        return (self.turn - (self.turn > 0 and tile >= self.first_tiles)) & 1

    def before(self, tile: int, barrier: Barrier) -> Wait:
        return barrier.passed(self.parity(tile) ^ 1) if self.turn > 0 else None

    def pieces_of(self, turn: int) -> int:
        return min(self.call.at_once, self.call.pieces - turn * self.call.at_once)


class Cluster:
    """without: a wait that is left out, to see that it is needed."""

    def __init__(self, call: Call, seed: int, without: str = "") -> None:
        self.call, self.rng, self.without = call, random.Random(seed), without
        self.blocks = [Block(call) for _ in range(call.at_once)]
        self.landing: list[Callable[[], None]] = []

    def _unless(self, name: str, wait: Wait) -> Wait:
        return None if name == self.without else wait

    def _copies(self, rank: int) -> Iterator[Wait]:
        call, block, way = self.call, self.blocks[rank], Way(self.call, rank)
        while way.turn < call.turns and way.here:
            units = [("key", tile, line) for tile in range(way.tiles) for line in range(call.key_lines)]
            units += [("value", tile, line) for tile in range(way.tiles) for line in range(call.value_lines)]
            for number, (what, tile, line) in enumerate(units, way.first_unit):
                stage, lap = number % call.stages, number // call.stages
                yield block.empty[stage].passed(lap ^ 1)
                arrives = block.have_keys[tile][line] if what == "key" else block.have_all[tile]
                yield way.before(tile, arrives)

                def land(stage=stage, unit=(what, way.turn, tile, line), arrives=arrives) -> None:
                    if block.ring[stage] is not None:
                        raise Race(f"{block.ring[stage]} is overwritten by {unit}")
                    block.ring[stage] = unit
                    arrives.land()

                self.landing.append(land)
            way.go_on()

    def _expectations(self, rank: int) -> Iterator[Wait]:
        call, block, way = self.call, self.blocks[rank], Way(self.call, rank)
        while way.turn < call.turns:
            barriers = [(tile, keys, 1) for tile in range(way.tiles) for keys in block.have_keys[tile]]
            for tile in range(way.tiles):
                barriers += [(tile, block.have_tops[tile], 1)] * (not call.small_cap)
                barriers += [(tile, block.have_all[tile], 1 + call.value_lines)]
            for tile, barrier, count in barriers if way.here else ():
                yield self._unless("before expecting", way.before(tile, barrier))
                barrier.arrive_and_expect(count)
            parts = block.have_parts[way.turn % 2]
            if way.turn > 1:
                yield parts.passed(way.turn // 2 ^ 1)
            parts.arrive_and_expect(len(call.senders(rank)) * way.pieces_of(way.turn))
            if way.here:
                for tile in range(way.tiles):
                    made = block.have_all if call.small_cap else block.have_tops
                    yield self._unless("await_scores", made[tile].passed(way.parity(tile)))
                yield self._unless("the turn before", self._tops_passed(block, way))
                block.tops_passed.arrive()
            way.go_on()

    @staticmethod
    def _tops_passed(block: Block, way: Way) -> Wait:
        return block.tops_passed.passed(way.turn ^ 1) if way.turn > 0 else None

    def _scores(self, rank: int, wave: int) -> Iterator[Wait]:
        call, block, way = self.call, self.blocks[rank], Way(self.call, rank)
        while way.turn < call.turns and way.here:
            passed = 0
            for tile in range(wave, way.tiles, SCORE_WAVES):
                for line in range(call.key_lines):
                    stage = (way.first_unit + tile * call.key_lines + line) % call.stages
                    yield block.have_keys[tile][line].passed(way.parity(tile))
                    if block.ring[stage] != ("key", way.turn, tile, line):
                        raise Race(f"keys of tile {tile}, turn {way.turn}: there is {block.ring[stage]}")
                    yield None
                    block.ring[stage] = None
                    block.empty[stage].arrive(OUTPUT_WAVES)
                if not call.small_cap:
                    yield self._unless("tops_passed", self._tops_passed(block, way))

                    def land_tops(tile=tile, turn=way.turn) -> None:
                        block.tops[tile] = turn
                        block.have_tops[tile].land()

                    self.landing.append(land_tops)
                    for other in range(passed, tile):
                        yield block.have_tops[other].passed(way.parity(other))
                        if block.tops[other] != way.turn:
                            raise Race(f"greatest scores of turn {block.tops[other]}, not {way.turn}")
                    passed = tile + 1
                yield self._unless("have_read", way.before(tile, block.have_read[tile]))

                def land_weights(tile=tile, turn=way.turn) -> None:
                    if block.weights[tile] is not None:
                        raise Race(f"weights of tile {tile} are overwritten by turn {turn}")
                    block.weights[tile] = (turn, OUTPUT_WAVES)
                    block.have_all[tile].land()

                self.landing.append(land_weights)
            yield self._tops_passed(block, way)
            block.tops_passed.arrive()
            way.go_on()

    def _add(self, rank: int, way: Way, turn: int) -> Iterator[Wait]:
        block = self.blocks[rank]
        yield block.have_parts[turn % 2].passed(turn // 2)
        for piece in range(way.pieces_of(turn)):
            yield None
            if block.parts[turn % 2][piece] != (turn, len(self.call.senders(rank))):
                raise Race(f"part {piece} of turn {turn}: there is {block.parts[turn % 2][piece]}")

    def _output(self, rank: int, wave: int) -> Iterator[Wait]:
        call, block, way = self.call, self.blocks[rank], Way(self.call, rank)
        while way.turn < call.turns:
            unit = way.first_unit + way.tiles * call.key_lines
            for tile in range(way.tiles if way.here else 0):
                yield block.have_all[tile].passed(way.parity(tile))
                weights = block.weights[tile]
                if weights is None or weights[0] != way.turn:
                    raise Race(f"weights of tile {tile}, turn {way.turn}: there is {weights}")
                stages = [(unit + line) % call.stages for line in range(call.value_lines)]
                for line, stage in enumerate(stages):
                    if block.ring[stage] != ("value", way.turn, tile, line):
                        raise Race(f"values of tile {tile}, turn {way.turn}: there is {block.ring[stage]}")
                yield None
                for stage in stages:
                    if block.empty[stage].pending == 1:
                        block.ring[stage] = None
                    block.empty[stage].arrive()
                turn, readers = block.weights[tile]
                block.weights[tile] = (turn, readers - 1) if readers > 1 else None
                block.have_read[tile].arrive()
                unit += call.value_lines
            if way.turn > 0:
                yield from self._add(rank, way, way.turn - 1)
            if way.here:
                meeting = block.met
                block.meetings += 1
                if block.meetings % OUTPUT_WAVES == 0:
                    block.met += 1
                yield self._unless("meet_output", lambda meeting=meeting: block.met > meeting)
                for to in (self.blocks[i] for i in range(call.at_once) if wave in call.senders(i)):

                    def land_part(to=to, turn=way.turn, piece=way.piece - way.turn * call.at_once) -> None:
                        of, waves = to.parts[turn % 2][piece]
                        to.parts[turn % 2][piece] = (turn, waves + 1 if of == turn else 1)
                        to.have_parts[turn % 2].land()

                    self.landing.append(land_part)
            way.go_on()
        yield from self._add(rank, way, call.turns - 1)

    def run(self) -> str:
        """What went wrong, or nothing."""
        rng, waves = self.rng, {}
        for rank in range(self.call.at_once):
            waves[f"{rank} copies"], waves[f"{rank} expects"] = self._copies(rank), self._expectations(rank)
            waves |= {f"{rank} scores {i}": self._scores(rank, i) for i in range(SCORE_WAVES)}
            waves |= {f"{rank} output {i}": self._output(rank, i) for i in range(OUTPUT_WAVES)}
        waits: dict[str, Wait] = dict.fromkeys(waves)
        slow: set[str] = set()  # for a while: what goes wrong needs somebody who is far behind
        change, patience = rng.choice([(0.01, 0.97), (0.002, 0.999)])
        try:
            while waits:
                ready = [name for name, wait in waits.items() if wait is None or wait()]
                if self.landing and (not ready or rng.random() < 0.5):
                    self.landing.pop(rng.choice([0, rng.randrange(len(self.landing))]))()
                    continue
                if not ready:
                    return f"wait for ever: {', '.join(waits)}"
                if rng.random() < change:
                    slow = {name for name in waits if rng.random() < 0.3}
                fast = [name for name in ready if name not in slow]
                name = rng.choice(fast if fast and rng.random() < patience else ready)
                try:
                    waits[name] = next(waves[name])
                except StopIteration:
                    del waits[name]
        except Race as race:
            return str(race)
        return ""


def found(runs: int, without: str = "", seed: int = 0) -> str:
    """What the first of so many drawn calls has that goes wrong, or nothing."""
    for number in range(seed, seed + runs):
        call = Call.drawn(random.Random(number))
        if wrong := Cluster(call, number, without).run():
            return f"seed {number}, {call}: {wrong}"
    return ""
