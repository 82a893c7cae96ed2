// A parallel loop on the thread pool that torch already runs. Its OpenMP runtime is found at run time by the one entry point that both
// GNU's and LLVM's have, so that nothing is linked and no second pool competes for the cores. Without it, plain threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <dlfcn.h>
#include <thread>
#include <vector>

namespace voroq {

using Region = void (*)(void*);
using Fork = void (*)(Region, void*, unsigned, unsigned);

template <class Work>
struct Shared {
    std::atomic<int64_t> next{0};
    int64_t count;
    const Work* work;
    static void run(void* self) {
        auto* shared = static_cast<Shared*>(self);
        for (int64_t i; (i = shared->next.fetch_add(1, std::memory_order_relaxed)) < shared->count;) (*shared->work)(i);
    }
};

// work(0) ... work(count - 1), each once, by whichever thread is free.
template <class Work>
void parallel(int64_t count, int threads, const Work& work) {
    Shared<Work> shared{{0}, count, &work};
    if (threads > count) threads = static_cast<int>(count);
    if (threads <= 1) return Shared<Work>::run(&shared);
    static const auto fork = reinterpret_cast<Fork>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (fork) return fork(&Shared<Work>::run, &shared, threads, 0);
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) others.emplace_back(&Shared<Work>::run, &shared);
    Shared<Work>::run(&shared);
    for (auto& other : others) other.join();
}

}  // namespace voroq
