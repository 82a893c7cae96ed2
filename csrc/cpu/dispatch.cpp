// Chooses the instruction set and shares the rows of the matrix among threads. Every row is computed by one thread from start to end, so the
// result does not depend on their number.
#include "index.h"
#include "kernels.h"
#include "parallel.h"
#include "pyramid.h"
#include "ready.h"
#include "reals.h"

#include <algorithm>
#include <vector>

namespace voroq {
namespace {

struct Isa {
    const char* name;
    const Kernels* kernels;
};

std::vector<Isa> found() {
    std::vector<Isa> list;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2")) {
        static const Kernels brains = avx512bf16();
        if (__builtin_cpu_supports("avx512bf16")) list.push_back({"avx512bf16", &brains});
        list.push_back({"avx512", &avx512});
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2"))
        list.push_back({"avx2", &avx2});
#elif defined(__aarch64__)
    list.push_back({"neon", &neon});
#endif
    list.push_back({"portable", &portable});
    return list;
}

const std::vector<Isa>& isas() {
    static const std::vector<Isa> list = found();
    return list;
}

const Isa* choose(int32_t wanted) {
    const auto& list = isas();
    if (wanted >= static_cast<int32_t>(list.size())) return nullptr;
    return &list[std::max(wanted, 0)];
}

// Rows handled at once: whole tiles of every band, a few pieces for each thread.
int64_t piece(const Product& p) {
    const int64_t wanted = std::clamp<int64_t>(p.out / (8 * std::max(p.threads, 1)), 64, 1024), tiles = unit(p);
    return (wanted + tiles - 1) / tiles * tiles;
}

void write(const Product& p, const Inputs& in, int64_t batch, int64_t rows, int64_t first, int64_t last, const float* y, int64_t pitch) {
    const int64_t wide = p.x_real == F32 ? 4 : 2;
    for (int64_t b = 0; b < rows; ++b) {
        if (!p.row_scale && !p.shift) {
            narrow(y + b * pitch, last - first, p.x_real, static_cast<char*>(p.y) + ((batch + b) * p.out + first) * wide);
            continue;
        }
        for (int64_t o = first; o < last; ++o) {
            float value = y[b * pitch + o - first] + in.shift[b];
            if (p.row_scale) value = value * real_at(p.row_scale, p.real, o) + real_at(p.row_shift, p.real, o) * in.all[b];
            put_real(p.y, p.x_real, (batch + b) * p.out + o, value);
        }
    }
}

thread_local Scratch scratch;

int64_t pairs(const Band& band) { return (band.along * band.cols + 1) / 2; }

// Inputs of a band as `strip` reads them, in pairs of columns: [pair][MOST], the first column's number below the second's.
void paired(const Inputs& in, const Band& band, uint32_t* to) {
    const int64_t columns = band.along * band.cols;
    const float* x = in.by_column + band.column * MOST;
    for (int64_t c = 0; c < columns; c += 2, to += MOST)
        for (int b = 0; b < MOST; ++b) to[b] = to_brain(x[c * MOST + b]) | (c + 1 < columns ? uint32_t(to_brain(x[(c + 1) * MOST + b])) << 16 : 0u);
}

bool by_strips(const Kernels& kernels, const Product& p) {
    const auto all = [&](auto is) { return std::all_of(p.bands, p.bands + p.count, is); };
    const bool grids = exact(kernels, p) && all(brains), pulses = all([](const Band& band) { return band.kind == PULSES; });
    const int64_t many = grids ? MANY_OF_GRIDS : pulses ? MANY_OF_PULSES : MANY;
    return kernels.strip && p.x_real == BF16 && p.batch >= many && unit(p) <= STRIP;
}

int32_t run_strips(const Product& p, const Kernels& kernels) {
    scratch.back(0);
    const std::vector<Ready> bands = prepare(scratch, kernels, p, false, true);
    const int64_t rows = STRIP / unit(p) * unit(p);
    const size_t kept = scratch.used();
    for (int64_t start = 0; start < p.batch; start += SLICE, scratch.back(kept)) {
        const int64_t batch = std::min(SLICE, p.batch - start), blocks = (batch + MOST - 1) / MOST;
        std::vector<uint32_t*> x;
        for (const Ready& r : bands) x.push_back(reinterpret_cast<uint32_t*>(scratch.take(blocks * pairs(r.band) * MOST)));
        std::vector<Inputs> in;
        const size_t laid = scratch.used();
        for (int64_t i = 0; i < blocks; ++i, scratch.back(laid)) {
            in.push_back(inputs(scratch, kernels, p, start + i * MOST, MOST));
            for (size_t n = 0; n < bands.size(); ++n) paired(in.back(), bands[n].band, x[n] + i * pairs(bands[n].band) * MOST);
        }
        parallel((p.out + rows - 1) / rows, p.threads, [&](int64_t i) {
            const int64_t first = i * rows, last = std::min(first + rows, p.out);
            thread_local std::vector<float> y;
            y.assign(size_t(blocks * MOST * STRIP), 0.0f);
            for (size_t n = 0; n < bands.size(); ++n) kernels.strip(bands[n], p.out, first, last, x[n], batch, y.data());
            for (int64_t done = 0; done < batch; done += MOST)
                write(p, in[size_t(done / MOST)], start + done, std::min<int64_t>(MOST, batch - done), first, last, y.data() + done * STRIP, STRIP);
        });
    }
    return 0;
}

// A product on its way: bands and inputs made ready, its rows in pieces.
struct Job {
    const Product* product;
    std::vector<Ready> bands;
    Inputs in;
    int64_t step, pieces;
};

// Where x lies as `r` reads it, if that is how it was laid out for one of these products, which have the same inputs.
bool shares(const std::vector<Job>& jobs, const Inputs& in, Ready& r) {
    for (const Job& job : jobs)
        for (const Ready& other : job.bands)
            if (r.band.kind == GRID && other.band.kind == GRID && other.x && job.in.by_column == in.by_column && other.lanes == r.lanes &&
                other.band.along == r.band.along && other.band.column == r.band.column && grid_codes(other.band.bits) == grid_codes(r.band.bits)) {
                r.x = other.x;
                r.sums = other.sums;
                return true;
            }
    return false;
}

// y = x w^T for inputs [done, done + rows) of the products, whose rows of w are shared among threads all together.
void multiply(const Kernels& kernels, std::vector<Job>& jobs, int64_t done, int64_t rows) {
    const int B = rows <= 2 ? int(rows) : rows <= 4 ? 4 : 8;
    int64_t pieces = 0;
    for (Job& job : jobs)
        for (Ready& r : job.bands) r.x = nullptr;
    for (size_t j = 0; j < jobs.size(); ++j) {
        Job& job = jobs[j];
        const Product &p = *job.product, &before = *jobs[j ? j - 1 : 0].product;
        const auto plain = [](const Product& q) { return !q.perm && !q.scale && !q.shift && !q.row_scale; };
        job.in = j && p.x == before.x && plain(p) && plain(before) ? jobs[j - 1].in : inputs(scratch, kernels, p, done, B);
        for (Ready& r : job.bands)
            if (!shares(jobs, job.in, r)) point(scratch, job.in, r, B);
        pieces += job.pieces;
    }
    parallel(pieces, jobs[0].product->threads, [&](int64_t i) {
        const Job* job = jobs.data();
        for (; i >= job->pieces; ++job) i -= job->pieces;
        const Product& p = *job->product;
        const int64_t first = i * job->step, last = std::min(first + job->step, p.out);
        thread_local std::vector<float> y;
        y.assign(size_t(B * job->step), 0.0f);
        kernels.product(job->bands.data(), p.count, p.out, p.in, B, first, last, y.data(), job->step);
        write(p, job->in, done, rows, first, last, y.data(), job->step);
    });
}

int32_t run_decode(const Product& p, int64_t first, int64_t last, void* out, int32_t real) {
    const Isa* isa = choose(p.isa);
    const int64_t tiles = unit(p);
    if (!isa || first < 0 || last > p.out || first % tiles) return 1;
    const Kernels& kernels = *isa->kernels;
    scratch.back(0);
    const std::vector<Ready> bands = prepare(scratch, kernels, p, true, false);
    const float* scale = floats(scratch, kernels, p.scale, p.real, p.in);
    const float* shift = floats(scratch, kernels, p.shift, p.real, p.in);
    const int64_t step = (16 + tiles - 1) / tiles * tiles;
    parallel((last - first + step - 1) / step, p.threads, [&](int64_t i) {
        const int64_t from = first + i * step, to = std::min(from + step, last);
        const bool plain = !p.perm && !scale && !shift && !p.row_scale;
        const auto decode = [&](float* rows) {
            for (const Ready& r : bands) kernels.decode(r, p.out, from, to, 0, r.band.along, rows + r.band.column, p.in);
        };
        if (plain && real == F32) return decode(static_cast<float*>(out) + (from - first) * p.in);
        thread_local std::vector<float> rows;
        rows.resize(size_t((to - from) * p.in));
        decode(rows.data());
        if (plain && real == BF16) return narrow(rows.data(), (to - from) * p.in, BF16, static_cast<uint16_t*>(out) + (from - first) * p.in);
        for (int64_t row = from; row < to; ++row) {
            const float by = p.row_scale ? real_at(p.row_scale, p.real, row) : 1.0f, more = p.row_shift ? real_at(p.row_shift, p.real, row) : 0.0f;
            const float* stored = rows.data() + (row - from) * p.in;
            for (int64_t c = 0; c < p.in; ++c) {
                const int64_t at = place(p, c);
                float w = stored[c];
                if (scale) w = w * scale[at] + shift[at];
                if (p.row_scale) w = w * by + more;
                put_real(out, real, (row - first) * p.in + at, w);
            }
        }
    });
    return 0;
}

int32_t run_nearest(const Index& index, const float* v, int64_t n, int64_t* best, int threads, int32_t wanted) {
    const Isa* isa = choose(wanted);
    if (!isa) return 1;
    const int64_t step = 64;
    parallel((n + step - 1) / step, threads, [&](int64_t i) {
        isa->kernels->nearest(index, v + i * step * index.dim, std::min(step, n - i * step), best + i * step);
    });
    return 0;
}

bool known(const Union& words) { return (words.dim == 8 || words.dim == 16) && words.levels >= 1 && words.levels <= 64; }

int32_t run_project(const Union& words, const float* v, int64_t n, int64_t* level, float* y, int threads, int32_t wanted) {
    const Isa* isa = choose(wanted);
    if (!isa || !known(words)) return 1;
    const int64_t step = 64;
    parallel((n + step - 1) / step, threads, [&](int64_t i) {
        const int64_t at = i * step;
        isa->kernels->project(words, v + at * words.dim, std::min(step, n - at), level + at, y + at * words.dim);
    });
    return 0;
}

int32_t run_feedback(const Union& words, const Sides& sides, const float* u, float* rest, int16_t* codes, float* errors, int32_t wanted) {
    const Isa* isa = choose(wanted);
    if (!isa || !known(words)) return 1;
    isa->kernels->feedback(words, sides, u, rest, codes, errors);
    return 0;
}

int32_t run_descend(
    const Union& words, const Sides& sides, const float* h, float* pull, float* error, int16_t* codes, int64_t* moves, int32_t wanted) {
    const Isa* isa = choose(wanted);
    if (!isa || !known(words)) return 1;
    *moves += isa->kernels->descend(words, sides, h, pull, error, codes);
    return 0;
}

// No exception may cross the C interface: there may be no memory, or the product is none that this library has.
template <class Work>
int32_t guarded(const Work& work) {
    try {
        return work();
    } catch (...) {
        return 2;
    }
}

}  // namespace

const Kernels* kernels_of(int32_t isa) {
    const Isa* found = choose(isa);
    return found ? found->kernels : nullptr;
}

int32_t products(const Product* list, int64_t count) {
    const Isa* isa = choose(list->isa);
    if (!isa) return 1;
    const Kernels& kernels = *isa->kernels;
    if (count == 1 && by_strips(kernels, *list)) return run_strips(*list, kernels);
    scratch.back(0);
    std::vector<Job> jobs;
    for (const Product* p = list; p < list + count; ++p) {
        const int64_t step = piece(*p);
        jobs.push_back({p, prepare(scratch, kernels, *p, false, false), {}, step, (p->out + step - 1) / step});
    }
    const size_t kept = scratch.used();
    for (int64_t done = 0; done < list->batch; done += MOST, scratch.back(kept))
        multiply(kernels, jobs, done, std::min<int64_t>(MOST, list->batch - done));
    return 0;
}
}  // namespace voroq

int32_t voroq_abi() { return VOROQ_ABI; }
int32_t voroq_isa_count() { return static_cast<int32_t>(voroq::isas().size()); }
const char* voroq_isa(int32_t index) { return index >= 0 && index < voroq_isa_count() ? voroq::isas()[size_t(index)].name : nullptr; }
int32_t voroq_product(const Product* product) {
    return voroq::guarded([&] { return voroq::products(product, 1); });
}
int32_t voroq_decode(const Product* product, int64_t first, int64_t last, void* out, int32_t real) {
    return voroq::guarded([&] { return voroq::run_decode(*product, first, last, out, real); });
}
int32_t voroq_nearest(const void* index, const float* v, int64_t n, int64_t* best, int32_t threads, int32_t isa) {
    return voroq::guarded([&] { return voroq::run_nearest(static_cast<const voroq::OwnedIndex*>(index)->index, v, n, best, threads, isa); });
}
void* voroq_index_new(const float* table, int64_t k, int32_t dim) {
    try {
        return k < 1 || k > 1 << 20 || dim < 1 ? nullptr : new voroq::OwnedIndex(table, k, dim);
    } catch (...) {
        return nullptr;
    }
}
void voroq_index_free(void* index) { delete static_cast<voroq::OwnedIndex*>(index); }
void* voroq_pyramid_new(int32_t dim, const int32_t* pulses, int32_t levels, int32_t bits, int32_t gains, int32_t classes) {
    try {
        if (levels < 1 || levels > 64) return nullptr;
        return static_cast<voroq::Pyramid*>(new voroq::OwnedPyramid(dim, pulses, levels, bits, gains, classes != 0));
    } catch (...) {
        return nullptr;
    }
}
void voroq_pyramid_free(void* pyramid) { delete static_cast<voroq::OwnedPyramid*>(static_cast<voroq::Pyramid*>(pyramid)); }
int32_t voroq_project(const Union* words, const float* v, int64_t n, int64_t* level, float* y, int32_t threads, int32_t isa) {
    return voroq::guarded([&] { return voroq::run_project(*words, v, n, level, y, threads, isa); });
}
int32_t voroq_feedback_pulses(const Union* words, const Sides* sides, const float* u, float* rest, int16_t* codes, float* errors, int32_t isa) {
    return voroq::guarded([&] { return voroq::run_feedback(*words, *sides, u, rest, codes, errors, isa); });
}
int32_t voroq_descend_pulses(
    const Union* words, const Sides* sides, const float* h, float* pull, float* error, int16_t* codes, int64_t* moves, int32_t isa) {
    return voroq::guarded([&] { return voroq::run_descend(*words, *sides, h, pull, error, codes, moves, isa); });
}
