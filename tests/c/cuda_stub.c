/* A CUDA driver without a GPU: what cuda.bindings finds as libcuda.so.1 in the tests (gpu_stub.py).
 *
 * It keeps the driver's rules: a stack of contexts per thread, modules and functions that belong to a context, loading
 * forbidden to a thread while a stream is captured unless it says otherwise. A launch's parameters are read as the
 * driver reads them and given to a callback. Calls are counted.
 *
 * An address of a function that isn't in FUNCTIONS is not to be had (CUDA_ERROR_NOT_FOUND): of none that waits.
 * Functions named stub_ tell it what to be; stub_reset makes it a driver that finds no device.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    STREAM_CAPTURE_UNSUPPORTED = 900,
};

enum {
    MAX_DEVICES = 8,
    MAX_STACK = 64,
    MAX_BLOCKS = 0x7FFFFFFF,
    MAX_THREADS = 1024,
    MAX_PARAMETERS = 4096,
    DRIVER_VERSION = 13000,
    ATTRIBUTE_SMS = 16,
    ATTRIBUTE_MAJOR = 75,
    ATTRIBUTE_MINOR = 76,
    POINTER_DEVICE_ORDINAL = 9,
    CAPTURE_RELAXED = 2,
    PARAM_END = 0,
    PARAM_BUFFER_POINTER = 1,
    PARAM_BUFFER_SIZE = 2,
};

/* clang-format off */
#define FUNCTIONS(X) \
    X(cuInit) X(cuDriverGetVersion) X(cuDeviceGetCount) X(cuDeviceGet) X(cuDeviceGetAttribute) \
    X(cuDevicePrimaryCtxRetain) X(cuCtxGetCurrent) X(cuCtxPushCurrent) X(cuCtxPopCurrent) \
    X(cuThreadExchangeStreamCaptureMode) X(cuModuleLoadData) X(cuModuleGetFunction) X(cuLaunchKernel) \
    X(cuPointerGetAttribute) X(cuMemcpyDtoDAsync) X(cuMemsetD32Async)
/* clang-format on */

enum {
#define X(name) AT_##name,
    FUNCTIONS(X)
#undef X
        COUNT
};

static const char *const names[COUNT] = {
#define X(name) #name,
    FUNCTIONS(X)
#undef X
};

/* ---- state ---- */

typedef struct {
    int major, minor, sms, retained;
} device_t;

typedef struct module {
    struct module *next;
    int device;
    char *image;
} module_t;

typedef struct function {
    struct function *next;
    module_t *module;
    char *name;
} function_t;

typedef struct memory {
    struct memory *next;
    uintptr_t first, size;
    int device;
} memory_t;

typedef struct {
    function_t *function;
    uint64_t device;
    const char *image, *name;
    uint64_t grid[3], block[3], shared, stream;
    const void *parameters;
    uint64_t parameter_bytes;
} launch_t;

typedef CUresult (*on_launch_t)(const launch_t *);
typedef void (*on_call_t)(const char *);

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of the three lists */
static module_t *modules;
static function_t *functions;
static memory_t *memories;
static device_t devices[MAX_DEVICES]; /* their addresses are the primary contexts' handles */
static int device_count;
static atomic_int initialised, capturing;
static atomic_ulong counts[COUNT];
static atomic_int failures[COUNT];
static _Atomic(on_launch_t) on_launch;
static _Atomic(on_call_t) on_call;

/* A thread's state is of the last reset or void. */
static atomic_uint reset_count;
static _Thread_local struct {
    unsigned reset;
    int depth, capture_mode;
    device_t *stack[MAX_STACK];
} thread_state;

static void renew_thread(void) {
    if (thread_state.reset != reset_count) {
        memset(&thread_state, 0, sizeof thread_state);
        thread_state.reset = reset_count;
    }
}

static device_t *current(void) { return thread_state.depth ? thread_state.stack[thread_state.depth - 1] : NULL; }

static int is_context(const device_t *context) {
    return context >= devices && context < devices + device_count && context->retained;
}

/* What every call begins with. */
static CUresult enter(int at) {
    renew_thread();
    counts[at]++;
    on_call_t observer = on_call;
    if (observer) observer(names[at]);
    if (failures[at]) return failures[at];
    return at == AT_cuInit || at == AT_cuDriverGetVersion || initialised ? SUCCESS : NOT_INITIALIZED;
}
#define ENTER(name)                                                                                                    \
    do {                                                                                                               \
        CUresult status_ = enter(AT_##name);                                                                           \
        if (status_) return status_;                                                                                   \
    } while (0)

/* ---- control ---- */

static void forget_memory(void) {
    while (memories) {
        memory_t *next = memories->next;
        free(memories);
        memories = next;
    }
}

void stub_reset(void) {
    pthread_mutex_lock(&lock);
    while (functions) {
        function_t *next = functions->next;
        free(functions->name);
        free(functions);
        functions = next;
    }
    while (modules) {
        module_t *next = modules->next;
        free(modules->image);
        free(modules);
        modules = next;
    }
    forget_memory();
    memset(devices, 0, sizeof devices);
    device_count = 0;
    initialised = capturing = 0;
    for (int at = 0; at < COUNT; at++) counts[at] = 0;
    for (int at = 0; at < COUNT; at++) failures[at] = SUCCESS;
    on_launch = NULL;
    on_call = NULL;
    reset_count++;
    pthread_mutex_unlock(&lock);
}

int stub_add_device(int major, int minor, int sms) {
    if (device_count == MAX_DEVICES) return -1;
    devices[device_count] = (device_t){major, minor, sms, 0};
    return device_count++;
}

/* Addresses that cuPointerGetAttribute knows. */
void stub_add_memory(uintptr_t first, uintptr_t size, int device) {
    memory_t *memory = malloc(sizeof *memory);
    if (!memory) abort();
    pthread_mutex_lock(&lock);
    *memory = (memory_t){memories, first, size, device};
    memories = memory;
    pthread_mutex_unlock(&lock);
}

void stub_forget_memory(void) {
    pthread_mutex_lock(&lock);
    forget_memory();
    pthread_mutex_unlock(&lock);
}

/* Calls of a function return this from now on; 0 ends it. */
int stub_fail(const char *name, CUresult status) {
    for (int at = 0; at < COUNT; at++)
        if (!strcmp(names[at], name)) {
            failures[at] = status;
            return 0;
        }
    return -1;
}

/* While a stream is captured, loading is forbidden to threads that haven't relaxed that. */
void stub_set_capturing(int now) { capturing = now; }
void stub_on_launch(on_launch_t callback) { on_launch = callback; }
void stub_on_call(on_call_t callback) { on_call = callback; }
int stub_function_count(void) { return COUNT; }
const char *stub_name(int at) { return names[at]; }
unsigned long stub_calls(int at) { return counts[at]; }
int stub_retained(int device) { return devices[device].retained; }
int stub_stack_depth(void) { return renew_thread(), thread_state.depth; }
int stub_capture_mode(void) { return renew_thread(), thread_state.capture_mode; }

/* ---- the driver ---- */

CUresult cuInit(unsigned flags) {
    ENTER(cuInit);
    if (flags) return INVALID_VALUE;
    if (!device_count) return NO_DEVICE;
    initialised = 1;
    return SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
    ENTER(cuDriverGetVersion);
    *version = DRIVER_VERSION;
    return SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
    ENTER(cuDeviceGetCount);
    *count = device_count;
    return SUCCESS;
}

CUresult cuDeviceGet(int *device, int ordinal) {
    ENTER(cuDeviceGet);
    if (ordinal < 0 || ordinal >= device_count) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
    ENTER(cuDeviceGetAttribute);
    if (device < 0 || device >= device_count) return INVALID_DEVICE;
    switch (attribute) {
    case ATTRIBUTE_SMS: *value = devices[device].sms; return SUCCESS;
    case ATTRIBUTE_MAJOR: *value = devices[device].major; return SUCCESS;
    case ATTRIBUTE_MINOR: *value = devices[device].minor; return SUCCESS;
    default: return INVALID_VALUE;
    }
}

CUresult cuDevicePrimaryCtxRetain(device_t **context, int device) {
    ENTER(cuDevicePrimaryCtxRetain);
    if (device < 0 || device >= device_count) return INVALID_DEVICE;
    devices[device].retained++;
    *context = &devices[device];
    return SUCCESS;
}

CUresult cuCtxGetCurrent(device_t **context) {
    ENTER(cuCtxGetCurrent);
    *context = current();
    return SUCCESS;
}

CUresult cuCtxPushCurrent(device_t *context) {
    ENTER(cuCtxPushCurrent);
    if (!is_context(context) || thread_state.depth == MAX_STACK) return INVALID_CONTEXT;
    thread_state.stack[thread_state.depth++] = context;
    return SUCCESS;
}

CUresult cuCtxPopCurrent(device_t **context) {
    ENTER(cuCtxPopCurrent);
    if (!thread_state.depth) return INVALID_CONTEXT;
    device_t *popped = thread_state.stack[--thread_state.depth];
    if (context) *context = popped;
    return SUCCESS;
}

CUresult cuThreadExchangeStreamCaptureMode(int *mode) {
    ENTER(cuThreadExchangeStreamCaptureMode);
    if (*mode < 0 || *mode > CAPTURE_RELAXED) return INVALID_VALUE;
    int before = thread_state.capture_mode;
    thread_state.capture_mode = *mode;
    *mode = before;
    return SUCCESS;
}

/* The one image is PTX: text that ends in 0. */
CUresult cuModuleLoadData(module_t **module, const char *image) {
    ENTER(cuModuleLoadData);
    if (!current()) return INVALID_CONTEXT;
    if (capturing && thread_state.capture_mode != CAPTURE_RELAXED) return STREAM_CAPTURE_UNSUPPORTED;
    if (!strstr(image, ".entry")) return INVALID_IMAGE;
    module_t *loaded = malloc(sizeof *loaded);
    char *copy = strdup(image);
    if (!loaded || !copy) return free(loaded), free(copy), OUT_OF_MEMORY;
    pthread_mutex_lock(&lock);
    *loaded = (module_t){modules, (int)(current() - devices), copy};
    *module = modules = loaded;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

static int has_entry(const char *image, const char *name) {
    size_t length = strlen(name);
    for (const char *at = image; (at = strstr(at, ".entry"));) {
        at += strlen(".entry");
        at += strspn(at, " \t\r\n");
        if (!strncmp(at, name, length) && strchr(" \t\r\n(", at[length])) return 1;
    }
    return 0;
}

CUresult cuModuleGetFunction(function_t **function, module_t *module, const char *name) {
    ENTER(cuModuleGetFunction);
    CUresult status = INVALID_HANDLE;
    pthread_mutex_lock(&lock);
    for (module_t *known = modules; known; known = known->next)
        if (known == module) status = has_entry(module->image, name) ? SUCCESS : NOT_FOUND;
    if (!status) {
        function_t *found = malloc(sizeof *found);
        if (!found) abort();
        *found = (function_t){functions, module, strdup(name)};
        *function = functions = found;
    }
    pthread_mutex_unlock(&lock);
    return status;
}

/* CU_LAUNCH_PARAM_ pairs up to the end. */
static CUresult read_extra(void **extra, launch_t *launch) {
    const size_t *size = NULL;
    for (int items = 0; items < 2 && extra[0] != (void *)PARAM_END; items++, extra += 2) {
        if (extra[0] == (void *)PARAM_BUFFER_POINTER)
            launch->parameters = extra[1];
        else if (extra[0] == (void *)PARAM_BUFFER_SIZE)
            size = extra[1];
        else
            return INVALID_VALUE;
    }
    if (extra[0] != (void *)PARAM_END || !launch->parameters || !size || *size > MAX_PARAMETERS) return INVALID_VALUE;
    launch->parameter_bytes = *size;
    return SUCCESS;
}

CUresult cuLaunchKernel(function_t *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, void *stream, void **parameters,
                        void **extra) {
    ENTER(cuLaunchKernel);
    launch_t launch = {.function = function,
                       .grid = {grid_x, grid_y, grid_z},
                       .block = {block_x, block_y, block_z},
                       .shared = shared,
                       .stream = (uintptr_t)stream};
    CUresult status = INVALID_HANDLE;
    pthread_mutex_lock(&lock);
    for (function_t *known = functions; known; known = known->next)
        if (known == function) {
            launch.device = (uint64_t)function->module->device;
            launch.image = function->module->image;
            launch.name = function->name;
            status = current() == &devices[launch.device] ? SUCCESS : INVALID_CONTEXT;
        }
    pthread_mutex_unlock(&lock);
    if (status) return status;
    if (parameters || !extra) return INVALID_VALUE; /* the stub doesn't know their types */
    for (int axis = 0; axis < 3; axis++)
        if (!launch.grid[axis] || !launch.block[axis]) return INVALID_VALUE;
    if (grid_x > MAX_BLOCKS || grid_y > 65535 || grid_z > 65535) return INVALID_VALUE;
    if (launch.block[0] * launch.block[1] * launch.block[2] > MAX_THREADS) return INVALID_VALUE;
    status = read_extra(extra, &launch);
    on_launch_t callback = on_launch;
    return status || !callback ? status : callback(&launch);
}

CUresult cuPointerGetAttribute(void *value, int attribute, uintptr_t address) {
    ENTER(cuPointerGetAttribute);
    if (attribute != POINTER_DEVICE_ORDINAL) return INVALID_VALUE;
    CUresult status = INVALID_VALUE; /* the driver's answer for the host's memory too */
    pthread_mutex_lock(&lock);
    for (memory_t *memory = memories; memory; memory = memory->next)
        if (address - memory->first < memory->size) {
            *(int *)value = memory->device;
            status = SUCCESS;
        }
    pthread_mutex_unlock(&lock);
    return status;
}

CUresult cuMemcpyDtoDAsync(void *to, const void *from, size_t bytes, void *stream) {
    (void)stream;
    ENTER(cuMemcpyDtoDAsync);
    if (!current()) return INVALID_CONTEXT;
    memcpy(to, from, bytes);
    return SUCCESS;
}

CUresult cuMemsetD32Async(uint32_t *to, uint32_t value, size_t count, void *stream) {
    (void)stream;
    ENTER(cuMemsetD32Async);
    if (!current()) return INVALID_CONTEXT;
    for (size_t i = 0; i < count; i++) to[i] = value;
    return SUCCESS;
}

/* cuda.bindings asks for names without _v2 and says which version it means. */
CUresult cuGetProcAddress_v2(const char *name, void **address, int version, uint64_t flags, int *found) {
    (void)version, (void)flags;
    *address = NULL;
#define X(known)                                                                                                       \
    if (!strcmp(name, #known)) *address = (void *)(uintptr_t)known;
    FUNCTIONS(X)
#undef X
    if (found) *found = *address ? 0 : 1;
    return *address ? SUCCESS : NOT_FOUND;
}
