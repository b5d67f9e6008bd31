/**
 * A program that would fail, or wait for ever, is refused when it is compiled: real programs are spoiled in many ways, and the
 * refusal names the ranks and the instruction.
 */
import { describe, expect, test } from "vitest";
import type { Collective, Instruction, Program, Transfer } from "../../schemas/plan.ts";
import { compile } from "../../src/compile.ts";
import { verifyPrograms } from "../../src/passes/verify.ts";
import { blockRuns } from "../support/blockRuns.ts";
import { jobOf } from "../support/job.ts";

const plan = (parallel: object, global_batch = 16) =>
  compile(
    jobOf({
      name: "spoiled",
      model: {
        ...{ layers: 4, hidden: 32, ffn: 48, heads: 4, vocab: 256, seq: 16 },
        moe: { experts: 4, top_k: 2, ffn: 16, router: { balance: "aux_loss", aux_coeff: 0.1 } },
      },
      parallel,
      train: { global_batch, steps: 1, precision: "fp32", optimizer: { lr: 1e-3 } },
      data: { path: "corpus.txt" },
    }),
  ).plan;

type Edit = (programs: Program[]) => void;
type Block = "forward" | "backward";
const block = (p: Program, kind: Block, chunk = 0): Instruction[] => p.chunks[chunk]![kind];
const find = <K extends Instruction["kind"]>(list: readonly Instruction[], kind: K, nth = 0): number =>
  list.map((i, at) => (i.kind === kind ? at : -1)).filter((at) => at >= 0)[nth]!;
const swap = (list: unknown[], a: number, b: number): void => void ([list[a], list[b]] = [list[b], list[a]]);
const change = <T extends Instruction>(list: Instruction[], at: number, over: Partial<T>): void =>
  void (list[at] = { ...list[at]!, ...over } as Instruction);

const meshes = {
  "1F1B over 4 stages of 2 ranks": plan({ world: 8, pipeline: 4, expert: 2 }),
  "two chunks a stage": plan({ world: 8, pipeline: 2, virtual_pipeline: 2, expert: 2 }),
  "zero-bubble": plan({ world: 8, pipeline: 4, schedule: "zero_bubble", expert: 2 }),
};

const spoiled: Readonly<Record<string, readonly [edit: Edit, message: RegExp]>> = {
  "a send is left out": [
    (ps) => block(ps[0]!, "forward").splice(find(block(ps[0]!, "forward"), "send"), 1),
    /wait for ever: .*stage 1 \(ranks 2..3|4..7\).*recv/,
  ],
  "a receive is left out": [
    (ps) => {
      const list = block(ps[1]!, "forward");
      const at = find(list, "recv");
      const { buffer } = list[at] as Transfer;
      list.splice(at, 1);
      ps[1]!.inputs.push({ source: "ids", depth: 9, buffer });
    },
    /stage 0 .*send.*for room at stage 1|sent and never received/,
  ],
  "a send goes to the wrong stage": [
    (ps) => change<Transfer>(block(ps[0]!, "forward"), find(block(ps[0]!, "forward"), "send"), { peer: ps.length - 1 + 7 }),
    /stage 0 \(ranks 0\.\.\d\) at .*send, F0.* names stage/,
  ],
  "a stage sends to itself": [
    (ps) => change<Transfer>(block(ps[1]!, "backward"), find(block(ps[1]!, "backward"), "send"), { peer: 1 }),
    /stage 1 \(ranks .*\) at .*send.* names stage 1/,
  ],
  "another value is sent": [
    (ps) => change<Transfer>(block(ps[0]!, "forward"), find(block(ps[0]!, "forward"), "send"), { tag: "something" }),
    /stage 1 .* waits for .* and stage 0 .* sends something/,
  ],
  "more is sent than is taken": [
    (ps) => change<Transfer>(block(ps[0]!, "forward"), find(block(ps[0]!, "forward"), "send"), { bytes: 4 }),
    /stage 1 .* takes \d+ bytes, and stage 0 .* sends 4/,
  ],
  "a letter goes by a channel that nobody reads": [
    (ps) => change<Transfer>(block(ps[1]!, "backward"), find(block(ps[1]!, "backward"), "send"), { channel: "lost" }),
    /wait for ever: .*stage 0 \(ranks 0\.\.\d\) at .*recv/,
  ],
  "a stage does its backward before its forward": [
    (ps) => ps[0]!.order.reverse(),
    /stage 0 \(ranks .*\): [BW]\d+.* is out of order: microbatch 0 is next/,
  ],
  "a microbatch is left out": [
    (ps) =>
      ps[1]!.order.splice(
        ps[1]!.order.findIndex((r) => r.kind === "forward" && r.microbatch === 1),
        1,
      ),
    /stage 1 .*: F2.* is out of order: microbatch 1 is next/,
  ],
  "the last backward is left out": [
    (ps) =>
      ps[0]!.order.splice(
        ps[0]!.order.findLastIndex((r) => r.kind === "backward"),
        1,
      ),
    /stage 0 .*(are done backward|comes before the backward)/,
  ],
  "a stage has fewer copies of its activations than microbatches in flight": [
    (ps) => void (ps[0]!.chunks[0] = { ...ps[0]!.chunks[0]!, copies: 1 }),
    /stage 0 .*: at F1.* 2 microbatches are in flight in 1 copies/,
  ],
  "a chunk that does not exist": [(ps) => ps[0]!.order.push(...blockRuns("F0.7")), /F0\.7 names chunk 7/],
  "a value is read before it is written": [
    (ps) => swap(block(ps[0]!, "forward"), 0, 3),
    /stage 0 \(ranks 0\.\.\d\): \S+ reads \S+ before it is written/,
  ],
  "a value of backward is read in forward": [
    (ps) =>
      block(ps[0]!, "forward").push({ ...(block(ps[0]!, "backward").find((i) => i.kind === "compute") as Instruction), id: "too.early" }),
    /stage 0 .*: too\.early reads \S+ before it is written/,
  ],
  "two instructions have one name": [
    (ps) => change(block(ps[0]!, "forward"), 1, { id: block(ps[0]!, "forward")[0]!.id }),
    /stage 0 .*: two instructions have the id embedding/,
  ],
  "a buffer that there is not": [
    (ps) => change<Collective>(block(ps[0]!, "forward"), find(block(ps[0]!, "forward"), "collective"), { from: "nowhere" }),
    /stage 0 .*: \S+ names nowhere, which is not a buffer/,
  ],
  "an op accumulates into a buffer that is not lasting": [
    (ps) => {
      const list = block(ps[0]!, "forward");
      const at = find(list, "compute", 1);
      const i = list[at]!;
      if (i.kind === "compute") list[at] = { ...i, accumulates: Object.keys(i.writes) };
    },
    /stage 0 .*: \S+ accumulates into \S+, which is not a lasting buffer/,
  ],
  "a collective of the wrong kind": [
    (ps) => {
      const list = block(ps[0]!, "forward");
      change<Collective>(list, find(list, "collective"), { how: "all_gather" });
    },
    /stage 0 .*: \S+: all_gather of \[[\d,]*\] cannot give \[[\d,]*\]/,
  ],
  "a collective over sub-axes that do not exist": [
    (ps) => {
      const list = block(ps[0]!, "forward");
      change<Collective>(list, find(list, "collective"), { subAxes: [9] });
    },
    /stage 0 .*: \S+ runs over unknown or repeated sub-axes 9/,
  ],
  "one stage leaves out what all ranks reduce": [
    (ps) => {
      const { step } = ps[1]!;
      const at = step.findIndex((i) => i.kind === "collective" && i.world);
      const { from, to } = step[at] as Collective;
      step.splice(at, 1);
      for (const i of step) if (i.kind === "compute") for (const [name, id] of Object.entries(i.reads)) if (id === to) i.reads[name] = from;
    },
    /wait for ever: .*stage 0 \(ranks 0\.\.\d\) at grad_norm\S*, the step block, for all other stages/,
  ],
  "stages run different collectives": [
    (ps) =>
      change<Collective>(
        ps[1]!.step,
        ps[1]!.step.findIndex((i) => i.kind === "collective" && i.world),
        { id: "another" },
      ),
    /stage 1 .* at another, the step block and stage 0 .* at grad_norm\S*, the step block run different collectives of all ranks/,
  ],
  "a stage waits for a letter before it meets all others, who wait for it": [
    (ps) => {
      const why = { op: "", because: "", path: "" };
      const letter = { buffer: "grad_norm.squared", tag: "late", channel: "step", bytes: 4, why };
      ps[0]!.step.push({ kind: "send", id: "late.send", peer: 1, ...letter });
      ps[1]!.step.unshift({ kind: "recv", id: "late.recv", peer: 0, ...letter });
    },
    /wait for ever: .*stage 0 .* for all other stages; stage 1 \(ranks .*\) at late\.recv, the step block, for stage 0/,
  ],
  "a stage is missing": [(ps) => void ps.pop(), /\d programs for \d stages/],
};

describe.each(Object.entries(meshes))("%s", (_, { programs, mesh }) => {
  const copy = (): Program[] => structuredClone(programs) as Program[];

  test("the compiled program passes", () => expect(() => verifyPrograms(copy(), mesh)).not.toThrow());
  test.each(Object.entries(spoiled))("%s", (_, [edit, message]) => {
    const spoiledPrograms = copy();
    edit(spoiledPrograms);
    expect(() => verifyPrograms(spoiledPrograms, mesh)).toThrow(message);
  });
});

test("two stages that both send first, without room for messages, are refused", () => {
  const { programs, mesh } = meshes["1F1B over 4 stages of 2 ranks"];
  const late = structuredClone(programs) as Program[];
  // stage 1 takes nothing before all forwards of stage 0 are sent, for which there is no room
  const [first, second] = late;
  const forwards = first!.order.filter((r) => r.kind === "forward");
  first!.order.splice(0, first!.order.length, ...forwards, ...first!.order.filter((r) => r.kind === "backward"));
  first!.chunks[0] = { ...first!.chunks[0]!, copies: forwards.length };
  second!.order.reverse();
  expect(() => verifyPrograms(late, mesh)).toThrow(/stage 1 \(ranks 2\.\.3\)/);
});

test("a chunk that sends more messages than are allowed in flight is refused", () => {
  const { programs, mesh } = plan({ world: 4, pipeline: 2, virtual_pipeline: 2, data: 2 }, 10);
  expect(() => verifyPrograms(programs, mesh)).not.toThrow();
  const alone = structuredClone(programs) as Program[];
  for (const p of alone)
    for (const { forward, backward } of p.chunks) for (const i of [...forward, ...backward] as { in_flight?: number }[]) delete i.in_flight;
  expect(() => verifyPrograms(alone, mesh)).toThrow(/wait for ever: .*send, B\d\.1, for room at stage 1/);
});

test("a stage without parameters adds zero to the gradient's norm; one with parameters adds before the sum", () => {
  const { programs, mesh } = plan({ world: 3, pipeline: 3, layout: "Etttt||L" }, 12);
  expect(programs[1]!.parameters).toEqual([]);
  expect(() => verifyPrograms(programs, mesh)).not.toThrow();
  const late = structuredClone(programs) as Program[];
  const isPart = (i: Instruction): boolean => i.kind === "compute" && Object.values(i.writes).includes("grad_norm.squared");
  late[0]!.step = [...late[0]!.step.filter((i) => !isPart(i)), ...late[0]!.step.filter(isPart)];
  expect(() => verifyPrograms(late, mesh)).toThrow(/stage 0 .*: \S+ reads grad_norm.squared before it is written/);
});
