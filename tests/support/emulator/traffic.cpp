// Counts the bytes that kernels read and write in given ranges of memory: implements the calls that
// -fsanitize=thread inserts before every access. Compiled without that flag, and linked to a
// kernel.cu that has it (see `traced` in tests/support/cuda/emulator.py).
#include <cstdint>
#include <vector>

namespace {
constexpr uintptr_t SECTOR = 32;  // what a GPU fetches at a time

struct Range {
    uintptr_t first, end;
    uint64_t read = 0, fetched = 0, distinct = 0, written = 0, kept = 0;
    std::vector<unsigned> sectors;  // the last block that read it
    std::vector<bool> bytes;        // written
};
// Never destroyed: the kernels' own constructors and destructors make these calls, too.
std::vector<Range>& ranges() {
    static auto& all = *new std::vector<Range>;
    return all;
}
unsigned block = 0;

Range* range_of(uintptr_t at) {
    for (auto& range : ranges()) {
        if (range.first <= at && at < range.end) return &range;
    }
    return nullptr;
}

void note_read(const void* pointer, uintptr_t size) {
    const auto at = reinterpret_cast<uintptr_t>(pointer);
    Range* range = range_of(at);
    if (range == nullptr) return;
    range->read += size;
    const uintptr_t last_sector = (at + size - 1 - range->first) / SECTOR;
    for (uintptr_t i = (at - range->first) / SECTOR; i <= last_sector; i++) {
        unsigned& last = range->sectors[i];
        range->distinct += last == 0;
        range->fetched += last != block;
        last = block;
    }
}

void note_write(const void* pointer, uintptr_t size) {
    const auto at = reinterpret_cast<uintptr_t>(pointer);
    Range* range = range_of(at);
    if (range == nullptr) return;
    range->written += size;
    for (uintptr_t i = at - range->first; i < at + size - range->first; i++) {
        range->kept += !range->bytes[i];
        range->bytes[i] = true;
    }
}
}  // namespace

extern "C" {
// Ranges as (address, bytes); all counts begin at 0.
void sokd_traffic_watch(const uint64_t* watched, unsigned count) {
    ranges().clear();
    for (unsigned i = 0; i < count; i++) {
        Range range;
        range.first = watched[2 * i], range.end = range.first + watched[2 * i + 1];
        range.sectors.resize(watched[2 * i + 1] / SECTOR + 1);
        range.bytes.resize(watched[2 * i + 1] + 16);
        ranges().push_back(range);
    }
    block = 0;
}
// In bytes: loaded; fetched, if each block caches what it reads; fetched, if all blocks share one
// cache; stored; stored to different addresses.
void sokd_traffic_counts(unsigned i, uint64_t counts[5]) {
    const Range& range = ranges()[i];
    counts[0] = range.read, counts[1] = range.fetched * SECTOR, counts[2] = range.distinct * SECTOR;
    counts[3] = range.written, counts[4] = range.kept;
}
void sokd_traffic_block() { block++; }

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* at, uintptr_t size) { note_read(at, size); }
void __tsan_write_range(void* at, uintptr_t size) { note_write(at, size); }
#define ACCESS(size)                                                    \
    void __tsan_read##size(void* at) { note_read(at, size); }            \
    void __tsan_write##size(void* at) { note_write(at, size); }          \
    void __tsan_unaligned_read##size(void* at) { note_read(at, size); }  \
    void __tsan_unaligned_write##size(void* at) { note_write(at, size); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
}
