/* The C ABI of fastdrop: the primitives, the number of threads, the instruction set. Included by every C file here and
 * in tests/c; ffi_build.py makes the cffi declarations from it.
 *
 * Every primitive is one row of ops.def. That row gives the struct that carries the arguments to the worker threads,
 * the public prototype fd_<name>, the slot in the kernel tables and the cffi declaration.
 *
 * Contract of every entry point: it returns FD_OK or a negative code, never aborts, and reads and writes nothing when
 * it returns an error. After FD_NO_MEMORY alone, which only attention returns, results may be partly written. Any
 * alignment is legal. x may equal y; the caller excludes other overlaps. Words are little-endian uint32: bit j of word
 * w is cell 32 w + j, and 1 keeps.
 */
#ifndef FASTDROP_H
#define FASTDROP_H

#if defined(_MSC_VER)
#error "on Windows the C kernels need MinGW-w64: python setup.py build_ext --compiler=mingw32"
#endif

#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "fastdrop's packed masks are little-endian; big-endian machines use the NumPy backend"
#endif

enum { FD_OK = 0, FD_BAD_ARGUMENT = -1, FD_BAD_ISA = -2, FD_NO_MEMORY = -3 };
enum { FD_FLOAT32 = 0, FD_FLOAT64 = 1, FD_FLOAT16 = 2, FD_BFLOAT16 = 3, FD_BOOL = 4 };
enum { FD_NO_ACTIVATION = 0, FD_RELU = 1, FD_GELU = 2, FD_GELU_TANH = 3, FD_SILU = 4 };

/* Every activation but FD_NO_ACTIVATION, by code and name. All switches over activations are made from this list. The
 * functions C(name) and C(name_slope) in activations.inc.h compute them. */
#define FD_ACTIVATIONS(ROW) ROW(FD_RELU, relu) ROW(FD_GELU, gelu) ROW(FD_GELU_TANH, gelu_tanh) ROW(FD_SILU, silu)

/* Threads share cells in multiples of a block: one AVX-512 vector of 16 words. */
enum { FD_BLOCK_CELLS = 512, FD_BLOCK_WORDS = FD_BLOCK_CELLS / 32 };

#define FD_PARAMETER(type, name) type name
#define FD_NEXT_PARAMETER(type, name) , type name
#define FD_OP(name, PARAMETERS) int fd_##name(PARAMETERS(FD_PARAMETER, FD_NEXT_PARAMETER));
/* fd_<name>_drawn draws the words too: it writes what draw_bits gives for cells 0 .. rows columns - 1, then works as
 * fd_<name> does under these words. */
#define FD_DRAWING_OP(name, PARAMETERS)                                                                                \
    FD_OP(name, PARAMETERS)                                                                                            \
    int fd_##name##_drawn(DRAW_PARAMETERS(FD_PARAMETER, FD_NEXT_PARAMETER)                                             \
                              PARAMETERS(FD_NEXT_PARAMETER, FD_NEXT_PARAMETER));
#include "ops.def"
#undef FD_OP

/* Instruction sets, the best one last. Their names are the values of the variable FASTDROP_ISA. */
int fd_isa_count(void);
const char *fd_isa_name(int isa);
int fd_isa_usable(int isa); /* 1 if built in and supported by this CPU and operating system */
int fd_isa_active(void);
int fd_isa_select(int isa); /* process-wide; FD_BAD_ISA leaves the choice as it was */

int fd_set_num_threads(int n);
int fd_get_num_threads(void);

/* For calls on behalf of another library, such as torch (fd_<name>_at in ffi_build.py). fd_limit_threads: the most
 * threads that calls of the calling thread may use; 0: as fd_set_num_threads says. fd_use_team: the address of the
 * library's GOMP_parallel, so that such calls run on its threads; 0: on ours. */
void fd_limit_threads(int n);
void fd_use_team(uintptr_t parallel);

/* One Philox4x32-10 block, for known-answer tests and seed derivation. */
void fd_philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

/* The memory policy: how passes go through memory, process-wide. fastdrop/backends/memory.py decides it and says what
 * the numbers mean; results do not depend on it. FD_BAD_ARGUMENT leaves it as it was: pages must be 1, 2, 4 or 8, lines
 * 4, 8 or 16. */
int fd_set_memory(uint64_t stream, int pages, int lines, uint64_t ahead, uint64_t ahead_streaming);
void fd_get_memory(uint64_t choices[5]); /* in the same order */

/* The memory speed that benchmarks compare with: y = a x, in one of the ways to go through memory, or y = x by libc's
 * memcpy, which each thread calls once. FD_INTERLEAVED takes the policy's pages and lines. Only a y that begins at a
 * cache line is written around the cache. */
enum { FD_MEMCPY = 0, FD_ORDINARY = 1, FD_STREAMING = 2, FD_INTERLEAVED = 3 };
int fd_scale_float32(const void *x, void *y, uint64_t n, float a, int how);

#endif
