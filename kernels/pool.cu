// Maximum and average over windows of an NHWC image; windows may overlap.
//
//   forward    y[n, oi, oj, c] = max or mean of x over rows oi·stride - pad … + kernel - 1, …
//   backward   dx[n, i, j, c] = Σ over the windows that hold (i, j) of what each gives to it
//
// One thread makes one number; neighbours in a warp are neighbouring channels, so every access is
// coalesced. The backward passes gather: no mask is kept and nothing is added atomically. A
// window's maximum is found again by comparing; where several tie, the first in scan order has it.
// A window of the maximum may hang over the edge, one of the average may not. Arrays are dense and
// hold less than 2^31 numbers. Called by gpu.max_pool_forward and its three siblings.

// The shapes of a pass, packed by gpu.py field by field.
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

    // first and last + 1 input row (or column) of window o
    __device__ int first(int o) const { return max(0, o * stride - pad); }
    __device__ int last(int o, int size) const { return min(size, o * stride - pad + kernel); }

    // first and last + 1 window that holds input row (or column) i
    __device__ int first_over(int i) const { return max(0, (i + pad - kernel + stride) / stride); }
    __device__ int last_over(int i, int count) const { return min(count, (i + pad) / stride + 1); }
};
static_assert(sizeof(Window) == WINDOW_BYTES, "gpu.WINDOW has the same fields");

__device__ unsigned index_of_thread() { return blockIdx.x * blockDim.x + threadIdx.x; }

extern "C" __global__ void
pool_forward(const float* x, float* y, unsigned total, const Window at, int average,
             int round)
{
    const unsigned index = index_of_thread();
    if (index >= total) return;
    int n, oi, oj, channel;
    at.decode(index, at.oh, at.ow, n, oi, oj, channel);
    float most = -INFINITY, sum = 0;
    for (int i = at.first(oi); i < at.last(oi, at.h); i++)
        for (int j = at.first(oj); j < at.last(oj, at.w); j++) {
            const float value = x[((n * at.h + i) * at.w + j) * at.c + channel];
            most = value > most || value != value ? value : most;   // a NaN stays
            sum += value;
        }
    y[index] = average ? rounded(sum / (at.kernel * at.kernel), round) : most;
}

extern "C" __global__ void
max_pool_backward(const float* dy, const float* x, const float* y, float* dx, unsigned total,
                  const Window at)
{
    const unsigned index = index_of_thread();
    if (index >= total) return;
    int n, i, j, channel;
    at.decode(index, at.h, at.w, n, i, j, channel);
    const float* image = x + n * at.h * at.w * at.c + channel;
    const float own = x[index];
    float sum = 0;
    for (int oi = at.first_over(i); oi < at.last_over(i, at.oh); oi++)
        for (int oj = at.first_over(j); oj < at.last_over(j, at.ow); oj++) {
            const int pooled = ((n * at.oh + oi) * at.ow + oj) * at.c + channel;
            bool mine = own == y[pooled];
            for (int p = at.first(oi); mine && p <= i; p++)         // is there an earlier one?
                for (int q = at.first(oj); mine && q < (p < i ? at.last(oj, at.w) : j); q++)
                    mine = image[(p * at.w + q) * at.c] != own;
            if (mine) sum += dy[pooled];
        }
    dx[index] = sum;
}

extern "C" __global__ void
avg_pool_backward(const float* dy, float* dx, unsigned total, const Window at)
{
    const unsigned index = index_of_thread();
    if (index >= total) return;
    int n, i, j, channel;
    at.decode(index, at.h, at.w, n, i, j, channel);
    float sum = 0;
    for (int oi = at.first_over(i); oi < at.last_over(i, at.oh); oi++)
        for (int oj = at.first_over(j); oj < at.last_over(j, at.ow); oj++)
            sum += dy[((n * at.oh + oi) * at.ow + oj) * at.c + channel] / (at.kernel * at.kernel);
    dx[index] = sum;
}
