"""Group shards: tokens of groups on disk. What other packages use stands here."""

from megatron_gft.shards.manifest import TokenizerStamp, check_sets, expand_shards
from megatron_gft.shards.reader import Group, GroupShard, GroupTable
from megatron_gft.shards.verification import verify_shards
from megatron_gft.shards.writer import GroupShardWriter, tokenizer_stamp
