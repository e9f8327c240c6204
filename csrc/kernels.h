/* The interface between dispatch.c, threads.c and the kernels: one argument struct per row of ops.def, one table of
 * kernels per instruction set. Included by these three. */
#ifndef FASTDROP_KERNELS_H
#define FASTDROP_KERNELS_H

#include "fastdrop.h"

#include <stdatomic.h>

/* The memory policy (memory.c). It may change at any time: what has to stay the same is read once. */
typedef struct {
    _Atomic uint64_t stream, ahead, ahead_streaming;
    atomic_int pages, lines;
} fd_memory_t;
extern fd_memory_t fd_memory;

#define FD_FIELD(type, name) type name;
#define FD_OP(name, PARAMETERS)                                                                                        \
    typedef struct {                                                                                                   \
        PARAMETERS(FD_FIELD, FD_FIELD)                                                                                 \
        int stream;         /* the output is too large for the cache: write around it */                               \
        const void *draw;   /* draw_bits_args by which the kernel draws the words itself; NULL: they are given */      \
        atomic_int *failed; /* set if there was no memory for scratch */                                               \
    } name##_args;
#include "ops.def"
#undef FD_OP

/* attention_forward and _backward: the largest tile of scores, and the most queries that forward takes as a unit. Units
 * of a head are of even sizes: each packs all keys. */
enum { ATTENTION_ROWS = 96, ATTENTION_KEYS = 256, ATTENTION_QUERIES = 480 };

static inline uint64_t attention_chunks(uint64_t queries) {
    return (queries + ATTENTION_QUERIES - 1) / ATTENTION_QUERIES;
}

static inline uint64_t attention_chunk_begin(uint64_t queries, uint64_t chunk) {
    const uint64_t rows = (queries + ATTENTION_ROWS - 1) / ATTENTION_ROWS, chunks = attention_chunks(queries);
    const uint64_t begin = rows * chunk / chunks * ATTENTION_ROWS;
    return begin < queries ? begin : queries;
}

/* The order of their strides, in elements. */
enum {
    FD_QUERY_STRIDES,
    FD_KEY_STRIDES,
    FD_VALUE_STRIDES,
    FD_MASK_STRIDES,
    FD_DY_STRIDES,
    FD_DMASK_STRIDES,
    FD_CELL_STRIDES, /* of cells of the mask of dropout */
    FD_STRIDES
};
typedef struct {
    uint64_t outer, head, row, column;
} strides_t;

/* A kernel does units begin .. end-1 of its call. Units are cells, rows, panels of rows, or parts of heads. If they are
 * cells, begin is a multiple of FD_BLOCK_CELLS unless it is the call's first. */
typedef void (*fd_kernel)(const void *args, uint64_t begin, uint64_t end);

/* Sums by panels, [panels, width]. add_panels adds them up into the first panel. */
typedef struct {
    void *sums;
    uint64_t panels, width;
    int wide; /* float64, else float32 */
} add_panels_args;

typedef struct {
    const float *x;
    float *y, a;
    int how;          /* FD_MEMCPY ... */
    uint64_t n, part; /* cells in all, and in a unit of FD_MEMCPY */
} scale_args;

typedef struct {
#define FD_OP(name, PARAMETERS) fd_kernel name;
#include "ops.def"
#undef FD_OP
    fd_kernel add_panels;    /* args: add_panels_args; units are columns */
    fd_kernel scale_float32; /* args: scale_args; units are cells, or parts of so many for FD_MEMCPY */
} fd_table;

extern const fd_table fd_table_scalar, fd_table_avx2, fd_table_avx512, fd_table_neon;

/* threads.c: runs the kernel over units begin .. end-1, by several threads if that pays. unit: the cells in a unit. */
void fd_parallel_for(fd_kernel kernel, const void *args, uint64_t begin, uint64_t end, uint64_t unit);

#endif
