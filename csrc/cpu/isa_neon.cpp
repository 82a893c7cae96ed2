#include "kernels.h"
#include <arm_neon.h>
#define NEON

namespace voroq {
namespace neon_only {
#include "kernels.inc"
}
const Kernels neon = {neon_only::product, neon_only::decode, neon_only::widen, neon_only::nearest,
                      neon_only::project, neon_only::feedback_pulses, neon_only::descend_pulses,
                      neon_only::dense, neon_only::gated, neon_only::attend, 8};
}  // namespace voroq
