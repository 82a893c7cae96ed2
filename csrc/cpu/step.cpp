// One token through a decoder of Llama's form. A step of small products and smaller things between them: as calls of torch the latter take
// longer than all products (docs/kernels.md).
#include "kernels.h"
#include "parallel.h"
#include "reals.h"

#include <algorithm>
#include <cmath>
#include <cstring>
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

void normed(const Norm& norm, const float* x, int64_t size, float* to) {
    double squares = 0;
    for (int64_t i = 0; i < size; ++i) squares += double(x[i]) * x[i];
    const float by = float(1 / std::sqrt(squares / double(size) + norm.epsilon));
    for (int64_t i = 0; i < size; ++i) to[i] = x[i] * by * real_at(norm.gains, norm.real, i);
}

class Stepper {
  public:
    explicit Stepper(const Step& step) : step_(step), kernels_(*kernels_of(step.isa)) {}

    void run() {
        const Step& s = step_;
        Floats h = room_for(s.hidden), n = room_for(s.hidden), more = room_for(s.hidden);
        Floats q = room_for(s.heads * s.size), k = room_for(s.pairs * s.size), v = room_for(s.pairs * s.size), mixed = room_for(s.heads * s.size);
        Floats gate = room_for(s.inner), up = room_for(s.inner);
        widen(s.x, s.real, s.hidden, h.data());
        for (int64_t i = 0; i < s.count; ++i) {
            const Layer& layer = s.layers[i];
            normed(layer.before, h.data(), s.hidden, n.data());
            multiply(layer.q, n.data(), q.data());
            multiply(layer.k, n.data(), k.data());
            multiply(layer.v, n.data(), v.data());
            place(layer.q_norm, s.heads, q.data());
            place(layer.k_norm, s.pairs, k.data());
            keep(layer, k.data(), layer.keys);
            keep(layer, v.data(), layer.values);
            attend(layer, q.data(), mixed.data());
            multiply(layer.o, mixed.data(), more.data());
            for (int64_t j = 0; j < s.hidden; ++j) h[size_t(j)] += more[size_t(j)];
            normed(layer.between, h.data(), s.hidden, n.data());
            multiply(layer.gate, n.data(), gate.data());
            multiply(layer.up, n.data(), up.data());
            kernels_.gated(gate.data(), up.data(), s.inner);
            multiply(layer.down, gate.data(), more.data());
            for (int64_t j = 0; j < s.hidden; ++j) h[size_t(j)] += more[size_t(j)];
        }
        normed(s.norm, h.data(), s.hidden, n.data());
        Floats logits = room_for(s.head.product.out);
        multiply(s.head, n.data(), logits.data());
        narrow(logits.data(), s.head.product.out, s.real, s.logits);
    }

  private:
    void widen(const void* from, int real, int64_t count, float* to) const { kernels_.widen(from, real, count, to); }

    static void narrow(const float* from, int64_t count, int real, void* to) {
        for (int64_t i = 0; i < count; ++i) put_real(to, real, i, from[i]);
    }

    void multiply(const Linear& linear, const float* x, float* y) {
        const Product& shape = linear.product;
        if (linear.before.signs) {
            turned_.resize(size_t(shape.in + PAD));
            for (int64_t i = 0; i < shape.in; ++i) turned_[size_t(i)] = x[i] * linear.before.signs[i];
            hadamard(linear.before, false, turned_.data());
            x = turned_.data();
        }
        if (linear.weight) dense(linear, x, y);
        else packed(linear, x, y);
        if (linear.after.signs) {
            hadamard(linear.after, true, y);
            for (int64_t i = 0; i < shape.out; ++i) y[i] *= linear.after.signs[i];
        }
        for (int64_t i = 0; linear.bias && i < shape.out; ++i) y[i] += real_at(linear.bias, linear.bias_real, i);
    }

    void dense(const Linear& linear, const float* x, float* y) const {
        const int64_t out = linear.product.out, in = linear.product.in, step = 64;
        parallel((out + step - 1) / step, step_.threads, [&](int64_t i) {
            kernels_.dense(linear.weight, linear.weight_real, in, i * step, std::min(out, (i + 1) * step), x, y + i * step);
        });
    }

    void packed(const Linear& linear, const float* x, float* y) {
        Product product = linear.product;
        product.batch = 1;
        product.x_real = linear.whole ? int32_t(F32) : step_.real;
        product.threads = step_.threads;
        product.isa = step_.isa;
        product.x = x;
        product.y = y;
        if (product.x_real != F32) {
            inputs_.resize(size_t(product.in));
            outputs_.resize(size_t(product.out));
            narrow(x, product.in, product.x_real, inputs_.data());
            product.x = inputs_.data();
            product.y = outputs_.data();
        }
        if (voroq_product(&product)) throw std::invalid_argument("product");
        if (product.x_real != F32) widen(outputs_.data(), product.x_real, product.out, y);
    }

    // Norms the heads where they have a norm, and turns them to the token's position.
    void place(const Norm& norm, int heads, float* x) const {
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
        for (int64_t p = 0; p < step_.pairs; ++p)
            for (int64_t i = 0; i < step_.size; ++i) put_real(cache, step_.real, (p * layer.room + step_.past) * step_.size + i, from[p * step_.size + i]);
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
    Floats turned_;
    std::vector<uint16_t> inputs_, outputs_;
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
