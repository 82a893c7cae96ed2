// One token through a decoder of Llama's form. A step of small products and smaller things between them: as calls of torch the latter take
// longer than all products (docs/kernels.md).
#include "kernels.h"
#include "parallel.h"
#include "reals.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <vector>

namespace voroq {
namespace {

constexpr int64_t PAD = 64;  // floats behind every vector, which kernels may write
using Floats = std::vector<float>;

Floats room_for(int64_t count) { return Floats(size_t(count + PAD)); }

// x h / sqrt(block) in place, or x h^T / sqrt(block); `row` holds a row of the core.
void hadamard(const Turn& turn, bool transposed, float* x) {
    const int order = turn.order;
    Floats row = room_for(order);
    for (int64_t i = 0; i < turn.n && order > 1; i += order) {
        for (int to = 0; to < order; ++to) {
            float total = 0;
            for (int from = 0; from < order; ++from) total += x[i + from] * turn.core[transposed ? to * order + from : from * order + to];
            row[size_t(to)] = total;
        }
        std::memcpy(x + i, row.data(), size_t(order) * 4);
    }
    for (int64_t width = order; width < turn.block; width *= 2)
        for (int64_t i = 0; i < turn.n; i += 2 * width)
            for (int64_t j = i; j < i + width; ++j) {
                const float a = x[j], b = x[j + width];
                x[j] = a + b;
                x[j + width] = a - b;
            }
    const float scale = 1.0f / std::sqrt(float(turn.block));
    for (int64_t i = 0; i < turn.n; ++i) x[i] *= scale;
}

// In eight parts, which compilers make vectors of.
double sum_of_squares(const float* x, int64_t count) {
    double parts[8] = {};
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (int64_t j = 0; j < 8; ++j) parts[j] += double(x[i + j]) * x[i + j];
    for (; i < count; ++i) parts[0] += double(x[i]) * x[i];
    return ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
}

// A linear, and where its outputs go.
struct Towards {
    const Linear& linear;
    Floats& y;
};

// What lies between the step's floats and a linear: its inputs turned, and what goes in and comes out in the step's type.
struct Between {
    Floats turned;
    std::vector<uint16_t> in, out;
};

// Inputs that are in the step's type already.
struct Rounded {
    const float* from;
    const uint16_t* to;
};

class Stepper {
  public:
    explicit Stepper(const Step& step) : step_(step), kernels_(*kernels_of(step.isa)) {}

    void run() {
        together(step_.threads, [this] { walk(); });
    }

  private:
    void walk() {
        const Step& s = step_;
        Floats h = room_for(s.hidden), n = room_for(s.hidden), more = room_for(s.hidden);
        Floats q = room_for(s.heads * s.size), k = room_for(s.pairs * s.size), v = room_for(s.pairs * s.size), mixed = room_for(s.heads * s.size);
        Floats gate = room_for(s.inner), up = room_for(s.inner);
        widen(s.x, s.real, s.hidden, h.data());
        for (int64_t i = 0; i < s.count; ++i) {
            const Layer& layer = s.layers[i];
            normed(layer.before, h.data(), s.hidden, n.data());
            multiply(n, {{layer.q, q}, {layer.k, k}, {layer.v, v}});
            place(layer.q_norm, s.heads, q.data());
            place(layer.k_norm, s.pairs, k.data());
            keep(layer, k.data(), layer.keys);
            keep(layer, v.data(), layer.values);
            attend(layer, q.data(), mixed.data());
            multiply(mixed, {{layer.o, more}});
            for (int64_t j = 0; j < s.hidden; ++j) h[size_t(j)] += more[size_t(j)];
            normed(layer.between, h.data(), s.hidden, n.data());
            multiply(n, {{layer.gate, gate}, {layer.up, up}});
            kernels_.gated(gate.data(), up.data(), s.inner);
            multiply(gate, {{layer.down, more}});
            for (int64_t j = 0; j < s.hidden; ++j) h[size_t(j)] += more[size_t(j)];
        }
        normed(s.norm, h.data(), s.hidden, n.data());
        Floats logits = room_for(s.head.product.out);
        multiply(n, {{s.head, logits}});
        narrow(logits.data(), s.head.product.out, s.real, s.logits);
    }

    void widen(const void* from, int real, int64_t count, float* to) const { kernels_.widen(from, real, count, to); }

    void normed(const Norm& norm, const float* x, int64_t size, float* to) {
        const float by = float(1 / std::sqrt(sum_of_squares(x, size) / double(size) + norm.epsilon));
        gains_.resize(size_t(size + PAD));
        widen(norm.gains, norm.real, size, gains_.data());
        for (int64_t i = 0; i < size; ++i) to[i] = x[i] * by * gains_[size_t(i)];
    }

    // Linears of the same inputs, their rows shared among the threads all together.
    void multiply(const Floats& x, std::initializer_list<Towards> all) {
        products_.clear();
        Rounded rounded{};
        auto own = between_;
        for (const auto& [linear, y] : all) enter(linear, x.data(), y.data(), *own++, rounded);
        if (!products_.empty() && products(products_.data(), int64_t(products_.size()))) throw std::invalid_argument("product");
        own = between_;
        for (const auto& [linear, y] : all) leave(linear, y.data(), *own++);
    }

    // A dense linear at once; of a packed one, what it is to multiply.
    void enter(const Linear& linear, const float* x, float* y, Between& own, Rounded& rounded) {
        const int64_t in = linear.product.in, out = linear.product.out;
        if (linear.before.signs) {
            own.turned.resize(size_t(in + PAD));
            for (int64_t i = 0; i < in; ++i) own.turned[size_t(i)] = x[i] * linear.before.signs[i];
            hadamard(linear.before, false, own.turned.data());
            x = own.turned.data();
        }
        if (linear.weight) return dense(linear, x, y);
        Product product = linear.product;
        product.batch = 1;
        product.x_real = linear.whole ? int32_t(F32) : step_.real;
        product.threads = step_.threads;
        product.isa = step_.isa;
        product.x = x;
        product.y = y;
        if (product.x_real != F32) {
            if (rounded.from != x) {
                own.in.resize(size_t(in));
                narrow(x, in, product.x_real, own.in.data());
                rounded = {x, own.in.data()};
            }
            own.out.resize(size_t(out));
            product.x = rounded.to;
            product.y = own.out.data();
        }
        products_.push_back(product);
    }

    void leave(const Linear& linear, float* y, const Between& own) const {
        const int64_t out = linear.product.out;
        if (!linear.weight && !linear.whole && step_.real != F32) widen(own.out.data(), step_.real, out, y);
        if (linear.after.signs) {
            hadamard(linear.after, true, y);
            for (int64_t i = 0; i < out; ++i) y[i] *= linear.after.signs[i];
        }
        for (int64_t i = 0; linear.bias && i < out; ++i) y[i] += real_at(linear.bias, linear.bias_real, i);
    }

    void dense(const Linear& linear, const float* x, float* y) const {
        const int64_t out = linear.product.out, in = linear.product.in, step = 64;
        parallel((out + step - 1) / step, step_.threads, [&](int64_t i) {
            kernels_.dense(linear.weight, linear.weight_real, in, i * step, std::min(out, (i + 1) * step), x, y + i * step);
        });
    }

    // Norms the heads where they have a norm, and turns them to the token's position.
    void place(const Norm& norm, int heads, float* x) {
        const int half = step_.size / 2;
        const float *cosines = step_.cosines, *sines = step_.sines;
        for (int h = 0; h < heads; ++h, x += step_.size) {
            if (norm.gains) normed(norm, x, step_.size, x);
            for (int i = 0; i < half; ++i) {
                const float a = x[i], b = x[i + half];
                x[i] = a * cosines[i] - b * sines[i];
                x[i + half] = b * cosines[i + half] + a * sines[i + half];
            }
        }
    }

    void keep(const Layer& layer, const float* from, void* cache) const {
        const int64_t wide = step_.real == F32 ? 4 : 2;
        for (int64_t p = 0; p < step_.pairs; ++p)
            narrow(from + p * step_.size, step_.size, step_.real, static_cast<char*>(cache) + (p * layer.room + step_.past) * step_.size * wide);
    }

    void attend(const Layer& layer, const float* q, float* to) const {
        const int group = step_.heads / step_.pairs;
        const int64_t pair = layer.room * step_.size * (step_.real == F32 ? 4 : 2), wide = int64_t(group) * step_.size;
        parallel(step_.pairs, step_.threads, [&](int64_t p) {
            thread_local Floats scores;
            scores.resize(size_t(step_.past + 1 + PAD));
            const char *keys = static_cast<const char*>(layer.keys) + p * pair, *values = static_cast<const char*>(layer.values) + p * pair;
            kernels_.attend(
                q + p * wide, group, keys, values, step_.real, step_.past + 1, step_.size, step_.scale, scores.data(), to + p * wide);
        });
    }

    const Step& step_;
    const Kernels& kernels_;
    Between between_[3];  // of linears that are multiplied together
    std::vector<Product> products_;
    Floats gains_;
};

}  // namespace
}  // namespace voroq

int32_t voroq_step(const Step* step) {
    if (!voroq::kernels_of(step->isa) || step->size % 16 || step->heads % step->pairs) return 1;
    for (int64_t i = 0; i < step->count; ++i)
        if (step->past >= step->layers[i].room) return 1;
    try {
        voroq::Stepper(*step).run();
        return 0;
    } catch (...) {
        return 2;
    }
}
