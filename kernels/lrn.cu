// Local response normalisation across channels (Krizhevsky 2012, §3.3), on (P, C) pixels.
//
//   forward    y_c = x_c s_c^-β,  s_c = k + α Σ x_c'²  over c' = c - half … c + half
//   backward   dx_c = dy_c s_c^-β - 2αβ x_c Σ dy_c' x_c' s_c'^(-β-1)  over the same c'
//
// A block takes `rows` pixels at a time into shared memory, so each number is read once. Called by
// gpu.lrn_forward and gpu.lrn_backward.

// Σ over the window around a channel of row (C,)
__device__ float window_sum(const float* row, int channel, int c, int half)
{
    float sum = 0;
    for (int near = max(0, channel - half); near < min(c, channel + half + 1); near++)
        sum += row[near];
    return sum;
}

__device__ float window_sum_of_squares(const float* row, int channel, int c, int half)
{
    float sum = 0;
    for (int near = max(0, channel - half); near < min(c, channel + half + 1); near++)
        sum += row[near] * row[near];
    return sum;
}

__device__ float power(float s, float beta)                // s^-β, by roots where β = 3/4
{
    return beta == 0.75f ? 1 / (sqrtf(s) * sqrtf(sqrtf(s))) : powf(s, -beta);
}

extern "C" __global__ void
lrn_forward(const float* x, float* y, int pixels, int c, int rows, int half, float k, float alpha,
            float beta)
{
    float* xs = shared_memory();                            // rows × C
    const long long start = static_cast<long long>(blockIdx.x) * rows * c;
    const int count = min(rows, pixels - static_cast<int>(blockIdx.x) * rows) * c;
    for (int at = threadIdx.x; at < count; at += blockDim.x) xs[at] = x[start + at];
    __syncthreads();                                        // all of xs is there
    for (int at = threadIdx.x; at < count; at += blockDim.x) {
        const int channel = at % c;
        const float s = k + alpha * window_sum_of_squares(xs + at - channel, channel, c, half);
        y[start + at] = xs[at] * power(s, beta);
    }
}

extern "C" __global__ void
lrn_backward(const float* dy, const float* x, float* dx, int pixels, int c, int rows, int half,
             float k, float alpha, float beta)
{
    float* xs = shared_memory();                            // rows × C
    float* own = xs + rows * c;                             // dy s^-β
    float* near = own + rows * c;                           // dy x s^(-β-1)
    const long long start = static_cast<long long>(blockIdx.x) * rows * c;
    const int count = min(rows, pixels - static_cast<int>(blockIdx.x) * rows) * c;
    for (int at = threadIdx.x; at < count; at += blockDim.x) xs[at] = x[start + at];
    __syncthreads();                                        // all of xs is there
    for (int at = threadIdx.x; at < count; at += blockDim.x) {
        const int channel = at % c;
        const float s = k + alpha * window_sum_of_squares(xs + at - channel, channel, c, half);
        own[at] = dy[start + at] * power(s, beta);
        near[at] = own[at] * xs[at] / s;
    }
    __syncthreads();                                        // all of near is there
    for (int at = threadIdx.x; at < count; at += blockDim.x) {
        const int channel = at % c;
        const float sum = window_sum(near + at - channel, channel, c, half);
        dx[start + at] = own[at] - 2 * alpha * beta * xs[at] * sum;
    }
}
