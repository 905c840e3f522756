// Maximum and average over windows of an NHWC image; windows may overlap.
//
//   forward    y[n, oi, oj, c] = max or mean of x over rows oi·stride - pad … + kernel - 1, …
//   backward   dx[n, i, j, c] = Σ over the windows that hold (i, j) of what each gives to it
//
// A thread makes the numbers of VEC neighbouring channels, 4 or 1; the next thread those beside, so
// every access is coalesced. The backward pass gathers: nothing is added atomically. A maximum
// leaves its `place` in the window, one byte: the first's where several tie, NOWHERE for a NaN and,
// if x is gated, a maximum that is not positive; without it this is the average, and a gate is x
// itself. A window of the maximum may hang over the edge, one of the average may not. Arrays are
// dense and hold less than 2^31 numbers. Called by gpu._pool.

#define NOWHERE 255
struct alignas(4 * VEC) Floats { float at[VEC]; };
struct alignas(VEC) Places { unsigned char at[VEC]; };

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

__device__ unsigned index_of_thread() { return blockIdx.x * blockDim.x + threadIdx.x; }

extern "C" __global__ void
pool_forward(const Floats* x, Floats* y, Places* place, unsigned total, const Window at, int gated,
             int round)
{
    const unsigned index = index_of_thread();
    if (index >= total) return;
    int n, oi, oj, channel;
    at.decode(index, at.oh, at.ow, n, oi, oj, channel);
    Floats most, sum = {};
    Places where;
    bool first = true;
    for (int i = at.first(oi); i < at.last(oi, at.h); i++)
        for (int j = at.first(oj); j < at.last(oj, at.w); j++) {
            const Floats value = x[((n * at.h + i) * at.w + j) * at.c + channel];
            for (int e = 0; e < VEC; e++) {
                const float v = value.at[e];
                sum.at[e] += v;
                if (!(first || v > most.at[e] || v != v)) continue; // a NaN stays
                most.at[e] = v;
                where.at[e] = v == v ? at.place(i, j, oi, oj) : NOWHERE;
            }
            first = false;
        }
    for (int e = 0; e < VEC; e++) {
        sum.at[e] = rounded(sum.at[e] / (at.kernel * at.kernel), round);
        if (gated && !(most.at[e] > 0)) where.at[e] = NOWHERE;
    }
    y[index] = place ? most : sum;
    if (place) place[index] = where;
}

extern "C" __global__ void
pool_backward(const Floats* dy, Floats* dx, const Floats* gate, const Places* place,
              unsigned total, const Window at, int round)
{
    const unsigned index = index_of_thread();
    if (index >= total) return;
    int n, i, j, channel;
    at.decode(index, at.h, at.w, n, i, j, channel);
    Floats sum = {};
    for (int oi = at.first_over(i); oi < at.last_over(i, at.oh); oi++)
        for (int oj = at.first_over(j); oj < at.last_over(j, at.ow); oj++) {
            const int pooled = ((n * at.oh + oi) * at.ow + oj) * at.c + channel;
            const Floats given = dy[pooled];
            const Places where = place ? place[pooled] : Places{};
            for (int e = 0; e < VEC; e++)
                if (!place) sum.at[e] += given.at[e] / (at.kernel * at.kernel);
                else if (where.at[e] == at.place(i, j, oi, oj)) sum.at[e] += given.at[e];
        }
    for (int e = 0; e < VEC; e++)
        sum.at[e] = gate && !(gate[index].at[e] > 0) ? 0 : rounded(sum.at[e], round);
    dx[index] = sum;
}
