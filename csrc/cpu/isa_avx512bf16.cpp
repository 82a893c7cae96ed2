#include "kernels.h"
#include <immintrin.h>

namespace voroq {
namespace avx512bf16_only {
#include "vectors.inc"

#include "grids.inc"
#include "pyramid.inc"

#include "brains.inc"

#include "strips.inc"
}  // namespace avx512bf16_only
Kernels avx512bf16() {
    Kernels all = avx512;
    all.product = avx512bf16_only::product;
    all.strip = avx512bf16_only::strip;
    return all;
}
}  // namespace voroq
