#include "kernels.h"


namespace voroq {
namespace portable_only {
#include "kernels.inc"
}
const Kernels portable = {portable_only::product, portable_only::decode, portable_only::widen, portable_only::nearest,
                          portable_only::project, portable_only::feedback_pulses, portable_only::descend_pulses,
                          portable_only::dense, portable_only::gated, portable_only::attend, 8};
}  // namespace voroq
