/** Schedules: each block runs once, the bubble and the activations in flight are those of the literature; and layouts of stages. */
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { groupsOf } from "../../schemas/program.ts";
import { layersOf, pipelineOf, readLayout } from "../../src/passes/pipelineStages.ts";
import { bubbleOf, schedule, timesOf } from "../../src/passes/schedule.ts";
import { drawSchedule } from "../../src/report/schedulePicture.ts";
import { blockRuns } from "../support/blockRuns.ts";
import { jobOf } from "../support/job.ts";
import { full } from "../support/tiers.ts";

type Kind = "1f1b" | "zero_bubble" | "pairs";
const jobWith = (stages: number, microbatches: number, chunks: number, kind: Kind) => {
  const job = jobOf({
    name: "order",
    model: { layers: stages * chunks, hidden: 8, heads: 2, vocab: 256, seq: 8 },
    parallel: { world: stages, pipeline: stages },
    train: { micro_batch: 1, global_batch: microbatches, steps: 1, optimizer: { lr: 1e-3 } },
    data: { path: "corpus.txt" },
  });
  const asked = kind === "pairs" ? ({ expert: 2, expert_overlap: "interleave" } as const) : { schedule: kind };
  return { ...job, parallel: { ...job.parallel, virtual_pipeline: chunks, ...asked } };
};
const played = (stages: number, microbatches: number, chunks: number, kind: Kind) => {
  const all = schedule(jobWith(stages, microbatches, chunks, kind), chunks);
  const pieces = timesOf(
    all.map((s) => s.order),
    chunks,
  );
  return { all, pieces };
};

const sizes = fc.record({ stages: fc.integer({ min: 1, max: 8 }), microbatches: fc.integer({ min: 1, max: 24 }) });

describe("bubbles, of units where a forward is one", () => {
  test("1F1B: p - 1 microbatches' time of m + p - 1", () =>
    fc.assert(
      fc.property(sizes, ({ stages: p, microbatches: m }) => {
        expect(bubbleOf(played(p, m, 1, "1f1b").pieces)).toBeCloseTo((p - 1) / (m + p - 1), 12);
      }),
    ));
  // Narayanan et al. 2021: a v-th of it, where groups of microbatches are full
  test("interleaved over v chunks: p - 1 of v m + p - 1", () =>
    fc.assert(
      fc.property(sizes, fc.integer({ min: 2, max: 4 }), ({ stages: p, microbatches: groups }, v) => {
        fc.pre(p > 1 && groups <= 6);
        const m = p * groups;
        expect(bubbleOf(played(p, m, v, "1f1b").pieces)).toBeCloseTo((p - 1) / (v * m + p - 1), 12);
      }),
    ));
  // Qi et al. 2023, ZB-H1: (p - 1)(F + B - W) with all three one unit
  test("zero-bubble: p - 1 units of 3 m + p - 1, where there are microbatches enough", () =>
    fc.assert(
      fc.property(sizes, ({ stages: p, microbatches: m }) => {
        fc.pre(m >= p);
        expect(bubbleOf(played(p, m, 1, "zero_bubble").pieces)).toBeCloseTo((p - 1) / (3 * m + p - 1), 12);
      }),
    ));
  test("zero-bubble over v chunks: a v-th of that, where groups of microbatches are full", () =>
    fc.assert(
      fc.property(sizes, fc.integer({ min: 2, max: 4 }), ({ stages: p, microbatches: groups }, v) => {
        fc.pre(p > 1 && groups <= 6);
        const m = p * groups;
        expect(bubbleOf(played(p, m, v, "zero_bubble").pieces)).toBeCloseTo((p - 1) / (3 * v * m + p - 1), 12);
      }),
    ));
  // a pair takes as long as its blocks, and a microbatch passes a stage later by a pair on its way there and back
  test("pairs: that of 1F1B, where there are microbatches enough", () =>
    fc.assert(
      fc.property(sizes, ({ stages: p, microbatches: m }) => {
        fc.pre(m >= 2 * p - 1);
        expect(bubbleOf(played(p, m, 1, "pairs").pieces)).toBeCloseTo((p - 1) / (m + p - 1), 12);
      }),
    ));
});

test("a pair is a forward and the backward of an earlier microbatch; all runs but the first and the last of a stage are in pairs", () =>
  fc.assert(
    fc.property(sizes, fc.integer({ min: 1, max: 4 }), ({ stages, microbatches }, v) => {
      const chunks = stages === 1 ? 1 : v;
      const { all } = played(stages, microbatches, chunks, "pairs");
      for (const [stage, { order }] of all.entries()) {
        const groups = groupsOf(order);
        expect(groups.flat()).toEqual(order);
        for (const group of groups.filter(({ length }) => length === 2)) {
          const [first, second] = group;
          expect([first?.kind, second?.kind]).toEqual(["forward", "backward"]);
          expect(second!.microbatch).toBeLessThan(first!.microbatch);
        }
        const kinds = groups.map((group) => (group.length === 2 ? "P" : group[0]!.kind[0])).join("");
        expect(kinds).toMatch(/^f+P*b+$/);
        if (chunks === 1)
          expect(groups.filter(({ length }) => length === 2)).toHaveLength(Math.max(0, microbatches - 2 * (stages - stage) + 1));
      }
    }),
  ));

test("every block runs once, in the order of microbatches, without deadlock", () => {
  const each = (n: number) => Array.from({ length: n }, (_, i) => i);
  const forms: readonly (readonly [Kind, number])[] = [
    ...(["1f1b", "zero_bubble", "pairs"] as const).flatMap((kind) => [1, 2, 3].map((v) => [kind, v] as const)),
  ];
  const cases = each(6).flatMap((p) => each(16).flatMap((m) => forms.map((form) => [p + 1, m + 1, form] as const)));
  for (const [stages, microbatches, [kind, v]] of cases) {
    const chunks = stages === 1 ? 1 : v;
    const { all, pieces } = played(stages, microbatches, chunks, kind);
    const kinds = kind === "zero_bubble" ? ["forward", "backward", "weights"] : ["forward", "backward"];
    for (const [stage, { order }] of all.entries()) {
      const where = `${kind}, ${microbatches} microbatches, stage ${stage} of ${stages} with ${chunks} chunks`;
      expect(pieces[stage]!.length, where).toBe(order.length);
      expect(order.length, where).toBe(microbatches * chunks * kinds.length);
      for (const k of kinds)
        for (const chunk of each(chunks))
          expect(
            order.filter((w) => w.kind === k && w.chunk === chunk).map((w) => w.microbatch),
            where,
          ).toEqual(each(microbatches));
    }
  }
});

describe("microbatches in flight", () => {
  const inFlight = (stages: number, m: number, chunks: number, kind: Kind) => played(stages, m, chunks, kind).all.map((s) => s.copies);
  test("1F1B: a stage holds as many as there are stages from it on", () => {
    expect(inFlight(4, 16, 1, "1f1b")).toEqual([[4], [3], [2], [1]]);
    expect(inFlight(4, 2, 1, "1f1b")).toEqual([[2], [2], [2], [1]]);
  });
  test("pairs: twice as many as under 1F1B, because a microbatch waits for a pair at each stage", () => {
    expect(inFlight(4, 16, 1, "pairs")).toEqual([[8], [6], [4], [2]]);
    expect(inFlight(1, 16, 1, "pairs")).toEqual([[2]]);
    expect(inFlight(1, 1, 1, "pairs")).toEqual([[1]]);
  });
  test("pairs of chunks: at most one more than interleaved", () =>
    expect(inFlight(2, 8, 2, "pairs")).toEqual([
      [4, 2],
      [4, 2],
    ]));
  test("zero-bubble: no stage more than the first one under 1F1B", () => {
    for (const copies of inFlight(4, 16, 1, "zero_bubble").flat()) expect(copies).toBeLessThanOrEqual(4);
  });
  test("zero-bubble over chunks: no chunk more than on the first stage of the interleaved schedule", () =>
    fc.assert(
      fc.property(sizes, fc.integer({ min: 2, max: 4 }), ({ stages: p, microbatches: m }, v) => {
        fc.pre(p > 1);
        const most = inFlight(p, m, v, "1f1b")[0] ?? [];
        for (const copies of inFlight(p, m, v, "zero_bubble"))
          for (const [c, n] of copies.entries()) expect(n).toBeLessThanOrEqual(most[c] ?? 0);
      }),
    ));
  test("interleaved: earlier chunks hold more", () =>
    expect(inFlight(2, 8, 2, "1f1b")).toEqual(
      [
        [4, 2],
        [3, 1],
      ].map((s) => s),
    ));
});

describe("layouts", () => {
  test.each([
    ["Et|tL", ["Et", "tL"]],
    ["E t | t t L", ["Et", "ttL"]],
    ["Et*3|(tt|)*2L", ["Ettt", "tt", "tt", "L"]],
    ["E|((t)*2|)*2tL", ["E", "tt", "tt", "tL"]],
    // Megatron Core drops commas before it reads anything else
    ["Et*3|(tt|)*2,m|L", ["Ettt", "tt", "tt", "m", "L"]],
    [",E(t,t|),*2,L", ["Ett", "tt", "L"]],
    ["|E||t*0|tt|L|", ["", "E", "", "", "tt", "L", ""]],
  ])("%s", (text, parts) => expect(readLayout(text)).toEqual(parts));
  test.each([
    ["Et|xL", /"x" means nothing.* at character 4/],
    ["E(t|L", /a group is not closed/],
    ["Et)|L", /closed that was not opened at character 3/],
    ["Et*|L", /a number must follow \*/],
    ["t|EL", /the embedding E comes first/],
    ["Et|tLL", /each of E and L once/],
    ["", /it places nothing/],
    ["*2EtL", /nothing stands before \* at character 1/],
    ["Et*2*2L", /nothing stands before \* at character 5/],
    ["E(t*999999)*9L", /longer than 1,000,000 letters/],
    ["E(t*999999)*999999L", /longer than 1,000,000 letters/],
  ])("%j is refused", (text, why) => expect(readLayout(text)).toMatch(why));

  test("any nesting and any number gives parts or a fault", () => {
    expect(readLayout(`${"(".repeat(1e5)}E${")".repeat(1e5)}tL`)).toEqual(["EtL"]);
    expect(readLayout(`Et*${"9".repeat(400)}L`)).toMatch(/longer than 1,000,000 letters/);
    expect(readLayout("Et*1".repeat(1e5))).toMatch(/it places EtEt/);
  });
  test("without a layout, layers are split evenly, in order", () =>
    fc.assert(
      fc.property(
        fc.integer({ min: 1, max: 8 }),
        fc.integer({ min: 1, max: 4 }),
        fc.integer({ min: 1, max: 5 }),
        (stages, chunks, each) => {
          const job = jobWith(stages, stages, chunks, "1f1b");
          const layers = stages * chunks * each;
          const sized = { ...job, model: { ...job.model, layers } };
          const pipeline = pipelineOf(sized);
          const ranges = Array.from({ length: stages * chunks }, (_, v) => layersOf(pipeline, sized, v));
          expect(ranges).toEqual(ranges.map((_, v) => [v * each, (v + 1) * each]));
          expect(pipeline.of[0]).toBe(0);
          expect(pipeline.of.at(-1)).toBe(stages * chunks - 1);
        },
      ),
    ));
});

test("the bubble and the picture of a schedule of 150,000 blocks", full, () => {
  const order = Array.from({ length: 75_000 }, (_, i) => blockRuns(`F${i} B${i}`)).flat();
  expect(bubbleOf(timesOf([order], 1))).toBe(0);
  expect(drawSchedule([order], 1).units).toBe(225_000);
});
