"""Loads the models that hfExportBench.ts exported with transformers, and compares their logits with rankc's, which lie beside them.

`python3 test/bench/hf_export.py OUT`; it needs torch and transformers. rankc and transformers compute from the same exported bf16 weights:

- in float32 on the CPU: differences are those of the order of sums, at most 1e-5 of the largest logit;
- in bf16, on the CPU and on a GPU if there is one: both round each value, at different places. An error is the distance from the logits in
  float32, of a token the root mean square over the vocabulary. The median error of rankc's tokens is at most 1.5 times that of
  transformers'. Rounding gives single tokens of models with experts other experts: their errors are the largest, in both.

Units are ulp: the spacing of bf16 at the largest logit. The last column names keys that transformers missed or did not expect. The exit
code is 1 if a model is over a limit.
"""
import json, math, os, sys
import torch, transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
out = sys.argv[1]
devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def logits(model, ids, device="cpu"):
    with torch.no_grad():
        return model.eval().to(device)(input_ids=ids.to(device)).logits.float().cpu()


def load(at, dtype):
    return AutoModelForCausalLM.from_pretrained(at, dtype=dtype, output_loading_info=True, attn_implementation="eager")


failed = False
print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.cuda.get_device_name() if len(devices) > 1 else 'no GPU'}")
print(f"{'model':24}{'files':9}{'fp32 max':>10}  ulp |" + "".join(f" bf16 on {d}: rankc median, max; transformers median, max [ulp] |" for d in devices))
for name in sorted(os.listdir(out)):
    own = load_file(f"{out}/{name}/logits.safetensors")
    ids, ours, ours16 = own["input_ids"].long(), own["fp32"], own["bf16"]
    for kind in sorted(k for k in os.listdir(f"{out}/{name}") if os.path.isdir(f"{out}/{name}/{k}")):
        model, info = load(f"{out}/{name}/{kind}", torch.float32)
        exact = logits(model, ids)
        ulp = 2.0 ** (math.floor(math.log2(exact.abs().max().item())) - 7)
        error = lambda x: ((x - exact).pow(2).mean(-1).sqrt().median().item() / ulp, (x - exact).abs().max().item() / ulp)
        apart = error(ours)[1]
        keys = {k: sorted(map(str, v)) for k, v in info.items() if v and k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        bad = apart * ulp > 1e-5 * exact.abs().max().item() or bool(keys)
        row = f"{name:24}{kind:9}{apart:10.5f}      |"
        median, most = error(ours16)
        for device in devices:
            theirs, theirs_most = error(logits(load(f"{out}/{name}/{kind}", torch.bfloat16)[0], ids, device))
            bad |= median > 1.5 * theirs
            row += f" {median:8.2f} {most:8.1f}; {theirs:8.2f} {theirs_most:8.1f} |"
        failed |= bad
        print(f"{row} {'WRONG ' if bad else ''}{json.dumps(keys) if keys else ''}", flush=True)
sys.exit(failed)
