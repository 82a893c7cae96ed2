// The two types of 16 bits, read and written one by one.
#pragma once
#include "voroq.h"

#include <cstring>

namespace voroq {

#include "reals.inc"

inline uint16_t to_half(float value) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00;
    if (bits >= 0x477ff000u) return sign | 0x7c00;
    if (bits < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded fraction in the lowest bits
        float size;
        std::memcpy(&size, &bits, 4);
        size += 0.5f;
        std::memcpy(&bits, &size, 4);
        return sign | uint16_t(bits - 0x3f000000u);
    }
    return sign | uint16_t((bits - 0x38000000u + 0xfffu + (bits >> 13 & 1)) >> 13);
}

inline uint16_t to_brain(float value) {  // in a form that compilers make vectors of
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
    return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? bits >> 16 | 0x40 : rounded);
}

inline void put_real(void* to, int32_t real, int64_t i, float value) {
    if (real == F32) static_cast<float*>(to)[i] = value;
    else static_cast<uint16_t*>(to)[i] = real == F16 ? to_half(value) : to_brain(value);
}

// `count` of them.
inline void narrow(const float* from, int64_t count, int32_t real, void* to) {
    auto* halfwords = static_cast<uint16_t*>(to);
    if (real == F32) std::memcpy(to, from, size_t(count) * 4);
    for (int64_t i = 0; i < count && real == F16; ++i) halfwords[i] = to_half(from[i]);
    for (int64_t i = 0; i < count && real == BF16; ++i) halfwords[i] = to_brain(from[i]);
}

}  // namespace voroq
