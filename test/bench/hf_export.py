"""Loads the models that hfExportBench.ts exported with transformers, and compares their logits with those of the models that they began from.

`python3 test/bench/hf_export.py OUT [MODELS]`, MODELS by default test/fixtures/hf; `--make MODELS` makes models of dense families. It needs torch and transformers. Per folder: the largest difference of the logits, relative to the largest
logit, and the keys that transformers missed or did not expect. The exit code is 1 if a difference is over the limit: 1e-4 in fp32, and in bf16
what rounding of the weights alone makes of the fixture's own weights, times two.
"""
import json, os, sys
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

transformers.logging.set_verbosity_error()
here = sys.argv[2] if len(sys.argv) > 2 else os.path.join(os.path.dirname(__file__), "../fixtures/hf")


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def distance(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def make(out):
    common = dict(vocab_size=256, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=96,
                  max_position_embeddings=64, initializer_range=0.05, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    for n, (family, own) in enumerate((("Qwen2", {}), ("Qwen3", dict(head_dim=32)), ("Mistral", dict(head_dim=16, sliding_window=None)))):
        torch.manual_seed(n)
        config = getattr(transformers, family + "Config")(**common, **own)
        model = getattr(transformers, family + "ForCausalLM")(config).float().eval()
        with torch.no_grad():
            for key, tensor in model.named_parameters():
                if key.endswith("bias"): tensor.copy_(0.05 * torch.randn(tensor.shape))
                elif "norm" in key: tensor.copy_(1 + 0.1 * torch.randn(tensor.shape))
        at = f"{out}/{family.lower()}-tiny"
        model.save_pretrained(at)
        ids = torch.randint(256, (4, 64))
        save_file({"input_ids": ids.int(), "logits": logits(model, ids).contiguous()}, f"{at}/io.safetensors")


if sys.argv[1] == "--make":
    make(sys.argv[2])
    sys.exit()
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
