/* The kernels in plain C, for any CPU. The autovectoriser is off, so that benchmarks and tests of "scalar" are scalar.
 */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-vectorize")
#endif
#include "simd_scalar.h"
#define FD_TABLE fd_table_scalar
#include "kernels.inc.h"
