// A loop over independent items, on one thread or many. With one thread OpenMP is never entered,
// which keeps forked worker processes safe.
#pragma once

#include <cstdint>
#include <exception>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace bagformer {

inline int worker_id() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Calls work(item, worker) for each item of 0..items, worker in 0..n_threads. The first exception
// is thrown again on the calling thread.
template <class Work>
void parallel_for(int64_t items, int n_threads, Work&& work) {
    if (n_threads > items) n_threads = static_cast<int>(items);
    if (n_threads <= 1) {
        for (int64_t item = 0; item < items; ++item) work(item, 0);
        return;
    }
    std::exception_ptr failure;
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic, 1) num_threads(n_threads)
#endif
    for (int64_t item = 0; item < items; ++item) {
        try {
            work(item, worker_id());
        } catch (...) {
#if defined(_OPENMP)
#pragma omp critical(bagformer_failure)
#endif
            if (!failure) failure = std::current_exception();
        }
    }
    if (failure) std::rethrow_exception(failure);
}

}  // namespace bagformer
