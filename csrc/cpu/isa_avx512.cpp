#include "kernels.h"
#include <immintrin.h>

namespace voroq {
namespace avx512_only {
#include "kernels.inc"
}
const Kernels avx512 = {avx512_only::product, avx512_only::decode, avx512_only::widen, avx512_only::nearest,
                        avx512_only::project, avx512_only::feedback_pulses, avx512_only::descend_pulses,
                        avx512_only::dense, avx512_only::gated, avx512_only::attend, 16};
}  // namespace voroq
