// Every instruction set that this machine has against the portable kernels, through the C interface alone: for machines without Python, and
// for emulators. Outputs start as NaN. Prints what it compared; 1 where something differs. voroq/kernels/parity_test.py is the whole test,
// against the reference; this one is compiled and run by voroq/kernels/neon_test.py.
#include "cpu/voroq.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

namespace {

uint64_t seed = 1;
uint32_t bits32() {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(seed >> 32);
}
int64_t below(int64_t n) { return int64_t((uint64_t(bits32()) << 32 | bits32()) % uint64_t(n)); }
float normal() {
    float sum = 0;
    for (int i = 0; i < 12; ++i) sum += float(bits32() >> 8) * 0x1p-24f;
    return sum - 6;
}
uint16_t to_brain(float value) { return uint16_t((std::bit_cast<uint32_t>(value) + 0x8000u) >> 16); }
uint16_t to_half(float value) {  // of normal numbers, cut off
    const uint32_t bits = std::bit_cast<uint32_t>(value), size = bits & 0x7fffffffu;
    if (size < 0x38800000u) return uint16_t(bits >> 16 & 0x8000);
    return uint16_t((bits >> 16 & 0x8000) | ((size - 0x38000000u) >> 13));
}
float from(const void* x, int real, size_t i) {
    if (real == F32) return static_cast<const float*>(x)[i];
    const uint16_t bits = static_cast<const uint16_t*>(x)[i];
    if (real == BF16) return std::bit_cast<float>(uint32_t(bits) << 16);
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent ? std::ldexp(1 + float(fraction) / 1024, exponent - 15) : std::ldexp(float(fraction), -24);
    return exponent == 31 ? std::numeric_limits<float>::quiet_NaN() : bits & 0x8000 ? -size : size;
}

// Numbers of a type, on words of their own.
struct Numbers {
    std::vector<uint32_t> memory;
    int real;
    Numbers(int64_t count, int real, bool poison = false) : memory(size_t(count + 32)), real(real) {
        for (int64_t i = 0; i < count; ++i) {
            const float value = poison ? std::numeric_limits<float>::quiet_NaN() : normal();
            if (real == F32) reinterpret_cast<float*>(memory.data())[i] = value;
            else reinterpret_cast<uint16_t*>(memory.data())[i] = poison ? 0x7fff : real == F16 ? to_half(value) : to_brain(value);
        }
    }
    float operator[](size_t i) const { return from(memory.data(), real, i); }
    void* data() { return memory.data(); }
    const void* data() const { return memory.data(); }
};

int failures = 0, comparisons = 0;
int sets() { return voroq_isa_count() - 1; }  // the portable one is the last

void report(const std::string& what, int isa, bool good, double error) {
    ++comparisons;
    if (good) return;
    ++failures;
    std::printf("%s: %s differs by %g\n", voroq_isa(isa), what.c_str(), error);
}

// |a - b| over the largest |b|; infinite where a is no number.
double error_of(const Numbers& a, const Numbers& b, size_t count) {
    double error = 0, size = 1e-30;
    for (size_t i = 0; i < count; ++i) {
        error = std::isfinite(a[i]) ? std::max(error, std::fabs(double(a[i]) - b[i])) : std::numeric_limits<double>::infinity();
        size = std::max(size, std::fabs(double(b[i])));
        if (std::isinf(error)) break;
    }
    return error / size;
}

struct Matrix {
    int64_t out, in = 0;
    std::vector<Band> bands;
    std::vector<Numbers> numbers;
    std::vector<std::vector<uint32_t>> words;
    std::vector<uint16_t> perm;
    bool scaled = false, rows_scaled = false, exact = true;

    explicit Matrix(int64_t out) : out(out) { numbers.reserve(64), words.reserve(64); }
    const void* reals(int64_t count, int real) { return numbers.emplace_back(count, real).data(); }
    const uint32_t* stream(int64_t count, uint64_t most, int width) {  // `count` codes up to `most`, from bit 0 on
        auto& to = words.emplace_back(size_t((count * width + 31) / 32 + 2));
        for (int64_t i = 0; i < count; ++i) {
            const uint64_t code = most == ~uint64_t(0) ? uint64_t(bits32()) << 32 | bits32() : uint64_t(below(int64_t(most) + 1));
            for (int b = 0; b < width; ++b) to[size_t((i * width + b) / 32)] |= uint32_t(code >> b & 1) << (i * width + b) % 32;
        }
        return to.data();
    }
    // `along` tiles a row, as one band behind the others
    Band& add(int kind, int rows, int cols, int64_t along, int width, uint64_t most, int real) {
        const int64_t tiles = (out + rows - 1) / rows, pitch = (along * width + 31) / 32;
        Band band{};
        band.words = words.emplace_back(size_t(tiles * pitch + 2)).data();
        for (int64_t t = 0; t < tiles; ++t) {
            const uint32_t* row = stream(along, most, width);
            std::copy(row, row + pitch, const_cast<uint32_t*>(band.words) + t * pitch);
            words.pop_back();
        }
        band.pitch = pitch, band.along = along, band.column = in, band.rows = rows, band.cols = cols, band.width = width, band.kind = kind, band.real = real;
        in += along * cols;
        bands.push_back(band);
        return bands.back();
    }
    void table(int rows, int cols, int64_t along, int bits, int residual, int real) {
        Band& band = add(TABLE, rows, cols, along, bits + residual, (uint64_t(1) << (bits + residual)) - 1, real);
        band.bits = bits, band.residual_bits = residual;
        band.table = reals((int64_t(rows) * cols) << bits, real);
        if (residual) band.residual = reals((int64_t(rows) * cols) << residual, real);
    }
    void grid(int64_t along, int bits, int real, bool zeros) {
        Band& band = add(GRID, 1, 1, along, bits, (uint64_t(1) << bits) - 1, real);
        band.bits = bits;
        band.scale = reals(out, real);
        if (zeros) band.zeros = stream(out, (uint64_t(1) << bits) - 1, bits);
    }
    void pulses(int dim, bool down, int64_t along, int levels, int entry_bits, int real) {
        Band& band = add(PULSES, down ? dim : 1, down ? 1 : dim, along, 3, uint64_t(levels) - 1, real);
        const int64_t tiles = (out + band.rows - 1) / band.rows;
        band.bits = levels, band.residual_bits = entry_bits;
        band.table = reals(levels, real);
        auto& entries = words.emplace_back(size_t(tiles * along * dim * entry_bits / 32 + 8));
        for (uint32_t& word : entries) word = bits32();
        band.residual = entries.data();
    }
    void pyramids(int dim, bool down, int64_t along, const void* pyramid, uint64_t count, int bits, int levels, int real) {
        Band& band = add(PYRAMID, down ? dim : 1, down ? 1 : dim, along, bits, count - 1, real);
        band.pyramid = pyramid;
        band.table = reals(levels, real);
        band.bits = bits;
    }
    Product product() {
        Product p{};
        p.out = out, p.in = in, p.count = int64_t(bands.size()), p.bands = bands.data(), p.real = BF16, p.threads = 2;
        if (!perm.empty()) p.perm = perm.data(), p.perm_bytes = 2;
        if (scaled) p.scale = reals(in, BF16), p.shift = reals(in, BF16);
        if (rows_scaled) p.row_scale = reals(out, BF16), p.row_shift = reals(out, BF16);
        return p;
    }
};

void compare(const std::string& name, Matrix& m) {
    Product p = m.product();
    for (int x_real : {F32, F16, BF16})
        for (int64_t batch : {1, 2, 3, 8, 17}) {
            const Numbers x(batch * m.in, x_real);
            Numbers expected(batch * m.out, x_real, true);
            p.x = x.data(), p.x_real = x_real, p.batch = batch;
            p.y = expected.data(), p.isa = sets();
            if (voroq_product(&p)) return report(name + ", portable, refused", sets(), false, 0);
            for (int isa = 0; isa < sets(); ++isa) {
                Numbers y(batch * m.out, x_real, true);
                p.y = y.data(), p.isa = isa;
                const bool done = voroq_product(&p) == 0;
                const double error = error_of(y, expected, size_t(batch * m.out));
                report(name + " x " + std::to_string(batch) + " of type " + std::to_string(x_real), isa, done && error < (x_real == F32 ? 1e-5 : 2e-2), error);
            }
        }
    for (int real : {F32, BF16}) {
        Numbers expected(m.out * m.in, real, true);
        p.isa = sets();
        voroq_decode(&p, 0, m.out, expected.data(), real);
        for (int isa = 0; isa < sets(); ++isa) {
            Numbers w(m.out * m.in, real, true);
            p.isa = isa;
            const bool done = voroq_decode(&p, 0, m.out, w.data(), real) == 0;
            const double error = error_of(w, expected, size_t(m.out * m.in));
            report(name + ", decoded to type " + std::to_string(real), isa, done && error < (real == F32 ? 1e-6 : 1e-2), error);
        }
    }
}

void tables() {
    for (int rows : {2, 3, 4, 6, 8, 12, 16})
        for (int real : {F32, F16, BF16})
            for (auto [bits, residual] : {std::pair(4, 0), {8, 8}, {12, 0}, {7, 3}, {13, 0}}) {
                Matrix m(rows * 9 + 1);
                m.table(rows, 1, 203, bits, residual, real);
                m.scaled = rows % 4 == 0, m.rows_scaled = rows == 6;
                if (rows == 8)
                    for (int64_t c = 0; c < m.in; ++c) m.perm.push_back(uint16_t((c * 5 + 2) % m.in));
                compare("table of " + std::to_string(rows) + " x 1, " + std::to_string(bits) + " + " + std::to_string(residual) + " bits", m);
            }
    Matrix m(37);
    m.table(1, 4, 61, 9, 0, BF16), m.table(1, 8, 33, 8, 8, F16), m.table(1, 16, 17, 6, 0, F32), m.grid(200, 3, BF16, true);
    compare("tables along the input, and a grid", m);
}

void grids() {
    for (int bits = 1; bits <= 8; ++bits)
        for (int real : {F32, BF16}) {
            Matrix m(71);
            m.grid(256, bits, real, true), m.grid(128, bits, real, false), m.grid(77, bits, real, true);
            compare("grid of " + std::to_string(bits) + " bits", m);
        }
}

// Points of whole numbers in `dim` dimensions whose sizes add up to `pulses`.
uint64_t points(int dim, int pulses) {
    std::vector<uint64_t> row(size_t(pulses + 1), 0), last;
    row[0] = 1;
    for (int d = 0; d < dim; ++d) {
        last = row;
        for (int k = 1; k <= pulses; ++k) row[size_t(k)] = last[size_t(k)] + last[size_t(k - 1)] + row[size_t(k - 1)];
    }
    return row[size_t(pulses)];
}

void pyramids() {
    for (int dim : {8, 16})
        for (int classes : {0, 1}) {
            if (classes && dim == 16) continue;  // that order is of eight dimensions
            const int32_t pulses[] = {3, 4, 6};
            uint64_t count = 1;
            for (int k : pulses) count += points(dim, k);
            const int bits = std::bit_width(count - 1);
            void* pyramid = voroq_pyramid_new(dim, pulses, 3, bits, 0, classes);
            if (!pyramid) {
                report("pyramid of " + std::to_string(dim), sets(), false, 0);
                continue;
            }
            for (bool down : {true, false}) {
                Matrix m(dim * 5 + 3);
                m.pyramids(dim, down, 133, pyramid, count, bits, 3, BF16);
                compare("pyramids of " + std::to_string(dim) + (classes ? " by classes" : ""), m);
            }
            voroq_pyramid_free(pyramid);
            for (int entry_bits : {4, 8}) {
                Matrix m(dim * 5 + 3);
                m.pulses(dim, entry_bits == 4, 133, 6, entry_bits, F16);
                compare("pulses of " + std::to_string(dim), m);
            }
        }
}

double distance(const float* a, const float* b, int dim) {
    double sum = 0;
    for (int d = 0; d < dim; ++d) sum += (double(a[d]) - b[d]) * (double(a[d]) - b[d]);
    return sum;
}

void searches() {
    for (int dim : {2, 3, 4, 6, 8, 12, 16})
        for (int64_t k : {5, 256, 6000}) {
            const int64_t n = 300;
            const Numbers table(k * dim, F32), v(n * dim, F32);
            const auto *t = static_cast<const float*>(table.data()), *at = static_cast<const float*>(v.data());
            void* index = voroq_index_new(t, k, dim);
            std::vector<int64_t> expected(size_t(n), -1);
            voroq_nearest(index, at, n, expected.data(), 2, sets());
            for (int isa = 0; isa < sets(); ++isa) {
                std::vector<int64_t> best(size_t(n), -1);
                voroq_nearest(index, at, n, best.data(), 2, isa);
                double worst = 0;
                for (int64_t i = 0; i < n; ++i) {
                    const int64_t own = std::clamp<int64_t>(best[size_t(i)], 0, k - 1);
                    if (own != best[size_t(i)]) worst = std::numeric_limits<double>::infinity();
                    worst = std::max(worst, distance(at + i * dim, t + own * dim, dim) - distance(at + i * dim, t + expected[size_t(i)] * dim, dim));
                }
                report("nearest of " + std::to_string(k) + " in " + std::to_string(dim), isa, worst < 1e-5, worst);
            }
            voroq_index_free(index);
        }
}

void unions() {
    for (int dim : {8, 16}) {
        const int32_t pulses[] = {2, 4, 7};
        const float scales[] = {0.9f, 0.6f, 0.45f};
        const Union words{dim, 3, pulses, scales};
        const int64_t n = 200, columns = 40;
        const Numbers v(n * dim, F32);
        std::vector<float> metric(size_t(dim * dim)), u(size_t(columns * columns)), h(size_t(columns * columns));
        for (int i = 0; i < dim; ++i) metric[size_t(i * dim + i)] = 1;
        for (int64_t i = 0; i < columns; ++i)
            for (int64_t j = i; j < columns; ++j) u[size_t(i * columns + j)] = i == j ? 1.0f : 0.05f * normal();
        for (int64_t i = 0; i < columns; ++i)
            for (int64_t j = 0; j < columns; ++j) h[size_t(i * columns + j)] = i == j ? 1.0f : 0.02f;
        const Sides sides{metric.data(), metric.data(), columns};
        std::vector<double> costs, losses, falls;
        const Numbers rest(dim * columns, F32);
        for (int isa = 0; isa <= sets(); ++isa) {
            std::vector<int64_t> level(size_t(n), -1);
            Numbers y(n * dim, F32, true), left = rest, errors(dim * columns, F32, true), pull(dim * columns, F32), error = rest;
            voroq_project(&words, static_cast<const float*>(v.data()), n, level.data(), static_cast<float*>(y.data()), 2, isa);
            double cost = 0, loss = 0, fall = 0;
            for (int64_t i = 0; i < n; ++i)
                for (int d = 0; d < dim; ++d) {
                    const size_t at = size_t(i * dim + d);
                    const float scale = level[size_t(i)] < 3 ? scales[level[size_t(i)]] : 0;
                    cost += (v[at] - scale * y[at]) * (v[at] - scale * y[at]);
                }
            std::vector<int16_t> codes(size_t(columns * (dim + 1)), -1);
            voroq_feedback_pulses(&words, &sides, u.data(), static_cast<float*>(left.data()), codes.data(), static_cast<float*>(errors.data()), isa);
            for (size_t i = 0; i < size_t(dim * columns); ++i) loss += double(errors[i]) * errors[i];
            for (int64_t c = 0; c < columns; ++c)
                for (int d = 0; d < dim; ++d) {
                    const int16_t* own = codes.data() + c * (dim + 1);
                    float* e = static_cast<float*>(error.data()) + d * columns + c;
                    *e = rest[size_t(d * columns + c)] - (own[0] < 3 ? scales[own[0]] : 0) * float(own[1 + d] - 7);
                }
            for (int d = 0; d < dim; ++d)
                for (int64_t c = 0; c < columns; ++c) {
                    float sum = 0;
                    for (int64_t j = 0; j < columns; ++j) sum += error[size_t(d * columns + j)] * h[size_t(j * columns + c)];
                    static_cast<float*>(pull.data())[d * columns + c] = sum;
                }
            int64_t moves = 0;
            voroq_descend_pulses(&words, &sides, h.data(), static_cast<float*>(pull.data()), static_cast<float*>(error.data()), codes.data(), &moves, isa);
            for (size_t i = 0; i < size_t(dim * columns); ++i) fall += double(error[i]) * pull[i];
            costs.push_back(cost), losses.push_back(loss), falls.push_back(fall);
        }
        for (int isa = 0; isa < sets(); ++isa)
            for (const auto& [what, all] : {std::pair("project", costs), {"feedback", losses}, {"descend", falls}}) {
                const double error = std::fabs(all[size_t(isa)] / all.back() - 1);  // words as near may differ, and what follows them
                report(std::string(what) + " in " + std::to_string(dim), isa, error < (what == std::string("project") ? 1e-4 : 0.03), error);
            }
    }
}

void steps() {
    constexpr int64_t hidden = 64, inner = 96, size = 32, past = 21, room = 40, words = 70;
    for (int real : {F32, F16, BF16}) {
        std::vector<Numbers> held;
        held.reserve(64);
        const auto made = [&](int64_t count) { return held.emplace_back(count, real).data(); };
        const auto linear = [&](int64_t out, int64_t in) {
            Linear to{};
            to.product.out = out, to.product.in = in, to.weight = made(out * in), to.weight_real = real, to.bias = made(out), to.bias_real = real;
            return to;
        };
        const auto norm = [&](int64_t count) { return Norm{made(count), real, 1e-6f}; };
        Layer layer{};
        layer.q = linear(2 * size, hidden), layer.k = linear(size, hidden), layer.v = linear(size, hidden), layer.o = linear(hidden, 2 * size);
        layer.gate = linear(inner, hidden), layer.up = linear(inner, hidden), layer.down = linear(hidden, inner);
        layer.before = norm(hidden), layer.between = norm(hidden), layer.q_norm = norm(size), layer.k_norm = norm(size), layer.room = room;
        const Numbers keys(room * size, real), values(room * size, real), angles(2 * size, F32);
        Step step{};
        step.layers = &layer, step.count = 1, step.hidden = hidden, step.inner = inner, step.past = past;
        step.head = linear(words, hidden), step.norm = norm(hidden), step.x = made(hidden);
        step.cosines = static_cast<const float*>(angles.data()), step.sines = step.cosines + size;
        step.heads = 2, step.pairs = 1, step.size = size, step.scale = 0.2f, step.real = real, step.threads = 2;
        std::vector<Numbers> logits;
        for (int isa = 0; isa <= sets(); ++isa) {
            Numbers own_keys = keys, own_values = values;
            layer.keys = own_keys.data(), layer.values = own_values.data();
            logits.emplace_back(words, real, true);
            step.logits = logits.back().data(), step.isa = isa;
            if (voroq_step(&step)) report("step, refused", isa, false, 0);
        }
        for (int isa = 0; isa < sets(); ++isa) {
            const double error = error_of(logits[size_t(isa)], logits.back(), words);
            report("step of type " + std::to_string(real), isa, error < (real == F32 ? 1e-4 : 2e-2), error);
        }
    }
}

}  // namespace

int main() {
    tables(), grids(), pyramids(), searches(), unions(), steps();
    std::string names;
    for (int isa = 0; isa < sets(); ++isa) names += std::string(isa ? ", " : "") + voroq_isa(isa);
    std::printf("%d of %d comparisons with portable hold: %s\n", comparisons - failures, comparisons, names.c_str());
    return failures || !comparisons;
}
