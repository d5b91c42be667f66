/* A stand-in of libcudart.so.13 under ONNX Runtime's real CUDA provider: one GPU of compute
 * capability 9.0 whose memory is the host's and whose kernels do nothing. It refuses what CUDA
 * refuses while a stream is captured, and counts. All other functions are made by stub_cuda.py and
 * return 0. Structures are those of CUDA 13, by offset. */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, CAPTURE_UNSUPPORTED = 900, SYMBOL_NOT_FOUND = 1 };
static int capturing;
static struct { long captures, launches, replays, refused; } count;

/* Read by the test with ctypes. */
void stub_counts(long *out) { memcpy(out, &count, sizeof count); }

static int refuse(const char *what) {
    count.refused++;
    fprintf(stderr, "stub: %s while capturing\n", what);
    return CAPTURE_UNSUPPORTED;
}

static void put(char *properties, size_t offset, int value) { memcpy(properties + offset, &value, 4); }

int cudaGetDeviceCount(int *n) { *n = 1; return SUCCESS; }
int cudaGetDevice(int *n) { *n = 0; return SUCCESS; }
int cudaGetDeviceProperties(char *p, int device) {
    size_t memory = 80ULL << 30, block = 49152, optin = 232448, multiprocessor = 233472;
    memset(p, 0, 1008);
    strcpy(p, "Stub");
    memcpy(p + 288, &memory, 8);
    memcpy(p + 296, &block, 8);
    put(p, 304, 65536);             /* regsPerBlock */
    put(p, 308, 32);                /* warpSize */
    put(p, 320, 1024);              /* maxThreadsPerBlock */
    put(p, 324, 1024), put(p, 328, 1024), put(p, 332, 64);
    put(p, 336, 2147483647), put(p, 340, 65535), put(p, 344, 65535);
    put(p, 360, 9), put(p, 364, 0); /* compute capability */
    put(p, 384, 132);               /* multiprocessors */
    put(p, 596, 50 << 20);          /* l2CacheSize */
    put(p, 604, 2048);              /* maxThreadsPerMultiProcessor */
    memcpy(p + 624, &multiprocessor, 8);
    memcpy(p + 672, &optin, 8);
    return SUCCESS;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 8: *value = 49152; break;   /* shared memory of a block */
    case 16: *value = 132; break;    /* multiprocessors */
    case 75: *value = 9; break;      /* compute capability */
    case 76: *value = 0; break;
    case 97: *value = 232448; break; /* shared memory of a block, if asked for */
    default: *value = 1;
    }
    return SUCCESS;
}
int cudaFuncGetAttributes(char *attributes, const void *function) {
    memset(attributes, 0, 144);
    put(attributes, 24, 1024); /* maxThreadsPerBlock */
    return SUCCESS;
}
int cudaDriverGetVersion(int *v) { *v = 13000; return SUCCESS; }
int cudaRuntimeGetVersion(int *v) { *v = 13000; return SUCCESS; }
int cudaMemGetInfo(size_t *available, size_t *all) { *available = 70ULL << 30; *all = 80ULL << 30; return SUCCESS; }
const char *cudaGetErrorName(int error) { return error == CAPTURE_UNSUPPORTED ? "stub: refused in a capture" : "stub"; }
const char *cudaGetErrorString(int error) { return cudaGetErrorName(error); }

int cudaMalloc(void **p, size_t n) {
    if (capturing) return refuse("cudaMalloc");
    *p = aligned_alloc(512, (n + 512) / 512 * 512);
    return *p ? SUCCESS : OUT_OF_MEMORY;
}
int cudaFree(void *p) { if (capturing) return refuse("cudaFree"); free(p); return SUCCESS; }
int cudaMallocHost(void **p, size_t n) { return cudaMalloc(p, n); }
int cudaHostAlloc(void **p, size_t n, unsigned flags) { return cudaMalloc(p, n); }
int cudaFreeHost(void *p) { return cudaFree(p); }
int cudaPointerGetAttributes(char *attributes, void *p) {
    memset(attributes, 0, 88);
    put(attributes, 0, 2); /* cudaMemoryTypeDevice */
    memcpy(attributes + 8, &p, sizeof p);
    return SUCCESS;
}
int cudaMemcpy(void *to, const void *from, size_t n, int kind) {
    if (capturing) return refuse("cudaMemcpy");
    memcpy(to, from, n);
    return SUCCESS;
}
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *stream) {
    if (capturing && kind != 3) return refuse("a copy from or to the host"); /* 3: on the device */
    memcpy(to, from, n);
    return SUCCESS;
}
int cudaMemset(void *p, int value, size_t n) { memset(p, value, n); return SUCCESS; }
int cudaMemsetAsync(void *p, int value, size_t n, void *stream) { memset(p, value, n); return SUCCESS; }

static int create(void **p) { *p = malloc(64); return SUCCESS; }
int cudaStreamCreate(void **p) { return create(p); }
int cudaStreamCreateWithFlags(void **p, unsigned flags) { return create(p); }
int cudaEventCreate(void **p) { return create(p); }
int cudaEventCreateWithFlags(void **p, unsigned flags) { return create(p); }
int cudaStreamSynchronize(void *stream) { return capturing ? refuse("cudaStreamSynchronize") : SUCCESS; }
int cudaDeviceSynchronize(void) { return capturing ? refuse("cudaDeviceSynchronize") : SUCCESS; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = capturing; return SUCCESS; }
int cudaStreamBeginCapture(void *stream, int mode) { capturing = 1; count.captures++; return SUCCESS; }
int cudaStreamEndCapture(void *stream, void **graph) { capturing = 0; return create(graph); }
int cudaGraphInstantiate(void **executable, void *graph, unsigned long long flags) { return create(executable); }
int cudaGraphLaunch(void *executable, void *stream) { count.replays++; return SUCCESS; }

typedef struct { unsigned x, y, z; } Dim3;
static struct { Dim3 grid, block; size_t shared; void *stream; } pushed;
int cudaLaunchKernel(const void *f, Dim3 grid, Dim3 block, void **arguments, size_t shared, void *stream) {
    count.launches++;
    return SUCCESS;
}
int __cudaLaunchKernel(const void *f, Dim3 grid, Dim3 block, void **arguments, size_t shared, void *stream) {
    return cudaLaunchKernel(f, grid, block, arguments, shared, stream);
}
int cudaLaunchKernelExC(const void *configuration, const void *f, void **arguments) { count.launches++; return SUCCESS; }
unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void *stream) {
    pushed.grid = grid, pushed.block = block, pushed.shared = shared, pushed.stream = stream;
    return SUCCESS;
}
int __cudaPopCallConfiguration(Dim3 *grid, Dim3 *block, size_t *shared, void **stream) {
    *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *stream = pushed.stream;
    return SUCCESS;
}
void **__cudaRegisterFatBinary(void *binary) { static void *handle[8]; return handle; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t s, unsigned flags) { *n = 1; return SUCCESS; }
int cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned v, unsigned long long flags, int *status) {
    *f = NULL;
    if (status) *status = SYMBOL_NOT_FOUND;
    return SUCCESS;
}
int cudaLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned n, void *c, void *d, unsigned m) { return create(library); }
int cudaLibraryGetKernel(void **kernel, void *library, const char *name) { return create(kernel); }
