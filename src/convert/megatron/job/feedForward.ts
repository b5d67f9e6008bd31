/**
 * Activation and biases of a launch. Megatron's default is GELU with biases everywhere. With biases and the fusion that is on by default it
 * computes the tanh approximation of GELU, else GELU by erf.
 */
import type { Importing } from "./importing.ts";

/** Puts the activation and the keys of biases. */
export function putLayers({ args, job }: Importing): void {
  putActivation({ args, job });
  putBiases({ args, job });
}

const hasBiases = ({ args }: Importing): boolean => !args.has("disable-bias-linear");
/** Megatron clears the fusion where there are no biases. */
const isFused = ({ args, job }: Importing): boolean => hasBiases({ args, job }) && !args.has("no-bias-gelu-fusion");

function putActivation({ args, job }: Importing): void {
  const given = (["swiglu", "squared-relu", "quick-geglu"] as const).filter((name) => args.has(name));
  const [name] = given;
  if (name === undefined) putGelu({ args, job });
  else {
    const activation = ({ swiglu: "swiglu", "squared-relu": "squared_relu", "quick-geglu": "quick_geglu" } as const)[name];
    job.put("model.activation", activation, [name]);
  }
  const softmax = args.text("softmax-type");
  if (softmax !== "vanilla") job.refuse(`--softmax-type ${softmax}`, "softmax is over the keys alone", "leave it out");
}

function putGelu({ args, job }: Importing): void {
  const fused = isFused({ args, job });
  const remark = fused ? "Megatron fuses biases with the tanh approximation" : undefined;
  job.put("model.activation", fused ? "gelu_tanh" : "gelu", ["swiglu", "no-bias-gelu-fusion", "disable-bias-linear"], remark);
}

function putBiases({ args, job }: Importing): void {
  const all = hasBiases({ args, job });
  const from = ["disable-bias-linear"] as const;
  if (args.has("multi-latent-attention")) job.put("model.qkv_bias", false, ["multi-latent-attention"], "its projections have no biases");
  else job.put("model.qkv_bias", all || args.has("add-qkv-bias"), [...from, "add-qkv-bias"]);
  job.put("model.out_bias", all, from);
  job.put("model.mlp_bias", all, from);
}

/** Puts the keys of the biases of experts and router. */
export function putExpertBiases({ args, job }: Importing): void {
  job.put("model.moe.bias", hasBiases({ args, job }), ["disable-bias-linear"]);
  job.put("model.moe.router.bias", hasBiases({ args, job }), ["disable-bias-linear"]);
}
