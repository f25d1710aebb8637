import torch, time
from squat_fx.codecs import *
from squat_fx.kernels import launch, reference as R
def bench(B, H, HQ, D, T, bits, G):
    c = Kivi(G); sides = []
    pos = torch.tensor([[T, T - 32]] * 2, device="cuda")
    for i, role in enumerate(("key", "value")):
        f = make_format(c, codec_spec(c), role, D, bits, 32, 4)
        x = torch.randn(B, H, 1, D, device="cuda", dtype=torch.float16)
        a = R.empty_arenas(x, T, f)
        a.packed[0].random_(); a.packed[1].uniform_(.5, 1); a.packed[2].uniform_(-1, 0); a.dense.normal_()
        sides.append((a, (pos, i), f))
    q = torch.randn(B, HQ, 1, D, device="cuda", dtype=torch.float16)
    n = torch.randn(B, H, 1, D, device="cuda", dtype=torch.float16)
    def go(): return launch.attend(q, n, n, *sides, mask=None, sinks=None, scale=D**-.5, causal=0, softcap=0.0)
    def app():
        for a, e, f in sides: launch.write(a, n, None, e, f)
    from triton.testing import do_bench_cudagraph
    s = torch.cuda.Stream()
    with torch.cuda.stream(s):
        t = do_bench_cudagraph(go, rep=50); ta = do_bench_cudagraph(app, rep=20)
    nb = sum(t_.numel() * t_.element_size() for a, _, _ in sides for t_ in a.packed)
    k = torch.randn(B, H, T, D, device="cuda", dtype=torch.float16); v = torch.randn_like(k)
    from torch.nn.attention import sdpa_kernel, SDPBackend
    def base():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION): return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    with torch.cuda.stream(s):
        try: tb = do_bench_cudagraph(base, rep=50)
        except Exception as e: tb = float("nan"); print(e)
    print(f"B{B} H{H}/{HQ} D{D} T{T} bits{bits} G{G}: attend {t*1e3:.0f}us {nb/t/1e9:.2f} TB/s, sdpa cudnn {tb*1e3:.0f}us, append k+v {ta*1e3:.1f}us", flush=True)
    go()
    t0 = time.time()
    for _ in range(100): go()
    print("host us per attend", (time.time() - t0) * 1e4)
    torch.cuda.synchronize()
for G in (32, 128):
    for bits in (2, 4):
        bench(32, 8, 32, 128, 8192, bits, G)
        bench(1, 8, 32, 128, 32768, bits, G)
bench(32, 8, 8, 64, 8192, 2, 32)
