/* A strict stand-in of the CUDA driver on the host's memory, for driver_rig.py.

   Strict: it accepts only what the documentation of the driver API allows, and counts everything
   else as a violation. Memory is poisoned before and after its life; addresses are used again as
   soon as possible; work waits until its stream is synchronised, in the order of the stream.
   Kernels are functions of the host that driver_rig.py compiled from the same source. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef uint64_t u64;
enum { OK = 0, INVALID = 1, NO_MEMORY = 2, NO_DEVICE = 101, BAD_IMAGE = 200, BAD_CONTEXT = 201,
       NOT_THERE = 500, NOT_READY = 600, ILLEGAL = 700, UNSUPPORTED = 900, INVALIDATED = 901, UNKNOWN = 999 };
enum { MAX_BLOCKS = 1 << 14, MAX_ARGUMENTS = 32, PAGE = 4096, POISON = 0xFF, FENCE = 0xC7 };

typedef struct { char *start; size_t size, open, mapped; int host, live; long freed; } Block; /* open: bytes of pages in use */
typedef struct { void (*launch)(unsigned, unsigned, void **); const char *kinds; char name[64]; } Kernel;
typedef struct {
    enum { LAUNCH, COPY, FILL, CALL } kind;
    Kernel *kernel;
    u64 values[MAX_ARGUMENTS];
    unsigned blocks, threads;
    char *to;
    const char *from;
    size_t size;
    int byte;
    void (*function)(void *);
    void *data;
} Work;
typedef struct { Work *items; int count, room; } Queue;
typedef struct { Queue queue; int capturing, invalid, mode, dead; pthread_t owner; Queue captured; } Stream;

static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static Block blocks[MAX_BLOCKS];
static Stream *streams[256];
static int num_blocks, num_streams, context_alive, sticky;
static __thread int current;
static size_t total = 1ull << 30, used;

/* ---- what the tests see and steer */
static int violations, calls, launches, fail_in = -1, fail_code, fail_allocation = -1;
static char last_violation[512], failed_in[64];

static void violation(const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(last_violation, sizeof last_violation, format, values);
    va_end(values);
    fprintf(stderr, "[rig] %s\n", last_violation);
    violations++;
    if (getenv("SDRT_RIG_ABORT")) abort();
}
int rig_violations(void) { return violations; }
const char *rig_last_violation(void) { return last_violation; }
void rig_forget_violations(void) { violations = 0; }
int rig_calls(void) { return calls; }
int rig_launches(void) { return launches; }
size_t rig_used(void) { return used; }
void rig_set_total(size_t bytes) { total = bytes; }
/* The call after `count` others returns `code`; one of those that lose the context does for good. */
void rig_fail_after(int count, int code) { fail_in = count; fail_code = code; failed_in[0] = 0; }
const char *rig_failed_in(void) { return failed_in; }
/* The allocation after `count` others finds no memory. */
void rig_fail_allocation(int count) { fail_allocation = count; }
/* The process as it was before anything: for tests that lose the context. */
void rig_restart(void) {
    for (int i = 0; i < num_blocks; i++) blocks[i].live = 0;
    for (int i = 0; i < num_streams; i++) streams[i]->dead = 1;
    context_alive = sticky = 0;
    used = 0;
    fail_in = fail_allocation = -1;
}

static int loses_context(int code) {
    static const int codes[] = {201, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 999};
    for (unsigned i = 0; i < sizeof codes / sizeof *codes; i++) if (codes[i] == code) return 1;
    return 0;
}
static int injected(const char *name) {
    calls++;
    if (fail_in < 0 || fail_in-- > 0) return OK;
    snprintf(failed_in, sizeof failed_in, "%s", name);
    if (loses_context(fail_code)) sticky = fail_code;
    return fail_code;
}
/* Entry of every function that needs a context; nothing works any more once it is lost. */
#define ENTER                                                                     \
    pthread_mutex_lock(&lock);                                                    \
    __attribute__((cleanup(leave))) int entered = 1;                              \
    (void)entered;                                                                \
    if (sticky) return sticky;                                                    \
    if (!current || !context_alive) {                                             \
        violation("%s without a current context", __func__);                      \
        return BAD_CONTEXT;                                                       \
    }                                                                             \
    { int code = injected(__func__); if (code) return code; }
/* The same for what only the stand-ins of other libraries call: no error is injected. */
#define ENTER_QUIETLY                                                             \
    pthread_mutex_lock(&lock);                                                    \
    __attribute__((cleanup(leave))) int entered = 1;                              \
    (void)entered;                                                                \
    if (sticky) return sticky;
#define REQUIRE(condition, ...) do { if (!(condition)) { violation(__VA_ARGS__); return INVALID; } } while (0)
static void leave(int *entered) { (void)entered; pthread_mutex_unlock(&lock); }

/* ---- memory */
static Block *find(u64 address, size_t size) {
    for (int i = 0; i < num_blocks; i++) {
        Block *b = blocks + i;
        if (b->live && (char *)address >= b->start && (char *)address + size <= b->start + b->size) return b;
    }
    return NULL;
}
static int is_memory(u64 address, size_t size, int host, const char *what) {
    Block *block = find(address, size ? size : 1);
    if (!block) { violation("%s: %zu bytes at %llx are in no live block", what, size, (long long)address); return 0; }
    if (block->host != host) {
        violation("%s: %s memory instead of %s", what, block->host ? "host" : "device", host ? "host" : "device");
        return 0;
    }
    return 1;
}
static void check_fence(Block *block) {
    for (size_t i = block->size; i < block->open; i++)
        if ((unsigned char)block->start[i] != FENCE) {
            violation("something wrote behind the %zu bytes at %p", block->size, (void *)block->start);
            memset(block->start + block->size, FENCE, block->open - block->size);
            return;
        }
}
static int allocate(void **address, size_t size, int host) {
    if (fail_allocation >= 0 && fail_allocation-- == 0) return NO_MEMORY;
    if (!host && used + size > total) return NO_MEMORY;
    size_t mapped = (size + PAGE - 1) / PAGE * PAGE;
    Block *block = NULL;
    for (int i = 0; i < num_blocks; i++) { /* the address that was freed last is used again */
        Block *b = blocks + i;
        if (!b->live && b->mapped >= mapped && b->host == host && (!block || b->freed > block->freed)) block = b;
    }
    if (!block) {
        if (num_blocks == MAX_BLOCKS) return NO_MEMORY;
        block = blocks + num_blocks++;
        block->start = mmap(NULL, mapped + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        block->mapped = mapped;
    }
    block->open = mapped;
    mprotect(block->start, block->open, PROT_READ | PROT_WRITE); /* the page behind it stays closed */
    memset(block->start, POISON, size);
    memset(block->start + size, FENCE, block->open - size);
    block->size = size; block->host = host; block->live = 1;
    if (!host) used += size;
    *address = block->start;
    return OK;
}
static int release(u64 address, int host) {
    Block *block = find(address, 1);
    REQUIRE(block && block->start == (char *)address && block->host == host,
            "free of %llx, which is no live block", (long long)address);
    for (int i = 0; i < num_streams; i++)
        REQUIRE(!streams[i]->queue.count, "free of %llx while a stream has work", (long long)address);
    check_fence(block);
    madvise(block->start, block->open, MADV_DONTNEED);
    mprotect(block->start, block->open, PROT_NONE); /* whoever reads it now crashes */
    static long frees;
    block->live = 0;
    block->freed = ++frees;
    if (!host) used -= block->size;
    return OK;
}

/* ---- streams */
static int append(Queue *queue, const Work *work) {
    if (queue->count == queue->room) {
        queue->room = queue->room ? 2 * queue->room : 64;
        queue->items = realloc(queue->items, queue->room * sizeof *work);
    }
    queue->items[queue->count++] = *work;
    return OK;
}
static Stream *as_stream(void *handle) {
    for (int i = 0; i < num_streams; i++) if (streams[i] == handle && !streams[i]->dead) return handle;
    violation("%p is no stream", handle);
    return NULL;
}
static int put(const Work *work, void *handle) {
    Stream *stream = as_stream(handle);
    if (!stream) return INVALID;
    return append(stream->capturing ? &stream->captured : &stream->queue, work);
}
/* What a capture forbids, of its own thread or of all, voids it. */
static int forbidden(const char *name) {
    for (int i = 0; i < num_streams; i++) {
        Stream *stream = streams[i];
        if (!stream->capturing || stream->dead) continue;
        if (stream->mode == 0 || (stream->mode == 1 && pthread_equal(stream->owner, pthread_self()))) {
            violation("%s during a capture", name);
            stream->invalid = 1;
            return UNSUPPORTED;
        }
    }
    return OK;
}
#define UNSAFE { int code = forbidden(__func__); if (code) return code; }
static void check_arguments(const Work *work) {
    for (int i = 0; work->kernel->kinds[i]; i++)
        if (work->kernel->kinds[i] == 'p' && work->values[i])
            is_memory(work->values[i], 1, 0, work->kernel->name);
}
static void execute(const Work *work) {
    void *arguments[MAX_ARGUMENTS];
    switch (work->kind) {
    case LAUNCH:
        check_arguments(work);
        for (int i = 0; i < MAX_ARGUMENTS; i++) arguments[i] = (void *)&work->values[i];
        work->kernel->launch(work->blocks, work->threads, arguments);
        break;
    case COPY:
        if (!find((u64)work->from, work->size) || !find((u64)work->to, work->size)) {
            violation("a copy runs between blocks that are gone");
            sticky = ILLEGAL;
        } else memcpy(work->to, work->from, work->size);
        break;
    case FILL:
        if (is_memory((u64)work->to, work->size, 0, "memset runs")) memset(work->to, work->byte, work->size);
        break;
    case CALL: work->function(work->data);
    }
}
static int drain(Stream *stream) {
    Queue queue = stream->queue;
    stream->queue = (Queue){0};
    for (int i = 0; i < queue.count && !sticky; i++) execute(queue.items + i);
    free(queue.items);
    for (int i = 0; i < num_blocks; i++) if (blocks[i].live) check_fence(blocks + i);
    return sticky;
}
/* For a kernel of the host: an access that a GPU does not allow. */
void rig_illegal_access(void) { sticky = ILLEGAL; }

/* ---- the driver API */
int f_cuInit(unsigned flags) { return flags ? INVALID : OK; }
int f_cuDriverGetVersion(int *version) { *version = 13000; return OK; }
static int hidden(void) { const char *visible = getenv("CUDA_VISIBLE_DEVICES"); return visible && !*visible; }
int f_cuDeviceGetCount(int *count) { *count = !hidden(); return OK; }
int f_cuDeviceGet(int *device, int index) { *device = 0; return index || hidden() ? NO_DEVICE : OK; }
int f_cuDeviceGetName(char *name, int room, int device) { (void)device; snprintf(name, room, "Stand-in, not a GPU"); return OK; }
int f_cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; *bytes = total; return OK; }
int f_cuDeviceGetPCIBusId(char *id, int room, int device) { (void)device; snprintf(id, room, "0000:01:00.0"); return OK; }
int f_cuDeviceGetAttribute(int *value, int attribute, int device) { (void)device; *value = attribute == 75 ? 8 : attribute == 76 ? 9 : 0; return OK; }
int f_cuGetErrorName(int code, const char **name) { (void)code; *name = "stand-in"; return OK; }
int f_cuGetErrorString(int code, const char **text) { (void)code; *text = "stand-in"; return OK; }
int f_cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; context_alive = 1; *context = &context_alive; return OK; }
int f_cuDevicePrimaryCtxReset_v2(int device) { (void)device; violation("the context of everybody in the process is reset"); return OK; }
int f_cuCtxSetCurrent(void *context) { if (sticky) return sticky; current = context != NULL; return OK; }
int f_cuStreamCreate(void **handle, unsigned flags) {
    ENTER UNSAFE
    if (flags > 1) return INVALID;
    Stream *stream = calloc(1, sizeof *stream);
    *handle = streams[num_streams++ % 256] = stream;
    return OK;
}
int f_cuStreamDestroy_v2(void *handle) {
    ENTER
    Stream *stream = as_stream(handle);
    if (!stream) return INVALID;
    drain(stream);
    stream->dead = 1;
    return sticky;
}
int f_cuStreamSynchronize(void *handle) {
    ENTER UNSAFE
    Stream *stream = as_stream(handle);
    return stream ? drain(stream) : INVALID;
}
int f_cuStreamQuery(void *handle) {
    ENTER_QUIETLY UNSAFE
    Stream *stream = as_stream(handle);
    return !stream ? INVALID : stream->queue.count ? NOT_READY : OK;
}
int f_cuStreamIsCapturing(void *handle, int *status) {
    ENTER_QUIETLY
    Stream *stream = as_stream(handle);
    if (!stream) return INVALID;
    *status = !stream->capturing ? 0 : stream->invalid ? 2 : 1;
    return OK;
}
int f_cuMemGetInfo_v2(size_t *free, size_t *all) { ENTER *free = total - used; *all = total; return OK; }
int f_cuMemAlloc_v2(u64 *address, size_t size) { ENTER UNSAFE return size ? allocate((void **)address, size, 0) : INVALID; }
int f_cuMemHostAlloc(void **address, size_t size, unsigned flags) { (void)flags; ENTER UNSAFE return allocate(address, size, 1); }
int f_cuMemFree_v2(u64 address) { ENTER UNSAFE return release(address, 0); }
int f_cuMemFreeHost(void *address) { ENTER UNSAFE return release((u64)address, 1); }
int f_cuMemGetAddressRange_v2(u64 *start, size_t *size, u64 address) {
    ENTER_QUIETLY
    Block *block = find(address, 1);
    if (!block || block->host) return INVALID;
    *start = (u64)block->start; *size = block->size;
    return OK;
}
int f_cuMemcpyHtoDAsync_v2(u64 to, const void *from, size_t size, void *stream) {
    ENTER
    if (!is_memory(to, size, 0, "copy to the device") || !is_memory((u64)from, size, 1, "copy from the host")) return INVALID;
    Work work = {.kind = COPY, .to = (char *)to, .from = from, .size = size};
    return put(&work, stream);
}
int f_cuMemcpyDtoHAsync_v2(void *to, u64 from, size_t size, void *stream) {
    ENTER
    if (!is_memory(from, size, 0, "copy from the device") || !is_memory((u64)to, size, 1, "copy to the host")) return INVALID;
    Work work = {.kind = COPY, .to = to, .from = (char *)from, .size = size};
    return put(&work, stream);
}
int f_cuMemsetD8Async(u64 to, unsigned char byte, size_t size, void *stream) {
    ENTER_QUIETLY
    if (!is_memory(to, size, 0, "memset")) return INVALID;
    Work work = {.kind = FILL, .to = (char *)to, .size = size, .byte = byte};
    return put(&work, stream);
}
int f_cuLaunchHostFunc(void *stream, void (*function)(void *), void *data) {
    ENTER_QUIETLY
    Work work = {.kind = CALL, .function = function, .data = data};
    return put(&work, stream);
}
int f_cuStreamBeginCapture_v2(void *handle, int mode) {
    ENTER
    Stream *stream = as_stream(handle);
    if (!stream || stream->capturing) return INVALID;
    stream->capturing = 1; stream->invalid = 0; stream->mode = mode; stream->owner = pthread_self();
    stream->captured = (Queue){0};
    return OK;
}
static int num_graphs;
int rig_graphs(void) { return num_graphs; }
int f_cuStreamEndCapture(void *handle, void **graph) {
    pthread_mutex_lock(&lock);
    __attribute__((cleanup(leave))) int entered = 1;
    (void)entered;
    Stream *stream = as_stream(handle);
    if (!stream || !stream->capturing) return INVALID;
    stream->capturing = 0;
    *graph = NULL;
    if (sticky) return sticky;
    int code = injected(__func__);
    if (code) return code;
    if (stream->invalid) return INVALIDATED;
    Queue *nodes = malloc(sizeof *nodes);
    *nodes = stream->captured;
    *graph = nodes;
    num_graphs++;
    return OK;
}
int f_cuGraphInstantiateWithFlags(void **executable, void *graph, u64 flags) {
    (void)flags;
    ENTER UNSAFE
    Queue *nodes = graph, *copy = calloc(1, sizeof *copy);
    for (int i = 0; i < nodes->count; i++) append(copy, nodes->items + i);
    *executable = copy;
    num_graphs++;
    return OK;
}
/* What they return may be an error of earlier work: the graph is gone all the same. */
static void drop_graph(Queue *graph) {
    pthread_mutex_lock(&lock);
    free(graph->items); free(graph); num_graphs--;
    pthread_mutex_unlock(&lock);
}
int f_cuGraphDestroy(void *graph) { drop_graph(graph); ENTER return OK; }
int f_cuGraphExecDestroy(void *graph) { drop_graph(graph); ENTER return OK; }
int f_cuGraphLaunch(void *graph, void *handle) {
    ENTER
    Stream *stream = as_stream(handle);
    if (!stream) return INVALID;
    if (stream->capturing) return UNSUPPORTED;
    launches++;
    Queue *nodes = graph;
    for (int i = 0; i < nodes->count; i++) append(&stream->queue, nodes->items + i);
    return OK;
}
/* A cubin's bytes, by its ELF header; its host library has their FNV-1a hash as its name. */
static u64 hash(const unsigned char *image) {
    u64 segments, sections, value = 1469598103934665603ull;
    uint16_t sizes[4]; /* of a segment's header, how many; of a section's, how many */
    memcpy(&segments, image + 0x20, 8);
    memcpy(&sections, image + 0x28, 8);
    memcpy(sizes, image + 0x36, 8);
    size_t end = segments + sizes[0] * sizes[1], other = sections + sizes[2] * sizes[3];
    for (size_t i = 0; i < (end > other ? end : other); i++) value = (value ^ image[i]) * 1099511628211ull;
    return value;
}
static int num_modules;
int rig_modules(void) { return num_modules; }
int f_cuModuleLoadData(void **module, const void *image) {
    ENTER UNSAFE
    uint16_t machine;
    memcpy(&machine, (const char *)image + 18, 2);
    REQUIRE(!memcmp(image, "\x7f" "ELF", 4) && machine == 190, "the module is no cubin");
    char path[4096];
    snprintf(path, sizeof path, "%s/%016llx.so", getenv("SDRT_RIG_KERNELS"), (unsigned long long)hash(image));
    *module = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!*module) { violation("no kernels of the host: %s", dlerror()); return BAD_IMAGE; }
    num_modules++;
    return OK;
}
int f_cuModuleUnload(void *module) { ENTER (void)module; num_modules--; return OK; }
int f_cuModuleGetFunction(void **function, void *module, const char *name) {
    ENTER
    char symbol[128];
    Kernel *kernel = calloc(1, sizeof *kernel);
    snprintf(kernel->name, sizeof kernel->name, "%s", name);
    snprintf(symbol, sizeof symbol, "launch_%s", name);
    kernel->launch = (void (*)(unsigned, unsigned, void **))dlsym(module, symbol);
    snprintf(symbol, sizeof symbol, "kinds_%s", name);
    kernel->kinds = dlsym(module, symbol);
    *function = kernel;
    return kernel->launch ? OK : NOT_THERE;
}
int f_cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                     unsigned shared, void *stream, void **parameters, void **extra) {
    ENTER
    Kernel *kernel = function;
    REQUIRE(gx && gx <= 2147483647u && gy == 1 && gz == 1 && bx && bx <= 1024 && by == 1 && bz == 1 && !shared && !extra,
            "%s: %u blocks of %u threads", kernel->name, gx, bx);
    Work work = {.kind = LAUNCH, .kernel = kernel, .blocks = gx, .threads = bx};
    for (int i = 0; kernel->kinds[i]; i++)
        if (kernel->kinds[i] == 'p') work.values[i] = *(u64 *)parameters[i];
        else memcpy(&work.values[i], parameters[i], 4);
    check_arguments(&work);
    return put(&work, stream);
}

/* ---- how functions are found: by name for ctypes, through cuGetProcAddress for cuda-bindings */
static int missing(void) { violation("a function that the stand-in lacks"); return UNKNOWN; }
int cuGetProcAddress_v2(const char *symbol, void **function, int version, u64 flags, int *status) {
    (void)version; (void)flags;
    static void *self;
    Dl_info info;
    if (!self && dladdr((void *)missing, &info)) self = dlopen(info.dli_fname, RTLD_NOW);
    const char *suffixes[] = {"_v2", "", "WithFlags"};
    char name[128];
    *function = strcmp(symbol, "cuGetProcAddress") ? NULL : (void *)cuGetProcAddress_v2;
    for (int i = 0; i < 3 && !*function; i++) {
        snprintf(name, sizeof name, "f_%s%s", symbol, suffixes[i]);
        *function = dlsym(self, name);
    }
    if (status) *status = *function ? 0 : 1;
    return *function ? OK : NOT_THERE;
}
int cuGetProcAddress(const char *symbol, void **function, int version, u64 flags) { return cuGetProcAddress_v2(symbol, function, version, flags, NULL); }
int cuGetExportTable(const void **table, const void *id) { (void)id; *table = NULL; return NOT_THERE; } /* NVRTC asks */
int cuInit(unsigned flags) { return f_cuInit(flags); }
int cuDriverGetVersion(int *version) { return f_cuDriverGetVersion(version); }
int cuDeviceGetCount(int *count) { return f_cuDeviceGetCount(count); }
int cuDeviceGet(int *device, int index) { return f_cuDeviceGet(device, index); }
int cuDeviceGetName(char *name, int room, int device) { return f_cuDeviceGetName(name, room, device); }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { return f_cuDeviceTotalMem_v2(bytes, device); }
int cuDeviceGetPCIBusId(char *id, int room, int device) { return f_cuDeviceGetPCIBusId(id, room, device); }
int cuDeviceGetAttribute(int *value, int attribute, int device) { return f_cuDeviceGetAttribute(value, attribute, device); }
