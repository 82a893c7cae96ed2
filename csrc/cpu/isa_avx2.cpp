#include "kernels.h"
#include <immintrin.h>

namespace voroq {
namespace avx2_only {
#include "kernels.inc"
}
const Kernels avx2 = {avx2_only::product, avx2_only::decode, avx2_only::widen, avx2_only::nearest,
                      avx2_only::project, avx2_only::feedback_pulses, avx2_only::descend_pulses,
                      avx2_only::dense, avx2_only::gated, avx2_only::attend, 8};
}  // namespace voroq
