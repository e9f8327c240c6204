/* The C ABI of fastdrop: its primitives, a thread count and an instruction set.
 *
 * Every primitive is one row of ops.def. From that row come the struct that carries its arguments to the worker
 * threads, the public prototype fd_<name>, its slot in the kernel tables and its cffi declaration.
 *
 * Contract of every entry point: it returns FD_OK or a negative code, allocates nothing the caller sees, never aborts,
 * reads and writes nothing when it returns an error. Any alignment is legal. x may equal y; other overlaps are the
 * caller's to exclude. Words are little-endian uint32, bit j of word w is cell 32 w + j, 1 keeps.
 */
#ifndef FASTDROP_H
#define FASTDROP_H

#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "fastdrop's packed masks are little-endian; big-endian machines use the NumPy backend"
#endif

enum { FD_OK = 0, FD_BAD_ARGUMENT = -1, FD_BAD_ISA = -2 };
enum { FD_FLOAT32 = 0, FD_FLOAT64 = 1, FD_FLOAT16 = 2, FD_BFLOAT16 = 3 };
enum { FD_NO_ACTIVATION = 0, FD_RELU = 1, FD_GELU = 2, FD_GELU_TANH = 3, FD_SILU = 4 };

/* Work on cells is split at multiples of so many: one AVX-512 vector of 16 words. */
enum { FD_BLOCK_CELLS = 512, FD_BLOCK_WORDS = FD_BLOCK_CELLS / 32 };

/* Outputs at least this large are written with streaming stores: they do not survive in the cache until the next pass
 * reads them, and not reading a line before writing it saves a third of the traffic. Measured, docs/design.md. */
enum { FD_STREAM_BYTES = 16 << 20 };

#define FD_PARAMETER(type, name) type name
#define FD_NEXT_PARAMETER(type, name) , type name
#define FD_OP(name, PARAMETERS) int fd_##name(PARAMETERS(FD_PARAMETER, FD_NEXT_PARAMETER));
/* Drawn: cell i's bit is bit i of words, which are written as by draw_bits of cells 0 .. rows columns - 1. */
#define FD_DRAWING_OP(name, PARAMETERS)                                                                                \
    FD_OP(name, PARAMETERS)                                                                                            \
    int fd_##name##_drawn(DRAW_PARAMETERS(FD_PARAMETER, FD_NEXT_PARAMETER)                                             \
                              PARAMETERS(FD_NEXT_PARAMETER, FD_NEXT_PARAMETER));
#include "ops.def"
#undef FD_OP

/* Instruction sets, best last; names are those of FASTDROP_ISA. */
int fd_isa_count(void);
const char *fd_isa_name(int isa);
int fd_isa_usable(int isa); /* 1 if built in and supported by this CPU and operating system */
int fd_isa_active(void);
int fd_isa_select(int isa); /* process-wide; FD_BAD_ISA leaves the choice as it was */

int fd_set_num_threads(int n);
int fd_get_num_threads(void);

/* For calls that stand for another library's (fd_<name>_at): the most threads the calling thread's calls may use, 0 for
 * what fd_set_num_threads said; and that library's own threads to run them on, as its GOMP_parallel, 0 for ours. */
void fd_limit_threads(int n);
void fd_use_team(uintptr_t parallel);

/* One Philox4x32-10 block, for known-answer tests and seed derivation. */
void fd_philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

/* y = a x with streaming (1) or ordinary (0) stores: the memory limit that the benchmarks quote. */
int fd_scale_float32(const void *x, void *y, uint64_t n, float a, int stream);

#endif
