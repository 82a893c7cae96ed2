// Rounding in a metric of two sides, row after row of tiles (voroq/rounding/kronecker.py has the mathematics and the slow twin).
// A tile is v weights down the output; its words are a table's, or sums of two tables' entries; `metric` [v, v] says what an error costs.
// Pyramids are in pulses.inc.
#include "voroq.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EVERY_SET __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EVERY_SET
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
constexpr Ints PLACES{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

#include "sweeps.inc"

INLINE Floats load(const float* from) {
    Floats to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

// Of the lanes of x; halves are compared until four are left.
template <class Vector, class Half, class Quarter, class Lane>
INLINE Lane least_lane(Vector x) {
    Half a, b;
    std::memcpy(&a, &x, sizeof a), std::memcpy(&b, reinterpret_cast<const char*>(&x) + sizeof a, sizeof b);
    a = b < a ? b : a;
    Quarter c, d;
    std::memcpy(&c, &a, sizeof c), std::memcpy(&d, reinterpret_cast<const char*>(&a) + sizeof c, sizeof d);
    c = d < c ? d : c;
    return std::min(std::min(c[0], c[1]), std::min(c[2], c[3]));
}
typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats4 __attribute__((vector_size(16)));
typedef int32_t Ints8 __attribute__((vector_size(32)));
typedef int32_t Ints4 __attribute__((vector_size(16)));

// A table as the search wants it: for every LANES words c the products M c, by component, and c M c.
struct Metric {
    const float* table;
    int64_t k;
    int v;
    std::vector<float> pulled, norms;

    void prepare(const float* words, int64_t count, int size, const float* metric) {
        table = words, k = count, v = size;
        const int64_t blocks = (k + LANES - 1) / LANES;
        pulled.assign(size_t(blocks * v * LANES), 0.0f);
        norms.assign(size_t(blocks * LANES), std::numeric_limits<float>::infinity());
        for (int64_t c = 0; c < k; ++c) {
            const float* word = table + c * v;
            float norm = 0;
            for (int a = 0; a < v; ++a) {
                float sum = 0;
                for (int b = 0; b < v; ++b) sum += metric[a * v + b] * word[b];
                pulled[size_t((c / LANES * v + a) * LANES + c % LANES)] = sum;
                norm += sum * word[a];
            }
            norms[size_t(c)] = norm;
        }
    }

    // c M c - 2 t M c of the words of a block; V is v, or 0 for any.
    template <int V>
    INLINE Floats scores(int64_t block, const float* t) const {
        const int size = V ? V : v;
        Floats sum = load(&norms[size_t(block * LANES)]);
        const float* words = &pulled[size_t(block * size * LANES)];
        for (int a = 0; a < size; ++a) sum += (-2 * t[a]) * load(words + a * LANES);
        return sum;
    }
};

struct Best {
    float score;
    int64_t word;
};

// The word with the least score; of equals, the first.
template <int V>
INLINE Best nearest_of(const Metric& words, const float* t) {
    Floats least = Floats{} + std::numeric_limits<float>::infinity();
    Ints where{}, here{};
    const int64_t blocks = int64_t(words.norms.size()) / LANES;
    for (int64_t block = 0; block < blocks; ++block, here += 1) {
        const Floats s = words.scores<V>(block, t);
        const Ints less = s < least;
        least = less ? s : least;
        where = less ? here : where;
    }
    const float score = least_lane<Floats, Floats8, Floats4, float>(least);
    const Ints own = where * LANES + PLACES, none = Ints{} + std::numeric_limits<int32_t>::max();
    const int64_t word = least_lane<Ints, Ints8, Ints4, int32_t>(least == score ? own : none);
    return {score, word < words.k ? word : 0};
}

INLINE Best nearest(const Metric& words, const float* t) {
    switch (words.v) {
        case 2: return nearest_of<2>(words, t);
        case 3: return nearest_of<3>(words, t);
        case 4: return nearest_of<4>(words, t);
        default: return nearest_of<0>(words, t);
    }
}

struct Words {
    using Code = int64_t;
    static constexpr int LONGEST = 64, MOST_STREAMS = 2;
    Metric main, rest;
    int beam = 1, dim, streams;
    std::vector<Best> few;

    Words(const VoroqTables& tables, const float* metric) : beam(std::max(1, tables.beam)), dim(tables.v), streams(tables.rest ? 2 : 1) {
        main.prepare(tables.main, tables.k, tables.v, metric);
        if (tables.rest) rest.prepare(tables.rest, tables.k_rest, tables.v, metric);
        else rest.k = 0;
    }
    // Of the word at `codes`.
    void decode(const int64_t* codes, float* word) const {
        for (int a = 0; a < main.v; ++a) word[a] = main.table[codes[0] * main.v + a] + (rest.k ? rest.table[codes[1] * main.v + a] : 0);
    }
    void search(const float* t, int64_t* codes);
};

// Codes of the best word found for t: with a second table, the `beam` best of the main one are each completed.
INLINE void Words::search(const float* t, int64_t* codes) {
    if (!rest.k) {
        codes[0] = nearest(main, t).word;
        return;
    }
    few.clear();
    if (beam == 1) few.push_back(nearest(main, t));
    else {
        for (int64_t block = 0; block * LANES < main.k; ++block) {
            const Floats s = main.scores<0>(block, t);
            for (int l = 0; l < LANES && block * LANES + l < main.k; ++l) {
                if (int(few.size()) == beam && !(s[l] < few.back().score)) continue;
                if (int(few.size()) == beam) few.pop_back();
                const Best one{s[l], block * LANES + l};
                few.insert(std::upper_bound(few.begin(), few.end(), one, [](const Best& a, const Best& b) { return a.score < b.score; }), one);
            }
        }
    }
    float least = std::numeric_limits<float>::infinity();
    for (const Best& one : few) {
        float left[LONGEST];
        for (int a = 0; a < main.v; ++a) left[a] = t[a] - main.table[one.word * main.v + a];
        const Best second = nearest(rest, left);
        if (one.score + second.score < least) {
            least = one.score + second.score;
            codes[0] = one.word, codes[1] = second.word;
        }
    }
}

EVERY_SET void feedback(Words& words, const float* u, int64_t columns, float* rest, int64_t* codes, float* errors) {
    feed_back(words, u, columns, rest, codes, errors);
}

// What a sweep takes from its own pulls, the metric times its steps times h, says what it takes from the pulls of the rows below.
EVERY_SET int64_t descend(const VoroqTables& tables, const Rows& rows, const float* h, float* pulls, float* error, int64_t* codes) {
    const int64_t v = tables.v, tall = rows.count * v, wide = rows.columns;
    std::vector<float> before(size_t(v * wide));
    int64_t moves = 0;
    for (int64_t r = 0; r < rows.count; ++r) {
        const float* metric = rows.metrics + r * v * v;
        float* pull = pulls + r * v * wide;
        Words words(tables, metric);
        std::copy(pull, pull + v * wide, before.begin());
        const int32_t here = sweep(words, metric, rows.inverses + r * v * v, h, wide, pull, error + r * v * wide, codes + r * wide * words.streams);
        if (!here) continue;
        moves += here;
        for (int64_t i = 0; i < v * wide; ++i) before[size_t(i)] -= pull[i];
        for (int64_t l = (r + 1) * v; l < tall; ++l)
            for (int64_t a = 0; a < v; ++a) subtract(pulls + l * wide, before.data() + a * wide, rows.below[l * tall + r * v + a], wide);
    }
    return moves;
}

}  // namespace

extern "C" {

int32_t voroq_feedback_tile(
    const VoroqTables* tables, const float* metric, const float* u, int64_t columns, float* rest, int64_t* codes, float* errors) try {
    if (tables->v < 1 || tables->v > Words::LONGEST) return 1;
    Words words(*tables, metric);
    feedback(words, u, columns, rest, codes, errors);
    return 0;
} catch (const std::bad_alloc&) {
    return 2;
}

int32_t voroq_descend_tiles(
    const VoroqTables* tables, const Rows* rows, const float* h, float* pulls, float* error, int64_t* codes, int64_t* moves) try {
    if (tables->v < 1 || tables->v > Words::LONGEST) return 1;
    *moves += descend(*tables, *rows, h, pulls, error, codes);
    return 0;
} catch (const std::bad_alloc&) {
    return 2;
}
}
