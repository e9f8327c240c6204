/* The fused kernels for one type that is computed in. Included by kernels.inc.h twice, with CTYPE f32 (data of float32,
 * float16 and bfloat16) and f64 (float64). C(name) is f32_name or f64_name: C(t) a number, C(v) a vector of them.
 *
 * Data goes through a kernel's stages a strip at a time (strips.inc.h), each stage a loop over numbers of C(t) in the
 * nearest cache. Data that is stored as C(t) is read and written in place; 16-bit data passes through a scratch strip.
 * So a stage exists once for all storage types. One loop does several stages at once, because most forward calls need
 * nothing else: `drop`, of bias, activation, mask and residual.
 *
 * Sums over a row are taken in lanes and then in double. Sums over a column are taken by panels of rows and then over
 * the panels. Both orders depend on the shape alone, so results are the same for any number of threads.
 */
#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define C(name) PASTE(CTYPE, name)

#include "storage.inc.h"

#include "activations.inc.h"

#include "drop.inc.h"

#include "norm.inc.h"
#include "pointwise.inc.h"
#include "softmax.inc.h"

#include "products.inc.h"

#include "attention.inc.h"

#undef MASK_ROW
#undef FOR_VECTORS
#undef C
#undef PASTE
#undef PASTE_
#undef CTYPE
