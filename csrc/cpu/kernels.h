// What dispatch.cpp asks of every instruction set. The same source, kernels.inc, is compiled once for each.
#pragma once
#include "voroq.h"

namespace voroq {

constexpr int MOST = 8;  // rows of x at a time

// Codes of a grid in a unit: those that a lane of 32 bits takes.
static constexpr int grid_codes(int bits) { return bits <= 4 ? 8 : 4; }

constexpr int STRIP = 48;   // rows that are decoded to bfloat16 at a time; whole tiles of 1, 2, 3, 4, 6, 8, 12 and 16
constexpr int BRAINS = 32;  // lanes of a grid whose inputs are in bfloat16, which holds them exactly

// A band with its tables made ready: entries of `lanes` floats (or of the stored type where `half`), zero beyond the tile.
struct Ready {
    Band band;
    const void* table;
    const void* residual;    // always floats
    const float* x;          // tiles down: [in][batch]; tiles along: [tile][batch][lanes]; grid: [chunk][code of a unit][batch][lanes], BRAINS in 16 bits
    const float* sums;       // grid: sum of x over the band [batch]
    int lanes;
    int half;                // Real of `table`
};

// A table of centroids as `nearest` searches it: leaves of 16 points. A small table is in its own order; a large one is sorted so that
// the points of a leaf, and the 16 leaves of a group, lie together, and has a box around each.
struct Index {
    int dim;
    int64_t leaves, groups_padded;
    const float* points;     // [leaf][dim][16]
    const float* bias;       // [leaf][16]: -|t|^2 / 2, -inf where there is no point
    const int32_t* places;   // [leaf][16]: the point's place in the table; null for a small table
    const float *leaf_low, *leaf_high;    // [group][dim][16]
    const float *group_low, *group_high;  // [dim][groups_padded]
    float largest;           // |t|^2, at most
    float slack;             // relative error of a squared distance, at most
};

// Numbers [previous last + 1, last] of a pyramid's vectors have `left` pulses in their first half and `right` in their second; within them
// the left half's number is the quotient by `radix`. The split before the first one ends at -1.
struct Split {
    uint64_t last, radix, magic;  // magic: 2**64 / radix, rounded down
    int32_t mask;                 // 0 where all numbers name the zero vector, else -1
    uint16_t level;
    uint8_t left, right;
};

// Where to look for the split of number i among vectors of one size and one sum: not before guide[i >> shift].
struct Guide {
    const Split* splits;
    const uint16_t* guide;
    int shift;
};

// Numbers [first, last] of the class order are patterns of z nonzero magnitudes, z bits of signs below each.
struct Class {
    uint64_t last, first;
    uint32_t patterns;
    uint16_t level, z;
};

// Unions of pyramids, or one pyramid with gains, as numbers are turned into vectors: halved until a table has them.
struct Pyramid {
    int dim, levels, bits, gains;
    Guide top;                    // of all levels at once
    const Guide *eights, *fours;  // vectors of 8 and of 4, by pulses
    int most;                     // up to this many pulses a vector of 4 is in `table`, those with the same sum from `first` on
    const int8_t* table;
    const uint32_t* first;
    const Class* classes;         // null in the split order; else the class of number i is not before guide[i >> shift]
    const uint16_t* guide;
    int shift;
    const uint64_t* patterns;     // eight magnitudes, a byte each
};

struct Kernels {
    // y[b * pitch + row] += the product with `bands`, for rows [first, last) of the matrix; batch is 1, 2, 4 or 8.
    void (*product)(const Ready* bands, int64_t count, int64_t out, int64_t in, int batch, int64_t first, int64_t last, float* y, int64_t pitch);
    // to[(row - first) * pitch + column] = stored weight, for codes [begin, end) of a band's rows; `begin` is a multiple of 8
    void (*decode)(const Ready& band, int64_t out, int64_t first, int64_t last, int64_t begin, int64_t end, float* to, int64_t pitch);
    void (*widen)(const void* from, int real, int64_t count, float* to);
    void (*nearest)(const Index& index, const float* v, int64_t n, int64_t* best);
    // The nearest of the words scales[level] * y.
    void (*project)(const Union& words, const float* v, int64_t n, int64_t* level, float* y);
    // One row of tiles of such words, in a metric of two sides.
    void (*feedback)(const Union& words, const Sides& sides, const float* u, float* rest, int16_t* codes, float* errors);
    int32_t (*descend)(const Union& words, const Sides& sides, const float* h, float* pull, float* error, int16_t* codes);
    // A step of decoding (dense.inc).
    void (*dense)(const void* w, int real, int64_t in, int64_t first, int64_t last, const float* x, float* y);
    void (*gated)(float* x, const float* y, int64_t count);
    void (*attend)(const float* q, int heads, const void* keys, const void* values, int real, int64_t many, int size, float scale, float* scores, float* to);
    int lanes;  // floats of its widest vectors
    // y[b * STRIP + row - first] += the product of a band's rows [first, last), STRIP at most, rounded to bfloat16, with x: inputs in blocks of
    // MOST, each [pair of columns][MOST]. Null without bfloat16; with it, `product` takes grids whose inputs are in bfloat16.
    void (*strip)(const Ready& band, int64_t out, int64_t first, int64_t last, const uint32_t* x, int64_t batch, float* y) = nullptr;
};

// Those of an instruction set by its place, the best for one below zero; null where there is none.
const Kernels* kernels_of(int32_t isa);

// voroq_product for several, of as many inputs each and one instruction set, whose rows are shared among the threads all together.
int32_t products(const Product* list, int64_t count);

extern const Kernels portable;
#if defined(__x86_64__)
extern const Kernels avx2, avx512;
Kernels avx512bf16();  // avx512's, with products in bfloat16 instead where these are exact
#elif defined(__aarch64__)
extern const Kernels neon;
#endif

}  // namespace voroq
