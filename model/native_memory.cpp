// A CPU allocator for torch that keeps the memory of freed tensors, so that the next step reuses it.
//
// glibc either returns the pages of a large freed tensor to the kernel, which zeroes them again at each allocation, or
// keeps them in a heap. There, a freed tensor is no place for one of the same size, because torch asks for aligned
// memory and glibc then looks for a longer piece. So a process grows, differently in each run. Here, tensors of 1 MiB or
// more have pages of their own, in blocks of few sizes. The blocks of freed tensors are kept for the next ones.

#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <unordered_map>

namespace {

constexpr std::size_t LARGE = 1 << 20;  // bytes
// Sizes of blocks from one power of two to the next. What a tensor leaves of its block takes addresses, but no memory
// unless a longer tensor has used it before. With few sizes, tensors whose sizes vary a little share blocks.
constexpr std::size_t SIZES = 8;
// The limit of all blocks, as a multiple of the largest sum of those in use so far. A step of GPT-2 needs 1.07 to 1.25
// to get all its tensors from kept blocks, and a loop without DeepSpeed more.
constexpr double SLACK = 1.5;

const c10::Device CPU(c10::DeviceType::CPU);

class KeepingAllocator final : public c10::Allocator {
  public:
    c10::DataPtr allocate(std::size_t bytes) override {
        if (bytes >= LARGE) {
            if (void* block = take(size_of_block(bytes))) return {block, block, &KeepingAllocator::free, CPU};
        }
        return torchs->allocate(bytes);  // raises torch's error if there is no memory
    }

    c10::DeleterFnPtr raw_deleter() const override { return &KeepingAllocator::free; }

    void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }

    static KeepingAllocator& instance() {
        static auto* allocator = new KeepingAllocator;  // never destroyed: tensors may outlive static objects
        return *allocator;
    }

  private:
    // A child process must not inherit the mutex while another thread holds it.
    KeepingAllocator() {
        pthread_atfork(
            [] { instance().mutex.lock(); }, [] { instance().mutex.unlock(); }, [] { instance().mutex.unlock(); });
    }

    c10::Allocator* const torchs = c10::GetCPUAllocator();
    std::mutex mutex;
    std::multimap<std::size_t, void*> kept;       // free blocks by size
    std::unordered_map<void*, std::size_t> used;  // blocks of tensors, and their sizes
    std::size_t in_use = 0, largest_use = 0, mapped = 0;

    // Round up to a size of blocks. If that overflows, return the bytes, which no kernel has.
    static std::size_t size_of_block(std::size_t bytes) {
        std::size_t power = LARGE;
        while (power <= bytes / 2) power *= 2;
        const std::size_t step = power / SIZES;
        return bytes > SIZE_MAX - step ? bytes : (bytes + step - 1) / step * step;
    }

    // Return a block of `size` bytes, or a null pointer if the kernel has no memory.
    void* take(std::size_t size) {
        const std::lock_guard guard(mutex);
        void* block = nullptr;
        if (const auto found = kept.find(size); found != kept.end()) {
            block = found->second;
            kept.erase(found);
        } else {
            const double limit = SLACK * static_cast<double>(std::max(largest_use, in_use + size));
            while (!kept.empty() && static_cast<double>(mapped + size) > limit) unmap_largest();
            block = map(size);
            while (block == nullptr && !kept.empty()) {
                unmap_largest();
                block = map(size);
            }
            if (block == nullptr) return nullptr;
        }
        used.emplace(block, size);
        in_use += size;
        largest_use = std::max(largest_use, in_use);
        report(block, static_cast<std::int64_t>(size));
        return block;
    }

    // Tell torch.profiler that blocks of tensors have become so many bytes more, or fewer if negative.
    void report(void* block, std::int64_t bytes) const {
        if (c10::memoryProfilingEnabled()) c10::reportMemoryUsageToProfiler(block, bytes, in_use, mapped, CPU);
    }

    void* map(std::size_t size) {
        void* block = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (block == MAP_FAILED) return nullptr;
        mapped += size;
        return block;
    }

    void unmap_largest() {
        const auto last = std::prev(kept.end());
        munmap(last->second, last->first);
        mapped -= last->first;
        kept.erase(last);
    }

    // Keep a block, or free what torch's own allocator has allocated.
    static void free(void* block) {
        KeepingAllocator& self = instance();
        {
            const std::lock_guard guard(self.mutex);
            if (const auto found = self.used.find(block); found != self.used.end()) {
                const std::size_t size = found->second;
                self.kept.emplace(size, block);
                self.in_use -= size;
                self.used.erase(found);
                self.report(block, -static_cast<std::int64_t>(size));
                return;
            }
        }
        self.torchs->raw_deleter()(block);
    }
};

}  // namespace

// Let torch allocate the tensors of this process from now on with the allocator above.
extern "C" void keep_memory() { c10::SetCPUAllocator(&KeepingAllocator::instance()); }
