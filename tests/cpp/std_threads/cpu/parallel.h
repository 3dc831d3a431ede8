// Stands in for csrc/cpu/parallel.h where a sanitizer watches: the runtime of OpenMP is not built
// for it, so that it takes every start and end of a loop for a race. The promises are the same: the
// caller's memory is seen by all, theirs by the caller afterwards, and nothing in between (items
// are handed out without any order of memory).
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace bagformer {

template <class Work>
void parallel_for(int64_t items, int n_threads, Work&& work) {
    if (n_threads > items) n_threads = static_cast<int>(items);
    if (n_threads <= 1) {
        for (int64_t item = 0; item < items; ++item) work(item, 0);
        return;
    }
    std::atomic<int64_t> next{0};
    std::exception_ptr failure;
    std::mutex failing;
    const auto serve = [&](int worker) {
        for (;;) {
            const int64_t item = next.fetch_add(1, std::memory_order_relaxed);
            if (item >= items) return;
            try {
                work(item, worker);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(failing);
                if (!failure) failure = std::current_exception();
            }
        }
    };
    std::vector<std::thread> threads;
    for (int worker = 1; worker < n_threads; ++worker) threads.emplace_back(serve, worker);
    serve(0);
    for (std::thread& thread : threads) thread.join();
    if (failure) std::rethrow_exception(failure);
}

}  // namespace bagformer
