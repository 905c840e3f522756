// Stochastic gradient descent with momentum and weight decay, in one pass:
//
//   v ← momentum·v + dw + decay·w;   w ← w - rate·v
//
// for all `total` numbers of dw; those behind the first `weights` are biases, which do not decay.
// With `rows`, none twice, row r of dw (R, E) updates row rows[r] of w and v (K, E). A thread
// updates four numbers. Called by gpu.sgd.

__device__ float update(float& v, float w, float dw, float rate, float momentum, float decay)
{
    v = momentum * v + dw + decay * w;
    return w - rate * v;
}

extern "C" __global__ void
sgd(float* w, float* v, const float* dw, const int* rows, unsigned total, unsigned weights, int e,
    float rate, float momentum, float decay)
{
    const unsigned start = blockIdx.x * blockDim.x * 4, end = start + blockDim.x * 4;
    if (!rows && end <= weights) {
        const unsigned at = start + threadIdx.x * 4;
        float4 weight = *reinterpret_cast<float4*>(w + at);
        float4 velocity = *reinterpret_cast<float4*>(v + at);
        const float4 d = *reinterpret_cast<const float4*>(dw + at);
        weight.x = update(velocity.x, weight.x, d.x, rate, momentum, decay);
        weight.y = update(velocity.y, weight.y, d.y, rate, momentum, decay);
        weight.z = update(velocity.z, weight.z, d.z, rate, momentum, decay);
        weight.w = update(velocity.w, weight.w, d.w, rate, momentum, decay);
        *reinterpret_cast<float4*>(w + at) = weight;
        *reinterpret_cast<float4*>(v + at) = velocity;
        return;
    }
    for (unsigned at = start + threadIdx.x; at < min(end, total); at += blockDim.x) {
        const long long to = rows ? static_cast<long long>(rows[at / e]) * e + at % e : at;
        w[to] = update(v[to], w[to], dw[at], rate, momentum, at < weights ? decay : 0);
    }
}
