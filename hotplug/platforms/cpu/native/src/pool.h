// The threads of the library: one a physical core that the process may run on, the caller among them.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace hotplug {

// Runs the items of one call after the other; the caller must not enter `run` twice at once.
//
// Threads that wait for work spin for a bounded time, because the next product of a step follows within microseconds,
// and sleep then. Whoever is awake takes items, many while there are many left and one at the end, so that all end
// together though items be small; a call ends when its items have, whether sleepers woke up or not.
class Pool {
public:
    // `count` threads with the caller, at least one; no more than the cores found.
    explicit Pool(int count);
    // Stops the threads and waits for them.
    ~Pool();

    int threads() const { return static_cast<int>(workers_.size()) + 1; }

    // f(item) for 0 <= item < items, each once, in any order and thread. Returns when all are done.
    template <class F>
    void run(int64_t items, const F& f) {
        if (items == 1 || workers_.empty()) {
            for (int64_t i = 0; i < items; ++i) f(i);
        } else {
            const auto call = [](const void* context, int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) (*static_cast<const F*>(context))(i);
            };
            share(call, &f, items);
        }
    }

    // f(begin, end) for parts of 0 <= row < rows of `cost` elements of light work each: what one thread does in the time
    // that it takes to wake another stays in one part.
    template <class F>
    void run_rows(int64_t rows, int64_t cost, const F& f) {
        const int64_t each = kWorthWaking / (cost < 1 ? 1 : cost) + 1;
        run((rows + each - 1) / each, [&](int64_t item) {
            const int64_t begin = item * each;
            f(begin, begin + each < rows ? begin + each : rows);
        });
    }

    // How many threads a new pool has unless told otherwise: the physical cores the process may run on.
    static int cores();

private:
    static constexpr int64_t kWorthWaking = 16384;

    using Function = void (*)(const void* context, int64_t begin, int64_t end);

    void share(Function function, const void* context, int64_t items);
    bool take_some();
    void work();

    // The call at hand. `left_` holds its number in the upper half and the items nobody has taken yet in the lower; a
    // thread that takes some proves by the exchange that the call it read the fields of is still this one.
    alignas(64) std::atomic<uint64_t> left_{0};
    std::atomic<Function> function_{nullptr};
    std::atomic<const void*> context_{nullptr};
    std::atomic<int64_t> items_{0};
    int64_t share_ = 1;  // of what is left, of which a thread takes one

    // Apart from what the others look at, because the caller waits for it.
    alignas(64) std::atomic<int64_t> done_{0};

    alignas(64) std::atomic<bool> stop_{false};
    std::atomic<int> sleepers_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> workers_;
};

}  // namespace hotplug
