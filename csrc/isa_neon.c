/* The kernels for Arm AdvSIMD, which every AArch64 CPU has. */
#if defined(__aarch64__)
#include "simd_neon.h"
#define FD_TABLE fd_table_neon
#include "kernels.inc.h"
#endif
