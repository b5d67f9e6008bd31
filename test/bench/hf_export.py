"""Loads the models that hfExportBench.ts exported with transformers, and compares their logits with those of test/fixtures/hf.

`python3 test/bench/hf_export.py OUT`; needs torch and transformers. Per folder: the largest difference of the logits, relative to the largest
logit, and the keys that transformers missed or did not expect. The exit code is 1 if a difference is over the limit: 1e-4 in fp32, and in bf16
what rounding of the weights alone makes of the fixture's own weights, times two.
"""
import json, os, sys
import torch, transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

transformers.logging.set_verbosity_error()
here = os.path.join(os.path.dirname(__file__), "../fixtures/hf")


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def distance(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


failed = False
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
for name in sorted(os.listdir(sys.argv[1])):
    io = load_file(f"{here}/{name}/io.safetensors")
    ids, wanted = io["input_ids"].long(), io["logits"].float()
    for kind in sorted(os.listdir(f"{sys.argv[1]}/{name}")):
        if kind == "checkpoints": continue
        at = f"{sys.argv[1]}/{name}/{kind}"
        model, info = AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32, output_loading_info=True, attn_implementation="eager")
        found = distance(logits(model.eval(), ids), wanted)
        limit = 1e-4
        if kind == "bf16":
            rounded = AutoModelForCausalLM.from_pretrained(f"{here}/{name}", dtype=torch.bfloat16, attn_implementation="eager").float()
            limit = 2 * distance(logits(rounded.eval(), ids), wanted) + 1e-4
        keys = {k: sorted(map(str, v)) for k, v in info.items() if v and k in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        bad = found > limit or bool(keys)
        failed |= bad
        shards = len([f for f in os.listdir(at) if f.endswith(".safetensors")])
        print(f"{name:24} {kind:11} {shards} files  {found:.2e} (limit {limit:.1e}) {'WRONG ' if bad else ''}{json.dumps(keys) if keys else ''}")
sys.exit(failed)
