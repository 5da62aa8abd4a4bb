"""Group files: one prompt with its responses, as text. What other packages use stands here."""

from megatron_gft.groups.files import (
    BYTES_PER_CHUNK,
    GROUP_FILE_SUFFIXES,
    RawChunk,
    expand_inputs,
    iter_group_file,
    iter_groups,
    output_problems,
    parse_chunk,
    read_all,
    read_chunks,
    refuse_problems,
    write_group_file,
)
from megatron_gft.groups.records import GroupRecord, ResponseRecord, gold_answer, record_to_dict, record_to_json
from megatron_gft.groups.rows import cell, iter_rows, parse_json_line, record_from_json
from megatron_gft.objectives import SOURCE_CODES, SOURCES
