// The C interface of the CPU kernels. No C++ and no torch types cross it, so one library serves every version of Python and torch.
// Python's side of it is voroq/native.py; change both and raise VOROQ_ABI.
#pragma once
#include <cstdint>

#define VOROQ_ABI 9

enum Real : int32_t { F32 = 0, F16 = 1, BF16 = 2 };
enum Kind : int32_t { TABLE = 0, GRID = 1, PYRAMID = 2, PULSES = 3 };

// Consecutive columns in one codebook: `along` codes a row of tiles, each of `rows` x `cols` weights.
struct Band {
    const uint32_t* words;   // the codes' bit stream, row 0
    int64_t pitch;           // words from one row of tiles to the next
    int64_t first;           // place of the band's first code in its row
    int64_t along;           // codes per row of tiles
    int64_t column;          // first column, in stored order
    const void* table;       // [2**bits, rows * cols]; of pyramids the scale of every level, or the gains
    const void* residual;    // [2**residual_bits, rows * cols] or null; of pulses the entries [tile rows, along, rows * cols] in residual_bits each
    const void* scale;       // per row of tiles, or null
    const uint32_t* zeros;   // bit stream of a zero point per row of tiles, or null
    const void* pyramid;     // from voroq_pyramid_new; null for other kinds
    int32_t rows, cols;      // of a tile; one of them is 1, the other 16 at most; down the output, where codes are plain numbers of 16 or 32 bits
                             // for one table without scales, a power of two times that
    int32_t width;           // bits of a code: the word's number, the residual's or the gain's above it; 64 for pyramids, 32 else, at most
    int32_t bits, residual_bits;  // of pulses: `bits` is how many levels there are, a code the level; 4 or 8 bits an entry
    int32_t kind;            // Kind
    int32_t real;            // Real, of table, residual and scale
};

// y = x w^T for a packed w [out, in]: w[o, c] = (scale[c] * stored[o, place(c)] + shift[c])
struct Product {
    int64_t out, in, batch, count;
    const Band* bands;
    const void* x;           // [batch, in]
    void* y;                 // [batch, out]
    const void* perm;        // column of x at stored place p, unsigned 16 or signed 32 or 64 bits; or null
    const void* scale;       // [in] in original order, or null
    const void* shift;
    const void* row_scale;   // [out], or null: w = row_scale[o] * stored + row_shift[o]
    const void* row_shift;
    int32_t x_real;          // Real, of x and y
    int32_t real;            // Real, of scale and shift
    int32_t perm_bytes;      // 2, 4 or 8
    int32_t threads;
    int32_t isa;             // -1: the best
};

// The words of a tile of v weights: entries of a table, or sums of its entries and those of a second one (null if there is none), of which
// the `beam` best of the first are each completed.
struct VoroqTables {
    const float* main;       // [k, v]
    const float* rest;       // [k_rest, v] or null
    int64_t k, k_rest;
    int32_t v, beam;
};

// Words scales[level] * y, y of pulses[level] pulses.
struct Union {
    int32_t dim, levels;
    const int32_t* pulses;
    const float* scales;
};

// What an error in one row of tiles costs: the metric of its rows [v, v] and its inverse, and how many columns there are.
struct Sides {
    const float* metric;
    const float* inverse;
    int64_t columns;
};

// The same for rows of tiles one below the other, [count, v, v] each; and below [count v, count v], the metric of all of them with every
// tile's columns times the tile's inverse, of which what lies below the tiles on the diagonal is read.
struct Rows {
    const float *metrics, *inverses, *below;
    int64_t count, columns;
};

// q = diag(signs) h / sqrt(n) for vectors of n: h is n / block copies of Sylvester's matrix of order block / order times the core [order, order].
struct Turn {
    const float* signs;      // [n]; null: no rotation
    const float* core;
    int64_t n;
    int32_t block, order;
};

// y = x w^T + bias. A packed w is given by `product` without x, y and batch; a dense one by `weight`. Its inputs are turned by `before`, what
// comes out is turned back by `after`.
struct Linear {
    Product product;
    const void* weight;      // [out, in] or null
    const void* bias;        // or null
    Turn before, after;
    int32_t weight_real, bias_real;
    int32_t whole;           // inputs and outputs of the packed product are floats, whatever the step's type
};

// Gains of a root-mean-square norm, or null.
struct Norm {
    const void* gains;
    int32_t real;
    float epsilon;
};

// h += o(attention(q(n), k(n), v(n))), n = before(h); h += down(silu(gate(m)) * up(m)), m = between(h).
struct Layer {
    Linear q, k, v, o, gate, up, down;
    Norm before, between, q_norm, k_norm;
    void *keys, *values;     // [pairs, room, size], of the step's type
    int64_t room;
};

// One token through all layers; its keys and values are written at place `past`, for which every layer must have room.
struct Step {
    const Layer* layers;
    int64_t count, hidden, inner, past;
    Linear head;
    Norm norm;
    const void* x;           // [hidden]
    const float *cosines, *sines;  // [size], of the token's position
    void* logits;            // [head.product.out]
    int32_t heads, pairs, size;    // of queries, of keys and values; what one is made of, a multiple of 16
    float scale;             // of the scores
    int32_t real;            // Real, of x, keys, values, logits and of what goes into linears
    int32_t threads, isa;
};

#pragma GCC visibility push(default)
extern "C" {
int32_t voroq_abi();
// Name of the best instruction set found here, and how many this library was built with.
const char* voroq_isa(int32_t index);
int32_t voroq_isa_count();
// 0, or not where the product asks for what this library does not have.
int32_t voroq_product(const Product* product);
// Rows [first, last) of w, as `real` [last - first, in]; `first` is where a tile of every band begins.
int32_t voroq_decode(const Product* product, int64_t first, int64_t last, void* out, int32_t real);
// A table of centroids [k, dim], k at most 2**20, made ready for `voroq_nearest`; null where there is no memory. Free it once.
void* voroq_index_new(const float* table, int64_t k, int32_t dim);
void voroq_index_free(void* index);
// best[i] = argmin_j |v_i - t_j|^2 for v [n, dim]; of equals, the first.
int32_t voroq_nearest(const void* index, const float* v, int64_t n, int64_t* best, int32_t threads, int32_t isa);
// Error feedback along one row of tiles, in the metric [v, v]: `rest` [v, columns] holds the targets before and, each as it was when its
// turn came, after; u [columns, columns] upper; codes [columns, streams]; errors [v, columns] divided by u's diagonal.
int32_t voroq_feedback_tile(
    const VoroqTables* tables, const float* metric, const float* u, int64_t columns, float* rest, int64_t* codes, float* errors);
// One sweep of coordinate descent along rows of tiles, each knowing the steps of those above: pulls = metric-weighted gradient
// [count v, columns], error [count v, columns] and codes [count, columns, streams] move; h [columns, columns]. The moves are added to *moves.
int32_t voroq_descend_tiles(
    const VoroqTables* tables, const Rows* rows, const float* h, float* pulls, float* error, int64_t* codes, int64_t* moves);
// Pyramids of `dim` 8 or 16 and up to 127 pulses, `levels` of them under one number of `bits` bits. With `gains` above 0 there is one level,
// and that many gains, a power of two, are named by the bits above the number's. `classes`: the class order, not the split order. Null for
// what this library lacks. Free it once.
void* voroq_pyramid_new(int32_t dim, const int32_t* pulses, int32_t levels, int32_t bits, int32_t gains, int32_t classes);
void voroq_pyramid_free(void* pyramid);
// y[i] is the point and level[i] the level, `levels` for the zero vector, of the word scales[level] * y nearest to v_i, for v and y [n, dim];
// y on level j has pulses[j] pulses. `dim` is 8 or 16.
int32_t voroq_project(const Union* words, const float* v, int64_t n, int64_t* level, float* y, int32_t threads, int32_t isa);
// `voroq_feedback_tile` and `voroq_descend_tiles` along one row, for such words; codes are the level and the entries of y, raised by the most pulses.
int32_t voroq_feedback_pulses(const Union* words, const Sides* sides, const float* u, float* rest, int16_t* codes, float* errors, int32_t isa);
int32_t voroq_descend_pulses(
    const Union* words, const Sides* sides, const float* h, float* pull, float* error, int16_t* codes, int64_t* moves, int32_t isa);
int32_t voroq_step(const Step* step);
}
#pragma GCC visibility pop
