/* The memory policy that kernels follow: one variable for the process. fastdrop/backends/memory.py decides it from what
 * the machine says of itself; until it has, this one holds, which is the one for a machine that says nothing. */
#include "kernels.h"

enum { MIB = 1 << 20 };
fd_memory_t fd_memory = {
    .stream = 16 * MIB, .stream_drawing = 16 * MIB, .pages = 1, .lines = 8, .ahead = 8192, .ahead_streaming = 8192};

static int power_of_two(int n, int least, int most) { return n >= least && n <= most && (n & (n - 1)) == 0; }

int fd_set_memory(uint64_t stream, uint64_t stream_drawing, int pages, int lines, uint64_t ahead,
                  uint64_t ahead_streaming) {
    if (!power_of_two(pages, 1, 8) || !power_of_two(lines, 4, 16)) return FD_BAD_ARGUMENT;
    atomic_store(&fd_memory.stream, stream);
    atomic_store(&fd_memory.stream_drawing, stream_drawing);
    atomic_store(&fd_memory.pages, pages);
    atomic_store(&fd_memory.lines, lines);
    atomic_store(&fd_memory.ahead, ahead);
    atomic_store(&fd_memory.ahead_streaming, ahead_streaming);
    return FD_OK;
}

void fd_get_memory(uint64_t choices[6]) {
    choices[0] = atomic_load(&fd_memory.stream);
    choices[1] = atomic_load(&fd_memory.stream_drawing);
    choices[2] = (uint64_t)atomic_load(&fd_memory.pages);
    choices[3] = (uint64_t)atomic_load(&fd_memory.lines);
    choices[4] = atomic_load(&fd_memory.ahead);
    choices[5] = atomic_load(&fd_memory.ahead_streaming);
}
