// See pool.h. Cores are found and threads pinned on Linux only; elsewhere the system places them.
#include "pool.h"

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <set>
#include <string>
#include <system_error>

#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace hotplug {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kSpin = std::chrono::microseconds(200);
constexpr int kAlone = 200;  // looks, some 10 us of them, before another thread is let onto the core

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins until `ready` or the time is up, and returns whether it is. After a while the core goes to whoever else wants it:
// a caller that the system has put on a worker's core would otherwise wait for the worker to fall asleep.
template <class Ready>
bool wait_until(const Ready& ready, std::chrono::microseconds time) {
    for (int i = 0; i < kAlone; ++i) {
        if (ready()) return true;
        relax();
    }
    const Clock::time_point begin = Clock::now();
    do {
        for (int i = 0; i < 32; ++i) {
            if (ready()) return true;
            relax();
        }
        std::this_thread::yield();
    } while (Clock::now() - begin < time);
    return ready();
}

// The processors of one physical core, as the system lists them; the processor itself where it does not say.
std::string siblings_of(int cpu) {
    const std::string name = std::to_string(cpu);
    const std::string path = "/sys/devices/system/cpu/cpu" + name + "/topology/thread_siblings_list";
    std::FILE* file = std::fopen(path.c_str(), "r");
    if (file == nullptr) return name;
    char line[256];
    const bool read = std::fgets(line, sizeof line, file) != nullptr;
    std::fclose(file);
    return read ? line : name;
}

// One processor of each physical core that the process may run on.
std::vector<int> allowed_cores() {
    std::vector<int> found;
#ifdef __linux__
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        std::set<std::string> seen;
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (!CPU_ISSET(cpu, &allowed)) continue;
            if (seen.insert(siblings_of(cpu)).second) found.push_back(cpu);
        }
    }
#endif
    if (found.empty()) {
        for (unsigned cpu = 0; cpu < std::max(1u, std::thread::hardware_concurrency()); ++cpu) found.push_back(cpu);
    }
    return found;
}

void pin(std::thread& thread, int cpu) {
#ifdef __linux__
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    // Refused where the set of processors has changed meanwhile: the thread then runs where the system likes.
    pthread_setaffinity_np(thread.native_handle(), sizeof one, &one);
#else
    static_cast<void>(thread), static_cast<void>(cpu);
#endif
}

}  // namespace

int Pool::cores() { return static_cast<int>(allowed_cores().size()); }

Pool::Pool(int count) {
    const std::vector<int> cores = allowed_cores();
    count = std::min(count, static_cast<int>(cores.size()));
    share_ = 2 * std::max(1, count);
    // The caller is not ours to pin, since what it starts later would inherit that; it finds the first core free.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the program's own threads
    for (int i = 1; i < count; ++i) {
        try {
            workers_.emplace_back([this] { work(); });
        } catch (const std::system_error&) {
            break;  // the system has no threads left: those that there are do the work
        }
        pin(workers_.back(), cores[i]);
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Pool::~Pool() {
    {
        const std::lock_guard lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void Pool::share(Function function, const void* context, int64_t items) {
    // Nobody reads these for good now: the last call has no items left, and the next is not announced.
    function_.store(function, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    items_.store(items, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    const uint64_t number = (left_.load(std::memory_order_relaxed) >> 32) + 1;
    left_.store(number << 32 | static_cast<uint64_t>(items));  // in one order with the count of sleepers
    if (sleepers_.load() > 0) {
        { const std::lock_guard lock(mutex_); }  // whoever counted itself is waiting by now
        wake_.notify_all();
    }
    while (take_some()) {
    }
    const auto done = [&] { return done_.load(std::memory_order_acquire) == items; };
    while (!wait_until(done, kSpin)) {
    }
}

bool Pool::take_some() {
    uint64_t left = left_.load(std::memory_order_acquire);
    for (;;) {
        const int64_t count = static_cast<int64_t>(left & 0xffffffff);
        if (count == 0) return false;
        const Function function = function_.load(std::memory_order_relaxed);
        const void* context = context_.load(std::memory_order_relaxed);
        const int64_t item = items_.load(std::memory_order_relaxed) - count;
        const int64_t taken = count < share_ ? 1 : count / share_;
        if (left_.compare_exchange_weak(left, left - static_cast<uint64_t>(taken), std::memory_order_acq_rel,
                                        std::memory_order_acquire)) {
            function(context, item, item + taken);
            done_.fetch_add(taken, std::memory_order_acq_rel);
            return true;
        }
    }
}

void Pool::work() {
    while (!stop_.load(std::memory_order_relaxed)) {
        if (take_some()) continue;
        const auto found = [this] { return (left_.load(std::memory_order_relaxed) & 0xffffffff) != 0; };
        if (wait_until(found, kSpin)) continue;
        std::unique_lock lock(mutex_);
        ++sleepers_;
        wake_.wait(lock, [this] { return stop_.load() || (left_.load() & 0xffffffff) != 0; });
        --sleepers_;
    }
}

}  // namespace hotplug
