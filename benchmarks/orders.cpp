// Nanoseconds per weight of turning numbers of pyramids into bytes: the split order of the kernels with look-ups of four entries up to so
// many pulses, and in eight dimensions the class code (voroq/numerics/class_code.py), whose signs are spread with one instruction (pdep).
//
//     for most in 8 12 20 26; do
//         cp csrc/cpu/*.h csrc/cpu/*.inc build/ && sed -i "s/MOST_OF_FOUR = 20/MOST_OF_FOUR = $most/" build/pyramid.h
//         g++ -O3 -std=c++20 -march=native -fno-math-errno -Wno-psabi -Ibuild benchmarks/orders.cpp -o build/orders && build/orders
//     done
#include "kernels.h"
#include "pyramid.h"

#include <immintrin.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>

namespace voroq::here {
#include "kernels.inc"
}
using namespace voroq;

struct Stream {
    int dim, bits;
    std::vector<int32_t> pulses;
    int64_t count = 1 << 16;
    std::vector<uint32_t> row;

    Stream(int dim, int bits, std::vector<int32_t> pulses) : dim(dim), bits(bits), pulses(std::move(pulses)), row(size_t(count * bits / 32 + 4)) {
        unsigned __int128 points = 0;
        for (int k : this->pulses) points += counts().of[dim][k];
        std::mt19937_64 random(1);
        for (int64_t i = 0; i < count; ++i) {
            const uint64_t number = uint64_t((unsigned __int128)random() * points >> 64);
            for (int64_t b = 0, at = i * bits; b < bits; ++b, ++at) row[size_t(at / 32)] |= uint32_t(number >> b & 1) << at % 32;
        }
    }
};

double fastest(int64_t weights, const std::function<void()>& work) {
    double best = 1;
    for (int round = 0; round < 25; ++round) {
        const auto begun = std::chrono::steady_clock::now();
        work();
        best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count());
    }
    return best * 1e9 / double(weights);
}

template <int L>
std::vector<int8_t> by_splits(const Stream& stream, double& ns) {
    OwnedPyramid owned(L, stream.pulses.data(), int(stream.pulses.size()), stream.bits, 0);
    std::vector<float> scales(stream.pulses.size() + 1, 1.0f), factors(size_t(stream.count));
    std::vector<int8_t> y(size_t(stream.count * L));
    Ready ready{};
    ready.band.words = stream.row.data();
    ready.band.pitch = int64_t(stream.row.size());
    ready.band.width = stream.bits;
    ready.band.pyramid = static_cast<const Pyramid*>(&owned);
    ready.table = scales.data();
    ns = fastest(stream.count * L, [&] { here::spell<L>(ready, stream.row.data(), 0, stream.count, y.data(), factors.data()); });
    return y;
}

// A class: numbers up to `last` from `first` on are patterns with z nonzero entries, and their signs.
struct Class {
    uint32_t last, first, patterns;
    int z;
};

std::vector<int8_t> by_classes(const Stream& stream, double& ns, size_t& bytes) {
    std::vector<Class> classes;
    std::vector<uint64_t> patterns;  // eight magnitudes, a byte each
    uint32_t first = 0;
    for (int k : stream.pulses)
        for (int z = 1; z <= 8 && z <= k; ++z) {
            const uint32_t begin = uint32_t(patterns.size());
            std::function<void(int, int, int, uint64_t)> place = [&](int i, int left, int nonzero, uint64_t so_far) {
                if (i == 8 && !left && !nonzero) patterns.push_back(so_far);
                for (int v = 0; i < 8 && v <= left && nonzero >= (v > 0); ++v) place(i + 1, left - v, nonzero - (v > 0), so_far | uint64_t(v) << 8 * i);
            };
            place(0, k, z, 0);
            const uint32_t many = uint32_t(patterns.size() - begin) << z;
            classes.push_back({first + many - 1, first, begin, z});
            first += many;
        }
    bytes = patterns.size() * 8;
    const int shift = std::max(0, stream.bits - 12);
    std::vector<uint16_t> guide;
    for (uint64_t b = 0, at = 0; at < classes.size() && b <= (uint64_t(1) << stream.bits) - 1 >> shift; ++b) {
        while (at + 1 < classes.size() && classes[at].last < b << shift) ++at;
        guide.push_back(uint16_t(at));
    }
    std::vector<int8_t> y(size_t(stream.count * 8));
    ns = fastest(stream.count * 8, [&] {
        for (int64_t i = 0; i < stream.count; ++i) {
            const uint32_t code = here::code_at(stream.row.data(), i * stream.bits, stream.bits);
            const Class* own = &classes[guide[code >> shift]];
            while (code > own->last) ++own;
            const uint32_t rest = code - own->first;
            const uint64_t size = patterns[own->patterns + (rest >> own->z)], ones = 0x7f7f7f7f7f7f7f7f;
            const uint64_t negative = _pdep_u64(rest & ((1u << own->z) - 1), (size + ones) & ~ones) >> 7;
            const uint64_t entries = (size ^ negative * 255) + negative;  // two's complement where it is not zero: nothing is carried
            std::memcpy(&y[size_t(i * 8)], &entries, 8);
        }
    });
    return y;
}

long pulses_in(const std::vector<int8_t>& y) {
    long sum = 0;
    for (int8_t v : y) sum += std::abs(v);
    return sum;
}

// The presets of voroq/codebook/preset_table.py.
int main() {
    double split, classes;
    size_t bytes;
    for (const Stream& stream : {Stream(16, 32, {8, 8, 10, 7, 9, 8, 12, 7, 9}),
                                 Stream(16, 48, {20, 22, 20, 18, 24, 19, 22, 26, 20, 25, 22}),
                                 Stream(16, 64, {42, 44, 46, 43, 48, 45, 50, 45, 51, 43, 45, 47, 51, 44, 44, 51, 47, 44, 51, 44, 49, 44, 45})}) {
        by_splits<16>(stream, split);
        std::printf("16 dimensions, %d bits: split %.2f with a table up to %d pulses\n", stream.bits, split, MOST_OF_FOUR);
    }
    for (const Stream& stream : {Stream(8, 16, {3, 3, 5, 3, 6, 6}), Stream(8, 20, {5, 4, 6, 9, 3, 9, 9, 5}), Stream(8, 24, {8, 10, 13, 13, 6, 10, 13, 13, 9})}) {
        const long same = pulses_in(by_splits<8>(stream, split)) - pulses_in(by_classes(stream, classes, bytes));
        std::printf("8 dimensions, %d bits: split %.2f, class %.2f with %zu KB of patterns%s\n", stream.bits, split, classes, bytes / 1024,
                    same ? " (not the same vectors)" : "");
    }
}
