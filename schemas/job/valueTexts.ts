/** Texts that editors show beside the values of a key. */
import { devices } from "../devices.ts";

/** The memory of each device. */
const deviceTexts = Object.fromEntries(
  Object.entries(devices).map(([name, { memory }]) => [name, name === "cpu" ? "this machine" : `${Math.round(memory / 2 ** 30)} GiB`]),
);

/** What each value of a key with a few named values means. A test holds that no value is missing. */
export const valueTexts: Readonly<Record<string, Readonly<Record<string, string>>>> = {
  "model.norm.type": { rmsnorm: "x / sqrt(mean(x^2) + eps) x gain", layernorm: "the same of x less its mean, plus a bias" },
  "model.positions": {
    rope: "queries and keys are rotated by their position",
    learned: "a vector for each position is added to the embedding",
    none: "the order is seen by causality alone",
  },
  "model.rope.scaling.type": {
    linear: "all wavelengths are stretched",
    llama3: "long wavelengths are stretched, by the number of rotations within original_seq",
    yarn: "long wavelengths are stretched, and attention scores are scaled",
  },
  "model.activation": {
    swiglu: "silu(gate) x up",
    geglu: "gelu(gate) x up, with the tanh approximation of gelu",
    quick_geglu: "gate x sigmoid(1.702 gate) x up",
    gelu: "gelu, without a gate",
    gelu_tanh: "the tanh approximation of gelu, without a gate",
    squared_relu: "max(x, 0)^2, without a gate",
  },
  "model.qk_norm": { none: "no norm", head: "each head alone (Qwen3)", full: "all heads together (OLMoE)" },
  "model.moe.router.type": {
    top_k: "each token chooses its top_k experts",
    expert_choice: "each expert chooses its best tokens of a microbatch",
  },
  "model.moe.router.score": {
    softmax: "over all experts",
    sigmoid: "for each expert alone (DeepSeek-V3)",
    sqrt_softplus: "for each expert alone",
  },
  "model.moe.router.precision": { model: "logits have the type of train.precision", fp32: "logits are always fp32" },
  "model.moe.router.balance": {
    none: "no balancing loss",
    aux_loss: "a loss on the loads of a microbatch (Switch)",
    seq_aux_loss: "the same for each sequence alone (DeepSeek-V2)",
    global_aux_loss: "the same on the loads since the start of the step",
    sinkhorn: "the assignment is balanced by Sinkhorn's iterations, without a loss",
    quantile: "a threshold per expert follows the quantile of its scores",
  },
  "model.moe.router.force": { none: "the scores choose", uniform: "experts take tokens in turn: for benchmarks" },
  "model.moe.dispatch": {
    all_to_all: "each row is sent to the ranks of its experts",
    once: "a token is sent once to each rank that has experts of it, which returns one sum",
    once_per_node: "a token is sent once to each node that has experts of it, and inside the node once to each rank",
    all_gather: "every row is sent to every rank of the expert group",
  },
  "model.moe.capacity.drop": {
    probs: "rows with the largest weights are kept",
    position: "rows of the first tokens are kept",
  },
  "parallel.schedule": {
    "1f1b": "one forward, one backward",
    zero_bubble: "gradients of weights are computed later, while the stage would wait",
  },
  "parallel.context_method": {
    ring: "keys and values pass around a ring, one block after another",
    all_gather: "keys and values of all ranks are gathered at once",
  },
  "parallel.parameter_gather": {
    step: "in the step that updates them",
    forward: "the first two in the step, the others in the next forward, ahead of their use",
  },
  "parallel.expert_overlap": {
    none: "each exchange of rows ends before the next instruction",
    shared: "shared experts, and in backward gradients of weights, run beside the exchanges",
    interleave: "these, and another microbatch: its forward alternates with the backward of an earlier one",
  },
  "parallel.tensor_overlap": {
    none: "each all-gather and reduce-scatter ends before the next product that needs it",
    backward: "gradients of weights run beside the all-gathers and reduce-scatters of backward",
  },
  "parallel.order": {
    "tp-cp-ep-dp-pp": "pipeline stages outermost: a stage has neighbouring ranks",
    "tp-cp-ep-pp-dp": "data replicas outermost: a replica has neighbouring ranks",
  },
  "train.loss_weighting": {
    microbatch: "the mean of the means of microbatches",
    token: "the mean of all labels of a step",
  },
  "train.precision": {
    fp32: "everything in fp32",
    bf16: "parameters and activations in bf16; sums and main weights in fp32",
    fp16: "parameters and activations in fp16 with a loss scale; sums and main weights in fp32",
  },
  "train.matmul": {
    f32: "products of fp32 are exact to their last bits",
    tf32: "on tensor cores; operands keep 3 decimal digits",
  },
  "train.gradients": {
    f32: "gradients of matrices are summed in f32",
    bf16: "half of the memory and the traffic; each sum is rounded",
  },
  "train.gradient_reduction": {
    f32: "sums over ranks are sums of f32",
    bf16: "half of the traffic; gradients are rounded before they are sent",
  },
  "train.on_nonfinite": { stop: "the run ends with an error", skip: "the step is left out and counted" },
  "train.recompute.mode": {
    none: "all activations are kept",
    selective: "those of the named modules are recomputed",
    full: "those of whole layers are recomputed",
  },
  "train.recompute.modules": {
    core_attn: "attention itself: scores, softmax and sums",
    layernorm: "norms",
    mla_up_proj: "projections of the latent of attention",
    mlp: "the dense feed-forward part",
    moe: "the whole layer of experts",
    moe_act: "the activation of experts",
    moe_permute: "the copies of tokens that experts read",
    shared_experts: "the shared experts",
  },
  "train.recompute.method": { uniform: "all layers, in groups", block: "the first layers of each stage or chunk" },
  "train.init.output_scaling": {
    none: "all matrices have the same standard deviation",
    depth: "output projections: divided by sqrt(2 x model.layers), as Megatron does",
  },
  "train.optimizer.type": {
    adamw: "weight decay is subtracted from the weights",
    adam: "weight decay is added to the gradients",
    sgd: "with or without momentum; weight decay is added to the gradients",
    muon: "orthogonal updates of hidden matrices, adamw for the rest",
  },
  "train.optimizer.muon.coefficients": { simple: "the same in each iteration", quintic: "others in each iteration, as Megatron Core" },
  "train.optimizer.muon.scale_mode": {
    spectral: "sqrt(max(in, out))",
    unit_rms_norm: "sqrt(out / in)",
    shape_scaling: "sqrt(max(1, out / in))",
  },
  "train.optimizer.schedule": {
    constant: "no decay after warm-up",
    linear: "a straight line to min_lr",
    cosine: "half a cosine to min_lr",
    inverse_square_root: "1 / sqrt(step)",
    wsd: "constant, then a decay over the last wsd_decay_steps",
  },
  "train.optimizer.wsd_decay": {
    exponential: "by equal factors",
    linear: "a straight line",
    cosine: "half a cosine",
    minus_sqrt: "1 - sqrt(share of the decay)",
  },
  "train.optimizer.moments": { f32: "moments in f32", bf16: "moments in bf16: half of their memory" },
  "train.optimizer.weight_decay_schedule": {
    constant: "weight_decay in each step",
    linear: "a straight line from weight_decay_start to weight_decay_end",
    cosine: "half a cosine between them",
  },
  "cluster.device": deviceTexts,
  "data.format": { text: "a text, which a tokenizer reads", tokens: "token ids, one after another" },
  "data.dtype": { u16: "two bytes an id", u32: "four bytes an id" },
  "data.order": { sequential: "from the start of the corpus", shuffled: "from seeded random positions" },
};
