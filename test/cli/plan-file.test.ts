import { Buffer } from "node:buffer";
import canonicalize from "canonicalize";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { FORMAT_VERSION } from "../../schemas/formatVersion.ts";
import type { Plan, Sections } from "../../schemas/plan.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { loadTarget } from "../../src/codegen/targets.ts";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { canonical } from "../../src/plan/canonical.ts";
import { parsePlan } from "../../src/plan/read.ts";
import { printPlan, sealPlan } from "../../src/plan/seal.ts";
import { smallest } from "../../src/rules/index.ts";
import { version } from "../../src/version.ts";
import { blockRuns } from "../support/blockRuns.ts";
import { jobOf } from "../support/job.ts";

const { job } = readJob(smallest, "job.yaml");

/** One rank, one instruction: all the sections there are. */
const sections: Sections = {
  job: job!,
  mesh: {
    world: 1,
    per_stage: 1,
    stage_stride: 1,
    subAxes: [],
    axes: { tp: [], cp: [], dp: [], etp: [], ep: [], edp: [], kv: [], copies: [] },
    sizes: { tp: 1, cp: 1, dp: 1, etp: 1, ep: 1, edp: 1, pp: 1, kv: 1, copies: 1 },
    gpus_per_node: 8,
  },
  programs: [
    {
      stage: 0,
      order: blockRuns("F0 B0"),
      parameters: [],
      inputs: [],
      bounds: [],
      metrics: {},
      buffers: [{ id: "x", kind: "optimizer", dtype: "f32", shape: [2], sizes: [2], ragged: 0, shardedBy: [[]] }],
      chunks: [
        {
          layers: [0, 4],
          copies: 1,
          forward: [
            {
              kind: "compute",
              id: "layers.0.add",
              op: "add",
              kernel: "add_00000000",
              reads: { a: "x", b: "x" },
              writes: { y: "x" },
              dims: {},
              attrs: { scale: 0.1 },
            },
          ],
          backward: [],
          weights: [],
        },
      ],
      step: [],
    },
  ],
  memory: [
    { stage: 0, parameter: 0, gradient: 0, optimizer: 256, activation: [0], workspace: 0, scratch: 0, peak: 256, offsets: { x: 0 } },
  ],
  kernels: [{ id: "add_00000000", op: "add", dtypes: "f32.f32.f32", sizes: {}, attrs: {}, uses: 1, scratch: 0, launches: [] }],
  toolchain: { rankc: "0.1.0", target: "cpu" },
};
const plan = sealPlan(sections);
const text = printPlan(plan);
const names = ["job", "mesh", "programs", "memory", "kernels", "toolchain"] as const;

function refusal(changed: string): Trouble {
  try {
    parsePlan(changed, "plan.json");
  } catch (error) {
    if (error instanceof Trouble) return error;
    throw error;
  }
  throw new Error("it was read");
}

describe("a plan as a file", () => {
  test("parse(print(plan)) is the plan", () => {
    expect(parsePlan(text, "plan.json")).toEqual(plan);
    expect(printPlan(parsePlan(text, "plan.json"))).toBe(text);
  });

  test.each([
    ["copies of key/value heads", { kv_heads: 2 }, { world: 8, tensor: 8, sequence: true }],
    ["copies of key/value heads around a ring", { kv_heads: 1 }, { world: 8, tensor: 4, sequence: true, context: 2 }],
    ["parts without a layer", {}, { world: 3, pipeline: 3, layout: "E||tt||L|" }],
    ["several messages in flight", {}, { world: 2, pipeline: 2, layout: "E|t|t|L" }],
  ])("a compiled plan with %s is read back unchanged", (_, model, parallel) => {
    const made = compile(
      jobOf({
        name: "read",
        model: { layers: 2, hidden: 32, heads: 8, vocab: 256, seq: 16, ...model },
        parallel,
        train: { global_batch: 5, steps: 1, optimizer: { lr: 1e-3 } },
        data: { path: "corpus.txt" },
      }),
    ).plan;
    const written = printPlan(made);
    expect(printPlan(parsePlan(written, "plan.json"))).toBe(written);
  });

  test.each(["cuda:sm_90a", "cuda:sm_80", "webgpu:baseline"])(
    "a plan for %s with bounded rows of experts on several ranks is read as it was written",
    async (name) => {
      const moe = { experts: 8, top_k: 2, ffn: 32, rows_bound: 2 };
      const made = compile(
        jobOf({
          name: "read",
          model: { layers: 1, hidden: 32, heads: 4, vocab: 256, seq: 16, moe },
          parallel: { world: 4, expert: 4 },
          train: { global_batch: 4, steps: 1, precision: "fp32", optimizer: { lr: 1e-3 } },
          data: { path: "corpus.txt" },
        }),
        { target: await loadTarget(name) },
      ).plan;
      const written = printPlan(made);
      expect(printPlan(parsePlan(written, "plan.json"))).toBe(written);
    },
  );

  test("equal sections have equal bytes, whatever the order of their keys", () => {
    const turned = Object.fromEntries(Object.entries(sections).reverse()) as Sections;
    expect(printPlan(sealPlan(turned))).toBe(text);
  });

  test.each(names)("a change of %s changes its digest and that of the plan, and no other's does", (name) => {
    const other = structuredClone(sections) as { -readonly [K in keyof Sections]: Sections[K] };
    const edits: { [K in (typeof names)[number]]: () => void } = {
      job: () => (other.job = { ...other.job, name: "other" }),
      mesh: () => (other.mesh = { ...other.mesh, gpus_per_node: 4 }),
      programs: () => (other.programs = []),
      memory: () => (other.memory = []),
      kernels: () => (other.kernels = []),
      toolchain: () => (other.toolchain = { ...other.toolchain, target: "h100" }),
    };
    edits[name]();
    const { digests } = sealPlan(other);
    const moved = Object.keys(digests).filter(
      (key) => digests[key as keyof Plan["digests"]] !== plan.digests[key as keyof Plan["digests"]],
    );
    expect(moved.sort()).toEqual([name, "plan"].sort());
  });

  test.each([
    ["job", '"name":"smallest"', '"name":"smallish"'],
    ["mesh", '"gpus_per_node":8,"per_stage"', '"gpus_per_node":4,"per_stage"'],
    ["programs", '"scale":0.1', '"scale":0.2'],
    ["memory", '"peak":256', '"peak":128'],
    ["kernels", '"uses":1', '"uses":2'],
    ["toolchain", '"target":"cpu"', '"target":"gpu"'],
  ])("a change in %s is named", (name, from, to) => {
    expect(text).toContain(from);
    const { message, exit } = refusal(text.replace(from, to));
    expect(message).toContain(`section "${name}" was changed after the plan was compiled`);
    expect(exit).toBe(2);
  });

  test("a changed digest is reported as such, not as a change of its section", () => {
    const digest = plan.digests.programs;
    const { message } = refusal(text.replace(digest, digest.replace(/^./, digest.startsWith("0") ? "1" : "0")));
    expect(message).toContain('section "digests" was changed');
  });

  test("any flipped byte is refused with one line that names its place", () => {
    const bytes = Buffer.from(text);
    const flipped = fc.record({ at: fc.nat(bytes.length - 1), mask: fc.integer({ min: 1, max: 255 }) });
    fc.assert(
      fc.property(flipped, ({ at, mask }) => {
        const changed = Buffer.from(bytes);
        changed[at]! ^= mask;
        const { message, exit } = refusal(changed.toString("utf8"));
        expect(exit).toBe(2);
        expect(message).toMatch(/^plan\.json: .*(section ".*"|JSON|format_version|digests)/);
        expect(message.split("\n")).toHaveLength(1);
      }),
      { numRuns: 1000 },
    );
  });

  test("a file that was cut short is refused", () => {
    expect(refusal(text.slice(0, text.length / 2)).message).toContain("JSON");
    expect(refusal("").message).toContain("JSON");
    expect(refusal("[]\n").message).toContain("not a plan");
  });

  test("a newer major version is named before anything else is looked at", () => {
    const { message, fix } = refusal(JSON.stringify({ format_version: "99.0", unheard: "of" }));
    expect(message).toBe(`plan.json: format_version 99.0 is newer than this rankc reads (${FORMAT_VERSION})`);
    expect(fix).toContain("newer rankc");
  });

  test("an invalid structure with correct digests is reported by the schema", () => {
    const wrong = sealPlan({ ...sections, memory: [{ ...sections.memory[0]!, peak: -1 }] });
    expect(refusal(printPlan(wrong)).message).toMatch(/not a valid plan: \/memory\/0\/peak must be >= 0/);
    const extra = sealPlan({ ...sections, toolchain: { ...sections.toolchain, extra: 1 } as Sections["toolchain"] });
    expect(refusal(printPlan(extra)).message).toContain("/toolchain");
  });

  test("a plan of a build with other keys is named so, whichever build has the key; a wrong value is no matter of builds", () => {
    const { seed: _, ...train } = sections.job.train;
    const older = sealPlan({ ...sections, job: { ...sections.job, train: train as Sections["job"]["train"] } });
    const { message, fix } = refusal(printPlan(older));
    expect(message).toBe(
      `plan.json: another build of rankc wrote this plan (it names ${version}, this is ${version}): /job/train must have required property 'seed'`,
    );
    expect(fix).toContain("compile the job again");
    const newer = sealPlan({ ...sections, job: { ...sections.job, later: 1 } as unknown as Sections["job"] });
    expect(refusal(printPlan(newer)).message).toContain("another build of rankc wrote this plan");
    const named = sealPlan({ ...sections, toolchain: { ...sections.toolchain, rankc: "0.0.9", extra: 1 } as Sections["toolchain"] });
    expect(refusal(printPlan(named)).message).toContain(`it names 0.0.9, this is ${version}`);
  });

  test("a plan of some megabytes is read in a second", () => {
    const [program] = sections.programs;
    const [chunk] = program!.chunks;
    const forward = Array.from({ length: 20_000 }, (_, i) => ({ ...chunk!.forward[0]!, id: `layers.${i}.add` }));
    const big = printPlan(sealPlan({ ...sections, programs: [{ ...program!, chunks: [{ ...chunk!, forward }] }] }));
    expect(big.length).toBeGreaterThan(2.5e6);
    // against quadratic time: it takes 0.3 s of processor time on an idle machine
    const start = process.cpuUsage();
    parsePlan(big, "plan.json");
    const { user, system } = process.cpuUsage(start);
    expect((user + system) / 1e6).toBeLessThan(6);
  });
});

describe("canonical JSON", () => {
  const object = (key: fc.Arbitrary<string>) =>
    fc.letrec((tie) => ({
      value: fc.oneof(
        { maxDepth: 4 },
        fc.double({ noNaN: true, noDefaultInfinity: true }),
        fc.string({ unit: "binary" }),
        tie("object"),
        fc.array(tie("value")),
      ),
      object: fc.dictionary(key, tie("value"), { noNullPrototype: true }),
    })).object;

  test("is that of the package canonicalize, also for keys whose order an assignment does not decide", () => {
    const keys = fc.oneof(fc.string({ unit: "binary" }), fc.constantFrom("", "9", "10", "__proto__", "toString", "\u{1F600}", "\uFB33"));
    fc.assert(fc.property(object(keys), (value) => void expect(canonical(value)).toBe(canonicalize(value))));
  });

  test("refuses numbers that JSON cannot hold", () => {
    expect(() => canonical({ a: [1, Number.POSITIVE_INFINITY] })).toThrow("JSON has no number Infinity");
  });
});
