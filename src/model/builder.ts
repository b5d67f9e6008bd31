/**
 * What the parts of a model are built with: its sizes by letter, and the leaves (inputs and parameters) of one position. Weights
 * are [in, out].
 *
 * Letters: B sequences of one microbatch on all data-parallel ranks, S tokens, D hidden (2D two of them), V vocabulary, E experts, F ffn of an
 * expert, L the width that routed experts work in, X ffn of shared experts, H ffn of a dense layer, Q all query heads, KV all key/value
 * heads, C one head, O what all heads give. Of latent attention: QL the queries' latent, KL that of keys and values, KR the same with
 * the channels that positions turn, KU what it becomes for all heads.
 */
import type { Job } from "../../schemas/job.ts";
import { dropout, siteOf } from "../ops/dropout.ts";
import type { Attrs, Leaf, Value } from "../ops/op.ts";

/** What a step counts beside its losses: reduced and reported like them, and without a gradient. */
export type Count = "expert_loads" | "dropped_rows";
export const isCount = (name: string): name is Count => name === "expert_loads" || name === "dropped_rows";

export interface Loss {
  /**
   * `loss` is the cross-entropy people watch; `mtp_loss` that of further tokens; `aux_loss` what balancing adds; `z_loss` what keeps logits
   * small. Of the counts, `expert_loads` are tokens by layer and expert, `dropped_rows` rows beyond a capacity. Equal names are added up.
   */
  readonly name: "loss" | "mtp_loss" | "aux_loss" | "z_loss" | Count;
  readonly value: Value;
  /** The input that says by how much it counts, where that is not 1. */
  readonly weight?: string;
}

/** One place of the model: the embedding, a layer, or the head. All that is made of its leaves belongs to its stage. */
export interface ModuleBuilder {
  readonly job: Job;
  /** A number that grows from the embedding to the head; see `Node.position`. */
  readonly position: number;
  /** Ids of nodes and names of parameters begin so: `layers.3.`. */
  readonly prefix: string;
  readonly losses: Loss[];
  /** `prefix` and a name. */
  at(name: string): string;
  /** A number for each token; `i32` if not said. */
  input(name: string, dtype?: Value["dtype"]): Value;
  /** Numbers of the sequences that are here, since the run began. */
  readonly sample: Value;
  /** Attributes of what is random: whose bits, and how tokens lie. */
  random(name: string): Attrs;
  /** `D,F@etp`: dims by letter, and the axes that cut each, outermost first. */
  weight(name: string, dims: string): Value;
  gain(name: string, dims: string): Value;
  bias(name: string, dims: string): Value;
  /** Begins as zeros, in f32, and changes once a step by a rule of its own. */
  state(name: string, dims: string, rule: Leaf["rule"]): Value;
}

/** How the residual stream [B,S,D] lies: between matrices, tensor ranks share out its tokens, too. */
export const streamCut = ({ parallel }: Job): NonNullable<Value["shardAxes"]> => [["dp"], parallel.sequence ? ["cp", "tp"] : ["cp"], []];

/** How the tokens of a sequence lie over the ranks that share it (ops/positions.ts). */
export const orderOf = ({ model, parallel: { context } }: Job) => ({ chunk: context > 1 ? model.seq / (2 * context) : 0, ranks: context });

type Sizes = Readonly<Record<string, number>>;

function sizesOf({ model: m, parallel, train }: Job): Sizes {
  return {
    B: train.micro_batch * parallel.data,
    S: m.seq,
    D: m.hidden,
    "2D": 2 * m.hidden,
    V: m.vocab,
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

export type ModuleBuilderAt = (position: number, prefix: string) => ModuleBuilder;

/** The parts of one model, which put their losses into `losses`. */
export function moduleBuilders(job: Job, losses: Loss[]): ModuleBuilderAt {
  // one for all: an input does not stand at a place of the model
  const sample: Value = {
    ...{ out: 0, ragged: 0, fanout: 0, dtype: "i32", sizes: [sizesOf(job).B!], shardAxes: [["dp"]] },
    leaf: { kind: "input", name: "sample", position: 0 },
  };
  return (position, prefix) => partOf(job, position, prefix, losses, sample);
}

function partOf(job: Job, position: number, prefix: string, losses: Loss[], sample: Value): ModuleBuilder {
  const { train } = job;
  const type = ({ fp32: "f32", bf16: "bf16", fp16: "f16" } as const)[train.precision];
  const size = sizesOf(job);
  const leaf = (dims: string, of: Leaf, dtype: Value["dtype"]): Value => {
    const dimSpecs = dims.split(",").map((d) => d.split("@"));
    return {
      out: 0,
      leaf: of,
      ragged: 0,
      fanout: 0,
      dtype,
      sizes: dimSpecs.map(([d]) => size[d!]!),
      shardAxes: dimSpecs.map(([, ...axes]) => axes),
    };
  };
  const at = (name: string): string => prefix + name;
  const parameter = (name: string, dims: string, init: Leaf["init"], more: Partial<Leaf> = {}, dtype: Value["dtype"] = type): Value =>
    leaf(dims, { kind: "parameter", name: at(name), position, init: init!, ...more }, dtype);
  return {
    ...{ job, position, prefix, losses, at, sample },
    random: (name) => ({ ...siteOf(train.seed, at(name)), ...orderOf(job) }),
    input: (name, dtype = "i32") => leaf("B@dp,S@cp", { kind: "input", name, position }, dtype),
    weight: (name, dims) => parameter(name, dims, { type: "normal", std: train.init_std }),
    gain: (name, dims) => parameter(name, dims, { type: "ones", std: 0 }),
    bias: (name, dims) => parameter(name, dims, { type: "zeros", std: 0 }),
    state: (name, dims, rule) => parameter(name, dims, { type: "zeros", std: 0 }, { rule: rule! }, "f32"),
  };
}

/** Hidden dropout, of the job's probability. */
export function dropped({ job, at, random, sample }: ModuleBuilder, x: Value, name: string): Value {
  const drop = job.model.dropout.hidden;
  if (drop === 0) return x;
  // what is dropped is an element of the whole sum over the tensor ranks: it is made as it is needed next
  x.shardAxes = streamCut(job);
  return dropout.of({ x, sample }, { drop, ...random(name) }, at(name));
}

/** A copy of a parameter that stands at another position, too. */
export const copyOf = (of: Value, position: number): Value => ({ ...of, leaf: { ...of.leaf!, position, tiedTo: of } });
