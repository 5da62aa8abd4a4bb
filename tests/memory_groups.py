"""Groups of tokens in memory, as training reads them."""

from __future__ import annotations

from typing import Any

from megatron_gft.shards.limited import GroupTable


class MemoryGroups:
    """A data set (``batch.Groups``) over dicts with ``prompt``, ``responses``, ``sources`` and ``rewards``."""

    def __init__(self, items: list[dict[str, Any]], fingerprint: str):
        self.items, self.fingerprint = items, fingerprint

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

    def table(self, indices) -> GroupTable:
        items = [self.items[index] for index in indices]
        return GroupTable.of_groups(
            [
                (len(item["prompt"]), [len(tokens) for tokens in item["responses"]], item["sources"], item["rewards"])
                for item in items
            ]
        )

    def describe(self, index: int) -> str:
        return f"g{index}"
