#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "kernels.h"

namespace duquant {
namespace {

class Pool {
public:
    void run(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& work) {
        std::lock_guard<std::mutex> turn(turn_);
        const int helpers = threads - 1;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (started_ < helpers) {
                std::thread([this, index = started_] { serve(index); }).detach();
                ++started_;
            }
            work_ = &work;
            count_ = count;
            grain_ = grain;
            next_ = 0;
            wanted_ = helpers;
            busy_ = helpers;
            ++round_;
        }
        wake_.notify_all();
        take();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return busy_ == 0; });
    }

private:
    void take() {
        for (int64_t begin = next_.fetch_add(grain_); begin < count_; begin = next_.fetch_add(grain_)) {
            (*work_)(begin, begin + grain_ < count_ ? begin + grain_ : count_);
        }
    }

    void serve(int index) {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return round_ != seen; });
            seen = round_;
            if (index >= wanted_) continue;
            lock.unlock();
            take();
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_, done_;
    const std::function<void(int64_t, int64_t)>* work_ = nullptr;
    std::atomic<int64_t> next_{0};
    int64_t count_ = 0, grain_ = 1;
    int started_ = 0, wanted_ = 0, busy_ = 0;
    uint64_t round_ = 0;
};

// Never destroyed: its threads wait on it until the process ends. After a fork there are no threads, so a new one.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
    Pool* found = pool.load();
    if (found == nullptr) {
        static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
        (void)registered;
        Pool* made = new Pool;
        if (pool.compare_exchange_strong(found, made)) return *made;
        delete made;
    }
    return *pool.load();
}

struct Buffers {
    void* memory[kScratchSlots] = {};
    size_t bytes[kScratchSlots] = {};
    ~Buffers() {
        for (void* each : memory) std::free(each);
    }
};

}  // namespace

void parallel_for(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& work) {
    const int64_t pieces = (count + grain - 1) / grain;
    if (pieces < threads) threads = static_cast<int>(pieces);
    if (threads <= 1) {
        if (count > 0) work(0, count);
        return;
    }
    the_pool().run(count, grain, threads, work);
}

void* scratch(int slot, size_t bytes) {
    thread_local Buffers buffers;
    if (buffers.bytes[slot] < bytes) {
        std::free(buffers.memory[slot]);
        const size_t rounded = (bytes + 4095) / 4096 * 4096;
        buffers.memory[slot] = std::aligned_alloc(64, rounded);
        buffers.bytes[slot] = buffers.memory[slot] == nullptr ? 0 : rounded;
        if (buffers.memory[slot] == nullptr) std::abort();
    }
    return buffers.memory[slot];
}

}  // namespace duquant
