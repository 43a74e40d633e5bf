// cuBLAS, cuBLASLt, cuDNN's graph API and NVRTC: everything is accepted, nothing is computed. Declared here and not by
// their headers, which differ between the CUDA 12 and 13 wheels in nothing that matters here.
#include <cudnn_version.h>

#include "counters.h"
#include "fake.h"

using namespace fake;

// Products that are worth counting; all other names of cuBLAS are unplayed (see build.sh).
#define MATMUL(name)         \
  EXPORT int name() {        \
    count(Counter::matmuls); \
    return 0;                \
  }
MATMUL(cublasSgemm_v2)
MATMUL(cublasDgemm_v2)
MATMUL(cublasHgemm)
MATMUL(cublasSgemmEx)
MATMUL(cublasGemmEx)
MATMUL(cublasSgemmBatched)
MATMUL(cublasDgemmBatched)
MATMUL(cublasGemmBatchedEx)
MATMUL(cublasSgemmStridedBatched)
MATMUL(cublasDgemmStridedBatched)
MATMUL(cublasGemmStridedBatchedEx)
MATMUL(cublasLtMatmul)

EXPORT int cublasCreate_v2(void** handle) {
  *handle = new_handle<void*>();
  return 0;
}
EXPORT int cublasGetVersion_v2(void*, int* version) {
  *version = CUDART_VERSION * 10;
  return 0;
}
EXPORT int cublasGetProperty(int, int* value) {
  *value = CUDART_VERSION / 1000;
  return 0;
}
EXPORT int cublasGetMathMode(void*, int* mode) {
  *mode = 0;
  return 0;
}
EXPORT int cublasGetPointerMode_v2(void*, int* mode) {
  *mode = 0;
  return 0;
}
EXPORT int cublasGetStream_v2(void*, void** stream) {
  *stream = nullptr;
  return 0;
}
EXPORT const char* cublasGetStatusString(int) { return "status of the fake cuBLAS"; }
EXPORT const char* cublasGetStatusName(int) { return "CUBLAS_STATUS"; }

EXPORT int cublasLtCreate(void** handle) {
  *handle = new_handle<void*>();
  return 0;
}
EXPORT size_t cublasLtGetVersion() { return CUDART_VERSION * 10 + 100; }
EXPORT size_t cublasLtGetCudartVersion() { return CUDART_VERSION; }
EXPORT int cublasLtMatmulDescCreate(void** d, int, int) {
  *d = calloc(1, 4096);
  return 0;
}
EXPORT int cublasLtMatmulDescDestroy(void* d) {
  free(d);
  return 0;
}
EXPORT int cublasLtMatrixLayoutCreate(void** d, int, uint64_t, uint64_t, int64_t) {
  *d = calloc(1, 1024);
  return 0;
}
EXPORT int cublasLtMatrixLayoutDestroy(void* d) {
  free(d);
  return 0;
}
EXPORT int cublasLtMatmulPreferenceCreate(void** d) {
  *d = calloc(1, 1024);
  return 0;
}
EXPORT int cublasLtMatmulPreferenceDestroy(void* d) {
  free(d);
  return 0;
}
// One algorithm, without workspace; a result (cublasLtMatmulHeuristicResult_t) is 96 bytes.
EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* results,
                                          int* found) {
  memset(results, 0, 96);
  *found = 1;
  return 0;
}

// cuDNN's graph API: every graph is supported, every plan is empty.
EXPORT int cudnnCreate(void** handle) {
  *handle = new_handle<void*>();
  return 0;
}
EXPORT size_t cudnnGetVersion() { return CUDNN_VERSION; }
EXPORT size_t cudnnGetCudartVersion() { return CUDART_VERSION; }
EXPORT const char* cudnnGetErrorString(int) { return "status of the fake cuDNN"; }
EXPORT void cudnnGetLastErrorString(char* text, size_t n) {
  if (n) *text = 0;
}
EXPORT int cudnnBackendCreateDescriptor(int, void** d) {
  *d = calloc(1, 256);
  return 0;
}
EXPORT int cudnnBackendDestroyDescriptor(void* d) {
  free(d);
  return 0;
}
EXPORT int cudnnBackendFinalize(void*) { return 0; }
EXPORT int cudnnBackendExecute(void*, void*, void*) { return 0; }
EXPORT int cudnnBackendSetAttribute(void*, int, int, int64_t, const void*) { return 0; }
EXPORT int cudnnBackendGetAttribute(void*, int, int type, int64_t wanted, int64_t* count, void* values) {
  constexpr int INT64 = 3;  // CUDNN_TYPE_INT64: workspace sizes, which are zero
  if (count) *count = 1;
  if (type == INT64 && values && wanted) *(int64_t*)values = 0;
  return 0;
}

// NVRTC compiles to sixteen zeros.
constexpr size_t PROGRAM_BYTES = 16;
EXPORT int nvrtcVersion(int* major, int* minor) {
  *major = CUDART_VERSION / 1000;
  *minor = CUDART_VERSION % 1000 / 10;
  return 0;
}
EXPORT const char* nvrtcGetErrorString(int) { return "result of the fake NVRTC"; }
EXPORT int nvrtcGetNumSupportedArchs(int* n) {
  *n = 1;
  return 0;
}
EXPORT int nvrtcGetSupportedArchs(int* archs) {
  *archs = compute_capability();
  return 0;
}
EXPORT int nvrtcCreateProgram(void** program, const char*, const char*, int, const char* const*, const char* const*) {
  *program = new_handle<void*>();
  return 0;
}
EXPORT int nvrtcGetLoweredName(void*, const char* name, const char** lowered) {
  *lowered = name;
  return 0;
}
EXPORT int nvrtcGetPTXSize(void*, size_t* n) {
  *n = PROGRAM_BYTES;
  return 0;
}
EXPORT int nvrtcGetCUBINSize(void*, size_t* n) {
  *n = PROGRAM_BYTES;
  return 0;
}
EXPORT int nvrtcGetPTX(void*, char* text) {
  memset(text, 0, PROGRAM_BYTES);
  return 0;
}
EXPORT int nvrtcGetCUBIN(void*, char* text) {
  memset(text, 0, PROGRAM_BYTES);
  return 0;
}
EXPORT int nvrtcGetProgramLogSize(void*, size_t* n) {
  *n = 1;
  return 0;
}
EXPORT int nvrtcGetProgramLog(void*, char* text) {
  *text = 0;
  return 0;
}
