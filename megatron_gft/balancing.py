"""Spread the work of a step over packs: bins of bounded size and nearly equal cost, in lock-step rows.

A row is one microbatch: the bins that the data-parallel ranks work on at the same time. What counts is the sum over
rows of the dearest bin. Longest-processing-time-first gets close where bins hold many items; where they hold few
(whole groups on a shared prompt), groups are cut exactly where that lowers the dearest bin, each cut at the price
of computing the prompt once more.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Bins this close to the mean are left alone.
TOLERANCE = 0.003
# How many of the cheapest bins are considered as partners of the dearest one.
PARTNERS = 4
# How many exchanges are looked at exactly, best estimate first, before a bin counts as done.
ATTEMPTS = 4


class Item(NamedTuple):
    """What is placed as a whole: some responses of one group, on one shared prompt when there are several.

    ``tokens`` are rows of a pack, ``flops`` their cost, ``loss_rows`` the response tokens among the labels.
    """

    group: int
    responses: tuple[int, ...]
    tokens: int
    flops: float
    loss_rows: int


Bin = list[Item]


class _Exchange(NamedTuple):
    """``given`` leaves the dearer bin for the cheaper one, ``taken`` comes back; ``worst`` is the larger cost then.

    ``tails`` is empty for a whole item, else the responses of ``given`` that go.
    """

    worst: float
    partner: int
    given: Item
    taken: Item | None
    tails: tuple[int, ...]


def cost(items: Sequence[Item]) -> float:
    """Total cost of a bin."""
    return sum(item.flops for item in items)


def rows(items: Sequence[Item]) -> int:
    """Rows of a bin before padding."""
    return sum(item.tokens for item in items)


@dataclass(frozen=True)
class Balancer:
    """Places items into bins of at most ``capacity`` rows.

    Attributes:
        make_item: the item of some responses of a group: (group, responses) -> item.
        tail_flops: cost that a response adds to an item that has its prompt: (group, response) -> flops.
    """

    capacity: int
    make_item: Callable[[int, tuple[int, ...]], Item]
    tail_flops: Callable[[int, int], float]

    def spread(self, items: Sequence[Item], rows_of_bins: int, width: int) -> list[Bin] | None:
        """``rows_of_bins`` x ``width`` bins, dearest first; consecutive ``width`` form a row. None: no room.

        An item dearer than the average bin sets the height of its row: the row is filled up to it, and the rest
        is spread over the other rows. So one long response does not leave a whole row of ranks waiting.
        """
        bins: list[Bin] = []
        rest = list(items)
        for done in range(rows_of_bins):
            count = (rows_of_bins - done) * width
            highest = max((item.flops for item in rest), default=0.0)
            if done == rows_of_bins - 1 or highest <= (1 + TOLERANCE) * cost(rest) / count:
                even = self.assign(rest, count)
                if even is None:
                    return None
                self.even_out(even)
                bins += even
                break
            filled, rest = self.fill(rest, width, highest)
            bins += filled
        return sorted(bins, key=lambda items: (-cost(items), items))

    def assign(self, items: Sequence[Item], count: int) -> list[Bin] | None:
        """Longest processing time first: each item, dearest first, to the cheapest of ``count`` bins with room.

        An item that finds no room is halved, if it has several responses; if not, the result is None.
        """
        bins: list[Bin] = [[] for _ in range(count)]
        used = [0] * count
        cheapest = [(0.0, index) for index in range(count)]
        waiting = [(-item.flops, item) for item in items]
        heapq.heapify(waiting)
        while waiting:
            _, item = heapq.heappop(waiting)
            full = []
            while cheapest and used[cheapest[0][1]] + item.tokens > self.capacity:
                full.append(heapq.heappop(cheapest))
            if cheapest:
                total, index = cheapest[0]
                bins[index].append(item)
                used[index] += item.tokens
                heapq.heapreplace(cheapest, (total + item.flops, index))
            elif len(item.responses) > 1:
                for half in self.halves(item):
                    heapq.heappush(waiting, (-half.flops, half))
            else:
                return None
            for entry in full:
                heapq.heappush(cheapest, entry)
        return bins

    def fill(self, items: Sequence[Item], width: int, height: float) -> tuple[list[Bin], list[Item]]:
        """``width`` bins filled up to cost ``height``, best fit first, and the items that are left."""
        bins: list[Bin] = [[] for _ in range(width)]
        costs, used = [0.0] * width, [0] * width
        left = []
        for item in sorted(items, key=lambda item: (-item.flops, item)):
            room = [
                index
                for index in range(width)
                if costs[index] + item.flops <= height and used[index] + item.tokens <= self.capacity
            ]
            if not room:
                left.append(item)
                continue
            index = max(room, key=lambda index: (costs[index], -index))
            bins[index].append(item)
            costs[index] += item.flops
            used[index] += item.tokens
        return bins, left

    def cut(self, item: Item, tails: tuple[int, ...]) -> tuple[Item, Item]:
        """The item without the responses ``tails``, and these on a prompt of their own."""
        stay = tuple(k for k in item.responses if k not in tails)
        return self.make_item(item.group, stay), self.make_item(item.group, tuple(sorted(tails)))

    def halves(self, item: Item) -> tuple[Item, Item]:
        """Two parts of about the same cost."""
        tails = sum(self.tail_flops(item.group, k) for k in item.responses)
        return self.cut(item, self.choose_tails(item, tails / 2)[0])

    def choose_tails(self, item: Item, moved_flops: float) -> tuple[tuple[int, ...], float]:
        """Responses, at least one and not all, whose tails cost about ``moved_flops``; and what they cost.

        Greedy from each response on, dearest first; the nearest sum is taken.
        """
        tails = sorted(((self.tail_flops(item.group, k), k) for k in item.responses), reverse=True)
        best, best_sum = (tails[-1][1],), tails[-1][0]
        for start in range(len(tails) - 1):
            moved, total = [], 0.0
            for tail, k in tails[start:]:
                if total + tail <= moved_flops and len(moved) < len(tails) - 1:
                    moved.append(k)
                    total += tail
            if moved and abs(total - moved_flops) < abs(best_sum - moved_flops):
                best, best_sum = tuple(moved), total
            above = tails[start][0]
            if abs(above - moved_flops) < abs(best_sum - moved_flops):
                best, best_sum = (tails[start][1],), above
        return best, best_sum

    def even_out(self, bins: list[Bin]) -> None:
        """Move, swap and cut items between the dearest and the cheapest bins while that lowers the dearest."""
        costs = [cost(items) for items in bins]
        for _ in range(2 * len(bins)):
            high = max(range(len(bins)), key=costs.__getitem__)
            if costs[high] <= (1 + TOLERANCE) * sum(costs) / len(costs):
                return
            exchanges = []
            for low in heapq.nsmallest(PARTNERS, range(len(bins)), key=costs.__getitem__):
                exchanges += self.exchanges(bins[high], bins[low], low, costs[high], costs[low])
            for exchange in sorted(exchanges, key=lambda exchange: exchange.worst)[:ATTEMPTS]:
                new_high, new_low = self.apply(exchange, bins[high], bins[exchange.partner])
                worst = max(cost(new_high), cost(new_low))
                fits = rows(new_high) <= self.capacity and rows(new_low) <= self.capacity
                if fits and worst < costs[high] * (1 - 1e-4):
                    break
            else:
                return
            bins[high], bins[exchange.partner] = new_high, new_low
            costs[high], costs[exchange.partner] = cost(new_high), cost(new_low)

    def exchanges(self, high: Bin, low: Bin, partner: int, high_cost: float, low_cost: float) -> list[_Exchange]:
        """What might lower the larger of two bins' costs."""
        half = (high_cost - low_cost) / 2
        found = []
        low = sorted(low, key=lambda item: item.flops)
        low_costs = [item.flops for item in low]
        groups = {item.group for item in low}
        for give in high:
            place = bisect_left(low_costs, give.flops - half)
            for take in [*low[max(0, place - 1) : place + 1], None]:
                moved = give.flops - (take.flops if take else 0.0)
                found.append(_Exchange(max(high_cost - moved, low_cost + moved), partner, give, take, ()))
            if len(give.responses) > 1:
                prompt = 0.0
                if give.group not in groups:
                    prompt = give.flops - sum(self.tail_flops(give.group, k) for k in give.responses)
                if prompt < 2 * half:
                    tails, moved = self.choose_tails(give, half - prompt / 2)
                    worst = max(high_cost - moved, low_cost + prompt + moved)
                    found.append(_Exchange(worst, partner, give, None, tails))
        return [exchange for exchange in found if exchange.worst < high_cost]

    def apply(self, exchange: _Exchange, high: Bin, low: Bin) -> tuple[Bin, Bin]:
        """The two bins after an exchange; a part that meets its group's prompt shares it."""
        given, taken = exchange.given, exchange.taken
        new_high = [item for item in high if item is not given]
        new_low = [item for item in low if item is not taken]
        moved = given
        if exchange.tails:
            keep, moved = self.cut(given, exchange.tails)
            new_high.append(keep)
            there = next((item for item in new_low if item.group == given.group), None)
            if there is not None:
                new_low.remove(there)
                moved = self.make_item(given.group, tuple(sorted(moved.responses + there.responses)))
        if taken is not None:
            new_high.append(taken)
        return new_high, [*new_low, moved]
