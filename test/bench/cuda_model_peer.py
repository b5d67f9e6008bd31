"""The peer of cudaModelBench.ts: transformers' model of the same shape as a job of test/bench/jobs, forward and backward of one microbatch,
eager and compiled, and a step with torch's fused AdamW. Weights and gradients in bf16. One JSON object a job.

    python3 test/bench/cuda_model_peer.py test/bench/jobs/mixtral-8x7b-4-layers.yaml [...]

The environment: FORMS (eager,compiled), ROUNDS (9), the steps of which the median is taken.
"""
import gc, json, os, sys, time
import torch, transformers, yaml
from transformers import DeepseekV3Config, LlamaConfig, MixtralConfig, Qwen3MoeConfig


def config_of(model):
    moe, mla = model.get("moe"), model.get("mla")
    heads = model["heads"]
    common = dict(num_hidden_layers=model["layers"], hidden_size=model["hidden"], intermediate_size=model["ffn"], num_attention_heads=heads,
                  num_key_value_heads=model.get("kv_heads", heads), vocab_size=model["vocab"], max_position_embeddings=model["seq"],
                  use_cache=False, tie_word_embeddings=model.get("tie_embeddings", False))
    if mla:
        return DeepseekV3Config(**common, moe_intermediate_size=moe["ffn"], n_routed_experts=moe["experts"], num_experts_per_tok=moe["top_k"],
                                n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=moe["layers"]["first_dense"],
                                q_lora_rank=mla["q_rank"], kv_lora_rank=mla["kv_rank"], qk_nope_head_dim=mla["nope_dim"],
                                qk_rope_head_dim=mla["rope_dim"], v_head_dim=mla["v_dim"])
    if moe and model.get("qk_norm"):
        return Qwen3MoeConfig(**common, head_dim=model["head_dim"], moe_intermediate_size=moe["ffn"], num_experts=moe["experts"],
                              num_experts_per_tok=moe["top_k"], norm_topk_prob=True)
    if moe:
        return MixtralConfig(**common, num_local_experts=moe["experts"], num_experts_per_tok=moe["top_k"])
    return LlamaConfig(**common)


def median_ms(step):
    for _ in range(4):
        step()
    torch.cuda.synchronize()
    times = []
    for _ in range(int(os.environ.get("ROUNDS", 9))):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); step(); b.record(); torch.cuda.synchronize()
        times.append(a.elapsed_time(b))
    return sorted(times)[len(times) // 2]


def measure(job, forms):
    config = config_of(job["model"])
    config._attn_implementation = "sdpa"
    if "moe" in job["model"]:
        config._experts_implementation = "grouped_mm"
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.train()
    shape = (job["train"]["micro_batch"], job["model"]["seq"])
    adamw = job["train"]["optimizer"]["type"] == "adamw"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) if adamw else None
    out = {"job": job["name"]}
    for name in forms:
        try:
            begun = time.time()
            f = torch.compile(model) if name == "compiled" else model

            def step(update=False):
                ids = torch.randint(0, config.vocab_size, shape, device="cuda")
                model.zero_grad(set_to_none=True)
                f(input_ids=ids, labels=ids).loss.backward()
                if update:
                    optimizer.step()
            out[name] = {"forward_backward_ms": median_ms(step)}
            if optimizer:
                ms = median_ms(lambda: step(True))
                out[name].update(step_ms=ms, tokens_per_second=shape[0] * shape[1] / ms * 1e3)
            out[name]["seconds_in_all"] = time.time() - begun
        except Exception as error:
            out[name] = {"error": str(error)[:300]}
    return out


torch.set_default_dtype(torch.bfloat16)
forms = os.environ.get("FORMS", "eager,compiled").split(",")
# without arguments jobs come from stdin, a path a line, and the process waits between them
for path in sys.argv[1:] or map(str.strip, iter(sys.stdin.readline, "")):
    out = {"transformers": transformers.__version__, "torch": torch.__version__}
    try:
        with open(path) as file:
            out.update(measure(yaml.safe_load(file), forms))
    except Exception as error:
        out.update(job=path, error=str(error)[:300])
    print(json.dumps(out), flush=True)
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()
