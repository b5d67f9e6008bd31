/**
 * Plans whose digests are right and whose content is not: each was changed, then sealed again. Reading refuses all of them in one line
 * that names the section, before anything runs.
 */
import { describe, expect, test } from "vitest";
import { rowIndexOf } from "../../schemas/effects.ts";
import type { Collective, Compute, Instruction, Launch, Plan, Program, Sections, Transfer } from "../../schemas/plan.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { parsePlan } from "../../src/plan/read.ts";
import { printPlan, sealPlan, sections } from "../../src/plan/seal.ts";
import { blockRuns } from "../support/blockRuns.ts";
import { jobOf } from "../support/job.ts";

const job = jobOf({
  name: "small",
  model: {
    ...{ layers: 2, hidden: 16, ffn: 24, heads: 2, vocab: 256, seq: 8 },
    moe: { experts: 4, top_k: 2, ffn: 8, router: { balance: "sinkhorn", normalize_top_k: false } },
  },
  parallel: { world: 8, pipeline: 2, tensor: 2, sequence: true, expert: 2 },
  train: { global_batch: 8, steps: 1, precision: "bf16", optimizer: { lr: 1e-3 } },
  data: { path: "corpus.txt" },
});
const targets = ["cpu", "cuda:sm_90a"] as const;
type Target = (typeof targets)[number];
const plans = Object.fromEntries(
  await Promise.all(targets.map(async (target) => [target, compile(job, { target: await loadTarget(target) }).plan] as const)),
) as Record<Target, Plan>;

/** What an edit gets: the sections, free to be changed. */
type Free<T> = T extends readonly unknown[] | object ? { -readonly [K in keyof T]: Free<T[K]> } : T;
type EditablePlan = Free<Sections>;

function refusal(text: string): Trouble {
  try {
    parsePlan(text, "plan.json");
  } catch (error) {
    if (error instanceof Trouble) return error;
    throw error;
  }
  throw new Error("it was read");
}
function draftOf(target: Target): EditablePlan {
  const parts = structuredClone(plans[target]) as Partial<Plan>;
  return Object.fromEntries(sections.map((name) => [name, parts[name]])) as unknown as EditablePlan;
}
const sealed = (draft: EditablePlan): string => printPlan(sealPlan(draft as unknown as Sections));

const forward = (d: EditablePlan, stage = 0): Instruction[] => d.programs[stage]!.chunks[0]!.forward as Instruction[];
const allOf = (p: EditablePlan["programs"][number]): Free<Instruction>[] => [
  ...p.chunks.flatMap((c) => [...c.forward, ...c.backward, ...c.weights]),
  ...p.step,
];
function instruction<T extends Instruction>(d: EditablePlan, is: (i: Free<Instruction>) => boolean, stage = 0): Free<T> {
  const found = allOf(d.programs[stage]!).find(is);
  if (!found) throw new Error("the plan has no such instruction");
  return found as Free<T>;
}
const compute = (d: EditablePlan, op: string, stage = 0): Free<Compute> =>
  instruction<Compute>(d, (i) => i.kind === "compute" && i.op === op, stage);
/** An instruction on a list of tensors. */
const list = (d: EditablePlan, op = "sum_squares"): Free<Compute> =>
  instruction<Compute>(d, (i) => i.kind === "compute" && i.op === op && (i.tensors ?? 0) > 2);
const move = (d: EditablePlan): Free<Collective> => instruction<Collective>(d, (i) => i.kind === "collective");
const send = (d: EditablePlan): Free<Transfer> => instruction<Transfer>(d, (i) => i.kind === "send");
function buffer(d: EditablePlan, is: (b: Program["buffers"][number]) => boolean): EditablePlan["programs"][number]["buffers"][number] {
  const found = d.programs[0]!.buffers.find(is);
  if (!found) throw new Error("the plan has no such buffer");
  return found;
}
const parameter = (d: EditablePlan) => buffer(d, (b) => b.kind === "parameter" && b.sizes.length === 2);
const rows = (d: EditablePlan) => buffer(d, (b) => b.ragged > 0);
const place = (d: EditablePlan, id: string, at: number): void => void (d.memory[0]!.offsets[id] = at);
const launch = (d: EditablePlan): Free<Launch> => d.kernels[0]!.launches[0]!;

type Edit = (d: EditablePlan) => void;
type Damage = readonly [edit: Edit, section: (typeof sections)[number], says?: RegExp];

const damages: Readonly<Record<string, Damage>> = {
  "a target that does not exist": [(d) => (d.toolchain.target = "tpu"), "toolchain", /unknown target tpu/],
  "a world of other size": [(d) => (d.mesh.world = 4), "mesh"],
  "a world that the mesh cannot hold": [(d) => (d.job.parallel.world = d.mesh.world = 2 ** 20), "mesh"],
  "stages of no ranks": [(d) => (d.mesh.per_stage = 0), "mesh"],
  "no stride between stages": [(d) => (d.mesh.stage_stride = 0), "mesh"],
  "a factor of size 0": [(d) => (d.mesh.subAxes[0]!.size = 0), "mesh"],
  "a factor of stride 0": [(d) => (d.mesh.subAxes[0]!.stride = 0), "mesh"],
  "an axis over a factor that does not exist": [(d) => (d.mesh.axes.tp = [99]), "mesh"],
  "an axis less": [(d) => Reflect.deleteProperty(d.mesh.axes, "ep"), "mesh"],
  "more microbatches in the job than in the order": [(d) => (d.job.train.global_batch = 2 ** 40), "programs", /microbatches/],
  "a program less": [(d) => d.programs.pop(), "programs", /1 programs for 2 stages/],
  "a stage twice": [(d) => (d.programs[1]!.stage = 0), "programs", /program 1 is for stage 0/],
  "a chunk more on one stage": [(d) => d.programs[1]!.chunks.push(d.programs[1]!.chunks[0]!), "programs", /2 chunks, stage 0 has 1/],
  "a block run of another kind": [(d) => Reflect.set(d.programs[0]!.order[0]!, "kind", "step"), "programs", /kind/],
  "a block run of a microbatch that the step lacks": [
    (d) => (d.programs[0]!.order[0]!.microbatch = 1e9),
    "programs",
    /F1000000000 is out of order/,
  ],
  "a block run twice": [(d) => d.programs[0]!.order.push(...blockRuns("B0")), "programs", /B0 is out of order/],
  "an order that ends early": [(d) => d.programs[0]!.order.splice(1), "programs"],
  "a backward before its forward": [(d) => d.programs[0]!.order.reverse(), "programs"],
  "more copies of activations than microbatches": [
    (d) => (d.programs[0]!.chunks[0]!.copies = 2 ** 40),
    "programs",
    /copies of activations/,
  ],
  "two buffers of one name": [(d) => (d.programs[0]!.buffers[1]!.id = d.programs[0]!.buffers[0]!.id), "programs", /two buffers/],
  "a buffer of 2^60 elements": [(d) => (parameter(d).shape = parameter(d).sizes = [2 ** 30, 2 ** 30]), "programs", /too large/],
  "a shape that its sizes do not have": [(d) => (parameter(d).shape = [1, 1]), "programs", /over 2 ranks are not 1/],
  "a shard along a sub-axis that does not exist": [(d) => (parameter(d).shardedBy = [[7], []]), "programs", /its sub-axes are unknown/],
  "a buffer within itself": [(d) => (parameter(d).within = parameter(d).id), "programs", /cannot lie within/],
  "buffers within each other": [
    (d) => {
      const [a, b] = d.programs[0]!.buffers.filter(({ kind }) => kind === "optimizer");
      [a!.within, b!.within] = [b!.id, a!.id];
    },
    "programs",
    /cannot lie within/,
  ],
  "rows without an index": [(d) => delete rows(d).rows, "programs", /without a fanout or an index/],
  "rows whose index is another buffer": [(d) => (rows(d).rows = parameter(d).id), "programs", /is not an index of its rows/],
  "a chunk that does not exist": [(d) => (buffer(d, (b) => b.kind === "activation").chunk = 5), "programs", /no chunk 5/],
  "an op that does not exist": [
    (d) => Object.assign(compute(d, "rmsnorm"), { op: "format_disk" }),
    "programs",
    /"format_disk", which is not one of the allowed values/,
  ],
  "an op by the name of a method": [
    (d) => Object.assign(compute(d, "rmsnorm"), { op: "toString" }),
    "programs",
    /"toString", which is not one of the allowed values/,
  ],
  "an operand less": [(d) => delete compute(d, "rmsnorm").reads.gain, "programs", /lacks its operand gain/],
  "an operand of another size": [(d) => (compute(d, "gemm").reads.w = parameter(d).id), "programs"],
  "a dim of 2^50": [(d) => (compute(d, "gemm").dims.K = [2 ** 50, []]), "programs"],
  "a dim sharded by a sub-axis twice": [
    (d) => (compute(d, "gemm").dims.K![1] = [0, 0]),
    "programs",
    /sharded by unknown or repeated sub-axes/,
  ],
  "a buffer that does not exist": [(d) => (compute(d, "rmsnorm").writes.y = "nowhere"), "programs", /nowhere, which is not a buffer/],
  "an output that it keeps and does not have": [(d) => (compute(d, "rmsnorm").accumulates = ["z"]), "programs", /accumulates z/],
  "more experts chosen than there are": [(d) => (compute(d, "top_k_mask").attrs.k = 2 ** 40), "programs", /k is 1099511627776/],
  "rows of 2^50 elements": [(d) => (compute(d, "take_rows").attrs.width = 2 ** 50), "programs", /rows of/],
  "rounds without end": [(d) => (compute(d, "sinkhorn").attrs.most = 2 ** 50), "programs", /most is/],
  "a copy of 2^50 elements": [(d) => (compute(d, "arrange").attrs.n0 = 2 ** 50), "programs"],
  "a value that is read before it is written": [(d) => forward(d).reverse(), "programs"],
  "one instruction twice": [(d) => forward(d).push(forward(d)[0]!), "programs", /two instructions have the id/],
  "a send to a stage that does not exist": [(d) => (send(d).peer = 9), "programs", /names stage 9/],
  "a send of other bytes": [(d) => (send(d).bytes = 4), "programs", /bytes/],
  "a receive that nothing is sent for": [
    (d) => {
      const list = d.programs[0]!.chunks[0]!.forward;
      list.splice(list.indexOf(send(d) as never), 1);
    },
    "programs",
    /wait for ever/,
  ],
  "a collective over sub-axes that do not exist": [(d) => (move(d).subAxes = [9]), "programs", /sub-axes 9/],
  "a collective that says other bytes": [(d) => (move(d).bytes += 1), "programs", /the plan states/],
  "an input that no host has": [
    (d) => Object.assign(d.programs[0]!.inputs[0]!, { source: "password" }),
    "programs",
    /"password", which is not one of/,
  ],
  "an input of other size": [
    (d) => (d.programs[0]!.inputs.find(({ source }) => source === "lr")!.buffer = parameter(d).id),
    "programs",
    /the input lr has 1 elements/,
  ],
  "a metric that is no scalar": [(d) => (d.programs[0]!.metrics.loss = [parameter(d).id]), "programs", /the metric loss has 0 dims/],
  "a parameter without a buffer": [(d) => (d.programs[0]!.parameters[0]!.master = "nowhere"), "programs", /nowhere, which is not a buffer/],
  "a parameter twice": [(d) => d.programs[0]!.parameters.push(d.programs[0]!.parameters[0]!), "programs", /the name is repeated/],
  "a kernel that does not exist": [(d) => (compute(d, "rmsnorm").kernel = "none"), "kernels", /kernel none, which does not exist/],
  "the kernel of another op": [(d) => (compute(d, "rmsnorm").kernel = compute(d, "gemm").kernel), "kernels", /is of op gemm/],
  "a kernel at other sizes": [(d) => (d.kernels.find((k) => k.op === "gemm")!.sizes.K = 7), "kernels", /has K 7/],
  "two kernels of one name": [(d) => d.kernels.push(d.kernels[0]!), "kernels", /two kernels/],
  "a memory less": [(d) => d.memory.pop(), "memory", /1 memories for 2 stages/],
  "an offset beyond the arena": [(d) => place(d, parameter(d).id, 2 ** 40), "memory", /outside of the parameter arena/],
  "an offset that is not aligned": [(d) => place(d, parameter(d).id, 2), "memory", /outside of the parameter arena/],
  "no offset": [(d) => delete d.memory[0]!.offsets[parameter(d).id], "memory"],
  "an offset for no buffer": [(d) => place(d, "nowhere", 0), "memory", /offsets for/],
  "parameters that overlap": [(d) => place(d, d.programs[0]!.buffers.findLast((b) => b.kind === "parameter")!.id, 0), "memory", /overlap/],
  "an arena of 2^52 bytes": [(d) => (d.memory[0]!.workspace = 2 ** 52), "memory", /the peak is/],
  "a peak below the sum": [(d) => (d.memory[0]!.peak = 0), "memory", /the peak is 0/],
  "an activation arena more": [(d) => d.memory[0]!.activation.push(0), "memory", /2 activation arenas for 1 chunks/],
};

const cudaDamages: Readonly<Record<string, Damage>> = {
  "a kernel file outside the plan": [(d) => (d.kernels[0]!.source!.file = "../../etc/passwd"), "kernels", /pattern/],
  "a kernel file by an absolute path": [(d) => (d.kernels[0]!.source!.file = "/etc/passwd"), "kernels", /pattern/],
  "the file of another kernel": [(d) => (d.kernels[0]!.source!.file = d.kernels[1]!.source!.file), "kernels", /its source is/],
  "a kernel by a path": [(d) => (d.kernels[0]!.id = "../x"), "kernels", /pattern/],
  "a list of more tensors": [(d) => (list(d).tensors = 2 ** 40), "programs", /sum_squares lacks its operand g\.\d+/],
  "a list of fewer tensors": [(d) => (list(d).tensors = 2), "programs", /unknown operand g\.2/],
  "a list without its number": [(d) => delete list(d).tensors, "programs", /unknown operand g\.1/],
  "a list whose tensors have two types": [
    (d) => (list(d).reads["g.1"] = list(d, "adamw_cast").writes.y ?? ""),
    "programs",
    /g\.1 is bf16, and g f32/,
  ],
  "a list that shares what is not shared": [(d) => (list(d).writes["y.1"] = "loss"), "programs", /unknown operand y\.1/],
  "a list that updates a tensor twice": [
    (d) => (list(d, "adamw_cast").writes["m.1"] = list(d, "adamw_cast").writes.m ?? ""),
    "programs",
    /it writes \S+ for two tensors/,
  ],
  "a list of an op without lists": [(d) => (compute(d, "gemm").tensors = 2), "programs", /gemm has no operand that is a list/],
  "a kernel for fewer tensors": [
    (d) => {
      const { kernel } = list(d);
      const [arg] = d.kernels.find(({ id }) => id === kernel)!.launches[0]!.args;
      if (arg?.kind === "tensors") arg.count = 2;
    },
    "kernels",
    /takes g of 2 tensors/,
  ],
  "no blocks": [(d) => (launch(d).grid = [0, 1, 1]), "kernels", /0x1x1 blocks/],
  "2^40 blocks": [(d) => (launch(d).grid = [2 ** 40, 1, 1]), "kernels", /blocks/],
  "2^20 threads": [(d) => (launch(d).threads = 2 ** 20), "kernels", /threads/],
  "more shared memory than a device has": [(d) => (launch(d).shared = 2 ** 30), "kernels", /bytes/],
  "a function by a path": [(d) => (launch(d).entry = "../x"), "kernels", /is not a function name/],
  "an argument that does not exist": [(d) => launch(d).args.push({ kind: "operand", name: "secret" }), "kernels", /takes secret/],
  "scratch beyond the arena": [(d) => launch(d).args.push({ kind: "scratch", offset: 99999999999 }), "kernels", /takes scratch/],
  "less scratch than a kernel uses": [(d) => (d.kernels.find((k) => k.op === "gemm")!.scratch = 2 ** 40), "memory", /of scratch/],
  "no source": [(d) => delete d.kernels[0]!.source, "kernels", /needs a source/],
};

type Case = readonly [name: string, target: Target, damage: Damage];

describe("a plan that was changed and sealed again is refused", () => {
  test.each(targets)("the plan for %s is read where nothing was changed", (target) => {
    expect(parsePlan(sealed(draftOf(target)), "plan.json")).toEqual(plans[target]);
  });
  const cases = [
    ...Object.entries(damages).map(([name, damage]): Case => [name, "cpu", damage]),
    ...Object.entries(cudaDamages).map(([name, damage]): Case => [name, "cuda:sm_90a", damage]),
  ];
  test.each(cases)("%s", (_, target, [edit, section, says = /./]) => {
    const draft = draftOf(target);
    edit(draft);
    const { message, exit } = refusal(sealed(draft));
    expect(message).toMatch(
      new RegExp(
        `^plan\\.json: (section "${section}" is inconsistent: |not a valid plan: /${section}|another build of rankc wrote this plan \\(.*\\): /${section})`,
      ),
    );
    expect(message).toMatch(says);
    expect(message.split("\n")).toHaveLength(1);
    expect(exit).toBe(2);
  });
});

describe("rows of several indices", () => {
  const { plan } = compile(
    jobOf({
      name: "once",
      model: { layers: 2, hidden: 16, ffn: 24, heads: 2, vocab: 256, seq: 8, moe: { experts: 4, top_k: 2, ffn: 8, dispatch: "once" } },
      parallel: { world: 2, expert: 2 },
      train: { global_batch: 4, steps: 1, optimizer: { lr: 1e-3 } },
      data: { path: "corpus.txt" },
    }),
  );
  const indices = ({ programs }: Plan) =>
    programs.flatMap((p) => {
      const byId = new Map(p.buffers.map((b) => [b.id, b]));
      return instructionsOf(p).flatMap((i) => (i.kind === "compute" ? [[i.id, rowIndexOf(i, byId)]] : []));
    });

  // file and compiler have the operands of an instruction in different orders
  test("a plan that was read computes on the rows that it was compiled for", () => {
    const read = indices(parsePlan(printPlan(plan), "plan.json"));
    expect(read.find(([id]) => id === "layers.0.moe.unpermute_rows")).toEqual([
      "layers.0.moe.unpermute_rows",
      "layers.0.moe.row_choices.rows@-,-,ep",
    ]);
    expect(read).toEqual(indices(plan));
  });

  test.each([undefined, "c"])("an instruction that names %s as the operand of its rows is refused", (name) => {
    const draft = Object.fromEntries(sections.map((s) => [s, structuredClone(plan[s])])) as unknown as EditablePlan;
    const sum = compute(draft, "unpermute_rows");
    if (name === undefined) delete sum.rows_of;
    else sum.rows_of = name;
    expect(refusal(sealed(draft)).message).toMatch(
      `section "programs" is inconsistent: stage 0: ${sum.id}: it computes on the rows of ${name ?? "any operand"}, and unpermute_rows on those of r`,
    );
  });
});

describe("a section without a canonical form is refused by name", () => {
  const text = sealed(draftOf("cpu"));
  test.each([
    ["a number beyond floats", text.replace(/"peak":\d+/, '"peak":1e400'), /^plan\.json: section "memory" holds a number beyond/],
    [
      "a negative one",
      text.replace(/"rate":0/, '"rate":-1e999').replace(/"lr":0\.001/, '"lr":-1e999'),
      /section "job" holds a number beyond/,
    ],
    ["deep nesting", text.replace(/"memory":\[/, `$&${"[".repeat(1e5)}${"]".repeat(1e5)},`), /section "memory" is nested too deeply/],
    ["a second key of one name", text.replace(/"peak":\d+/, '"peak":0,$&'), /^plan\.json: the JSON is not in the form rankc wrote/],
  ])("%s", (_, changed, says) => {
    expect(changed).not.toBe(text);
    expect(refusal(changed).message).toMatch(says);
  });

  test("the digests of another plan are named as such", () => {
    const other = structuredClone(draftOf("cpu"));
    other.job.name = "other";
    other.kernels[0]!.uses += 1;
    const { digests } = sealPlan(other as unknown as Sections);
    const swapped = printPlan({ ...plans.cpu, digests });
    expect(refusal(swapped).message).toMatch(/section "digests" is not of this plan, or sections "job" and "kernels" were changed/);
  });
});
