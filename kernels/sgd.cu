// Stochastic gradient descent with momentum and weight decay, in one pass:
//
//   v ← momentum·v + dw + decay·w;   w ← w - rate·v
//
// for w's first `weights` numbers; the biases behind them do not decay. A thread updates four
// numbers. Called by gpu.sgd.

__device__ float update(float& v, float w, float dw, float rate, float momentum, float decay)
{
    v = momentum * v + dw + decay * w;
    return w - rate * v;
}

extern "C" __global__ void
sgd(float* w, float* v, const float* dw, unsigned total, unsigned weights, float rate,
    float momentum, float decay)
{
    const unsigned index = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (index + 4 <= weights) {
        float4 weight = *reinterpret_cast<float4*>(w + index);
        float4 velocity = *reinterpret_cast<float4*>(v + index);
        const float4 d = *reinterpret_cast<const float4*>(dw + index);
        weight.x = update(velocity.x, weight.x, d.x, rate, momentum, decay);
        weight.y = update(velocity.y, weight.y, d.y, rate, momentum, decay);
        weight.z = update(velocity.z, weight.z, d.z, rate, momentum, decay);
        weight.w = update(velocity.w, weight.w, d.w, rate, momentum, decay);
        *reinterpret_cast<float4*>(w + index) = weight;
        *reinterpret_cast<float4*>(v + index) = velocity;
    } else {
        for (unsigned at = index; at < min(index + 4, total); at++)
            w[at] = update(v[at], w[at], dw[at], rate, momentum, at < weights ? decay : 0);
    }
}

// The same on rows[r] of w and v (K, E), with dw (R, E); no row twice. A thread updates a number.
extern "C" __global__ void
sgd_rows(float* w, float* v, const float* dw, const int* rows, unsigned total, int e, float rate,
         float momentum, float decay)
{
    const unsigned index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= total) return;
    const long long at = static_cast<long long>(rows[index / e]) * e + index % e;
    w[at] = update(v[at], w[at], dw[index], rate, momentum, decay);
}
