// Just enough of CUDA C to run a kernel on a CPU, one block after the other. The threads of a block are fibers that take
// turns; each runs up to the next barrier. So a kernel must reach its barriers and shuffles with every thread, as
// __syncthreads and a full warp mask demand anyway.
#include <ucontext.h>

#include <cstddef>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __global__
#define __device__ static
#define __shared__ static  // one block at a time: a static is the block's
#define __launch_bounds__(threads)

struct uint3 {
    unsigned x, y, z;
};
static uint3 threadIdx, blockIdx, gridDim, blockDim;

static float __uint_as_float(unsigned u) {
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
static unsigned __float_as_uint(float f) {
    unsigned u;
    std::memcpy(&u, &f, 4);
    return u;
}
static unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const unsigned long long pool = (unsigned long long)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) result |= (unsigned)(pool >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}
static int min(int a, int b) { return a < b ? a : b; }

struct half {
    unsigned short bits;
};
static float to_float(half v) {
    _Float16 h;
    std::memcpy(&h, &v, 2);
    return (float)h;
}
static void store(half* p, float f) {
    const _Float16 h = (_Float16)f;
    std::memcpy(p, &h, 2);
}

static ucontext_t scheduler;
static std::vector<ucontext_t> fibers;
static std::vector<float> shuffled;

static void __syncthreads() { swapcontext(&fibers[threadIdx.x], &scheduler); }

static float __shfl_xor_sync(unsigned, float value, int lanes) {
    shuffled[threadIdx.x] = value;
    __syncthreads();
    const float other = shuffled[threadIdx.x ^ lanes];
    __syncthreads();
    return other;
}

static std::function<void()> thread_body;
static std::vector<char> finished;

static void fiber() {
    thread_body();
    finished[threadIdx.x] = 1;
}

static void run_block(std::vector<char>& stacks) {
    const size_t stack = stacks.size() / blockDim.x;
    finished.assign(blockDim.x, 0);
    for (unsigned t = 0; t < blockDim.x; t++) {
        getcontext(&fibers[t]);
        fibers[t].uc_stack.ss_sp = &stacks[t * stack];
        fibers[t].uc_stack.ss_size = stack;
        fibers[t].uc_link = &scheduler;
        makecontext(&fibers[t], fiber, 0);
    }
    for (bool running = true; running;) {
        running = false;
        for (unsigned t = 0; t < blockDim.x; t++) {
            if (finished[t]) continue;
            threadIdx = {t, 0, 0};
            swapcontext(&scheduler, &fibers[t]);
            running = true;
        }
    }
}

template <class... A, size_t... I>
static void unpack_and_run(void (*kernel)(A...), void** params, std::index_sequence<I...>) {
    thread_body = [=] { kernel(*(A*)params[I]...); };
    std::vector<char> stacks(blockDim.x * size_t(1 << 16));
    for (unsigned y = 0; y < gridDim.y; y++)
        for (unsigned x = 0; x < gridDim.x; x++) {
            blockIdx = {x, y, 0};
            run_block(stacks);
        }
}

// What cuLaunchKernel does: params[i] is the address of the kernel's i-th argument.
template <class... A>
static void launch(void (*kernel)(A...), const unsigned* grid, const unsigned* block, void** params) {
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    fibers.resize(blockDim.x);
    shuffled.resize(blockDim.x);
    unpack_and_run(kernel, params, std::index_sequence_for<A...>());
}
