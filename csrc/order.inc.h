/* The order in which a pass goes through a chunk, and how far ahead it prefetches: the kernels' side of the memory
 * policy. Included once by kernels.inc.h.
 *
 * A pass that streams takes pieces of a few cache lines in turn from several pages of 4 KiB. So the memory system has
 * several open rows and address translations at work, as in glibc's copies of large blocks. Each page goes through the
 * hardware's prefetchers as a stream of its own, so such a pass prefetches nothing.
 */

enum { PAGE_BYTES = 4096 };

/* How many bytes ahead of its place a pass prefetches that goes through memory cell by cell. */
INLINE uint64_t distance_ahead(int stream) {
    return atomic_load_explicit(stream ? &fd_memory.ahead_streaming : &fd_memory.ahead, memory_order_relaxed);
}

INLINE void prefetch_from(const void *p, uint64_t ahead) { prefetch((const char *)p + ahead); }

/* The chunk's pieces come from 2^page_bits pages in turn, 2^round_bits pieces of each, then from the next pages. */
typedef struct {
    unsigned cells; /* of a piece; a block is whole pieces */
    unsigned page_bits, round_bits;
    uint64_t ahead; /* prefetched */
} order_t;

INLINE order_t order_of(int stream, uint64_t element_bytes) {
    order_t order = {FD_BLOCK_CELLS, 0, 0, distance_ahead(stream)};
    const int pages = atomic_load_explicit(&fd_memory.pages, memory_order_relaxed);
    const int piece = LINE_BYTES * atomic_load_explicit(&fd_memory.lines, memory_order_relaxed);
    if (!stream || pages == 1) return order;
    order.cells = (unsigned)((uint64_t)piece / element_bytes);
    order.page_bits = (unsigned)__builtin_ctz((unsigned)pages);
    order.round_bits = (unsigned)__builtin_ctz((unsigned)(PAGE_BYTES / piece));
    order.ahead = 0;
    while ((uint64_t)PAGE_BYTES << order.page_bits > CHUNK_CELLS * element_bytes) order.page_bits--;
    return order;
}

/* Which piece of the chunk comes k-th. */
INLINE unsigned piece_at(const order_t *o, unsigned k) {
    const unsigned page = k & low_bits(o->page_bits), round = k >> o->page_bits & low_bits(o->round_bits);
    const unsigned group = k >> (o->page_bits + o->round_bits);
    return (group << o->page_bits | page) << o->round_bits | round;
}

/* Elements until y reaches a cache line; 0 if it never does, because an element lies across lines. */
#define ELEMENTS_TO_LINE(y) ((uintptr_t)(y) % sizeof *(y) ? 0 : (unsigned)(-(uintptr_t)(y) % LINE_BYTES / sizeof *(y)))
