// Builds what `spell` looks up to turn the numbers of pyramids into vectors. The split order is that of voroq/numerics/pyramid.py:
//
//     number(y) = sum_{j < k1} V(h, j) V(n-h, k-j)  +  number(left) V(n-h, k-k1)  +  number(right)       number((+k)) = 0, number((-k)) = 1
#pragma once
#include "kernels.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <vector>

namespace voroq {

constexpr int MOST_PULSES = 127;  // entries are bytes
constexpr int MOST_OF_FOUR = 20;  // 111 thousand vectors of 4 bytes, which fit into an L2 cache

// V(n, k) for n = 0..16, or the largest integer where it does not fit.
struct Counts {
    uint64_t of[17][MOST_PULSES + 1];
    Counts() {
        for (int k = 0; k <= MOST_PULSES; ++k) of[0][k] = k == 0;
        for (int n = 1; n <= 16; ++n)
            for (int k = 0; k <= MOST_PULSES; ++k) of[n][k] = k ? add(add(of[n - 1][k], of[n][k - 1]), of[n - 1][k - 1]) : 1;
    }

  private:
    static uint64_t add(uint64_t a, uint64_t b) { return a > std::numeric_limits<uint64_t>::max() - b ? std::numeric_limits<uint64_t>::max() : a + b; }
};

inline const Counts& counts() {
    static const Counts all;
    return all;
}

// Vector number i of P(n, k), slowly; n is a power of two.
inline void vector_of(int n, int k, uint64_t i, int8_t* y) {
    if (n == 1) {
        *y = int8_t(i ? -k : k);
        return;
    }
    const auto& v = counts().of;
    int left = 0;
    for (; i >= v[n / 2][left] * v[n / 2][k - left]; ++left) i -= v[n / 2][left] * v[n / 2][k - left];
    vector_of(n / 2, left, i / v[n / 2][k - left], y);
    vector_of(n / 2, k - left, i % v[n / 2][k - left], y + n / 2);
}

// All vectors of 4 entries with few pulses.
struct Fours {
    std::vector<int8_t> vectors;
    std::vector<uint32_t> first;  // by pulses
    Fours() {
        for (int k = 0; k <= MOST_OF_FOUR; ++k) {
            first.push_back(uint32_t(vectors.size() / 4));
            vectors.resize(vectors.size() + counts().of[4][k] * 4);
            for (uint64_t i = 0; i < counts().of[4][k]; ++i) vector_of(4, k, i, vectors.data() + (first.back() + i) * 4);
        }
    }
};

constexpr size_t MOST_PATTERNS = 1 << 20;  // of eight bytes: decoding is a random access to them

class OwnedPyramid : public Pyramid {
  public:
    // `classes`: numbers are in the class order (voroq/numerics/class_code.py), which eight dimensions have.
    OwnedPyramid(int dim, const int32_t* pulses, int levels, int bits, int gains, bool classes = false) : Pyramid{}, pulses_(pulses, pulses + levels) {
        const int most = check(dim, bits, gains);
        if (classes) {
            by_classes(dim, bits, gains);
            return;
        }
        static const Fours four;
        std::vector<Places> places{top(dim, bits)};
        for (int n : {8, 4})
            for (int k = 0; n < dim && k <= most; ++k) places.push_back(halves(n, k));
        for (const Places& at : places) guides_.push_back({splits_.data() + at.splits, guide_.data() + at.guide, at.shift});
        const Guide* inner = guides_.data() + 1;
        static_cast<Pyramid&>(*this) = {dim, levels, bits, gains, guides_[0], inner, inner + (dim == 16 ? most + 1 : 0), MOST_OF_FOUR,
                                        four.vectors.data(), four.first.data(), nullptr, nullptr, 0, nullptr};
    }

  private:
    struct Places {
        size_t splits, guide;
        int shift;
    };

    int check(int dim, int bits, int gains) const {
        const int most = *std::max_element(pulses_.begin(), pulses_.end()), least = *std::min_element(pulses_.begin(), pulses_.end());
        unsigned __int128 points = 0;
        if ((dim != 8 && dim != 16) || least < 1 || most > MOST_PULSES || bits < 1 || bits > 64) throw std::invalid_argument("pyramid");
        for (int k : pulses_) {
            if (counts().of[dim][k] == std::numeric_limits<uint64_t>::max()) throw std::invalid_argument("pyramid");
            points += counts().of[dim][k];
        }
        if (points > (unsigned __int128)1 << bits || (gains & (gains - 1)) || (gains && pulses_.size() > 1)) throw std::invalid_argument("pyramid");
        return most;
    }

    void by_classes(int dim, int bits, int gains) {
        if (dim != 8 || gains) throw std::invalid_argument("pyramid");
        uint32_t begins[MOST_PULSES + 1][9] = {};
        uint64_t next = 0;
        patterns_.push_back(0);  // of the zero vector
        for (size_t j = 0; j < pulses_.size(); ++j)
            for (int k = pulses_[j], z = 1; z <= std::min(k, 8); ++z) {
                uint64_t many = 1;  // binomial(8, z) binomial(k - 1, z - 1)
                for (int i = 0; i < z; ++i) many = many * uint64_t(8 - i) / uint64_t(i + 1);
                uint64_t shares = 1;
                for (int i = 1; i < z; ++i) shares = shares * uint64_t(k - i) / uint64_t(i);
                many *= shares;
                if (!begins[k][z]) {
                    if (patterns_.size() + many > MOST_PATTERNS) throw std::invalid_argument("pyramid");
                    begins[k][z] = uint32_t(patterns_.size());
                    append(0, k, z, 0);
                }
                classes_.push_back({next + (many << z) - 1, next, begins[k][z], uint16_t(j), uint16_t(z)});
                next += many << z;
            }
        if (next <= ~uint64_t(0) >> (64 - bits)) classes_.push_back({~uint64_t(0), next, 0, uint16_t(pulses_.size()), 63});
        const int shift = std::max(0, bits - 12);
        for (uint64_t b = 0, at = 0; b <= (~uint64_t(0) >> (64 - bits)) >> shift; ++b) {
            while (classes_[at].last < b << shift) ++at;
            guide_.push_back(uint16_t(at));
        }
        static_cast<Pyramid&>(*this) = {dim, int(pulses_.size()), bits, 0, {}, nullptr, nullptr, 0, nullptr, nullptr,
                                        classes_.data(), guide_.data(), shift, patterns_.data()};
    }

    // All magnitudes of which those from entry i on have `left` pulses on `nonzero` entries, in lexicographic order.
    void append(int i, int left, int nonzero, uint64_t before) {
        if (i == 8) return patterns_.push_back(before);
        for (int v = 0; v <= left; ++v) {
            const int there = nonzero - (v > 0), room = 7 - i;
            if (there >= 0 && there <= room && left - v >= there && (there || left == v)) append(i + 1, left - v, there, before | uint64_t(v) << 8 * i);
        }
    }

    // The splits of vectors of n entries with k pulses, whose numbers begin after those before; returns the last one.
    uint64_t split(int n, int k, uint16_t level, uint64_t last) {
        for (int left = 0; left <= k; ++left) {
            const uint64_t radix = counts().of[n / 2][k - left];
            last += counts().of[n / 2][left] * radix;
            const uint64_t magic = radix == 1 ? ~uint64_t(0) : uint64_t(((unsigned __int128)1 << 64) / radix);
            splits_.push_back({last, radix, magic, -1, level, uint8_t(left), uint8_t(k - left)});
        }
        return last;
    }

    Places begin() {
        splits_.push_back({~uint64_t(0), 1, 0, 0, 0, 0, 0});  // so that the first split begins at 0
        return {splits_.size() - 1, guide_.size(), 0};
    }

    void guide(Places& at, uint64_t last, int resolution) {
        for (at.shift = 0; last >> at.shift >> resolution; ++at.shift) {}
        uint16_t here = 1;
        for (uint64_t b = 0; b <= last >> at.shift; ++b) {
            while (splits_[at.splits + here].last < b << at.shift) ++here;
            guide_.push_back(here);
        }
    }

    Places top(int dim, int bits) {
        Places at = begin();
        uint64_t last = ~uint64_t(0);
        for (size_t j = 0; j < pulses_.size(); ++j) last = split(dim, pulses_[j], uint16_t(j), last);
        if (last != ~uint64_t(0)) splits_.push_back({~uint64_t(0), 1, ~uint64_t(0), 0, uint16_t(pulses_.size()), 0, 0});
        guide(at, bits == 64 ? ~uint64_t(0) : (uint64_t(1) << bits) - 1, 12);
        return at;
    }

    Places halves(int n, int k) {
        Places at = begin();
        guide(at, split(n, k, 0, ~uint64_t(0)), 7);
        return at;
    }

    std::vector<int32_t> pulses_;
    std::vector<Split> splits_;
    std::vector<uint16_t> guide_;
    std::vector<Class> classes_;
    std::vector<uint64_t> patterns_;
    std::vector<Guide> guides_;
};

}  // namespace voroq
