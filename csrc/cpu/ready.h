// What a product reads, made ready: tables widened and filled up to whole vectors, inputs in the order in which the kernels take them.
#pragma once
#include "kernels.h"
#include "reals.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <stdexcept>
#include <vector>

namespace voroq {

// Memory of this call, on cache lines; kept by the thread for the next one.
class Scratch {
  public:
    float* take(int64_t floats) {
        floats = (floats + 15) / 16 * 16;
        if (used_ == blocks_.size()) blocks_.emplace_back();
        Block& block = blocks_[used_++];
        if (block.size < floats) {
            block.memory.reset(static_cast<float*>(::operator new(size_t(floats) * 4, std::align_val_t(64))));
            block.size = floats;
        }
        return block.memory.get();
    }
    size_t used() const { return used_; }
    void back(size_t used) { used_ = used; }  // what was taken since is free again

  private:
    struct Free {
        void operator()(float* memory) const { ::operator delete(memory, std::align_val_t(64)); }
    };
    struct Block {
        std::unique_ptr<float, Free> memory;
        int64_t size = 0;
    };
    std::vector<Block> blocks_;
    size_t used_ = 0;
};

inline int lanes_for(int64_t size) { return size <= 4 ? 4 : size <= 8 ? 8 : 16; }

inline const float* floats(Scratch& scratch, const Kernels& kernels, const void* from, int32_t real, int64_t count) {
    if (!from || real == F32) return static_cast<const float*>(from);
    float* to = scratch.take(count);
    kernels.widen(from, real, count, to);
    return to;
}

// Entries of `size` as LANES floats, zeros behind; whole vectors but for the last ones, behind which there may be nothing.
template <int LANES>
inline void pad(const float* from, int64_t entries, int64_t size, float* __restrict to) {
    uint32_t kept[LANES];
    for (int i = 0; i < LANES; ++i) kept[i] = i < size ? ~0u : 0u;
    const int64_t whole = std::max<int64_t>(0, entries - (LANES + size - 1) / size);
    for (int64_t e = 0; e < whole; ++e, from += size, to += LANES)
        for (int i = 0; i < LANES; ++i) to[i] = std::bit_cast<float>(std::bit_cast<uint32_t>(from[i]) & kept[i]);
    for (int64_t e = whole; e < entries; ++e, from += size, to += LANES)
        for (int i = 0; i < LANES; ++i) to[i] = i < size ? from[i] : 0.0f;
}

inline const float* padded(Scratch& scratch, const Kernels& kernels, const void* from, int32_t real, int64_t entries, int64_t size, int lanes) {
    const float* dense = floats(scratch, kernels, from, real, entries * size);
    if (size == lanes) return dense;
    float* to = scratch.take(entries * lanes);
    (lanes == 4 ? pad<4> : lanes == 8 ? pad<8> : pad<16>)(dense, entries, size, to);
    return to;
}

// Tables above this many entries are read in their stored type, which takes half the cache.
constexpr int64_t SMALL = 4096;

// From so many inputs on, those in bfloat16 are multiplied by strips; grids that multiply them as they are, and expanded pyramids, wait longer.
constexpr int64_t MANY = 5, MANY_OF_PULSES = 9, MANY_OF_GRIDS = 13;
constexpr int64_t SLICE = 512;  // inputs that lie ready at a time

// Whether a band is multiplied with inputs in bfloat16, if they are exact.
inline bool brains(const Band& band) {
    return band.kind == GRID && band.bits >= 2 && band.bits <= 4 && band.along >= 4 * BRAINS && band.first * band.bits % 8 == 0;
}
inline bool exact(const Kernels& kernels, const Product& p) { return kernels.strip && p.x_real == BF16 && !p.scale; }

inline Ready ready(Scratch& scratch, const Kernels& kernels, const Band& band, bool widen, bool exact) {
    Ready r{band, nullptr, nullptr, nullptr, nullptr, 0, F32};
    if (band.kind == GRID) {
        r.lanes = exact && brains(band) ? BRAINS : band.along > 8 * grid_codes(band.bits) ? kernels.lanes : 8;
        return r;
    }
    const int64_t size = int64_t(band.rows) * band.cols, entries = int64_t(1) << band.bits;
    if (band.kind == PYRAMID || band.kind == PULSES) {
        const auto* pyramid = static_cast<const Pyramid*>(band.pyramid);
        const int64_t scales = !pyramid ? band.bits : pyramid->gains ? pyramid->gains : pyramid->levels;
        float* to = scratch.take(scales + 1);
        kernels.widen(band.table, band.real, scales, to);
        to[scales] = 0;
        r.table = to;
        r.lanes = int(size);
        return r;
    }
    r.lanes = lanes_for(size);
    if (!widen && entries > SMALL && size == r.lanes && (band.real == BF16 || (band.real == F16 && &kernels != &portable))) {
        r.table = band.table;
        r.half = band.real;
    } else {
        r.table = padded(scratch, kernels, band.table, band.real, entries, size, r.lanes);
    }
    if (band.residual) r.residual = padded(scratch, kernels, band.residual, band.real, int64_t(1) << band.residual_bits, size, r.lanes);
    return r;
}

constexpr int64_t LONGEST = 16;  // weights of a word

// Into how many words down the output, a power of two, a longer one is cut; 1 where it is not long, or cannot be cut.
inline int64_t pieces(const Band& band) {
    if (band.kind != TABLE || band.cols != 1 || band.residual || band.scale || band.zeros || band.width % 16) return 1;
    int64_t parts = 1;
    while (band.rows > parts * LONGEST) parts *= 2;
    return band.rows % parts ? 1 : parts;
}

// The same band in short words: a table of long ones is, as it lies, a table of their pieces, and every code becomes one for each of them.
inline Band cut(Scratch& scratch, Band band, int64_t out) {
    const int64_t parts = pieces(band), tiles = (out + band.rows - 1) / band.rows, pitch = (band.along * band.width + 31) / 32;
    if (parts == 1) return band;
    auto* to = reinterpret_cast<uint32_t*>(scratch.take(tiles * parts * pitch));
    std::fill(to, to + tiles * parts * pitch, 0u);
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const uint32_t* row = band.words + tile * band.pitch;
        for (int64_t c = 0; c < band.along; ++c) {
            const uint32_t code = band.width == 16 ? reinterpret_cast<const uint16_t*>(row)[band.first + c] : row[band.first + c];
            for (int64_t part = 0; part < parts; ++part) {
                const uint32_t own = uint32_t((code & ((uint64_t(1) << band.bits) - 1)) * parts + part);
                uint32_t* there = to + (tile * parts + part) * pitch;
                if (band.width == 16) reinterpret_cast<uint16_t*>(there)[c] = uint16_t(own);
                else there[c] = own;
            }
        }
    }
    band.words = to;
    band.pitch = pitch;
    band.first = 0;
    band.rows /= int32_t(parts);
    band.bits += std::countr_zero(uint64_t(parts));
    return band;
}

inline bool can(const Band& band) {
    const int64_t size = int64_t(band.rows) * band.cols;
    if (band.rows != 1 && band.cols != 1) return false;
    if (band.kind == PYRAMID) {
        if (!band.pyramid) return false;
        const auto& pyramid = *static_cast<const Pyramid*>(band.pyramid);
        return size == pyramid.dim && band.width <= 64 && band.width == pyramid.bits + (pyramid.gains ? __builtin_ctz(unsigned(pyramid.gains)) : 0);
    }
    if (band.kind == PULSES) return (size == 8 || size == 16) && band.width <= 32 && band.residual && (band.residual_bits == 4 || band.residual_bits == 8);
    if (band.kind == GRID) return size == 1 && band.bits <= 8 && band.width == band.bits;
    const int64_t parts = pieces(band);
    return size <= LONGEST * parts && band.width <= 32 && band.bits + band.residual_bits + std::countr_zero(uint64_t(parts)) <= band.width;
}

inline int64_t place(const Product& p, int64_t column) {
    if (!p.perm) return column;
    if (p.perm_bytes == 2) return static_cast<const uint16_t*>(p.perm)[column];
    return p.perm_bytes == 4 ? static_cast<const int32_t*>(p.perm)[column] : static_cast<const int64_t*>(p.perm)[column];
}

// Rows of the matrix that are whole tiles in every band.
inline int64_t unit(const Product& p) {
    int64_t rows = 1;
    for (int64_t i = 0; i < p.count; ++i) rows = std::lcm(rows, p.bands[i].rows / pieces(p.bands[i]));
    return rows;
}

// All bands ready, after a look at what the product asks for. A permutation that leads out of the matrix is refused on loading; here it
// only must not be followed.
inline std::vector<Ready> prepare(Scratch& scratch, const Kernels& kernels, const Product& p, bool decode, bool strips) {
    for (int64_t c = 0; p.perm && c < p.in; ++c)
        if (uint64_t(place(p, c)) >= uint64_t(p.in)) throw std::out_of_range("permutation");
    std::vector<Ready> bands;
    for (int64_t i = 0; i < p.count; ++i) {
        if (!can(p.bands[i])) throw std::invalid_argument("band");
        const Band band = cut(scratch, p.bands[i], p.out);
        bands.push_back(ready(scratch, kernels, band, decode || (strips && band.cols != 1), !decode && !strips && exact(kernels, p)));
    }
    return bands;
}

// B rows of x, as the kernels read them: stored column order, scaled. Rows past the batch are zero.
struct Inputs {
    const float* by_column;  // [in][B]
    float shift[MOST];   // sum of x * shift, of all columns
    float all[MOST];     // sum of x, where rows have scales
};

inline Inputs inputs(Scratch& scratch, const Kernels& kernels, const Product& p, int64_t first, int B) {
    Inputs to{};
    const int64_t rows = std::min<int64_t>(B, p.batch - first);
    const float* scale = floats(scratch, kernels, p.scale, p.real, p.in);
    const float* shift = floats(scratch, kernels, p.shift, p.real, p.in);
    const float* x = floats(scratch, kernels, static_cast<const char*>(p.x) + first * p.in * (p.x_real == F32 ? 4 : 2), p.x_real, rows * p.in);
    for (int b = 0; b < rows; ++b) {
        double with_shift = 0, plain = 0;
        for (int64_t c = 0; c < p.in && p.row_scale; ++c) plain += x[b * p.in + c];
        for (int64_t c = 0; c < p.in && shift; ++c) with_shift += double(x[b * p.in + c]) * shift[c];
        to.shift[b] = float(with_shift);
        to.all[b] = float(plain);
    }
    to.by_column = x;
    if (B == 1 && !p.perm && !scale) return to;
    float* by_column = scratch.take(p.in * B);
    to.by_column = by_column;
    for (int64_t c = 0; c < p.in; ++c) {
        const int64_t at = place(p, c);
        const float by = scale ? scale[at] : 1.0f;
        for (int b = 0; b < B; ++b) by_column[c * B + b] = b < rows ? x[b * p.in + at] * by : 0.0f;
    }
    return to;
}

// The sum of `count` numbers `step` apart, in eight parts.
inline float sum(const float* x, int64_t count, int64_t step) {
    float parts[8] = {};
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (int64_t j = 0; j < 8; ++j) parts[j] += x[(i + j) * step];
    for (; i < count; ++i) parts[0] += x[i * step];
    return ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
}

inline void point(Scratch& scratch, const Inputs& in, Ready& r, int B) {
    const Band& band = r.band;
    if (band.kind == GRID) {
        const int64_t codes = r.lanes == BRAINS ? 4 : grid_codes(band.bits), wide = r.lanes * codes, chunks = (band.along + wide - 1) / wide;
        float *x = scratch.take(chunks * wide * B), *sums = scratch.take(B);
        const float* from = in.by_column + band.column * B;
        for (int64_t chunk = 0, at = 0; chunk < chunks; ++chunk, from += wide * B)
            for (int64_t code = 0; code < codes; ++code) {
                const int64_t there = std::clamp<int64_t>((band.along - chunk * wide - code + codes - 1) / codes, 0, r.lanes);
                for (int b = 0; b < B; ++b, at += r.lanes) {
                    const float* own = from + code * B + b;
                    if (r.lanes == BRAINS) {  // what bfloat16 holds exactly
                        uint16_t* to = reinterpret_cast<uint16_t*>(x) + at;
                        for (int64_t lane = 0; lane < there; ++lane) to[lane] = uint16_t(std::bit_cast<uint32_t>(own[lane * codes * B]) >> 16);
                        std::fill(to + there, to + r.lanes, uint16_t(0));
                    } else {
                        for (int64_t lane = 0; lane < there; ++lane) x[at + lane] = own[lane * codes * B];
                        std::fill(x + at + there, x + at + r.lanes, 0.0f);
                    }
                }
            }
        for (int b = 0; b < B; ++b) sums[b] = sum(in.by_column + band.column * B + b, band.along, B);
        r.sums = sums;
        r.x = x;
    } else if (band.cols == 1) {
        r.x = in.by_column + band.column * B;
    } else {
        float* x = scratch.take(band.along * B * r.lanes);
        for (int64_t t = 0; t < band.along; ++t)
            for (int b = 0; b < B; ++b)
                for (int i = 0; i < r.lanes; ++i)
                    x[(t * B + b) * r.lanes + i] = i < band.cols ? in.by_column[(band.column + t * band.cols + i) * B + b] : 0.0f;
        r.x = x;
    }
}

}  // namespace voroq
