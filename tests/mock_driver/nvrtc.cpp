// An NVRTC for tests that compiles nothing: every program fails, with a log.
#include <cstddef>
#include <cstring>

#define EXPORT extern "C" __attribute__((visibility("default")))

static const char* const LOG = "draw.cu(24): error: identifier \"philox\" is undefined\n";
enum { OK = 0, COMPILATION = 6, INTERNAL = 11 };

EXPORT int nvrtcVersion(int* major, int* minor) { return *major = 13, *minor = 7, OK; }
EXPORT const char* nvrtcGetErrorString(int code) { return code == COMPILATION ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR_INTERNAL_ERROR"; }
EXPORT int nvrtcGetNumSupportedArchs(int* count) { return *count = 2, OK; }
EXPORT int nvrtcGetSupportedArchs(int* archs) { return archs[0] = 75, archs[1] = 90, OK; }
EXPORT int nvrtcCreateProgram(void** program, const char*, const char*, int headers, const char* const*, const char* const*) {
    return *program = program, headers == 3 ? OK : INTERNAL;
}
EXPORT int nvrtcDestroyProgram(void**) { return OK; }
EXPORT int nvrtcCompileProgram(void*, int, const char* const*) { return COMPILATION; }
EXPORT int nvrtcGetProgramLogSize(void*, size_t* size) { return *size = std::strlen(LOG) + 1, OK; }
EXPORT int nvrtcGetProgramLog(void*, char* text) { return std::strcpy(text, LOG), OK; }
EXPORT int nvrtcGetCUBINSize(void*, size_t*) { return INTERNAL; }
EXPORT int nvrtcGetCUBIN(void*, char*) { return INTERNAL; }
EXPORT int nvrtcGetPTXSize(void*, size_t*) { return INTERNAL; }
EXPORT int nvrtcGetPTX(void*, char*) { return INTERNAL; }
