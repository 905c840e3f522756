// Maximum and average over windows of an NHWC image; windows may overlap.
//
//   forward    y[n, oi, oj, c] = max or mean of x over rows oi·stride - pad … + kernel - 1, …
//   backward   dx[n, i, j, c] = Σ over the windows that hold (i, j) of what each gives to it
//
// A thread makes the numbers of VEC neighbouring channels, 4 or 1; the next thread those beside, so
// every access is coalesced. The backward pass gathers: nothing is added atomically. The forward
// pass of the maximum leaves its place in the window, one byte (argmax), and the backward pass
// reads nothing else but dy. A window of the maximum may hang over the edge, one of the average may
// not. Arrays hold less than 2^31 numbers. Called by gpu.max_pool_* and gpu.avg_pool_*.

struct alignas(4 * VEC) Floats { float at[VEC]; };
struct alignas(VEC) Bytes { unsigned char at[VEC]; };

// The shapes of a pass, packed by gpu.py field by field; c in units of VEC channels.
struct Window {
    int h, w, c, oh, ow, kernel, stride, pad;

    // number `at` of an image that is `wide` pixels wide and `high` high -> its pixel and channel
    __device__ void decode(unsigned at, int high, int wide, int& n, int& i, int& j,
                           int& channel) const
    {
        channel = at % c;
        at /= c;
        j = at % wide;
        at /= wide;
        i = at % high;
        n = at / high;
    }

    // where x (h, w) and y (oh, ow) have a pixel's channel
    __device__ int in_x(int n, int i, int j, int channel) const
    {
        return ((n * h + i) * w + j) * c + channel;
    }
    __device__ int in_y(int n, int oi, int oj, int channel) const
    {
        return ((n * oh + oi) * ow + oj) * c + channel;
    }

    // number of input pixel (i, j) in window (oi, oj), in scan order
    __device__ int place(int i, int j, int oi, int oj) const
    {
        return (i + pad - oi * stride) * kernel + j + pad - oj * stride;
    }

    // first and last + 1 input row (or column) of window o
    __device__ int first(int o) const { return max(0, o * stride - pad); }
    __device__ int last(int o, int size) const { return min(size, o * stride - pad + kernel); }

    // first and last + 1 window that holds input row (or column) i
    __device__ int first_over(int i) const { return max(0, (i + pad - kernel + stride) / stride); }
    __device__ int last_over(int i, int count) const { return min(count, (i + pad) / stride + 1); }
};
static_assert(sizeof(Window) == WINDOW_BYTES, "gpu.WINDOW has the same fields");

// -------------------------------------------------------------------------------- the maximum

// The first of several equal numbers counts. A NaN counts as larger than any number, and stays.
extern "C" __global__ void
max_pool_forward(const Floats* x, Floats* y, Bytes* argmax, unsigned total, const Window window)
{
    const unsigned index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= total) return;
    int n, oi, oj, channel;
    window.decode(index, window.oh, window.ow, n, oi, oj, channel);
    Floats most;
    Bytes where;
    const int first = window.place(window.first(oi), window.first(oj), oi, oj);
    for (int e = 0; e < VEC; e++) {
        most.at[e] = -INFINITY;
        where.at[e] = first;
    }
    for (int i = window.first(oi); i < window.last(oi, window.h); i++)
        for (int j = window.first(oj); j < window.last(oj, window.w); j++) {
            const Floats value = x[window.in_x(n, i, j, channel)];
            for (int e = 0; e < VEC; e++) {
                const bool is_nan = value.at[e] != value.at[e];
                if (!(value.at[e] > most.at[e]) && !is_nan) continue;
                most.at[e] = value.at[e];
                where.at[e] = window.place(i, j, oi, oj);
            }
        }
    y[index] = most;
    argmax[index] = where;
}

extern "C" __global__ void
max_pool_backward(const Floats* dy, const Bytes* argmax, Floats* dx, unsigned total,
                  const Window window)
{
    const unsigned index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= total) return;
    int n, i, j, channel;
    window.decode(index, window.h, window.w, n, i, j, channel);
    Floats sum = {};
    for (int oi = window.first_over(i); oi < window.last_over(i, window.oh); oi++)
        for (int oj = window.first_over(j); oj < window.last_over(j, window.ow); oj++) {
            const int at = window.in_y(n, oi, oj, channel);
            const Floats given = dy[at];
            const Bytes where = argmax[at];
            for (int e = 0; e < VEC; e++)
                if (where.at[e] == window.place(i, j, oi, oj)) sum.at[e] += given.at[e];
        }
    dx[index] = sum;
}

// -------------------------------------------------------------------------------- the average

extern "C" __global__ void
avg_pool_forward(const Floats* x, Floats* y, unsigned total, const Window window)
{
    const unsigned index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= total) return;
    int n, oi, oj, channel;
    window.decode(index, window.oh, window.ow, n, oi, oj, channel);
    Floats mean = {};
    for (int i = window.first(oi); i < window.last(oi, window.h); i++)
        for (int j = window.first(oj); j < window.last(oj, window.w); j++) {
            const Floats value = x[window.in_x(n, i, j, channel)];
            for (int e = 0; e < VEC; e++) mean.at[e] += value.at[e];
        }
    for (int e = 0; e < VEC; e++) mean.at[e] /= window.kernel * window.kernel;
    y[index] = mean;
}

extern "C" __global__ void
avg_pool_backward(const Floats* dy, Floats* dx, unsigned total, const Window window)
{
    const unsigned index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= total) return;
    int n, i, j, channel;
    window.decode(index, window.h, window.w, n, i, j, channel);
    Floats sum = {};
    for (int oi = window.first_over(i); oi < window.last_over(i, window.oh); oi++)
        for (int oj = window.first_over(j); oj < window.last_over(j, window.ow); oj++) {
            const Floats given = dy[window.in_y(n, oi, oj, channel)];
            for (int e = 0; e < VEC; e++)
                sum.at[e] += given.at[e] / (window.kernel * window.kernel);
        }
    dx[index] = sum;
}
