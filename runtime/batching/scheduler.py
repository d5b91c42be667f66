"""Whose turn it is: which pictures in flight share the next call of the model.

Knows numbers about pictures, not pictures: the same rules run the engine in flight, foretell when
a picture will be done, and simulate fleets.

The earliest due goes first within a priority. What was given no deadline is due after `STRETCH`
times the seconds that it would take alone, so the short ones pass the long ones, and the longest
is due some time: nothing starves. Whoever has waited `PATIENCE` seconds rises by one priority.
A picture that is passed over keeps its latents and goes on later; that costs nothing.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

STRETCH = 4.0
PATIENCE = 30.0
MARGIN = 1.1  # what a forecast may be wrong by before a promise is refused


@dataclass(slots=True, eq=False)
class Turn:
    """What the rules know of a picture.

    group: pictures of one group can share a call, while their next evaluations run one network
    rows: rows of one evaluation; left: evaluations left
    full: the share of its evaluations that run the whole model; the others run its shallow part
    due: seconds on the caller's clock; promised: whether somebody was promised it
    priority: larger goes first
    started: whether it has a slot
    """

    group: Hashable
    rows: int
    left: int
    submitted: float
    due: float
    priority: int = 0
    promised: bool = False
    started: bool = False
    network: str = "unet"
    full: float = 1.0

    def key(self, now: float) -> tuple[float, float, float]:
        """The smallest goes first."""
        risen = self.priority + max(0.0, now - self.submitted) // PATIENCE
        return (-risen, self.due, self.submitted)


def sharing(ordered: Sequence[Turn], most: Callable[[Hashable], int]) -> list[Turn]:
    """The first in order and, of those after it, whose rows fit into the same call.

    most: rows of one call of a group
    """
    first = ordered[0]
    room, chosen = max(most(first.group), first.rows), []
    for turn in ordered:
        alike = turn.group == first.group and turn.network == first.network
        if alike and turn.rows <= room:
            chosen.append(turn)
            room -= turn.rows
    return chosen


@dataclass(frozen=True, slots=True)
class Rates:
    """What things cost, in seconds.

    call: of one call of the model, by group and rows. most: rows of one call, by group
    before, after: from a slot to the first evaluation, from the last one to the picture, by group
    shallow: of a call of the model's shallow part, in units of the whole one's, by group
    """

    call: Callable[[Hashable, int], float]
    most: Callable[[Hashable], int]
    before: Callable[[Hashable], float]
    after: Callable[[Hashable], float]
    shallow: Callable[[Hashable], float] = lambda _: 1.0

    def evaluation(self, sharing: Sequence[Turn]) -> float:
        """Seconds of a call that these share, on average over their evaluations."""
        group, full = sharing[0].group, max(turn.full for turn in sharing)
        seconds = self.call(group, sum(turn.rows for turn in sharing))
        return seconds * (full + (1.0 - full) * self.shallow(group))

    def alone(self, turn: Turn) -> float:
        """Seconds that a picture takes if nothing else runs."""
        group = turn.group
        return self.before(group) + turn.left * self.evaluation([turn]) + self.after(group)

    def due(self, turn: Turn) -> float:
        """When a picture is due that was given no deadline."""
        return turn.submitted + STRETCH * self.alone(turn)


def forecast(turns: Sequence[Turn], now: float, rates: Rates, slots: int) -> list[float]:
    """When each of the pictures will be done, by the caller's clock.

    From one departure to the next the same ones share every call, so the cost is that of a few
    looks at the list, not of every evaluation.
    """
    left = [turn.left for turn in turns]
    done = [now] * len(turns)
    ordered = sorted(range(len(turns)), key=lambda i: turns[i].key(now))
    place = {id(turns[i]): i for i in ordered}
    rank = {i: at for at, i in enumerate(ordered)}
    inside = [i for i in ordered if turns[i].started]
    waiting = [i for i in ordered if not turns[i].started]
    idle = not inside and bool(waiting)
    clock = decoder = now + (rates.before(turns[waiting[0]].group) if idle else 0.0)
    while inside or waiting:
        room = slots - len(inside)
        inside = sorted([*inside, *waiting[:room]], key=rank.__getitem__)
        waiting = waiting[room:]
        chosen = [place[id(t)] for t in sharing([turns[i] for i in inside], rates.most)]
        count = min(left[i] for i in chosen)
        group = turns[chosen[0]].group
        clock += count * rates.evaluation([turns[i] for i in chosen])
        for i in chosen:
            left[i] -= count
            if left[i] <= 0:
                inside.remove(i)
                decoder = max(decoder, clock) + rates.after(group)  # one picture after another
                done[i] = decoder
    return done


def lateness(turns: Sequence[Turn], now: float, rates: Rates, slots: int) -> list[float]:
    """Seconds by which each of the pictures may come too late; negative where it comes in time."""
    done = forecast(turns, now, rates, slots)
    return [MARGIN * (at - now) - (turn.due - now) for turn, at in zip(turns, done, strict=True)]
