// A CPU allocator for torch that keeps the memory of freed tensors, so that the next step reuses it.
//
// glibc either returns the pages of a large freed tensor to the kernel, which zeroes them again at each allocation, or
// keeps them in a heap. There, a freed tensor is no place for one of the same size, because torch asks for aligned
// memory and glibc then looks for a longer piece. So a process grows, differently in each run. Here, tensors of 1 MiB or
// more have pages of their own. Freed ones are kept and given to tensors of about the same size.

#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <tuple>
#include <unordered_map>

namespace {

constexpr std::size_t LARGE = 1 << 20, PAGE = 4096;  // bytes
// A kept block may be longer than a tensor by this share of the tensor's size.
constexpr double WASTE = 1.0 / 8;
// The limit of all blocks, as a multiple of the largest sum of tensors so far. A step of GPT-2 needs 1.07 to 1.25 to get
// all its tensors from kept blocks, and a loop without DeepSpeed more.
constexpr double SLACK = 1.5;

const c10::Device CPU(c10::DeviceType::CPU);

class KeepingAllocator final : public c10::Allocator {
  public:
    c10::DataPtr allocate(std::size_t bytes) override {
        if (bytes >= LARGE) {
            if (void* block = take((bytes + PAGE - 1) / PAGE * PAGE)) return {block, block, &KeepingAllocator::free, CPU};
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
    c10::Allocator* const torchs = c10::GetCPUAllocator();
    std::mutex mutex;
    std::multimap<std::size_t, void*> kept;       // free blocks by size
    std::unordered_map<void*, std::size_t> used;  // blocks of tensors, and their sizes
    std::size_t in_use = 0, largest_use = 0, mapped = 0;

    // Return a block of at least `bytes` bytes, or a null pointer if the kernel has no memory.
    void* take(std::size_t bytes) {
        const std::lock_guard guard(mutex);
        const auto found = kept.lower_bound(bytes);
        void* block = nullptr;
        std::size_t size = bytes;
        if (found != kept.end() && found->first <= bytes + bytes * WASTE) {
            std::tie(size, block) = *found;
            kept.erase(found);
        } else {
            largest_use = std::max(largest_use, in_use + bytes);
            while (!kept.empty() && mapped + bytes > SLACK * largest_use) unmap_largest();
            block = map(bytes);
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

    void* map(std::size_t bytes) {
        void* block = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (block == MAP_FAILED) return nullptr;
        mapped += bytes;
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
