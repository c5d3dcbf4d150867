/* Launches: what a device allows of grids, blocks and shared memory, and the order in which blocks, warps and lanes come. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <map>
#include <random>
#include <utility>

#include "tests/emulator/parts.h"

namespace emulator
{

const char *setting(const char *name, const char *otherwise)
{
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

std::string where()
{
    char text[300];
    snprintf(text, sizeof text, "kernel %s, block (%u,%u,%u), thread (%u,%u,%u)", now.kernel, blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x,
             threadIdx.y, threadIdx.z);
    return text;
}

void stop(const std::string &what)
{
    fflush(stdout);
    fprintf(stderr, "emulator: %s%s\n", now.active ? (where() + ": ").c_str() : "", what.c_str());
    abort();
}

/* ---- order ---- */

static std::mt19937 generator;

order schedule()
{
    static const order chosen = [] {
        std::string word = setting("DISTILL_EMULATE_ORDER", "forward");
        if (word == "forward") return FORWARD;
        if (word == "reverse") return REVERSE;
        if (word.rfind("random:", 0)) stop("DISTILL_EMULATE_ORDER=" + word + "; known: forward, reverse, random:SEED");
        generator.seed((unsigned)atoi(word.c_str() + strlen("random:")));
        return RANDOM;
    }();
    return chosen;
}

unsigned random_below(unsigned n) { return generator() % n; }

void arrange(std::vector<int> &turns, int n)
{
    turns.resize((size_t)n);
    for (int i = 0; i < n; i++) turns[(size_t)i] = schedule() == REVERSE ? n - 1 - i : i;
    if (schedule() == RANDOM) std::shuffle(turns.begin(), turns.end(), generator);
}

/* Off by up to 2^-22, which PTX allows; always the same for the same number, as on a device */
float approximate(float exact)
{
    static const bool noise = *setting("DISTILL_EMULATE_NOISE", "");
    if (!noise || !isfinite(exact)) return exact;
    uint32_t hash;
    memcpy(&hash, &exact, sizeof hash);
    hash = (hash ^ hash >> 15) * 0x2c1b3c6du;
    hash = (hash ^ hash >> 12) * 0x297a2d39u;
    return exact * (1 + ((float)(hash >> 16) / 32768 - 1) * 0x1p-22f);
}

/* ---- a launch ---- */

static std::map<const void *, int> allowed_dynamic; /* by cudaFuncSetAttribute */
static cudaError_t last_error = cudaSuccess;
static void *dynamic_memory;

void *dynamic_shared_memory() { return dynamic_memory; }
void allow_dynamic_shared(const void *kernel, int bytes) { allowed_dynamic[kernel] = bytes; }
cudaError_t take_last_error() { return std::exchange(last_error, cudaSuccess); }

void check_launch_bounds(int most)
{
    if (now.threads > most) stop(std::to_string(now.threads) + " threads in a block, more than the kernel's launch bounds, " + std::to_string(most));
}

static void refuse(cudaError_t error, const char *kernel, const std::string &what)
{
    fprintf(stderr, "emulator: kernel %s: %s\n", kernel, what.c_str());
    last_error = error;
}

void launch_body(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared, void (*body)(void *), void *context)
{
    if (now.active) stop("a launch from within a kernel");
    size_t threads = (size_t)block.x * block.y * block.z, blocks = (size_t)grid.x * grid.y * grid.z;
    if (!blocks || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || !threads || threads > THREADS_MOST || block.z > 64) {
        char text[200];
        snprintf(text, sizeof text, "no device runs a grid of %u x %u x %u blocks of %u x %u x %u threads", grid.x, grid.y, grid.z, block.x, block.y,
                 block.z);
        return refuse(cudaErrorInvalidConfiguration, name, text);
    }
    auto allowed = allowed_dynamic.find(kernel);
    size_t most = allowed == allowed_dynamic.end() ? STATIC_SHARED_MOST : (size_t)allowed->second;
    if (shared > most)
        return refuse(cudaErrorInvalidValue, name,
                      std::to_string(shared) + " bytes of dynamic shared memory where " + std::to_string(most) + " are allowed");
    memory_give_back(dynamic_memory);
    dynamic_memory = memory_take(shared, 1024, true); /* exactly what was asked for, so that what lies behind it is not touched unseen */
    now.active = true;
    now.kernel = name;
    now.kernel_number++;
    now.threads = (int)threads;
    now.body = body;
    now.context = context;
    gridDim = grid;
    blockDim = block;
    std::vector<int> turns;
    arrange(turns, (int)blocks);
    for (int i : turns) {
        if (shared) memset(dynamic_memory, 0xff, shared);
        run_block({(unsigned)i % grid.x, (unsigned)i / grid.x % grid.y, (unsigned)i / grid.x / grid.y});
        if (now.static_shared > STATIC_SHARED_MOST) stop(std::to_string(now.static_shared) + " bytes of static shared memory, more than 48 KiB");
        if (now.static_shared + shared > (most > STATIC_SHARED_MOST ? SHARED_MOST : STATIC_SHARED_MOST))
            stop(std::to_string(now.static_shared) + " bytes of static and " + std::to_string(shared) +
                 " of dynamic shared memory are more than a block may have");
    }
    memory_end_of_launch();
    now.active = false;
}

} // namespace emulator
