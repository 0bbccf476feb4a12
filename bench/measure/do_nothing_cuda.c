// A libcuda whose calls succeed and do nothing: enough for Triton's own driver, loader and launcher.
//
// It keeps what it is given, for whoever asks afterwards: the machine code of every module, the
// kernels taken from it, and every launch. A launch that a real driver would refuse for its sizes is
// refused here too.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2 };

// ---------------------------------------------------------------------------------------------------
// The pretended chip, set from Python before the first kernel is loaded.

static int chip_major = 9, chip_minor = 0, multiprocessors = 132;
static int shared_a_block = 232448, shared_a_multiprocessor = 233472;

void pretend(int major, int minor, int sms, int shared_block, int shared_sm) {
  chip_major = major, chip_minor = minor, multiprocessors = sms;
  shared_a_block = shared_block, shared_a_multiprocessor = shared_sm;
}

// ---------------------------------------------------------------------------------------------------
// What was loaded and launched.

typedef struct { void *image; size_t size; } Module;
typedef struct { Module *module; char name[256]; int shared_limit; } Function;
typedef struct { Function *function; unsigned grid[3], block[3], shared; } Launch;

enum { KEPT_LAUNCHES = 1 << 16, DEFAULT_SHARED = 48 * 1024 };
static Launch kept[KEPT_LAUNCHES];
static long launched, refused;

long launch_count(void) { return launched; }
long refused_count(void) { return refused; }
void forget_launches(void) { launched = refused = 0; }
const char *launch_name(long i) { return kept[i].function->name; }
const void *launch_image(long i) { return kept[i].function->module->image; }
size_t launch_image_size(long i) { return kept[i].function->module->size; }
void launch_sizes(long i, unsigned *sizes) {
  memcpy(sizes, kept[i].grid, sizeof kept[i].grid);
  memcpy(sizes + 3, kept[i].block, sizeof kept[i].block);
  sizes[6] = kept[i].shared;
}

// The bytes of an ELF file for 64 bits, from its headers.
static size_t elf_size(const uint8_t *file) {
  uint64_t programs = *(const uint64_t *)(file + 0x20), sections = *(const uint64_t *)(file + 0x28);
  uint16_t program_size = *(const uint16_t *)(file + 0x36), programs_n = *(const uint16_t *)(file + 0x38);
  uint16_t section_size = *(const uint16_t *)(file + 0x3a), sections_n = *(const uint16_t *)(file + 0x3c);
  size_t end = 64, candidate = programs + (size_t)program_size * programs_n;
  if (candidate > end) end = candidate;
  candidate = sections + (size_t)section_size * sections_n;
  if (candidate > end) end = candidate;
  for (int i = 0; i < sections_n; i++) {
    const uint8_t *section = file + sections + (size_t)i * section_size;
    uint32_t type = *(const uint32_t *)(section + 4);
    candidate = *(const uint64_t *)(section + 0x18) + *(const uint64_t *)(section + 0x20);
    if (type != 8 /* SHT_NOBITS */ && candidate > end) end = candidate;
  }
  return end;
}

Result cuModuleLoadData(void **module, const void *image) {
  if (memcmp(image, "\177ELF", 4) != 0) return INVALID_VALUE;
  Module *loaded = malloc(sizeof *loaded);
  loaded->size = elf_size(image);
  loaded->image = malloc(loaded->size);
  memcpy(loaded->image, image, loaded->size);
  *module = loaded;
  return SUCCESS;
}
Result cuModuleUnload(void *module) { return SUCCESS; }

Result cuModuleGetFunction(void **function, void *module, const char *name) {
  Function *found = calloc(1, sizeof *found);
  found->module = module;
  found->shared_limit = DEFAULT_SHARED;
  strncpy(found->name, name, sizeof found->name - 1);
  *function = found;
  return SUCCESS;
}

typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned attributes_n;
} Config;

Result cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
  const unsigned *grid = config->grid, *block = config->block;
  unsigned long threads = (unsigned long)block[0] * block[1] * block[2];
  int sound = grid[0] > 0 && grid[0] <= 2147483647u && grid[1] > 0 && grid[1] <= 65535 &&
              grid[2] > 0 && grid[2] <= 65535 && threads > 0 && threads <= 1024 &&
              (int)config->shared <= ((Function *)function)->shared_limit;
  if (!sound) {
    refused++;
    return INVALID_VALUE;
  }
  if (launched < KEPT_LAUNCHES) {
    Launch *launch = &kept[launched];
    launch->function = function;
    memcpy(launch->grid, grid, sizeof launch->grid);
    memcpy(launch->block, block, sizeof launch->block);
    launch->shared = config->shared;
  }
  launched++;
  return SUCCESS;
}

// ---------------------------------------------------------------------------------------------------
// Functions: their attributes are those of a kernel that takes little, for machine code is read with
// better tools. A limit of shared memory above the default has to be asked for, as of a real driver.

Result cuFuncGetAttribute(int *value, int attribute, void *function) {
  enum { MAX_THREADS = 0, REGISTERS = 4 };
  *value = attribute == MAX_THREADS ? 1024 : attribute == REGISTERS ? 32 : 0;
  return SUCCESS;
}
Result cuFuncSetAttribute(void *function, int attribute, int value) {
  enum { MAX_DYNAMIC_SHARED = 8, NON_PORTABLE_CLUSTER = 14 };
  if (attribute == NON_PORTABLE_CLUSTER) return SUCCESS;
  if (attribute != MAX_DYNAMIC_SHARED || value > shared_a_block) return INVALID_VALUE;
  ((Function *)function)->shared_limit = value;
  return SUCCESS;
}
Result cuFuncSetCacheConfig(void *function, int config) { return SUCCESS; }

// ---------------------------------------------------------------------------------------------------
// One device, one context.

Result cuInit(unsigned flags) { return SUCCESS; }
Result cuDeviceGetCount(int *count) { return *count = 1, SUCCESS; }
Result cuDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
Result cuCtxGetCurrent(void **context) { return *context = (void *)1, SUCCESS; }
Result cuCtxSetCurrent(void *context) { return SUCCESS; }
Result cuCtxGetDevice(int *device) { return *device = 0, SUCCESS; }
Result cuCtxGetLimit(size_t *value, int limit) { return *value = 1 << 20, SUCCESS; }
Result cuCtxSetLimit(int limit, size_t value) { return SUCCESS; }
Result cuDeviceGet(int *device, int number) { return *device = number, SUCCESS; }
Result cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)1, SUCCESS; }
Result cuDevicePrimaryCtxRelease(int device) { return SUCCESS; }
Result cuStreamIsCapturing(void *stream, int *status) { return *status = 0, SUCCESS; }
Result cuGetErrorString(int error, const char **text) {
  return *text = "refused by the driver that does nothing", SUCCESS;
}

Result cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
  case 10: *value = 32; break;                       // warp size
  case 12: *value = 65536; break;                    // registers a block
  case 13: *value = 1980000; break;                  // clock, kHz
  case 16: *value = multiprocessors; break;
  case 36: *value = 3201000; break;                  // memory clock, kHz
  case 37: *value = 6144; break;                     // memory bus, bits
  case 75: *value = chip_major; break;
  case 76: *value = chip_minor; break;
  case 81: *value = shared_a_multiprocessor; break;
  case 97: *value = shared_a_block; break;           // with opting in
  default: *value = 0;
  }
  return SUCCESS;
}

Result cuOccupancyMaxActiveClusters(int *clusters, void *function, void *config) {
  return *clusters = 1, SUCCESS;
}

// Every address is one of the device.
Result cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) {
  *(uint64_t *)data = pointer;
  return SUCCESS;
}
Result cuPointerGetAttributes(unsigned n, int *attributes, void **data, uint64_t pointer) {
  enum { DEVICE_POINTER = 3 };
  for (unsigned i = 0; i < n; i++) {
    if (attributes[i] == DEVICE_POINTER) *(uint64_t *)data[i] = pointer;
    else *(unsigned *)data[i] = 0;
  }
  return SUCCESS;
}

// Descriptors of tensors are made by the host alone; nothing reads them.
Result cuTensorMapEncodeTiled(void) { return SUCCESS; }
Result cuTensorMapEncodeIm2col(void) { return SUCCESS; }
