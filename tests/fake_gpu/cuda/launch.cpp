// Kernels: registered, checked, counted, and never run.
#include "counters.h"
#include "streams.h"

using namespace fake;
using E = cudaError_t;
using R = CUresult;

static bool launchable(dim3 grid, dim3 block, size_t shared) {
  // What a device refuses, whatever the kernel: empty or oversized grids are the usual mistakes with empty tensors.
  return grid.x && grid.y && grid.z && block.x && block.y && block.z && grid.x <= 2147483647u && grid.y <= 65535 &&
         grid.z <= 65535 && block.x <= 1024 && block.y <= 1024 && block.z <= 64 &&
         size_t(block.x) * block.y * block.z <= 1024 && shared <= 232448;
}

static E launch(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  if (!launchable(grid, block, shared)) return remember(cudaErrorInvalidConfiguration);
  count(Counter::launches);
  if (is_capturing(stream)) enqueue(stream, [] {});  // a node of the graph
  return cudaSuccess;
}

EXPORT E cudaLaunchKernel(const void*, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return launch(grid, block, shared, stream);
}
EXPORT E cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void*, void**) {
  return launch(c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream);
}
EXPORT E cudaLaunchCooperativeKernel(const void*, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return launch(grid, block, shared, stream);
}
EXPORT R cuLaunchKernel(CUfunction, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void**, void**) {
  return launch({gx, gy, gz}, {bx, by, bz}, shared, stream) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
EXPORT R cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction, void**, void**) {
  return launch({c->gridDimX, c->gridDimY, c->gridDimZ}, {c->blockDimX, c->blockDimY, c->blockDimZ}, c->sharedMemBytes,
                c->hStream)
             ? CUDA_ERROR_INVALID_VALUE
             : CUDA_SUCCESS;
}
EXPORT R cuLaunchCooperativeKernel(CUfunction, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                   unsigned bz, unsigned shared, CUstream stream, void**) {
  return launch({gx, gy, gz}, {bx, by, bz}, shared, stream) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

// What compiled CUDA code calls when it is loaded, and for every <<<...>>>.
EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* binary;
  return &binary;
}
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {}
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
EXPORT void __cudaRegisterManagedVar(void**, void**, char*, const char*, int, size_t, int, int) {}
EXPORT char __cudaInitModule(void**) { return 1; }

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
static thread_local Configuration configuration;
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
EXPORT E __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *(void**)stream = configuration.stream;
  return cudaSuccess;
}
EXPORT E __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = (cudaKernel_t)function;
  return cudaSuccess;
}
EXPORT E __cudaLaunchKernel(cudaKernel_t, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return launch(grid, block, shared, stream);
}

EXPORT E cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->binaryVersion = a->ptxVersion = compute_capability();
  return cudaSuccess;
}
EXPORT E cudaGetFuncBySymbol(cudaFunction_t* function, const void* symbol) {
  *function = (cudaFunction_t)symbol;
  return cudaSuccess;
}
EXPORT E cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) {
  *n = 2;
  return cudaSuccess;
}
EXPORT E cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) {
  *n = 2;
  return cudaSuccess;
}
EXPORT E cudaOccupancyMaxActiveClusters(int* n, const void*, const cudaLaunchConfig_t*) {
  *n = 8;
  return cudaSuccess;
}
EXPORT E cudaOccupancyMaxPotentialClusterSize(int* n, const void*, const cudaLaunchConfig_t*) {
  *n = 8;
  return cudaSuccess;
}
EXPORT E cudaLibraryLoadData(cudaLibrary_t* library, const void*, cudaJitOption*, void**, unsigned, cudaLibraryOption*,
                             void**, unsigned) {
  *library = new_handle<cudaLibrary_t>();
  return cudaSuccess;
}
EXPORT E cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t, const char*) {
  *kernel = new_handle<cudaKernel_t>();
  return cudaSuccess;
}
