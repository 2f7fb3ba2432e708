// A libcuda.so.1 for tests: two devices in host memory, whose launches run emulated kernels.
//
// As strict as the real driver: a call before cuInit, a call without a context, a module, function
// or stream of another device, and an image that is no ELF file or lacks the kernel are errors.
// Records every call, and fails at any call on request. SOKD_MOCK_EMULATORS lists the libraries
// with the kernels (see emulator.h), separated by colons.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace {

enum Code {
    OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100,
    INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, INVALID_HANDLE = 400,
    NOT_FOUND = 500, LAUNCH_FAILED = 719, STREAM_CAPTURE_UNSUPPORTED = 900,
    STREAM_CAPTURE_IMPLICIT = 906
};
enum Mode { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2 };

struct Device {
    int ordinal, major, minor;
    bool retained = false;
};
struct Module {
    Device* device;
    std::string image;
};
struct Function {
    Device* device;
    std::string name;
};
struct Stream {
    Device* device;
    bool blocking = false;  // synchronises with the default stream; torch's streams do not
    bool capturing = false, invalidated = false;
    std::thread::id by = {};  // the thread that began the capture, in this mode
    int mode = GLOBAL;
};

std::mutex guard;
Device devices[2] = {{0, 9, 0}, {1, 8, 6}};
int device_count = 2;
bool initialised = false;
thread_local std::vector<Device*> contexts;
thread_local int thread_mode = GLOBAL;
std::set<Module*> modules;
std::set<Function*> functions;
std::set<Stream*> streams;
std::vector<std::string> calls;
std::map<std::string, int> counts;
std::string emulator_error;
int fail_at = -1, fail_code = 0;  // the call of this number, over all functions
std::string fail_call;            // or every call of this function
int schedule = 0;
unsigned blocks = 0;  // instead of the host's number of blocks, unless 0
uint64_t launches = 0;

// Memory between two pages that must not be touched.
struct Memory {
    void* mapped;
    size_t room;
    uint64_t address, bytes;
};
std::vector<Memory> allocated;
std::vector<std::string> traffic;

struct Emulator {
    int (*launch)(const char* name, const unsigned* grid, const unsigned* block, const void* args,
                  unsigned blocks, int schedule, uint64_t seed);
    uint64_t (*bytes)(const char*);
    const char* (*error)();
    // Of libraries that count accesses to memory alone.
    void (*watch)(const uint64_t*, unsigned);
    void (*counts)(unsigned, uint64_t*);
};

template <class T>
void find(T& function, void* library, const char* name) {
    function = reinterpret_cast<T>(dlsym(library, name));
}

Emulator opened(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) std::abort();
    Emulator emulator{};
    find(emulator.launch, library, "sokd_emulator_launch");
    find(emulator.bytes, library, "sokd_emulator_bytes");
    find(emulator.error, library, "sokd_emulator_error");
    find(emulator.watch, library, "sokd_traffic_watch");
    find(emulator.counts, library, "sokd_traffic_counts");
    return emulator;
}

std::vector<Emulator>& emulators() {
    static std::vector<Emulator> all = [] {
        std::vector<Emulator> found;
        const char* names = std::getenv("SOKD_MOCK_EMULATORS");
        std::stringstream list(names ? names : "");
        for (std::string path; std::getline(list, path, ':');) {
            found.push_back(opened(path.c_str()));
        }
        return found;
    }();
    return all;
}

Emulator* with(const char* kernel) {
    for (Emulator& emulator : emulators()) {
        if (emulator.bytes(kernel) != 0) return &emulator;
    }
    return nullptr;
}

// Counts the accesses of a launch to all allocated memory, where the library does.
void watch(const Emulator& emulator) {
    std::vector<uint64_t> pairs;
    for (const Memory& memory : allocated) {
        pairs.insert(pairs.end(), {memory.address, memory.bytes});
    }
    if (emulator.watch != nullptr) emulator.watch(pairs.data(), (unsigned)allocated.size());
}

void count(const Emulator& emulator, const std::string& kernel) {
    for (unsigned i = 0; emulator.counts != nullptr && i < allocated.size(); i++) {
        uint64_t counts[5];
        emulator.counts(i, counts);
        std::ostringstream line;
        line << kernel << " " << allocated[i].bytes;
        for (const uint64_t bytes : counts) line << " " << bytes;
        traffic.push_back(line.str());
    }
}

// Records the call; returns the code that it fails with.
int begin(const char* call, const std::string& details = "") {
    const int number = (int)calls.size();
    calls.push_back(details.empty() ? call : std::string(call) + " " + details);
    counts[call]++;
    if (number == fail_at || fail_call == call) return fail_code;
    const std::string name = call;
    const bool early = name == "cuInit" || name == "cuDriverGetVersion";
    return initialised || early ? OK : NOT_INITIALIZED;
}

Device* current() { return contexts.empty() ? nullptr : contexts.back(); }

// Whether a capture forbids the call, and is spoilt by it (cuThreadExchangeStreamCaptureMode).
int unsafe() {
    int code = OK;
    for (Stream* stream : streams) {
        if (!stream->capturing || stream->mode == RELAXED || thread_mode == RELAXED) continue;
        const bool own = stream->by == std::this_thread::get_id();
        if (!own && (stream->mode != GLOBAL || thread_mode != GLOBAL)) continue;
        stream->invalidated = true;
        code = STREAM_CAPTURE_UNSUPPORTED;
    }
    return code;
}

// Whether the default stream of this device would wait for a stream under capture.
bool implicit(const Device* device) {
    for (const Stream* stream : streams) {
        if (stream->capturing && stream->blocking && stream->device == device) return true;
    }
    return false;
}

// 0 is the device's default stream.
bool known(Stream* stream) {
    return stream == nullptr || (streams.count(stream) && stream->device == current());
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))
#define BEGIN(...)                           \
    std::lock_guard<std::mutex> hold(guard); \
    if (const int code = begin(__VA_ARGS__)) return code;

// ---------------------------------------------------------------------- functions of the driver
EXPORT int cuInit(unsigned) {
    BEGIN("cuInit")
    initialised = true;
    return OK;
}
EXPORT int cuDriverGetVersion(int* version) {
    BEGIN("cuDriverGetVersion")
    *version = 13000;
    return OK;
}
// Called by NVRTC and by the CUDA runtime inside torch: for them there is no device.
EXPORT int cuGetExportTable(const void**, const void*) { return NO_DEVICE; }
EXPORT int cuGetErrorName(int code, const char** name) {
#define NAMED(code) {code, "CUDA_ERROR_" #code}
    static const std::map<int, const char*> names = {
        NAMED(INVALID_VALUE), NAMED(OUT_OF_MEMORY), NAMED(NOT_INITIALIZED), NAMED(NO_DEVICE),
        NAMED(INVALID_DEVICE), NAMED(INVALID_IMAGE), NAMED(INVALID_CONTEXT), NAMED(INVALID_HANDLE),
        NAMED(NOT_FOUND), NAMED(LAUNCH_FAILED), NAMED(STREAM_CAPTURE_UNSUPPORTED),
        NAMED(STREAM_CAPTURE_IMPLICIT)};
    const auto found = names.find(code);
    *name = found == names.end() ? nullptr : found->second;
    return *name ? OK : INVALID_VALUE;
}
EXPORT int cuGetErrorString(int code, const char** text) {
    *text = code == OUT_OF_MEMORY   ? "out of memory"
            : code == LAUNCH_FAILED ? emulator_error.c_str()
                                    : nullptr;
    return *text ? OK : INVALID_VALUE;
}
EXPORT int cuDeviceGetCount(int* count) {
    BEGIN("cuDeviceGetCount")
    *count = device_count;
    return OK;
}
EXPORT int cuDeviceGet(int* device, int ordinal) {
    BEGIN("cuDeviceGet", std::to_string(ordinal))
    if (ordinal < 0 || ordinal >= device_count) return INVALID_DEVICE;
    *device = ordinal;
    return OK;
}
EXPORT int cuDeviceGetAttribute(int* value, int attribute, int device) {
    BEGIN("cuDeviceGetAttribute", std::to_string(attribute))
    if (attribute != 75 && attribute != 76) return INVALID_VALUE;
    *value = attribute == 75 ? devices[device].major : devices[device].minor;
    return OK;
}
EXPORT int cuDevicePrimaryCtxRetain(void** context, int device) {
    BEGIN("cuDevicePrimaryCtxRetain", std::to_string(device))
    devices[device].retained = true;
    *context = &devices[device];
    return OK;
}
EXPORT int cuCtxGetCurrent(void** context) {
    BEGIN("cuCtxGetCurrent")
    *context = current();
    return OK;
}
EXPORT int cuCtxPushCurrent_v2(void* context) {
    BEGIN("cuCtxPushCurrent_v2")
    Device* device = static_cast<Device*>(context);
    if (!device->retained) return INVALID_CONTEXT;
    contexts.push_back(device);
    return OK;
}
EXPORT int cuCtxPopCurrent_v2(void** context) {
    BEGIN("cuCtxPopCurrent_v2")
    if (contexts.empty()) return INVALID_CONTEXT;
    *context = contexts.back();
    contexts.pop_back();
    return OK;
}
EXPORT int cuModuleLoadData(void** module, const void* image) {
    BEGIN("cuModuleLoadData")
    if (current() == nullptr) return INVALID_CONTEXT;
    if (const int code = unsafe()) return code;
    const unsigned char* bytes = static_cast<const unsigned char*>(image);
    if (std::memcmp(bytes, "\x7f" "ELF", 4) != 0) return INVALID_IMAGE;
    uint64_t sections;  // e_shoff: the offset of the section table, which ends the file
    uint16_t entry, count;
    std::memcpy(&sections, bytes + 40, 8);
    std::memcpy(&entry, bytes + 58, 2);
    std::memcpy(&count, bytes + 60, 2);
    const std::string text(static_cast<const char*>(image), sections + (uint64_t)entry * count);
    auto* made = new Module{current(), text};
    modules.insert(made);
    *module = made;
    return OK;
}
EXPORT int cuModuleGetFunction(void** function, void* module, const char* name) {
    BEGIN("cuModuleGetFunction", name)
    auto* from = static_cast<Module*>(module);
    if (!modules.count(from) || from->device != current()) return INVALID_HANDLE;
    if (const int code = unsafe()) return code;  // it loads the kernel
    const std::string symbol = std::string(1, '\0') + name + '\0';
    // What nvrtc.cpp compiles holds no code: it stands for all kernels.
    const bool mocked = from->image.find("all kernels") != std::string::npos && with(name);
    if (!mocked && from->image.find(symbol) == std::string::npos) return NOT_FOUND;
    auto* made = new Function{current(), name};
    functions.insert(made);
    *function = made;
    return OK;
}
EXPORT int cuThreadExchangeStreamCaptureMode(int* mode) {
    BEGIN("cuThreadExchangeStreamCaptureMode", std::to_string(*mode))
    if (*mode < GLOBAL || *mode > RELAXED) return INVALID_VALUE;
    std::swap(*mode, thread_mode);
    return OK;
}
EXPORT int cuStreamIsCapturing(void* stream, int* status) {
    BEGIN("cuStreamIsCapturing")
    if (!known(static_cast<Stream*>(stream))) return INVALID_HANDLE;
    if (stream == nullptr && implicit(current())) return STREAM_CAPTURE_IMPLICIT;
    const auto* asked = static_cast<Stream*>(stream);
    *status = stream == nullptr || !asked->capturing ? 0 : asked->invalidated ? 2 : 1;
    return OK;
}
EXPORT int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                          unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                          void* stream, void** parameters, void** extra) {
    auto* kernel = static_cast<Function*>(function);
    std::ostringstream details;
    const bool real = functions.count(kernel) != 0;
    details << (real ? kernel->name : "?") << " grid=" << grid_x << "," << grid_y << "," << grid_z
            << " block=" << block_x << "," << block_y << "," << block_z
            << " device=" << (current() ? current()->ordinal : -1) << " stream=" << stream;
    BEGIN("cuLaunchKernel", details.str())
    if (!real || kernel->device != current() || !known(static_cast<Stream*>(stream))) {
        return INVALID_HANDLE;
    }
    if (stream == nullptr && implicit(current())) return STREAM_CAPTURE_IMPLICIT;
    if (grid_x == 0 || grid_y == 0 || grid_z == 0 || grid_y > 65535 || grid_z > 65535 ||
        block_x * block_y * block_z > 1024 || shared != 0 || extra != nullptr) {
        return INVALID_VALUE;
    }
    const unsigned grid[3] = {grid_x, grid_y, grid_z}, block[3] = {block_x, block_y, block_z};
    const char* name = kernel->name.c_str();
    const Emulator* emulator = with(name);
    if (emulator == nullptr) return NOT_FOUND;
    watch(*emulator);
    if (emulator->launch(name, grid, block, parameters[0], blocks, schedule, ++launches) != 0) {
        emulator_error = emulator->error();
        return LAUNCH_FAILED;
    }
    count(*emulator, name);
    return OK;
}

// -------------------------------------------------------------------------------- for the tests
// Kernels come from this library where it has them; null: from SOKD_MOCK_EMULATORS alone.
EXPORT void mock_use_library(const char* path) {
    static bool used = false;
    auto& all = emulators();
    if (used) all.erase(all.begin());
    used = path != nullptr;
    if (used) all.insert(all.begin(), opened(path));
}
EXPORT void mock_schedule(int which) { schedule = which; }
EXPORT void mock_blocks(unsigned count) { blocks = count; }
// Device memory, all bits set, that ends where a page that must not be touched begins, as far as
// its alignment allows. `odd`: never aligned to 16 bytes.
EXPORT uint64_t mock_allocate(uint64_t bytes, uint64_t align, int odd) {
    const auto page = (uint64_t)sysconf(_SC_PAGESIZE);
    const uint64_t inner = (bytes + 2 * align + page - 1) / page * page, room = inner + 2 * page;
    void* mapped = mmap(nullptr, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) std::abort();
    char* first = static_cast<char*>(mapped) + page;
    if (mprotect(first, inner, PROT_READ | PROT_WRITE) != 0) std::abort();
    uint64_t address = (reinterpret_cast<uint64_t>(first) + inner - bytes) / align * align;
    if (odd && address % 16 == 0) address -= align;
    std::memset(reinterpret_cast<void*>(address), 0xff, bytes);
    allocated.push_back({mapped, room, address, bytes});
    return address;
}
EXPORT void mock_free() {
    for (const Memory& memory : allocated) munmap(memory.mapped, memory.room);
    allocated.clear();
    traffic.clear();
}
// "kernel bytes-of-the-memory" and the five counts of traffic.cpp, for each launch and memory.
EXPORT int mock_traffic() { return (int)traffic.size(); }
EXPORT const char* mock_traffic_line(int i) { return traffic[i].c_str(); }
EXPORT void mock_fail_at(int number, int code) {
    fail_at = number < 0 ? -1 : (int)calls.size() + number, fail_code = code;
}
EXPORT void mock_fail_call(const char* call, int code) { fail_call = call, fail_code = code; }
EXPORT void mock_capability(int device, int major, int minor) {
    devices[device].major = major, devices[device].minor = minor;
}
EXPORT void mock_device_count(int count) { device_count = count; }
EXPORT void* mock_stream(int device) {
    auto* made = new Stream{&devices[device]};
    streams.insert(made);
    return made;
}
EXPORT void mock_capture(void* stream, int capturing, int mode, int blocking) {
    auto* of = static_cast<Stream*>(stream);
    of->capturing = capturing != 0, of->invalidated = false;
    of->mode = mode, of->blocking = blocking != 0;
    of->by = std::this_thread::get_id();
}
EXPORT int mock_invalidated(void* stream) { return static_cast<Stream*>(stream)->invalidated; }
EXPORT void mock_enter(int device) {
    devices[device].retained = true, contexts.push_back(&devices[device]);
}
EXPORT int mock_depth() { return (int)contexts.size(); }
EXPORT int mock_calls() { return (int)calls.size(); }
EXPORT const char* mock_call(int i) { return calls[i].c_str(); }
EXPORT uint64_t mock_argument_bytes(const char* kernel) {
    const Emulator* emulator = with(kernel);
    return emulator == nullptr ? 0 : emulator->bytes(kernel);
}
