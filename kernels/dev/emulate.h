// Runs a CUDA kernel on the host: one fiber per CUDA thread, switched by hand.
//
// emulate.py pastes this file, then a .cu file, then `run`, the entry it calls. A launch goes
// through its blocks one after the other and through a block's threads in turns: a thread runs
// until it waits at a barrier. What would pass unnoticed on a GPU is made to fail here:
//   - arrays are copies between pages that must not be touched; so is shared memory, and it holds
//     NaN when a block begins;
//   - an asynchronous copy lands when its thread waits for it; until then its place holds NaN;
//   - an operand of the tensor cores that is not rounded to TF32 is an error, and what they add up
//     is cut off to a float, not rounded, as hardware does;
//   - blocks and threads run in ascending, descending or shuffled order: emulate.py compares bits;
//   - a barrier that not all threads reach, or not all at the same line, is an error.
#include <csetjmp>
#include <csignal>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <algorithm>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>
#include <sys/mman.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

using std::max;
using std::min;

struct uint3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b)
{
    return (unsigned __int128)a * b >> 64;
}
inline unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }

static uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

enum State { READY, AT_BARRIER, AT_WARP, DONE };

struct Copy { float* to; const float* from; int count; bool valid; };

struct Fiber {
    jmp_buf at;
    ucontext_t first;
    bool begun = false;
    State state = READY;
    int line = 0, turn = 0;                                 // turn: of warp operations, 0 or 1
    std::vector<std::vector<Copy>> copies;                  // groups, the last one still open
};

const size_t STACK = 64 << 10, PAGE = 4096;
static std::vector<Fiber> fibers;
static int current;
static jmp_buf scheduler;
static sigjmp_buf fault;
static void* fault_address;
static std::function<void()> body;                          // the kernel with its arguments
static char* shared;
static size_t shared_size;
static unsigned exchange[32][2][32][6];                     // for each warp, turn and lane
static char message[400];

// A thread stops here until the scheduler lets it go on.
inline void stop(State state, int line)
{
    fibers[current].state = state;
    fibers[current].line = line;
    if (!_setjmp(fibers[current].at)) _longjmp(scheduler, 1);
}

inline void live()
{
    for (;;) {
        body();
        stop(DONE, 0);
    }
}

inline void resume(int i)
{
    current = i;
    threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    if (_setjmp(scheduler)) return;
    if (fibers[i].begun) _longjmp(fibers[i].at, 1);
    fibers[i].begun = true;
    setcontext(&fibers[i].first);
}

// `count` numbers in the order asked for: 0 ascending, 1 descending, 2 and more shuffled
inline std::vector<int> arranged(int count, int order, unsigned seed)
{
    std::vector<int> list(count);
    for (int i = 0; i < count; i++) list[i] = order == 1 ? count - 1 - i : i;
    unsigned long long state = seed + order;
    for (int i = count - 1; order > 1 && i > 0; i--) {
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        std::swap(list[i], list[(state >> 33) % (i + 1)]);
    }
    return list;
}

inline void describe(const char* what, int thread, int line)
{
    const int n = snprintf(message, sizeof message, "%s in block (%u, %u, %u), thread (%u, %u, %u)",
                           what, blockIdx.x, blockIdx.y, blockIdx.z, thread % blockDim.x,
                           thread / blockDim.x % blockDim.y, thread / blockDim.x / blockDim.y);
    if (line) snprintf(message + n, sizeof message - n, ", line %d", line);
}

// Ends the launch: this thread has done what a GPU would not mind.
inline void fail(const char* what, int line)
{
    describe(what, current, line);
    siglongjmp(fault, -1);
}

// Lets the threads first … last - 1 go on if all of them wait in `state` at one line.
inline bool release(int first, int last, State state)
{
    for (int i = first; i < last; i++)
        if (fibers[i].state != state || fibers[i].line != fibers[first].line) return false;
    for (int i = first; i < last; i++) fibers[i].state = READY;
    return true;
}

// Runs one block; false with `message` if its threads cannot all reach the end.
inline bool run_block(const std::vector<int>& turns)
{
    const int count = fibers.size();
    memset(shared, 0xff, shared_size);                      // NaN
    for (Fiber& fiber : fibers) {
        fiber.state = READY;
        fiber.turn = 0;
        fiber.copies.assign(1, {});
    }
    for (bool moved = true; moved;) {
        moved = false;
        for (int i : turns)
            if (fibers[i].state == READY) {
                resume(i);
                moved = true;
            }
        for (int warp = 0; warp < count; warp += 32)
            moved |= release(warp, min(count, warp + 32), AT_WARP);
        moved |= release(0, count, AT_BARRIER);
    }
    for (int i = 0; i < count; i++)
        if (fibers[i].state != DONE) {
            describe(fibers[i].state == AT_WARP ? "a warp operation that not all lanes reach"
                     : "a barrier that not all threads reach", i, fibers[i].line);
            return false;
        }
    return true;
}

// An array between two pages that must not be touched, against the one at its end or its start.
struct Guarded {
    char *pages, *data;
    size_t size, whole;

    Guarded(const void* from, size_t bytes, size_t alignment, bool at_end) : size(bytes)
    {
        const size_t room = (bytes + alignment + PAGE - 1) / PAGE * PAGE;
        whole = room + 2 * PAGE;
        pages = (char*)mmap(nullptr, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        mprotect(pages + PAGE, room, PROT_READ | PROT_WRITE);
        data = pages + PAGE + alignment;
        if (at_end) data += (room - alignment - bytes) / 16 * 16;
        memset(pages + PAGE, 0xff, room);                   // NaN, before and after the array
        if (from) memcpy(data, from, bytes);
    }
    bool intact() const                                     // nothing was written beside it
    {
        for (char* at = pages + PAGE; at < pages + whole - PAGE; at++)
            if ((at < data || at >= data + size) && *at != char(0xff)) return false;
        return true;
    }
    ~Guarded() { munmap(pages, whole); }
    Guarded(const Guarded&) = delete;
};

inline void on_fault(int number, siginfo_t* info, void*)
{
    fault_address = info->si_addr;
    siglongjmp(fault, number);
}

inline void copies_land(size_t groups_left)
{
    auto& groups = fibers[current].copies;
    while (groups.size() > groups_left + 1) {
        for (const Copy& copy : groups.front())
            for (int i = 0; i < copy.count; i++) copy.to[i] = copy.valid ? copy.from[i] : 0;
        groups.erase(groups.begin());
    }
}

}  // namespace emulated

// --------------------------------------------------- what kernels call: barriers and shuffles

#define __syncthreads() emulated::stop(emulated::AT_BARRIER, __LINE__)

// All lanes of a warp write a row of the board that this returns, then wait at warp_barrier. The
// next operation takes the other board: some lanes may still be reading this one.
inline auto& exchange_board()
{
    int& turn = emulated::fibers[emulated::current].turn;
    turn = 1 - turn;
    return emulated::exchange[emulated::current / 32][turn];
}
inline void warp_barrier(int line) { emulated::stop(emulated::AT_WARP, line); }

template <class T>
inline T __shfl_sync(unsigned, T x, int from, int line = __builtin_LINE())
{
    static_assert(sizeof x == 4, "shuffles move four bytes");
    auto& lanes = exchange_board();
    memcpy(lanes[emulated::current % 32], &x, 4);
    warp_barrier(line);
    memcpy(&x, lanes[from], 4);
    return x;
}

template <class T>
inline T __shfl_xor_sync(unsigned all, T x, int mask, int line = __builtin_LINE())
{
    return __shfl_sync(all, x, emulated::current % 32 ^ mask, line);
}

// ------------------------------------------------------- the host versions of ptx.cuh's functions

inline float* shared_memory() { return (float*)emulated::shared; }

template <int BYTES>
inline void copy_async(float* to, const float* from, bool valid)
{
    if (BYTES == 16) *(float4*)to = make_float4(NAN, NAN, NAN, NAN);
    else *to = NAN;
    if (BYTES == 16 && valid) (void)*(volatile const float*)&((const float4*)from)->x;
    emulated::fibers[emulated::current].copies.back().push_back({to, from, BYTES / 4, valid});
}

inline void copy_commit() { emulated::fibers[emulated::current].copies.push_back({}); }

template <int GROUPS>
inline void copy_wait() { emulated::copies_land(GROUPS); }

inline unsigned to_tf32(float x)
{
    return x == x ? (__float_as_uint(x) + 0x1000) & 0xffffe000 : 0x7fffffff;
}

inline void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                     int line = __builtin_LINE())
{
    const int thread = emulated::current, g = thread % 32 / 4, t = thread % 4;
    auto& lanes = exchange_board();
    for (int i = 0; i < 6; i++) {
        const unsigned bits = i < 4 ? a[i] : b[i - 4];
        if (bits & 0x1fff && __uint_as_float(bits) == __uint_as_float(bits))    // a NaN may
            emulated::fail("an operand of a tensor core that is not rounded to TF32", line);
        lanes[thread % 32][i] = bits;
    }
    warp_barrier(line);
    for (int i = 0; i < 4; i++) {                           // row g or g + 8, column 2t or 2t + 1
        double sum = d[i];
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++)
            sum += double(__uint_as_float(lanes[g * 4 + k % 4][i / 2 + k / 4 * 2])) *
                   __uint_as_float(lanes[(2 * t + i % 2) * 4 + k % 4][4 + k / 4]);
        d[i] = sum;
        if (std::abs(double(d[i])) > std::abs(sum)) d[i] = std::nextafter(d[i], 0.0f);
    }
}

// -------------------------------------------------------------------------------- the launch

namespace emulated {

struct Argument { void* at; size_t bytes; };                // bytes: of an array; 0 for a number

static void* values[64];                                    // where each argument of the kernel is

// Runs `body` on copies of its arrays and leaves them in `results`, or says what is wrong.
inline const char* run(int count, const Argument* arguments, const unsigned* grid,
                       const unsigned* block, size_t bytes, int order, void** results)
{
    static std::vector<Guarded*> arrays;
    static void* pointers[64];
    arrays.assign(count, nullptr);
    for (int i = 0; i < count; i++) {
        values[i] = arguments[i].at;
        if (!arguments[i].bytes) continue;
        int same = 0;                                       // an array that is passed twice
        while (arguments[same].at != arguments[i].at) same++;
        if (same == i)
            arrays[i] = new Guarded(arguments[i].at, arguments[i].bytes,
                                    (size_t)arguments[i].at % 16, order != 1);
        pointers[i] = arrays[same]->data;
        values[i] = &pointers[i];
    }

    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    const int threads = block[0] * block[1] * block[2], blocks = grid[0] * grid[1] * grid[2];
    static char* const stacks = (char*)mmap(nullptr, STACK * 1025, PROT_READ | PROT_WRITE,
                                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    static Guarded* memory;
    memory = new Guarded(nullptr, (bytes + 15) / 16 * 16, 0, true);
    shared = memory->data;
    shared_size = memory->size;
    fibers = std::vector<Fiber>(threads);
    for (int i = 0; i < threads; i++) {
        getcontext(&fibers[i].first);
        fibers[i].first.uc_stack.ss_sp = stacks + STACK * i;
        fibers[i].first.uc_stack.ss_size = STACK;
        makecontext(&fibers[i].first, live, 0);
    }
    stack_t alternate = {}, before = {};
    alternate.ss_sp = stacks + STACK * 1024;                 // a fault on a fiber's stack, too
    alternate.ss_size = STACK;
    sigaltstack(&alternate, &before);
    struct sigaction action = {}, saved[3];
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    const int signals[3] = {SIGSEGV, SIGBUS, SIGILL};
    for (int i = 0; i < 3; i++) sigaction(signals[i], &action, &saved[i]);

    static const char* wrong;
    wrong = nullptr;
    if (const int number = sigsetjmp(fault, 1)) {
        char what[120];
        snprintf(what, sizeof what, number == SIGILL ? "a misaligned access"
                 : "an access out of bounds, at %p", fault_address);
        for (int i = 0; i < count && number != SIGILL; i++)
            if (arrays[i] && fault_address >= arrays[i]->pages
                && fault_address < arrays[i]->pages + arrays[i]->whole)
                snprintf(what, sizeof what, "an access out of bounds, argument %d of %d, byte %td",
                         i + 1, count, (char*)fault_address - arrays[i]->data);
        if ((char*)fault_address >= memory->pages && (char*)fault_address < memory->pages +
            memory->whole) snprintf(what, sizeof what, "an access out of bounds of shared memory");
        if (number > 0) describe(what, current, 0);
        wrong = message;
    } else {
        const std::vector<int> turns = arranged(threads, order, 1);
        for (int number : arranged(blocks, order, 2)) {
            blockIdx = {number % grid[0], number / grid[0] % grid[1], number / grid[0] / grid[1]};
            if (!run_block(turns)) {
                wrong = message;
                break;
            }
        }
    }
    for (int i = 0; i < 3; i++) sigaction(signals[i], &saved[i], nullptr);
    sigaltstack(&before, nullptr);
    for (int i = 0; i < count; i++)
        if (arrays[i]) {
            if (!wrong && !arrays[i]->intact()) {
                snprintf(message, sizeof message, "a write beside argument %d of %d", i + 1, count);
                wrong = message;
            }
            memcpy(results[i], arrays[i]->data, arrays[i]->size);
            delete arrays[i];
        }
    delete memory;
    fibers.clear();
    return wrong;
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), std::index_sequence<I...>)
{
    kernel(*(std::remove_reference_t<A>*)values[I]...);
}

// Launches a kernel: see `run`.
template <class... A>
const char* launch(void (*kernel)(A...), const Argument* arguments, const unsigned* grid,
                   const unsigned* block, size_t bytes, int order, void** results)
{
    body = [=] { call(kernel, std::index_sequence_for<A...>()); };
    return run(sizeof...(A), arguments, grid, block, bytes, order, results);
}

}  // namespace emulated
