// Threads that help with tasks, and sleep between them.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <new>
#include <thread>

#include <pthread.h>
#include <sched.h>

namespace upcycle {

// Waits for another thread that is at work: a moment, then leaves it the core.
template <class Done>
inline void wait_until(Done done) {
    for (int turns = 0; !done(); turns++)
        if (turns > 1000) sched_yield();
}

class Pool {
  public:
    // Runs `work` here and in as many helpers as wake up before it is over, which nobody waits for:
    // to wake a thread takes as long as the experts of one token. `work` takes tasks until none is
    // left. A second caller at the same time gets no help.
    void run(const std::function<void()>& work, int threads) {
        std::unique_lock<std::mutex> only(caller, std::try_to_lock);
        if (!only || threads < 2) return work();
        {
            std::lock_guard<std::mutex> held(mutex);
            try {
                for (; helpers < threads - 1; helpers++) std::thread([this] { help(); }).detach();
            } catch (...) {  // no more threads here: those that there are do it
            }
            job = &work;
            seats = threads - 1;
        }
        wake.notify_all();
        work();
        {
            std::lock_guard<std::mutex> held(mutex);
            job = nullptr;
        }
        wait_until([&] { return inside.load(std::memory_order_acquire) == 0; });
    }

    // Never destroyed, as its threads are not; a forked process has none of them, and a new one,
    // or null where there is no memory for it.
    static Pool* get() {
        static Pool*& pool = *new Pool*(new Pool);
        static int hook = pthread_atfork(nullptr, nullptr, [] { pool = new (std::nothrow) Pool; });
        (void)hook;
        return pool;
    }

  private:
    void help() {
        for (;;) {
            const std::function<void()>* mine;
            {
                std::unique_lock<std::mutex> held(mutex);
                wake.wait(held, [&] { return job && seats > 0; });
                mine = job;
                seats--;
                inside++;
            }
            (*mine)();
            inside.fetch_sub(1, std::memory_order_release);
        }
    }

    std::mutex caller, mutex;
    std::condition_variable wake;
    const std::function<void()>* job = nullptr;
    int helpers = 0, seats = 0;
    std::atomic<int> inside{0};
};

}  // namespace upcycle
