// Work shared out over threads that wait for the next work.
#pragma once

#include <cstdint>
#include <functional>

namespace duquant {

// Call work(begin, end) for pieces of [0, count), each a multiple of `grain` but the last, on at most `threads` threads
// (the caller is one of them). Returns when all are done. One caller at a time; others wait their turn.
void parallel_for(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& work);

}  // namespace duquant
