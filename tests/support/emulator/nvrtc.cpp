// An NVRTC for tests: compiles nothing, and returns an image that the mock driver accepts for every
// kernel. Built with -DFAILS, it fails for every program, with a log.
#include <cstddef>
#include <cstdint>
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

static const char* const LOG = "draw.cu(24): error: identifier \"philox\" is undefined\n";
enum { OK = 0, COMPILATION = 6, INTERNAL = 11 };

// An ELF file of a header, this text, and a section table of no entries.
static const char MARK[] = "all kernels";
static const size_t HEADER = 64, BYTES = HEADER + sizeof(MARK);

EXPORT int nvrtcVersion(int* major, int* minor) { return *major = 13, *minor = 7, OK; }
EXPORT const char* nvrtcGetErrorString(int code) {
    return code == COMPILATION ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR_INTERNAL_ERROR";
}
EXPORT int nvrtcGetNumSupportedArchs(int* count) { return *count = 2, OK; }
EXPORT int nvrtcGetSupportedArchs(int* archs) { return archs[0] = 75, archs[1] = 90, OK; }
EXPORT int nvrtcCreateProgram(void** program, const char*, const char*, int headers,
                              const char* const*, const char* const*) {
    return *program = program, headers >= 3 ? OK : INTERNAL;
}
EXPORT int nvrtcDestroyProgram(void**) { return OK; }
EXPORT int nvrtcCompileProgram(void*, int, const char* const*) {
#ifdef FAILS
    return COMPILATION;
#else
    return OK;
#endif
}
EXPORT int nvrtcGetProgramLogSize(void*, size_t* size) { return *size = std::strlen(LOG) + 1, OK; }
EXPORT int nvrtcGetProgramLog(void*, char* text) { return std::strcpy(text, LOG), OK; }
EXPORT int nvrtcGetCUBINSize(void*, size_t* size) { return *size = BYTES, OK; }
EXPORT int nvrtcGetCUBIN(void*, char* image) {
    const uint64_t end = BYTES;
    std::memset(image, 0, BYTES);
    std::memcpy(image, "\x7f" "ELF", 4);
    std::memcpy(image + 40, &end, sizeof(end));
    std::memcpy(image + HEADER, MARK, sizeof(MARK));
    return OK;
}
EXPORT int nvrtcGetPTXSize(void*, size_t*) { return INTERNAL; }
EXPORT int nvrtcGetPTX(void*, char*) { return INTERNAL; }
