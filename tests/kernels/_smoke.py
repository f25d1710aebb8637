import sys, time
t = time.time()
import torch, triton
print(torch.__version__, triton.__version__)
from dataclasses import replace
from tests.kernels import laws
from squat_fx.codecs import *
c = replace(laws.random_case(0, (torch.float16,), (64,), 200), codec=Kivi(32), softcap=0.0)
print(c)
for role in ("key", "value"):
    laws.writing_is_bit_equal_to_the_reference(c, role, "cuda"); print("write ok", role)
    laws.quantizing_is_bit_equal_to_the_reference(c, role, "cuda"); print("quantize ok", role)
    laws.dequantizing_agrees_with_the_reference(c, role, "cuda"); print("dequantize ok", role)
laws.attending_agrees_with_float64(c, "cuda"); print("attend ok", time.time() - t)
