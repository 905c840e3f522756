// Passes over memory: each reads and writes every number once, so the memory's bandwidth is their
// limit. A thread makes one number; neighbouring threads access neighbouring memory.

// dx = dy where y > 0, else 0: the derivative of y = max(x, 0). Called by gpu.relu_backward.
extern "C" __global__ void
relu_backward(const float* dy, const float* y, float* dx, unsigned total)
{
    const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= total) return;
    dx[at] = y[at] > 0 ? dy[at] : 0;
}

// sum = a + b + c + d, of which b, c and d may be null. Called by gpu.sum_gradients.
extern "C" __global__ void
sum_gradients(const float* a, const float* b, const float* c, const float* d, float* sum,
              unsigned total)
{
    const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= total) return;
    float number = a[at];
    if (b) number += b[at];
    if (c) number += c[at];
    if (d) number += d[at];
    sum[at] = number;
}

// y = Σ_z parts[z] in the order of z, plus bias if it is not null, then with `relu` max(y, 0), in
// which a NaN stays. parts (count, total), y (total) = (…, cols), bias (cols); y may be the only
// part. The end of a convolution that was split, and of a matrix product. Called by
// gpu._add_parts.
extern "C" __global__ void
add_parts(const float* parts, float* y, const float* bias, int count, unsigned total,
          unsigned cols, int relu)
{
    const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= total) return;
    float sum = 0;
    for (int z = 0; z < count; z++) sum += parts[static_cast<long long>(z) * total + at];
    if (bias) sum += bias[at % cols];
    y[at] = relu && sum < 0 ? 0 : sum;
}
