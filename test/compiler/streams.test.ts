/** Asynchronous collectives: a program whose order does not hold them is refused, and the refusal names ranks, instruction and buffer. */
import { describe, expect, test } from "vitest";
import { touchedBy } from "../../schemas/effects.ts";
import type { Collective, Compute, Instruction, Program } from "../../schemas/plan.ts";
import { instructionsOf, turnsOf } from "../../schemas/program.ts";
import { BufferTable } from "../../src/analysis/bufferTable.ts";
import { compile } from "../../src/compile.ts";
import { verifyMemory } from "../../src/passes/memory.ts";
import { verifyPrograms } from "../../src/passes/verify.ts";
import { jobOf } from "../support/job.ts";

const planOf = (parallel: object, train: object = {}, data: object = {}, model: object = {}) =>
  compile(
    jobOf({
      name: "streams",
      model: { ...{ layers: 2, hidden: 32, ffn: 48, heads: 4, vocab: 256, seq: 16 }, moe: { experts: 4, top_k: 2, ffn: 16 }, ...model },
      parallel,
      train: { global_batch: 8, steps: 1, precision: "fp32", optimizer: { lr: 1e-3 }, ...train },
      data: { path: "corpus.txt", ...data },
    }),
  ).plan;
const buckets = { gradient_bucket: 0.01, parameter_bucket: 0.01 };
const meshes = {
  "data and expert parallel": planOf({ world: 4, expert: 2, distributed_optimizer: true, ...buckets }),
  "zero-bubble": planOf({ world: 4, pipeline: 2, schedule: "zero_bubble", distributed_optimizer: true, ...buckets }),
};

type Edit = (programs: Program[]) => void;
const isBucket = (i: Instruction): i is Collective => i.kind === "collective" && i.stream === "gradients";
const gradients = (p: Program): Instruction[] => [p.chunks[0]!.backward, p.chunks[0]!.weights].find((list) => list.some(isBucket))!;
const edit = (list: Instruction[], is: (i: Instruction) => boolean, over: object): void => {
  const at = list.findIndex(is);
  list[at] = { ...list[at]!, ...over } as Instruction;
};

const spoiled: Readonly<Record<string, readonly [edit: Edit, says: RegExp]>> = {
  "nothing waits for a bucket": [
    (ps) => {
      for (const i of ps[0]!.step) delete i.waits;
    },
    /stage 0 \(ranks 0\.\.\d\) at \S+, the step block touches \S+ while \S+\.bucket\.reduce_scatter on the stream gradients may run: it must wait/,
  ],
  "an instruction waits for what never begins": [
    (ps) => edit(ps[0]!.step, (i) => i.waits !== undefined, { waits: ["nothing"] }),
    /stage 0 .* at \S+, the step block waits for nothing, which has not begun/,
  ],
  "a bucket is reduced before its gradients are complete": [
    (ps) => {
      const list = gradients(ps[0]!);
      list.unshift(...list.splice(list.findIndex(isBucket), 1));
    },
    /stage 0 .* at \S+, [BW]\d touches \S+\.grad while \S+\.bucket\.reduce_scatter on the stream gradients may run/,
  ],
  "a bucket is reduced for every microbatch": [
    (ps) => edit(gradients(ps[0]!), isBucket, { only: undefined }),
    /stage 0 .* (touches \S+ while|begins again before anything has waited for it|reads \S+ before it is written)/,
  ],
  "a stream is not declared": [(ps) => delete ps[0]!.streams, /stage 0 .*: the stream gradients is not declared/],
  "streams may run at once, and the plan does not say so": [
    (ps) => (ps[0]!.streams = ps[0]!.streams!.map((s) => ({ ...s, beside: [] }))),
    /stage 0 .*: collectives of \S+ and \S+ may run at once, and the plan does not declare it/,
  ],
  "a collective of all ranks is asynchronous: its stages run different programs": [
    (ps) => edit(ps[0]!.step, (i) => i.kind === "collective" && i.world === true, { stream: "parameters" }),
    /stage 0 .*: a collective of all ranks runs on the stream parameters/,
  ],
  "what a collective writes is gone when its block ends": [
    (ps) => {
      const { more: _, only: __, ...bucket } = gradients(ps[0]!).find(isBucket)!;
      const { backward } = ps[0]!.chunks[0]!;
      const passing = new Set(ps[0]!.buffers.flatMap((b) => (b.kind === "workspace" ? [b.id] : [])));
      const own = backward.flatMap((i) => (i.kind === "compute" ? Object.values(i.writes).filter((id) => passing.has(id)) : []))[0]!;
      backward.push({ ...bucket, id: "late", how: "all_reduce", from: own, to: own });
    },
    /stage 0 .*: late may run after B0, and \S+ is gone then: nothing waits for it/,
  ],
  "the tensors of a bucket have different sizes": [
    (ps) => {
      const { from, more = [] } = gradients(ps[0]!).find(isBucket)!;
      edit(gradients(ps[0]!), isBucket, { more: [...more, { from, to: from }] });
    },
    /stage 0 .*: \S+: reduce_scatter of .* cannot give/,
  ],
};

describe.each(Object.entries(meshes))("%s", (_, { programs, mesh }) => {
  const copy = (): Program[] => structuredClone(programs) as Program[];
  test("the compiled program passes", () => {
    expect(programs.every((p) => instructionsOf(p).some(isBucket))).toBe(true);
    expect(() => verifyPrograms(copy(), mesh)).not.toThrow();
  });
  test.each(Object.entries(spoiled))("%s", (_, [spoil, says]) => {
    const programs = copy();
    spoil(programs);
    expect(() => verifyPrograms(programs, mesh)).toThrow(says);
  });
});

test("communication_sms limits each stream; stages with different limits are refused", () => {
  const { programs, mesh } = planOf({ world: 4, pipeline: 2, communication_sms: 8, gradient_bucket: 0.01 });
  expect(programs.map(({ streams }) => streams)).toEqual(
    programs.map(() => [expect.objectContaining({ name: "gradients", multiprocessors: 8 })]),
  );
  const spoilt = structuredClone(programs) as Program[];
  delete spoilt[1]!.streams![0]!.multiprocessors;
  expect(() => verifyPrograms(spoilt, mesh)).toThrow(/stage 1: gradients occupies any number of multiprocessors, and 8 on another stage/);
});

test("one rank has no collectives: with any key of overlap its programs and kernels are those without", () => {
  const of = (keys: object) => planOf({ distributed_optimizer: true, ...keys });
  const { programs, kernels } = of({});
  expect(programs.some(({ streams }) => streams)).toBe(false);
  const keys = [buckets, { ...buckets, parameter_gather: "forward", communication_sms: 8 }, { expert_overlap: "shared" }];
  for (const own of [...keys, { expert_overlap: "interleave" }, { tensor_overlap: "backward" }, { tensor_overlap: 2 }])
    expect(of(own), JSON.stringify(own)).toMatchObject({ programs, kernels });
});

describe("parameters that are gathered in forward", () => {
  const evaluation = { every: 1 };
  const own = { world: 4, distributed_optimizer: true, parameter_bucket: 0.01, parameter_gather: "forward" };
  const { programs, mesh } = planOf(own, { evaluation }, { split: [0.9, 0.1, 0] });
  const isGather = (i: Instruction): i is Collective => i.kind === "collective" && i.only === "first";
  const gathers = (list: readonly Instruction[]): Collective[] => list.filter(isGather);
  const broken: Readonly<Record<string, readonly [edit: Edit, says: RegExp]>> = {
    "a parameter is used before it is gathered": [
      ([p]) => {
        const { forward } = p!.chunks[0]!;
        forward.push(...forward.splice(forward.findIndex(isGather), 1));
      },
      /stage 0 .*: \S+ reads \S+ before it is written/,
    ],
    "an evaluation does not gather a parameter": [
      ([p]) => {
        const [chunk] = p!.evaluation!.chunks;
        chunk!.splice(chunk!.findIndex(isGather), 1);
      },
      /stage 0 .*: eval\.\S+ reads \S+ before it is written/,
    ],
    "nothing waits for a gather": [
      ([p]) => {
        for (const i of p!.chunks[0]!.forward) delete i.waits;
      },
      /stage 0 .* at \S+, F0 touches \S+ while \S+\.bucket\.all_gather on the stream parameters may run: it must wait/,
    ],
  };
  test("the compiled program passes: the first two buckets are gathered in the step, the others two ahead of their use", () => {
    expect(() => verifyPrograms(structuredClone(programs) as Program[], mesh)).not.toThrow();
    const [{ chunks, step } = programs[0]!] = programs;
    const { forward } = chunks[0]!;
    const all = gathers(forward);
    expect(step.filter((i) => i.kind === "collective" && i.how === "all_gather")).toHaveLength(2);
    expect(all.length).toBeGreaterThan(4);
    const usedAt = (g: Collective): number => forward.findIndex((i) => i.waits?.includes(g.id));
    for (const [n, g] of all.entries()) {
      const begun = forward.indexOf(g);
      if (n >= 2) expect(begun).toBeGreaterThanOrEqual(usedAt(all[n - 2]!));
      expect(usedAt(g)).toBeGreaterThan(begun);
    }
  });
  test.each(Object.entries(broken))("%s", (_, [spoil, says]) => {
    const copy = structuredClone(programs) as Program[];
    spoil(copy);
    expect(() => verifyPrograms(copy, mesh)).toThrow(says);
  });
});

/** The instructions of a forward and of the backward of the microbatch before it, in the order of their turns. */
function turnsOfPair(p: Program, { forward, backward }: { readonly forward: number; readonly backward: number }) {
  const runs = [
    { kind: "forward", microbatch: 1, chunk: forward },
    { kind: "backward", microbatch: 0, chunk: backward },
  ] as const;
  return turnsOf(p, runs).flatMap(({ run, instructions }) => instructions.map((i) => ({ i, kind: run.kind })));
}

describe("pairs of microbatches", () => {
  const pairs = {
    "one stage": planOf({ world: 4, expert: 4, expert_overlap: "interleave", gradient_bucket: 0.01 }, { global_batch: 16 }),
    "chunks of two stages": planOf(
      { world: 8, pipeline: 2, virtual_pipeline: 2, expert: 4, expert_overlap: "interleave" },
      { global_batch: 16 },
      {},
      { layers: 4 },
    ),
  };
  const exchanges = (list: readonly Instruction[]): Collective[] =>
    list.filter((i): i is Collective => i.kind === "collective" && i.stream === "experts");
  const broken: Readonly<Record<string, readonly [edit: Edit, says: RegExp]>> = {
    "nothing waits for an exchange of a forward": [
      ([p]) => {
        const { forward } = p!.chunks[0]!;
        const [first] = exchanges(forward);
        for (const i of forward) if (i.waits?.includes(first!.id)) delete i.waits;
      },
      /stage 0 .* at \S+, F0\S* touches \S+ while \S+ on the stream experts may run: it must wait/,
    ],
    "an instruction is in no turn": [
      ([p]) => p!.pairs![0]!.turns.splice(-1, 1),
      /stage 0 .*: the pair of forward \d and backward \d has \d+ of \d+ instructions of (forward|backward)/,
    ],
    "a pair is stated twice": [
      ([p]) => p!.pairs!.push(p!.pairs![0]!),
      /stage 0 .*: the pair of forward \d and backward \d is stated twice/,
    ],
    "a pair is not stated": [([p]) => p!.pairs!.pop(), /stage 0 .*: F\S+ is paired with B\S+, and the plan does not state their turns/],
    "a pair names a chunk that does not exist": [
      ([p]) => (p!.pairs![0]!.forward = 7),
      /stage 0 .*: the pair of forward 7 and backward \d names a chunk of \d/,
    ],
    "a backward is paired": [
      ([p]) => (p!.order.find(({ kind }) => kind === "backward")!.paired = true),
      /stage 0 .*: B\S+ is paired, and (B\S+|F\S+|the step block) follows it; a pair is a forward and a backward/,
    ],
    "a forward is paired with the backward of its own microbatch": [
      ([p]) => {
        const at = p!.order.findIndex(({ paired }) => paired);
        p!.order[at + 1]!.microbatch = p!.order[at]!.microbatch;
      },
      /stage 0 .*(: F(\S+) is paired with B\S+, which is not of an earlier microbatch|is out of order)/,
    ],
    "both blocks of a pair write one buffer": [
      ([p]) => {
        const [{ forward, backward } = p!.chunks[0]!] = p!.chunks;
        const written = forward.flatMap((i) => (i.kind === "compute" ? Object.values(i.writes) : []));
        const own = written.find((id) => p!.buffers.find((b) => b.id === id)?.kind === "workspace")!;
        const at = backward.findIndex((i) => i.kind === "compute");
        const i = backward[at] as Extract<Instruction, { kind: "compute" }>;
        backward[at] = { ...i, writes: { ...i.writes, [Object.keys(i.writes)[0]!]: own } };
      },
      /stage 0 .*: the pair of forward 0 and backward 0: \S+ and \S+ touch \S+, and one of them writes it|reads \S+ before it is written/,
    ],
  };
  describe.each(Object.entries(pairs))("%s", (_, { programs, mesh, memory }) => {
    const copy = (): Program[] => structuredClone(programs) as Program[];
    test("the compiled program passes, and the exchanges of a pair have one order on their communicator", () => {
      expect(() => verifyPrograms(copy(), mesh)).not.toThrow();
      for (const p of programs) {
        expect(p.streams?.map(({ name }) => name)).toContain("experts");
        for (const c of p.chunks)
          for (const i of [...c.forward, ...c.backward])
            if (i.kind === "collective" && (i.name === "dispatch" || i.name === "combine")) expect(i.stream).toBe("experts");
      }
    });
    test.each(Object.entries(broken))("%s", (_, [spoil, says]) => {
      const programs = copy();
      spoil(programs);
      expect(() => verifyPrograms(programs, mesh)).toThrow(says);
    });
    test("most exchanges of a pair run beside instructions of the other microbatch", () => {
      for (const p of programs)
        for (const pair of p.pairs!) {
          const all = turnsOfPair(p, pair);
          const begun = all.flatMap(({ i, kind }, at) => (exchanges([i]).length > 0 ? [{ id: i.id, kind, at }] : []));
          const hidden = begun.filter(({ id, kind, at }) => {
            const end = all.findIndex(({ i }) => i.waits?.includes(id));
            return all.slice(at, end < 0 ? undefined : end).some((other) => other.kind !== kind);
          });
          expect(hidden.length).toBeGreaterThanOrEqual(begun.length / 2);
        }
    });
    test("memory where the workspaces of a pair meet is refused", () => {
      for (const [s, p] of programs.entries()) {
        const own = memory[s]!;
        expect(() => verifyMemory(p, own)).not.toThrow();
        const inBackward = new Set(
          p.chunks.flatMap(({ backward }) => backward.flatMap((i) => [...touchedBy(i, new BufferTable(p.buffers))])),
        );
        const workspace = p.buffers.filter(({ id, kind }) => kind === "workspace" && inBackward.has(id)).map(({ id }) => id);
        const first = Math.min(...workspace.map((id) => own.offsets[id]!));
        expect(first).toBeGreaterThan(0);
        const moved = Object.fromEntries(workspace.map((id) => [id, own.offsets[id]! - first]));
        expect(() => verifyMemory(p, { ...own, offsets: { ...own.offsets, ...moved } })).toThrow(/overlap/);
      }
    });
  });
  test("a block of a pair sends after the other has received: two stages do not wait for room at each other", () => {
    // chunks without a layer send what they receive; grids that do not nest exchange tokens before a backward receives
    const apart = planOf(
      {
        ...{ world: 12, pipeline: 2, tensor: 2, context: 3, sequence: true, expert: 2, expert_tensor: 3 },
        ...{ layout: "Et*2|||L", expert_overlap: "interleave" },
      },
      { global_batch: 12, recompute: { mode: "selective", modules: ["moe"] } },
      {},
      { hidden: 48, head_dim: 12, seq: 24, moe: { experts: 6, top_k: 3, ffn: 24 } },
    );
    for (const { programs } of [...Object.values(pairs), apart])
      for (const p of programs)
        for (const pair of p.pairs!) {
          const all = turnsOfPair(p, pair);
          for (const [at, { i, kind }] of all.entries())
            if (i.kind === "send") expect(all.slice(at).filter((later) => later.i.kind === "recv" && later.kind !== kind)).toEqual([]);
        }
  });
  test("the second microbatch is in the peak: one copy of activations more, and the workspace of a forward beside that of a backward", () => {
    const [plain, paired] = [{}, { expert_overlap: "interleave" }].map(
      (own) => planOf({ world: 4, expert: 4, ...own }, { global_batch: 16 }).memory[0]!,
    );
    const [copies] = pairs["one stage"].programs[0]!.chunks.map((c) => c.copies);
    expect(copies).toBe(2);
    expect(paired!.peak).toBeGreaterThanOrEqual(plain!.peak + paired!.activation[0]!);
    expect(paired!.workspace).toBeGreaterThan(plain!.workspace);
  });
});

test("a bucket is one collective, begun after the last of its gradients; without buckets each gradient has its own after backward", () => {
  const { programs } = meshes["data and expert parallel"];
  const [{ chunks, step } = programs[0]!] = programs;
  const all = chunks[0]!.backward.filter(isBucket);
  expect(all.every((i) => i.only === "last")).toBe(true);
  const reduced = all.flatMap((i) => [i.from, ...(i.more ?? []).map(({ from }) => from)]);
  expect(new Set(reduced).size).toBe(reduced.length);
  expect(reduced.length).toBe(programs[0]!.parameters.length);
  expect(step.some((i) => i.kind === "collective" && i.how === "reduce_scatter")).toBe(false);
});

describe("products in parts beside the exchanges between tensor ranks", () => {
  const job = jobOf({
    name: "parts",
    model: { layers: 2, hidden: 64, ffn: 64, heads: 4, vocab: 256, seq: 64 },
    parallel: { world: 2, tensor: 2, sequence: true, tensor_overlap: 4 },
    train: { global_batch: 2, steps: 1, precision: "bf16", optimizer: { lr: 1e-3 } },
    data: { path: "corpus.txt" },
  });
  const { programs, mesh } = compile(job).plan;
  const isPart = (i: Instruction): i is Collective => i.kind === "collective" && i.stream === "tensor" && /\.part\d$/.test(i.id);
  const isScatter = (i: Instruction): boolean => isPart(i) && i.how === "reduce_scatter";
  const isProduct = (i: Instruction): boolean => i.kind === "compute" && /\.wo\.part1$/.test(i.id);
  const forward = (p: Program): Instruction[] => p.chunks[0]!.forward;
  const broken: Readonly<Record<string, readonly [edit: (p: Program) => void, says: RegExp]>> = {
    "nothing waits for a part": [
      (p) => {
        for (const i of forward(p)) if (i.kind === "compute") delete i.waits;
      },
      /stage 0 .* at \S+, F0 touches \S+\.part0 while \S+\.all_gather\.part0 on the stream tensor may run: it must wait/,
    ],
    "the whole is read, and a part of it is not reduced": [
      (p) => forward(p).splice(forward(p).findIndex(isScatter), 1),
      /stage 0 .*: layers\.0\.attn\.residual\.part0 reads \S+ before it is written|waits for \S+, which has not begun/,
    ],
    "a part is sent before its product": [
      (p) => {
        const list = forward(p);
        const at = list.findIndex(isProduct);
        list.splice(at + 2, 0, ...list.splice(at, 1));
      },
      /stage 0 .*: \S+\.part1 reads \S+\.part1 before it is written/,
    ],
    "the norm of one part writes what the all-gather of another reads": [
      (p) => {
        const norm = forward(p).find(({ id }) => id === "layers.0.mlp.norm.part1") as Compute;
        norm.writes.y = norm.writes.y!.replace("rows1", "rows0");
      },
      /stage 0 .* at layers\.0\.mlp\.norm\.part1, F0 touches \S+\.rows0 while \S+\.all_gather\.part0 on the stream tensor may run|before it is written/,
    ],
    "a part of a result is reduced into the place of another": [
      (p) => {
        const [first, second] = forward(p).filter(isScatter) as Collective[];
        second!.to = first!.to;
      },
      /stage 0 .*: \S+ reads \S+ before it is written/,
    ],
  };
  test("the compiled program passes", () => {
    expect(() => verifyPrograms(structuredClone(programs) as Program[], mesh)).not.toThrow();
    expect(forward(programs[0]!).filter(isPart)).toHaveLength(2 * 4 * 4);
  });
  test("a part is gathered behind the next product: sums and norms of tokens have the same parts", () => {
    const ids = forward(programs[0]!).map(({ id }) => id.replace(/@[^.]*/, ""));
    const layer = ids.slice(ids.indexOf("layers.0.attn.wo.part0"), ids.indexOf("layers.0.mlp.w3.part0"));
    expect(layer.map((id) => id.replace("layers.0.", ""))).toEqual([
      ...["attn.wo.part0", "attn.wo.reduce_scatter.part0", "attn.wo.part1", "attn.wo.reduce_scatter.part1"],
      ...["attn.residual.part0", "mlp.norm.part0", "mlp.norm.all_gather.part0"],
      ...["attn.wo.part2", "attn.wo.reduce_scatter.part2"],
      ...["attn.residual.part1", "mlp.norm.part1", "mlp.norm.all_gather.part1"],
      ...["attn.wo.part3", "attn.wo.reduce_scatter.part3", "mlp.w1.part0"],
    ]);
  });
  test.each(Object.entries(broken))("%s", (_, [spoil, says]) => {
    const copies = structuredClone(programs) as Program[];
    spoil(copies[0]!);
    expect(() => verifyPrograms(copies, mesh)).toThrow(says);
  });
});
