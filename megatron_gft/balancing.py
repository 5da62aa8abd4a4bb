"""Spread the work of a step over packs: bins of bounded size and nearly equal cost, microbatch by microbatch.

A microbatch is one bin for each data-parallel rank; the ranks work on them at the same time. What counts is the sum
over microbatches of the dearest bin. Longest-processing-time-first gets close where bins hold many items; where they
hold few (whole groups on a shared prompt), groups are cut exactly where that lowers the dearest bin, each cut at the
price of computing the prompt once more.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

# Bins this close to the mean are left alone.
TOLERANCE = 0.005
# How many of the cheapest bins are tried as partners of the dearest one: at first, and with pairs of items.
PARTNERS = (4, 16)
# Pairs of items are tried where a bin holds no more than this.
FEW_ITEMS = 8
# An exchange must lower the dearest bin by this share.
LEAST_GAIN = 1e-4
# How many exchanges are looked at exactly, best estimate first, before a bin counts as done.
ATTEMPTS = 4


class Item(NamedTuple):
    """What is placed as a whole: some responses of one group, on one shared prompt when there are several.

    ``tokens`` counts what it takes of a pack, ``flops`` is their cost, ``loss_rows`` its response tokens.
    """

    group: int
    responses: tuple[int, ...]
    tokens: int
    flops: float
    loss_rows: int


Bin = list[Item]


class _Exchange(NamedTuple):
    """``given`` leaves the dearer bin for the cheaper one, ``taken`` comes back; ``worst`` is the larger cost then.

    With ``tails``, only these responses of the one item ``given`` go.
    """

    worst: float
    partner: int
    given: tuple[Item, ...]
    taken: tuple[Item, ...]
    tails: tuple[int, ...] = ()


def cost(items: Sequence[Item]) -> float:
    """Total cost of a bin."""
    return sum([item.flops for item in items])


def tokens(items: Sequence[Item]) -> int:
    """Tokens of a bin before padding."""
    return sum([item.tokens for item in items])


@dataclass(frozen=True)
class Balancer:
    """Places items into bins of at most ``capacity`` tokens.

    ``make_item`` gives the item of some responses of a group; ``tails`` are [group][response] -> rows and cost that a
    response adds to an item that has its prompt.
    """

    capacity: int
    make_item: Callable[[int, tuple[int, ...]], Item]
    tails: Sequence[Sequence[tuple[int, float]]]
    _halves: dict[Item, tuple[Item, Item]] = field(default_factory=dict, init=False)

    def spread(self, items: Sequence[Item], microbatches: int, dp_size: int) -> list[Bin] | None:
        """``microbatches`` x ``dp_size`` bins, dearest first; consecutive ``dp_size`` run together. None: no room.

        An item dearer than the average bin sets the height of its microbatch, which is filled up to it; the rest is
        spread over the others. So one long response does not leave a whole microbatch of ranks waiting.
        """
        bins: list[Bin] = []
        rest = list(items)
        for left in range(microbatches, 0, -1):
            count = left * dp_size
            highest = max((item.flops for item in rest), default=0.0)
            if left == 1 or highest <= (1 + TOLERANCE) * cost(rest) / count:
                even = self.assign(rest, count)
                if even is None:
                    return None
                self.even_out(even)
                bins += even
                break
            filled, rest = self.fill(rest, dp_size, highest)
            bins += filled
        return sorted(bins, key=lambda items: (-cost(items), items))

    def assign(self, items: Sequence[Item], count: int) -> list[Bin] | None:
        """Longest processing time first: each item, dearest first, to the cheapest of ``count`` bins with room.

        An item that finds no room is halved, if it has several responses; if not, the result is None.
        """
        bins: list[Bin] = [[] for _ in range(count)]
        used = [0] * count
        cheapest = [(0.0, index) for index in range(count)]
        full: list[tuple[int, float, int]] = []  # bins that had no room for an item, emptiest first
        waiting = [(-item.flops, item) for item in items]
        heapq.heapify(waiting)
        while waiting:
            _, item = heapq.heappop(waiting)
            most = self.capacity - item.tokens
            while full and full[0][0] <= most:
                heapq.heappush(cheapest, heapq.heappop(full)[1:])
            while cheapest and used[cheapest[0][1]] > most:
                total, index = heapq.heappop(cheapest)
                heapq.heappush(full, (used[index], total, index))
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
        return bins

    def fill(self, items: Sequence[Item], width: int, height: float) -> tuple[list[Bin], list[Item]]:
        """``width`` bins filled up to cost ``height``, best fit first, and the items that are left."""
        bins: list[Bin] = [[] for _ in range(width)]
        costs, used, lowest = [0.0] * width, [0] * width, 0.0
        left = []
        for item in sorted(items, key=lambda item: (-item.flops, item)):
            room = [
                index
                for index in range(width if lowest + item.flops <= height else 0)
                if costs[index] + item.flops <= height and used[index] + item.tokens <= self.capacity
            ]
            if not room:
                left.append(item)
                continue
            index = max(room, key=lambda index: (costs[index], -index))
            bins[index].append(item)
            costs[index] += item.flops
            used[index] += item.tokens
            lowest = min(costs)
        return bins, left

    def cut(self, item: Item, tails: tuple[int, ...]) -> tuple[Item, Item]:
        """The item without the responses ``tails``, and these on a prompt of their own."""
        stay = tuple(k for k in item.responses if k not in tails)
        return self.make_item(item.group, stay), self.make_item(item.group, tuple(sorted(tails)))

    def halves(self, item: Item) -> tuple[Item, Item]:
        """Two parts of about the same cost; arrangements that are tried ask for the same ones."""
        if item not in self._halves:
            self._halves[item] = self.cut(item, self.choose_tails(item, self.tails_of(item) / 2)[0])
        return self._halves[item]

    def tails_of(self, item: Item) -> float:
        """Cost of an item of several responses without that of its prompt."""
        tails = self.tails[item.group]
        return sum([tails[k][1] for k in item.responses])

    def choose_tails(self, item: Item, moved_flops: float) -> tuple[tuple[int, ...], float]:
        """Responses, at least one and not all, whose tails cost about ``moved_flops``; and what they cost.

        Greedy from each response on, dearest first; the nearest sum is taken.
        """
        of_group = self.tails[item.group]
        tails = sorted([(of_group[k][1], k) for k in item.responses], reverse=True)
        best: tuple[int, ...] = (tails[-1][1],)
        best_sum = tails[-1][0]
        for start in range(len(tails) - 1):
            moved: list[int] = []
            total = 0.0
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
        """Move, swap and cut items between the dearest bin and cheaper ones while that lowers the dearest."""
        costs = [cost(items) for items in bins]
        order = sorted((total, index) for index, total in enumerate(costs))
        for _ in range(2 * len(bins)):
            high = order[bisect_left(order, (order[-1][0], -1))][1]
            if costs[high] <= (1 + TOLERANCE) * sum(costs) / len(costs):
                return
            partners = [index for _, index in order[: PARTNERS[1]]]
            before = [(costs[index], index) for index in {high, *partners}]
            if not (
                self.improve(bins, costs, high, partners[: PARTNERS[0]], pairs=False)
                or self.improve(bins, costs, high, partners, pairs=True)
            ):
                return
            for total, index in before:
                if costs[index] != total:
                    del order[bisect_left(order, (total, index))]
                    insort(order, (costs[index], index))

    def improve(self, bins: list[Bin], costs: list[float], high: int, partners: Sequence[int], pairs: bool) -> bool:
        """Make the exchange that lowers bin ``high`` and its partner most; False: there is none."""
        exchanges: list[_Exchange] = []
        for low in partners:
            difference = costs[high] - costs[low]
            swaps = _swaps(bins[high], bins[low], difference / 2, pairs)
            exchanges += (
                _Exchange(costs[high] - min(moved, difference - moved), low, given, taken)
                for moved, given, taken in swaps
            )
            if not pairs:
                exchanges += self.cuts(bins[high], bins[low], low, costs[high], difference)
        for exchange in heapq.nsmallest(ATTEMPTS, exchanges):
            if exchange.worst >= costs[high] * (1 - LEAST_GAIN):
                return False
            low = exchange.partner
            changed = self.apply(exchange, bins[high], bins[low])
            if max(map(tokens, changed)) <= self.capacity and max(map(cost, changed)) < costs[high] * (1 - LEAST_GAIN):
                bins[high], bins[low] = changed
                costs[high], costs[low] = map(cost, changed)
                return True
        return False

    def cuts(self, high: Bin, low: Bin, partner: int, high_cost: float, difference: float) -> list[_Exchange]:
        """For each item of several responses, the part of it that had best go over to ``low``."""
        groups = {item.group for item in low}
        found = []
        for item in high:
            if len(item.responses) > 1:
                tails = self.tails_of(item)
                prompt = 0.0 if item.group in groups else item.flops - tails
                if prompt < difference:
                    part, moved = self.choose_tails(item, (difference - prompt) / 2)
                    worst = high_cost - min(moved, difference - moved - prompt)
                    found.append(_Exchange(worst, partner, (item,), (), part))
        return found

    def apply(self, exchange: _Exchange, high: Bin, low: Bin) -> tuple[Bin, Bin]:
        """The two bins after an exchange; a part that meets its group's prompt shares it."""
        new_high = [*(item for item in high if item not in exchange.given), *exchange.taken]
        new_low = [item for item in low if item not in exchange.taken]
        if not exchange.tails:
            return new_high, [*new_low, *exchange.given]
        (given,) = exchange.given
        keep, moved = self.cut(given, exchange.tails)
        there = next((item for item in new_low if item.group == given.group), None)
        if there is not None:
            new_low.remove(there)
            moved = self.make_item(given.group, tuple(sorted(moved.responses + there.responses)))
        return [*new_high, keep], [*new_low, moved]


def _swaps(
    high: Bin, low: Bin, moved_flops: float, pairs: bool
) -> list[tuple[float, tuple[Item, ...], tuple[Item, ...]]]:
    """(moved cost, given, taken) that move about ``moved_flops`` > 0 from ``high`` to ``low``.

    Single items, or with ``pairs`` up to two for up to two, where the bins hold few.
    """
    takes: list[tuple[Item, ...]] = [(), *_subsets(low, pairs)]
    takes.sort(key=cost)
    costs = [cost(take) for take in takes]
    swaps = []
    for give in _subsets(high, pairs):
        flops = cost(give)
        place = bisect_left(costs, flops - moved_flops)
        swaps += [(flops - costs[i], give, takes[i]) for i in range(max(0, place - 1), min(place + 1, len(takes)))]
    return [swap for swap in swaps if 0 < swap[0] < 2 * moved_flops]


def _subsets(items: Bin, pairs: bool) -> list[tuple[Item, ...]]:
    """Single items, and pairs of them where ``pairs`` is set and there are few."""
    singles: list[tuple[Item, ...]] = [(item,) for item in items]
    return singles + list(combinations(items, 2)) if pairs and len(items) <= FEW_ITEMS else singles
