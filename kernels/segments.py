"""Division of packed segments into chunks of CHUNK rows, on the device: the host never reads how long they are.

Every segment is divided from its own first row. Chunk ``c`` of segment ``b`` has the chunk index
``cu_seqlens[b] // CHUNK + b + c``. No two chunks have the same index, and all indices are below ``max_chunks``,
whatever the lengths. A segment is divided in the same way wherever it is in the batch. A packed batch therefore gives
the same bits as its sequences one by one.

The entries of cu_seqlens may be int64. No buffer has 2^31 rows, so they are int32 once they are loaded.

On a GPU nothing checks cu_seqlens, because that would be a host sync. The functions here clamp what they read:
whatever cu_seqlens holds, no row and no chunk index is outside of the buffers.
"""

import triton
import triton.language as tl

_SEARCH = tl.constexpr(256)


def max_chunks(rows: int, segments: int, chunk: int) -> int:
    """Upper bound of the chunks of all segments and of the padding rows, which count as one segment more."""
    return rows // chunk + segments + 1


@triton.jit
def segment_bounds(
    cu_ptr,  # (segments + 1,) int32 or int64
    segment, segments, rows,
):  # fmt: skip
    """First row of a segment and the row after its last. Segment number ``segments`` is the padding rows."""
    start = tl.maximum(tl.load(cu_ptr + segment).to(tl.int32), 0)
    end = tl.load(cu_ptr + segment + 1, mask=segment < segments, other=rows).to(tl.int32)
    return start, tl.maximum(tl.minimum(end, rows), start)


@triton.jit
def find_chunk(
    cu_ptr,  # (segments + 1,) int32 or int64
    segments, rows, chunk_index, CHUNK: tl.constexpr,
):  # fmt: skip
    """Locate a chunk: its segment (``segments`` for padding rows), its first row, the row after its last, and the row
    after the last of the segment. A chunk index that no chunk has gives a first row at or past the row after the last.
    """
    found = tl.zeros((), dtype=tl.int32)
    # All starts at once: one load. A binary search would be a chain of loads that wait for each other.
    for base in range(0, segments + 1, _SEARCH):
        index = base + tl.arange(0, _SEARCH)  # [_SEARCH]
        start = tl.load(cu_ptr + index, mask=index <= segments, other=0).to(tl.int32)
        found += tl.sum(((start // CHUNK + index <= chunk_index) & (index <= segments)).to(tl.int32))
    segment = tl.maximum(found - 1, 0)
    start, end = segment_bounds(cu_ptr, segment, segments, rows)
    first = tl.maximum(start.to(tl.int64) + (chunk_index - start // CHUNK - segment) * CHUNK, start)
    return segment, first, tl.minimum(first + CHUNK, end), end


@triton.jit
def find_segment(
    cu_ptr,  # (segments + 1,) int32 or int64
    segments, row,
):  # fmt: skip
    """The segment of a row, ``segments`` for a padding row."""
    found = tl.zeros((), dtype=tl.int32)
    for base in range(0, segments + 1, _SEARCH):
        index = base + tl.arange(0, _SEARCH)  # [_SEARCH]
        start = tl.load(cu_ptr + index, mask=index <= segments, other=0).to(tl.int32)
        found += tl.sum(((start <= row) & (index <= segments)).to(tl.int32))
    return tl.maximum(found - 1, 0)


@triton.jit
def next_segment(
    cu_ptr,  # (segments + 1,) int32 or int64
    segment, end, segments, rows, row,
):  # fmt: skip
    """The segment of a row that is at or behind ``segment``, which ends at ``end``, and the row after its last."""
    while (end <= row) & (segment < segments):
        segment += 1
        end = tl.load(cu_ptr + segment + 1, mask=segment < segments, other=rows).to(tl.int32)
        end = tl.minimum(end, rows)
    return segment, end
