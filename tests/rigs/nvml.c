/* A stand-in of NVIDIA's management library: the memory of the stand-in of the driver. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stddef.h>

typedef struct { unsigned long long total, free, used; } Memory;
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned room) { snprintf(text, room, "0.0, a stand-in"); return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **handle) { *handle = (void *)id; return 0; }
int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory) {
    (void)handle;
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    size_t (*used)(void) = driver ? (size_t (*)(void))dlsym(driver, "rig_used") : NULL;
    int (*all)(size_t *, int) = driver ? (int (*)(size_t *, int))dlsym(driver, "cuDeviceTotalMem_v2") : NULL;
    size_t total;
    if (!used || !all || all(&total, 0)) return 999;
    *memory = (Memory){total, total - used(), used()};
    return 0;
}
