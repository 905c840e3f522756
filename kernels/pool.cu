// Maximum and average over windows of an NHWC image; windows may overlap and hang over the edge.
//
//   forward    y[n, oi, oj, c] = max or mean of x over rows oi·stride - pad … + kernel - 1, …
//   backward   dx[n, i, j, c] = Σ over the windows that hold (i, j) of what each gives to it
//
// One thread makes one number; neighbours in a warp are neighbouring channels, so every access is
// coalesced. The backward passes gather: no mask is kept and nothing is added atomically. A
// window's maximum is found again by comparing; where several tie, the first in scan order has it.
// Arrays hold less than 2^31 numbers. y and dy may be channel slices: `pitch` is the distance from
// a pixel to the next.
// Called by gpu.max_pool_forward and its three siblings.

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
    __device__ int first_over(int i) const
    {
        return max(0, (i + pad - kernel + stride) / stride);
    }
    __device__ int last_over(int i, int count) const
    {
        return min(count, (i + pad) / stride + 1);
    }
};

__device__ unsigned index_of_thread() { return blockIdx.x * blockDim.x + threadIdx.x; }

extern "C" __global__ void
max_pool_forward(const float* x, float* y, unsigned total, int h, int w, int c, int oh, int ow,
                 int kernel, int stride, int pad, int y_pitch)
{
    const Window at = {h, w, c, oh, ow, kernel, stride, pad};
    const unsigned index = index_of_thread();
    if (index >= total) return;
    int n, oi, oj, channel;
    at.decode(index, oh, ow, n, oi, oj, channel);
    float most = -INFINITY;
    for (int i = at.first(oi); i < at.last(oi, h); i++)
        for (int j = at.first(oj); j < at.last(oj, w); j++) {
            const float value = x[((n * h + i) * w + j) * c + channel];
            most = value > most || value != value ? value : most;   // a NaN stays
        }
    y[static_cast<long long>(index / c) * y_pitch + channel] = most;
}

extern "C" __global__ void
max_pool_backward(const float* dy, const float* x, const float* y, float* dx, unsigned total,
                  int h, int w, int c, int oh, int ow, int kernel, int stride, int pad,
                  int dy_pitch, int y_pitch, int relu)
{
    const Window at = {h, w, c, oh, ow, kernel, stride, pad};
    const unsigned index = index_of_thread();
    if (index >= total) return;
    int n, i, j, channel;
    at.decode(index, h, w, n, i, j, channel);
    const float* image = x + n * h * w * c + channel;
    const float own = image[(i * w + j) * c];
    float sum = 0;
    for (int oi = at.first_over(i); oi < at.last_over(i, oh); oi++)
        for (int oj = at.first_over(j); oj < at.last_over(j, ow); oj++) {
            const int pixel = (n * oh + oi) * ow + oj;
            bool mine = own == y[static_cast<long long>(pixel) * y_pitch + channel];
            for (int p = at.first(oi); mine && p <= i; p++)         // is there an earlier one?
                for (int q = at.first(oj); mine && q < (p < i ? at.last(oj, w) : j); q++)
                    mine = image[(p * w + q) * c] != own;
            if (mine) sum += dy[static_cast<long long>(pixel) * dy_pitch + channel];
        }
    dx[index] = relu && !(own > 0) ? 0 : sum;
}

extern "C" __global__ void
avg_pool_forward(const float* x, float* y, unsigned total, int h, int w, int c, int oh, int ow,
                 int kernel, int stride, int pad, int y_pitch)
{
    const Window at = {h, w, c, oh, ow, kernel, stride, pad};
    const unsigned index = index_of_thread();
    if (index >= total) return;
    int n, oi, oj, channel;
    at.decode(index, oh, ow, n, oi, oj, channel);
    float sum = 0;
    for (int i = at.first(oi); i < at.last(oi, h); i++)
        for (int j = at.first(oj); j < at.last(oj, w); j++)
            sum += x[((n * h + i) * w + j) * c + channel];
    const int count = (at.last(oi, h) - at.first(oi)) * (at.last(oj, w) - at.first(oj));
    y[static_cast<long long>(index / c) * y_pitch + channel] = sum / count;
}

extern "C" __global__ void
avg_pool_backward(const float* dy, const float* x, float* dx, unsigned total,
                  int h, int w, int c, int oh, int ow, int kernel, int stride, int pad,
                  int dy_pitch, int relu)
{
    const Window at = {h, w, c, oh, ow, kernel, stride, pad};
    const unsigned index = index_of_thread();
    if (index >= total) return;
    int n, i, j, channel;
    at.decode(index, h, w, n, i, j, channel);
    float sum = 0;
    for (int oi = at.first_over(i); oi < at.last_over(i, oh); oi++)
        for (int oj = at.first_over(j); oj < at.last_over(j, ow); oj++) {
            const int count = (at.last(oi, h) - at.first(oi)) * (at.last(oj, w) - at.first(oj));
            const long long pixel = (n * oh + oi) * ow + oj;
            sum += dy[pixel * dy_pitch + channel] / count;
        }
    dx[index] = relu && !(x[index] > 0) ? 0 : sum;
}
