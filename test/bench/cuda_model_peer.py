"""The peer of cudaModelBench.ts: transformers' Mixtral of the same shape, forward and backward, eager and compiled. One JSON object."""
import json, sys, time
import torch, transformers
from transformers import MixtralConfig, MixtralForCausalLM

torch.manual_seed(0)
config = MixtralConfig(num_hidden_layers=4, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
                       vocab_size=32000, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=4096, use_cache=False)
config._attn_implementation = "sdpa"
try:
    config._experts_implementation = "grouped_mm"
except Exception:
    pass
torch.set_default_dtype(torch.bfloat16)
with torch.device("cuda"):
    model = MixtralForCausalLM(config)
model.train()
B, S = 2, 4096
active = 4 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 2 * 3 * 4096 * 14336 + 4096 * 8) + 4096 * 32000
flops = 6 * active * B * S + 4 * 3.5 * 2 * B * 32 * S * S * 128


def median_ms(step):
    for _ in range(4):
        step()
    torch.cuda.synchronize()
    times = []
    for _ in range(10):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); step(); b.record(); torch.cuda.synchronize()
        times.append(a.elapsed_time(b))
    return sorted(times)[len(times) // 2]


def stepper(f):
    def step():
        ids = torch.randint(0, 32000, (B, S), device="cuda")
        model.zero_grad(set_to_none=True)
        f(input_ids=ids, labels=ids).loss.backward()
    return step


out = {"transformers": transformers.__version__, "torch": torch.__version__}
for name, make in (("eager", lambda: model), ("compiled", lambda: torch.compile(model))):
    try:
        begun = time.time()
        ms = median_ms(stepper(make()))
        out[name] = {"ms": ms, "tflops": flops / ms / 1e9, "seconds_in_all": time.time() - begun}
    except Exception as error:
        out[name] = {"error": str(error)[:300]}
print(json.dumps(out))
