/* What dispatch.c and the kernel files agree on: one argument struct per row of ops.def, one table per ISA. */
#ifndef FASTDROP_KERNELS_H
#define FASTDROP_KERNELS_H

#include "fastdrop.h"

#define FD_FIELD(type, name) type name;
#define FD_OP(name, PARAMETERS)                                                                                        \
    typedef struct {                                                                                                   \
        PARAMETERS(FD_FIELD, FD_FIELD)                                                                                 \
        int stream;       /* output too large for the cache to keep: write around it */                                \
        const void *draw; /* draw_bits_args of the words, which are drawn while at it; NULL: they are there */         \
    } name##_args;
#include "ops.def"
#undef FD_OP

/* A kernel does units begin .. end-1 of its call: cells, rows or panels of rows. Cells are split at multiples of
 * FD_BLOCK_CELLS. */
typedef void (*fd_kernel)(const void *args, uint64_t begin, uint64_t end);

/* Sums by panels, [panels, width], to be added up into the first. */
typedef struct {
    void *sums;
    uint64_t panels, width;
    int wide; /* float64, else float32 */
} add_panels_args;

typedef struct {
#define FD_OP(name, PARAMETERS) fd_kernel name;
#include "ops.def"
#undef FD_OP
    fd_kernel add_panels; /* of add_panels_args; units are columns */
    void (*scale_float32)(const float *x, float *y, uint64_t n, float a, int stream);
} fd_table;

extern const fd_table fd_table_scalar, fd_table_avx2, fd_table_avx512, fd_table_neon;

/* threads.c: the kernel over units begin .. end-1 of so many cells each, by several threads where that pays. */
void fd_parallel_for(fd_kernel kernel, const void *args, uint64_t begin, uint64_t end, uint64_t unit);

#endif
