// What CUDA C++ does not say: asynchronous copies, tensor cores, shared memory of any size.
//
// All inline PTX of the project is in this file. dev/emulate.h holds a host version of each
// function, so the kernels call these names and compile as they are for a GPU and for the host's
// processor.
// Facts are from the PTX ISA, sections on cp.async, mma.m16n8k8 and cvt.

#define INFINITY __uint_as_float(0x7f800000u)               // NVRTC has no math.h

// Dynamic shared memory of the block, as floats: its size is an argument of the launch.
__device__ __forceinline__ float* shared_memory()
{
    extern __shared__ float4 shared_float4[];
    return reinterpret_cast<float*>(shared_float4);
}

// Copies BYTES (4 or 16) from global to shared memory, or zeros where `valid` is false. The data
// is there for this thread after copy_wait, for the block after a barrier that follows it. Below
// sm_80 the copy is made at once.
template <int BYTES>
__device__ __forceinline__ void copy_async(float* to, const float* from, bool valid)
{
#if __CUDA_ARCH__ >= 800
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    const int size = valid ? BYTES : 0;
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n"
                     :: "r"(address), "l"(from), "r"(size) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n"
                     :: "r"(address), "l"(from), "r"(size) : "memory");
#else
    if (BYTES == 16)
        *reinterpret_cast<float4*>(to) =
            valid ? *reinterpret_cast<const float4*>(from) : make_float4(0, 0, 0, 0);
    else
        *to = valid ? *from : 0.0f;
#endif
}

// Closes a group of copies; copy_wait<G> waits until all but the last G groups have landed.
__device__ __forceinline__ void copy_commit()
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

template <int GROUPS>
__device__ __forceinline__ void copy_wait()
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;\n" :: "n"(GROUPS) : "memory");
#endif
}

#if __CUDA_ARCH__ >= 800
// x rounded to the 10 bits of mantissa that tensor cores read (TF32), to nearest; a NaN stays. From
// sm_90 on that is one instruction, which takes halves to even; before it is two, which take them
// away from zero.
__device__ __forceinline__ unsigned to_tf32(float x)
{
    unsigned bits;
#if __CUDA_ARCH__ >= 900
    asm("cvt.rn.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(x));
#else
    asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(x));
#endif
    return bits;
}

// d += a b by one warp: a is 16×8, b 8×8, d 16×8. With g = lane / 4 and t = lane % 4, a lane holds
// a: (g, t) (g+8, t) (g, t+4) (g+8, t+4);  b: (t, g) (t+4, g);  d: (g, 2t) (g, 2t+1) (g+8, 2t) …
__device__ __forceinline__ void mma_tf32(float (&d)[4], const unsigned (&a)[4],
                                         const unsigned (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif
