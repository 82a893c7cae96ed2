// Sorts a large table of centroids into boxes for the exact search of `nearest`.
#pragma once
#include "kernels.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

namespace voroq {

constexpr int64_t SORTED_FROM = 2048;  // centroids; below, looking at all of them is faster

struct OwnedIndex {
    Index index{};

    OwnedIndex(const float* table, int64_t k, int dim) : dim_(dim) {
        constexpr float inf = std::numeric_limits<float>::infinity();
        const bool sorted = k >= SORTED_FROM;
        const int64_t unit = sorted ? 256 : 16, padded = (k + unit - 1) / unit * unit, leaves = padded / 16;
        std::vector<int32_t> order(static_cast<size_t>(k));
        std::iota(order.begin(), order.end(), 0);
        if (sorted) split(table, order.data(), k, padded);
        points_.assign(size_t(padded * dim), 0.0f);
        bias_.assign(size_t(padded), -inf);
        float largest = 0;
        for (int64_t i = 0; i < k; ++i) {
            const float* t = table + int64_t(order[size_t(i)]) * dim;
            float norm = 0;
            for (int d = 0; d < dim; ++d) {
                points_[size_t((i / 16 * dim + d) * 16 + i % 16)] = t[d];
                norm += t[d] * t[d];
            }
            bias_[size_t(i)] = -0.5f * norm;
            largest = std::max(largest, norm);
        }
        index.dim = dim;
        index.leaves = leaves;
        index.points = points_.data();
        index.bias = bias_.data();
        index.largest = largest;
        index.slack = 4e-7f * float(dim + 2);
        if (!sorted) return;
        places_.assign(size_t(padded), std::numeric_limits<int32_t>::max());
        std::copy(order.begin(), order.end(), places_.begin());
        index.places = places_.data();
        const int64_t groups = leaves / 16, wide = (groups + 15) / 16 * 16;
        for (auto* ends : {&leaf_low_, &group_low_}) ends->assign(size_t(dim * (ends == &leaf_low_ ? leaves : wide)), inf);
        for (auto* ends : {&leaf_high_, &group_high_}) ends->assign(size_t(dim * (ends == &leaf_high_ ? leaves : wide)), -inf);
        for (int64_t i = 0; i < k; ++i)
            for (int d = 0; d < dim; ++d) {
                const float t = table[int64_t(order[size_t(i)]) * dim + d];
                const size_t leaf = size_t((i / 256 * dim + d) * 16 + i / 16 % 16), group = size_t(d * wide + i / 256);
                leaf_low_[leaf] = std::min(leaf_low_[leaf], t);
                leaf_high_[leaf] = std::max(leaf_high_[leaf], t);
                group_low_[group] = std::min(group_low_[group], t);
                group_high_[group] = std::max(group_high_[group], t);
            }
        index.groups_padded = wide;
        index.leaf_low = leaf_low_.data();
        index.leaf_high = leaf_high_.data();
        index.group_low = group_low_.data();
        index.group_high = group_high_.data();
    }

  private:
    // Halves the points along their widest side, at a whole number of leaves, until 16 are left.
    void split(const float* table, int32_t* order, int64_t count, int64_t room) {
        if (count <= 16) return;
        int widest = 0;
        float extent = -1;
        for (int d = 0; d < dim_; ++d) {
            float low = std::numeric_limits<float>::infinity(), high = -low;
            for (int64_t i = 0; i < count; ++i) {
                const float t = table[int64_t(order[i]) * dim_ + d];
                low = std::min(low, t);
                high = std::max(high, t);
            }
            if (high - low > extent) extent = high - low, widest = d;
        }
        const int64_t half = (room / 2 + 15) / 16 * 16;
        if (half >= count) return split(table, order, count, half);
        std::nth_element(order, order + half, order + count, [&](int32_t a, int32_t b) {
            const float x = table[int64_t(a) * dim_ + widest], y = table[int64_t(b) * dim_ + widest];
            return x < y || (x == y && a < b);
        });
        split(table, order, half, half);
        split(table, order + half, count - half, room - half);
    }

    int dim_;
    std::vector<float> points_, bias_, leaf_low_, leaf_high_, group_low_, group_high_;
    std::vector<int32_t> places_;
};

}  // namespace voroq
