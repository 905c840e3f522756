// Local response normalisation across channels (Krizhevsky 2012, §3.3), on (P, C) pixels.
//
//   forward    y_c = x_c s_c^-β,  s_c = k + α Σ x_c'²  over c' = c - half … c + half
//   backward   dx_c = dy_c s_c^-β - 2αβ x_c Σ dy_c' x_c' s_c'^(-β-1)  over the same c'
//
// A block takes `rows` pixels at a time into shared memory, so each number is read once.
// Without dy this is the forward pass. Called by gpu.lrn_backward.

__device__ float window_sum(const float* row, int channel, int c, int half, bool squared)
{
    float sum = 0;
    for (int near = max(0, channel - half); near < min(c, channel + half + 1); near++)
        sum += squared ? row[near] * row[near] : row[near];
    return sum;
}

__device__ float power(float s, float beta)                // s^-β, by roots where β = 3/4
{
    return beta == 0.75f ? 1 / (sqrtf(s) * sqrtf(sqrtf(s))) : powf(s, -beta);
}

extern "C" __global__ void
lrn(const float* dy, const float* x, float* out, int pixels, int c, int rows, int half, float k,
    float alpha, float beta, int gated, int round)
{
    float* xs = shared_memory();                            // rows × C
    float* near = xs + rows * c;                            // backward: dy x s^(-β-1)
    float* own = near + rows * c;                           // … dy s^-β
    const long long start = static_cast<long long>(blockIdx.x) * rows * c;
    const int count = min(rows, pixels - static_cast<int>(blockIdx.x) * rows) * c;
    for (int at = threadIdx.x; at < count; at += blockDim.x) xs[at] = x[start + at];
    __syncthreads();                                        // all of xs is there
    for (int at = threadIdx.x; at < count; at += blockDim.x) {
        const int channel = at % c;
        const float s = k + alpha * window_sum(xs + at - channel, channel, c, half, true);
        if (dy) {
            own[at] = dy[start + at] * power(s, beta);
            near[at] = own[at] * xs[at] / s;
        } else {
            out[start + at] = rounded(xs[at] * power(s, beta), round);
        }
    }
    if (!dy) return;
    __syncthreads();                                        // all of near is there
    for (int at = threadIdx.x; at < count; at += blockDim.x) {
        const int channel = at % c;
        const float sum = window_sum(near + at - channel, channel, c, half, false);
        const float number = own[at] - 2 * alpha * beta * xs[at] * sum;
        out[start + at] = gated && !(xs[at] > 0) ? 0 : rounded(number, round);
    }
}
