/**
 * Module builders create the leaves (inputs and parameters) of one position of the model. Weights are [in, out].
 *
 * Letters of dims: B sequences of one microbatch on all data-parallel ranks, S tokens of a sequence, D hidden (2D: two of them),
 * V vocabulary, P learned positions, E experts, F ffn of an expert, L latent width of routed experts, X ffn of shared experts, H ffn of a dense layer,
 * Q all query heads, KV all key/value heads, C one head, O output of all heads. Latent attention: QL latent of queries, KL latent of
 * keys and values, KR KL with the rotary channels, KU keys and values of all heads.
 */
import type { Job } from "../../schemas/job.ts";
import { paddedVocab } from "../../schemas/jobSizes.ts";
import type { HostInput, InputSource } from "../../schemas/plan.ts";
import { inputName } from "../../schemas/program.ts";
import { dropout, siteOf } from "../ops/dropout.ts";
import { type Attrs, declared, invariant, type Leaf, type LeafValue, type Value } from "../ops/op.ts";

/** Counts of a step, and the entropy of its routers. They are reduced and reported like losses, but have no gradient. */
export type Count = "expert_loads" | "dropped_rows" | "router_entropy";
/** Returns whether the name of a loss is a count. */
export const isCount = (name: string): name is Count => name === "expert_loads" || name === "dropped_rows" || name === "router_entropy";

/** A scalar (or the table of expert loads) that a step reduces and reports. */
export interface Loss {
  /**
   * `loss` is the cross-entropy of the next token, `mtp_loss` that of further tokens, `aux_loss` the balancing loss, `z_loss` the loss
   * on router logits. `evaluation` is the cross-entropy by source. `expert_loads` counts tokens by layer and expert, `dropped_rows` rows beyond a capacity;
   * `router_entropy` is a mean over tokens and layers. Equal names are summed.
   */
  readonly name: "loss" | "mtp_loss" | "aux_loss" | "z_loss" | "evaluation" | Count;
  readonly value: Value;
  /** The depth of multi-token prediction, from 1. Each depth has a sum of its own. */
  readonly depth?: number;
  /** The input that holds the weight of the loss; 1 if absent. */
  readonly weight?: InputSource;
}

/** The forward graph of a model: its nodes are those that the values below depend on. */
export interface ModelGraph {
  readonly losses: readonly Loss[];
  /** Per parameter with an update rule of its own, the value whose sum over the step the rule reads. */
  readonly updateInputs: ReadonlyMap<Value, Value>;
}
/** A graph under construction. */
export interface ModelGraphBuilder {
  readonly losses: Loss[];
  readonly updateInputs: Map<Value, Value>;
}

/** Creates the leaves of one position of the model: embedding, layer or head. Nodes that use them run on its stage. */
export interface ModuleBuilder extends ModelGraphBuilder {
  readonly job: Job;
  /** Ascends from the embedding to the head; see `Node.position`. */
  readonly position: number;
  /** Prefix of node ids and parameter names: `layers.3.`. */
  readonly prefix: string;
  /** Returns `prefix` + `name`. */
  at(name: string): string;
  /** An input with one number per token [B,S]; `i32` by default. */
  input(source: HostInput, dtype?: Value["dtype"]): Value;
  /** An input [B]: the indices of the sequences of a microbatch, counted from the start of the run. */
  readonly sample: Value;
  /** An input [B,S]: per token the position in its sequence at which its document begins. */
  readonly documents: Value;
  /** Returns the attributes of a random op: its site and the token order. */
  random(name: string): Attrs;
  /** A hidden weight with normal initialisation. `dims` is like `D,F@etp`: letters of dims, and the axes that shard each, outermost first. */
  weight(name: string, dims: string): Value;
  /** An embedding table or an output head, with normal initialisation. */
  vocabulary(name: string, dims: string): LeafValue;
  /** A parameter that starts as ones. */
  gain(name: string, dims: string): Value;
  /** A parameter that starts as zeros. */
  bias(name: string, dims: string): Value;
  /** An f32 parameter that starts as zeros and has a custom update rule. */
  state(name: string, dims: string, rule: NonNullable<Leaf["rule"]>): Value;
}

/** Returns the axes that shard the residual stream [B,S,D]. With sequence parallelism, tensor ranks shard tokens too. */
const streamAxes = ({ parallel }: Job): NonNullable<Value["shardAxes"]> => [["dp"], parallel.sequence ? ["cp", "tp"] : ["cp"], []];

/** Returns the attributes for the order of a sequence's tokens over context ranks (ops/positions.ts). */
export const orderOf = ({ model, parallel: { context } }: Job) => ({ chunk: context > 1 ? model.seq / (2 * context) : 0, ranks: context });

/** Returns the number of sequences of one microbatch on all data-parallel ranks. */
const sequencesOf = ({ train, parallel }: Job): number => train.micro_batch * parallel.data;

function sizesOf(job: Job): Readonly<Record<string, number>> {
  const { model: m } = job;
  return {
    B: sequencesOf(job),
    S: m.seq,
    D: m.hidden,
    "2D": 2 * m.hidden,
    V: paddedVocab(m),
    P: m.max_positions,
    Q: m.heads * m.head_dim,
    KV: m.kv_heads * m.head_dim,
    C: m.head_dim,
    O: m.heads * (m.mla ? m.mla.v_dim : m.head_dim),
    QL: m.mla?.q_rank ?? 0,
    KL: m.mla ? m.mla.kv_rank : 0,
    KR: m.mla ? m.mla.kv_rank + m.mla.rope_dim : 0,
    KU: m.mla ? m.heads * (m.mla.nope_dim + m.mla.v_dim) : 0,
    H: m.ffn,
    F: m.moe?.ffn ?? 0,
    E: m.moe?.experts ?? 0,
    L: m.moe?.latent ?? 0,
    X: m.moe?.shared?.ffn ?? 0,
    "1": 1,
  };
}

/** Weights whose products are added to the residual stream, or are on the way from there to it behind an activation. */
const residualOutputs: ReadonlySet<string> = new Set(["wo", "w2", "shared.w2", "latent.up"]);

/** Creates the module builder of a position. */
export type ModuleBuilderAt = (position: number, prefix: string) => ModuleBuilder;

/** Returns the factory of module builders of one model. They add losses and update inputs to `graph`. */
export function moduleBuilders(job: Job, graph: ModelGraphBuilder): ModuleBuilderAt {
  // one input for all positions
  const shared = (source: InputSource, sizes: readonly number[], shardAxes: NonNullable<Value["shardAxes"]>): Value => ({
    ...{ out: 0, ragged: 0, fanout: 0, dtype: "i32", sizes, shardAxes },
    leaf: { kind: "input", name: source, position: 0, source: { source } },
  });
  const B = sequencesOf(job);
  const inputs = { sample: shared("sample", [B], [["dp"]]), documents: shared("documents", [B, job.model.seq], [["dp"], ["cp"]]) };
  return (position, prefix) => moduleBuilder(job, position, prefix, graph, inputs);
}

function moduleBuilder(
  job: Job,
  position: number,
  prefix: string,
  graph: ModelGraphBuilder,
  inputs: Pick<ModuleBuilder, "sample" | "documents">,
): ModuleBuilder {
  const { train } = job;
  const type = ({ fp32: "f32", bf16: "bf16", fp16: "f16" } as const)[train.precision];
  const size = sizesOf(job);
  const sizeOf = (dim: string): number => {
    const n = size[dim];
    invariant(n !== undefined, `no dim of a model is named ${dim}`);
    return n;
  };
  const leaf = (dims: string, of: Leaf, dtype: Value["dtype"]): LeafValue => {
    const dimSpecs = dims.split(",").map((d) => d.split("@"));
    return {
      out: 0,
      leaf: of,
      ragged: 0,
      fanout: 0,
      dtype,
      sizes: dimSpecs.map(([dim = ""]) => sizeOf(dim)),
      shardAxes: dimSpecs.map(([, ...axes]) => axes),
    };
  };
  const at = (name: string): string => prefix + name;
  const parameter = (name: string, dims: string, of: Pick<Leaf, "init" | "role" | "rule">, dtype: Value["dtype"] = type): LeafValue =>
    leaf(dims, { kind: "parameter", name: at(name), position, ...of }, dtype);
  const { std, output_scaling } = train.init;
  const normal = { type: "normal", std } as const;
  const scaled = output_scaling === "depth" ? ({ type: "normal", std: std / Math.sqrt(2 * job.model.layers) } as const) : normal;
  const constant = (type: "ones" | "zeros") => ({ role: "vector", init: { type, std: 0 } }) as const;
  return {
    ...{ job, position, prefix, ...graph, at, ...inputs },
    random: (name) => ({ ...siteOf(train.seed, at(name)), ...orderOf(job) }),
    input: (source, dtype = "i32") => leaf("B@dp,S@cp", { kind: "input", name: inputName(source), position, source }, dtype),
    weight: (name, dims) => parameter(name, dims, { role: "matrix", init: residualOutputs.has(name) ? scaled : normal }),
    vocabulary: (name, dims) => parameter(name, dims, { role: "vocabulary", init: normal }),
    gain: (name, dims) => parameter(name, dims, constant("ones")),
    bias: (name, dims) => parameter(name, dims, constant("zeros")),
    state: (name, dims, rule) => parameter(name, dims, { ...constant("zeros"), rule }, "f32"),
  };
}

/** Returns the same value in the layout of the residual stream [B,S,D]. */
export const inStream = (job: Job, x: Value): Value => declared(x, { shardAxes: streamAxes(job) });

/** Applies hidden dropout with the job's probability. */
export function dropped({ job, at, random, sample }: ModuleBuilder, x: Value, name: string): Value {
  const drop = job.model.dropout.hidden;
  if (drop === 0) return x;
  // dropout is applied after the reduction over tensor ranks, in the layout of the residual stream
  return dropout.of({ x: inStream(job, x), sample }, { drop, ...random(name) }, at(name));
}

/** Returns a tied copy of a parameter at another position. */
export const copyOf = (of: LeafValue, position: number): LeafValue => ({ ...of, leaf: { ...of.leaf, position, tiedTo: of } });
