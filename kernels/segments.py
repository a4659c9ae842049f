"""Cut packed segments into chunks counted from each segment's own start, without asking the host how long they are.

Chunk ``c`` of segment ``b`` gets the slot ``cu_seqlens[b] // CHUNK + b + c``. Segments never share a slot, there are
at most ``chunk_slots`` of them whatever the lengths, and a segment is cut the same way wherever it sits in the batch:
that is what makes a packed batch and its sequences one by one equal to the last bit.

On a GPU nobody has checked cu_seqlens (that would be a sync): whatever it holds, no row or slot outside of the buffers
is named here.
"""

import triton
import triton.language as tl

_SEARCH = tl.constexpr(256)


def chunk_slots(rows: int, segments: int, chunk: int) -> int:
    """Slots that cover the segments and, as one segment more, the padding rows behind them."""
    return rows // chunk + segments + 1


@triton.jit
def segment_bounds(cu_ptr, segment, segments, rows):
    """First row of a segment and the row after its last; the padding rows are the segment past the last one."""
    start = tl.maximum(tl.load(cu_ptr + segment), 0)
    end = tl.load(cu_ptr + segment + 1, mask=segment < segments, other=rows)
    return start, tl.maximum(tl.minimum(end, rows), start)


@triton.jit
def find_chunk(cu_ptr, segments, rows, slot, CHUNK: tl.constexpr):
    """The segment of a slot (``segments`` for padding rows), the first row of its chunk, the row after the chunk's last
    one, and the row after the segment's."""
    found = tl.zeros((), dtype=tl.int32)
    # All starts at once, not a binary search: one load instead of a chain of loads that wait for each other.
    for base in range(0, segments + 1, _SEARCH):
        index = base + tl.arange(0, _SEARCH)
        start = tl.load(cu_ptr + index, mask=index <= segments, other=0)
        found += tl.sum(((start // CHUNK + index <= slot) & (index <= segments)).to(tl.int32))
    segment = tl.maximum(found - 1, 0)
    start, end = segment_bounds(cu_ptr, segment, segments, rows)
    first = tl.maximum(start.to(tl.int64) + (slot - start // CHUNK - segment) * CHUNK, start)
    return segment, first, tl.minimum(first + CHUNK, end), end
