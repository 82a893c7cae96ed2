// Loops whose turns are taken by whoever is free, on the thread pool that torch already runs. Its OpenMP runtime is found at run time by
// the one entry point that both GNU's and LLVM's have, so that nothing is linked and no second pool competes for the cores. Without it,
// plain threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <dlfcn.h>
#include <exception>
#include <stdexcept>
#include <thread>
#include <vector>

namespace voroq {

inline thread_local bool busy = false;  // with a turn

// Threads that stay from one loop to the next: waking them takes longer than many a loop does. One leads; the others look for turns until
// they are dismissed. The leader waits for turns, never for threads, so it does not matter how many came, or when.
class Team {
  public:
    using Turn = void (*)(const void* work, int64_t i);

    // Throws if a turn did.
    void lead(int64_t count, Turn turn, const void* work) {
        turn_ = turn;
        work_ = work;
        done_.store(0, std::memory_order_relaxed);
        const uint64_t round = (left_.load(std::memory_order_relaxed) >> 32) + 1;
        left_.store(round << 32 | uint64_t(count), std::memory_order_release);
        while (take()) {}
        for (int64_t waits = 0; done_.load(std::memory_order_acquire) < count; ++waits) wait(waits);
        if (failed_.exchange(false, std::memory_order_relaxed)) throw std::runtime_error("a turn failed");
    }
    void follow() {
        for (int64_t waits = 0; !dismissed_.load(std::memory_order_acquire);) {
            if (take()) waits = 0;
            else wait(waits++);
        }
    }
    void dismiss() { dismissed_.store(true, std::memory_order_release); }

  private:
    // One turn of the loop there is, if one is left. Until it is done the loop is not, so what belongs to the loop can be read.
    bool take() {
        uint64_t left = left_.load(std::memory_order_acquire);
        while (uint32_t(left))
            if (left_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel)) {
                busy = true;
                try {
                    turn_(work_, int64_t(uint32_t(left)) - 1);
                } catch (...) {
                    failed_.store(true, std::memory_order_relaxed);
                }
                busy = false;
                done_.fetch_add(1, std::memory_order_release);
                return true;
            }
        return false;
    }
    static void wait(int64_t waits) {
        if (waits > SPINS) return std::this_thread::yield();
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    static constexpr int64_t SPINS = 2000;
    alignas(64) std::atomic<uint64_t> left_{0};  // number of the loop, and turns that nobody has taken
    alignas(64) std::atomic<int64_t> done_{0};
    alignas(64) std::atomic<bool> dismissed_{false}, failed_{false};
    Turn turn_ = nullptr;
    const void* work_ = nullptr;
};

inline thread_local Team* led = nullptr;  // the team that this thread leads

// work(), on this thread, with `threads` of them ready for its loops.
template <class Work>
void together(int threads, const Work& work) {
    if (threads <= 1 || led || busy) return work();
    struct Region {
        Team team;
        const Work* work;
        std::thread::id leader = std::this_thread::get_id();
        std::exception_ptr problem;

        static void run(void* self) {
            auto* region = static_cast<Region*>(self);
            if (std::this_thread::get_id() != region->leader) return region->team.follow();
            led = &region->team;
            try {
                (*region->work)();
            } catch (...) {  // none may cross the runtime's frames
                region->problem = std::current_exception();
            }
            led = nullptr;
            region->team.dismiss();
        }
    } region;
    region.work = &work;
    using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);
    static const auto fork = reinterpret_cast<Fork>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (fork) {
        fork(&Region::run, &region, unsigned(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int t = 1; t < threads; ++t) others.emplace_back(&Region::run, &region);
        Region::run(&region);
        for (auto& other : others) other.join();
    }
    if (region.problem) std::rethrow_exception(region.problem);
}

// work(0) ... work(count - 1), each once, by whichever thread is free. A loop within a loop is its thread's own.
template <class Work>
void parallel(int64_t count, int threads, const Work& work) {
    if (threads <= 1 || count <= 1 || busy) {
        for (int64_t i = 0; i < count; ++i) work(i);
        return;
    }
    together(int(threads < count ? threads : count), [&] {
        led->lead(count, [](const void* self, int64_t i) { (*static_cast<const Work*>(self))(i); }, &work);
    });
}

}  // namespace voroq
