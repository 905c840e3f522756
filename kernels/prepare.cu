// Photos to pixels: cropped, mirrored and normalised, (x - mean) / deviation (paper, §3).
//
// photos uint8 (N, S, S, 3) -> y (N, crop, crop, 3). crops (3, N) has top, left and flip of each.
// A block takes one photo. The sums are of integers, hence exact whatever their order. Called by
// gpu.prepare.

typedef unsigned long long Word;

extern "C" __global__ void
prepare(const unsigned char* photos, const int* crops, float* y, int batch, int size, int crop)
{
    Word* sums = reinterpret_cast<Word*>(shared_memory());  // of each thread
    Word* squares = sums + blockDim.x;
    const int n = blockIdx.x, pixels = crop * crop;
    const int top = crops[n], left = crops[batch + n], flip = crops[2 * batch + n];
    const unsigned char* photo =
        photos + ((static_cast<long long>(n) * size + top) * size + left) * 3;
    Word sum = 0, square = 0;
    for (int at = threadIdx.x; at < pixels; at += blockDim.x) {
        const unsigned char* pixel = photo + (at / crop * size + at % crop) * 3;
        for (int c = 0; c < 3; c++) {
            sum += pixel[c];
            square += pixel[c] * pixel[c];
        }
    }
    sums[threadIdx.x] = sum;
    squares[threadIdx.x] = square;
    for (int half = blockDim.x / 2; half; half /= 2) {
        __syncthreads();                                    // the sums to be added are there
        if (threadIdx.x < half) {
            sums[threadIdx.x] += sums[threadIdx.x + half];
            squares[threadIdx.x] += squares[threadIdx.x + half];
        }
    }
    __syncthreads();                                        // sums[0] is the whole
    const double count = 3.0 * pixels, mean = sums[0] / count;
    const double variance = squares[0] / count - mean * mean;
    const float scale = 1 / fmaxf(sqrtf(static_cast<float>(variance)), 1.0f), shift = mean;
    y += static_cast<long long>(n) * pixels * 3;
    for (int at = threadIdx.x; at < pixels; at += blockDim.x) {
        const int i = at / crop, j = flip ? crop - 1 - at % crop : at % crop;
        const unsigned char* pixel = photo + (i * size + j) * 3;
        for (int c = 0; c < 3; c++) y[at * 3 + c] = (pixel[c] - shift) * scale;
    }
}
