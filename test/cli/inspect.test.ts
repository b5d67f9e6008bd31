/** `inspect`: one screen, sections that fit the width, ids that need not be exact, and answers to "why". */
import { readFileSync } from "node:fs";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import type { Instruction } from "../../schemas/plan.ts";
import { instructionsOf } from "../../schemas/program.ts";
import { Trouble } from "../../schemas/trouble.ts";
import { BufferTable } from "../../src/analysis/bufferTable.ts";
import { layerOf } from "../../src/analysis/layerNames.ts";
import { anyLayer } from "../../src/analysis/layerText.ts";
import { refusalsOf } from "../../src/cli/keyPlace.ts";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { findId } from "../../src/report/findId.ts";
import { inspectPlan } from "../../src/report/inspect.ts";
import { linksOf, transferAcross } from "../../src/report/links.ts";
import { printOverview, type Warning } from "../../src/report/overview.ts";
import { printCommunication, printKernels, printMeshSection, printScheduleSection } from "../../src/report/sections.ts";
import { printTensors, tensorsOf } from "../../src/report/tensors.ts";
import { bar, fitTable, paint, textWidth, wrap } from "../../src/report/textLayout.ts";
import { explainId } from "../../src/report/why.ts";
import { printWhy } from "../../src/report/whyText.ts";
import { withoutDigests } from "../support/digests.ts";
import { jobOf } from "../support/job.ts";

const published = (name: string, sets: readonly string[] = []) => {
  const { job } = readJob(readFileSync(new URL(`../../plans/${name}/job.yaml`, import.meta.url), "utf8"), "job.yaml", sets);
  return compile(job!).plan;
};
const mixtral = published("mixtral-8x7b-16gpu", ["model.layers=3"]);
const staged = published("tiny-interleaved");
const warning: Warning = {
  code: "C504",
  title: "expert groups cross nodes",
  found: "expert 4 x expert_tensor 4 = 16 neighbouring ranks on nodes of 8 GPUs",
};

const screens = (width: number) => ({
  overview: [printOverview(mixtral, inspectPlan(mixtral), [warning], width), printOverview(staged, inspectPlan(staged), [], width)].join(
    "\n\n",
  ),
  sections: [
    ...printMeshSection(mixtral, inspectPlan(mixtral), width),
    ...printTensors(mixtral, inspectPlan(mixtral), 6, width),
    ...printCommunication(inspectPlan(mixtral), 6, width),
    ...printScheduleSection(staged, inspectPlan(staged), width),
    ...printKernels(mixtral, 4, width),
    ...printWhy(
      explainId(mixtral, findId(mixtral, "moe.permute dispatch")),
      { path: "parallel.expert", line: "job.yaml:40: expert: 4" },
      [],
      width,
    ),
  ].join("\n"),
});

describe.each([80, 120])("at %i columns", (width) => {
  const { overview, sections } = screens(width);

  test.each([false, true])("the screens are those of test/fixtures/screens; colour %s", async (hasColor) => {
    const file = (name: string) => `../fixtures/screens/${name}-${width}${hasColor ? "-colour" : ""}.txt`;
    await expect(withoutDigests(`${paint(overview, hasColor)}\n`)).toMatchFileSnapshot(file("overview"));
    await expect(`${paint(sections, hasColor)}\n`).toMatchFileSnapshot(file("sections"));
  });

  test("no line is wider, and colour changes no column", () => {
    for (const line of `${overview}\n${sections}`.split("\n")) {
      expect(textWidth(line), line).toBeLessThanOrEqual(width);
      expect(paint(line, false)).toHaveLength([...paint(line, false)].length);
    }
    // biome-ignore lint/suspicious/noControlCharactersInRegex: codes of a terminal
    expect(paint(overview, true).replace(/\u001b\[\d+m/g, "")).toBe(paint(overview, false));
  });
});

test("the first screen has at most 40 lines of 80 columns, also with many stages, axes and warnings", () => {
  const many = compile(
    jobOf({
      ...{
        name: "many stages",
        model: { layers: 24, hidden: 32, ffn: 64, heads: 4, vocab: 256, seq: 64, moe: { experts: 4, top_k: 2, ffn: 32 } },
      },
      parallel: { world: 192, tensor: 2, sequence: true, pipeline: 12, expert: 2, expert_tensor: 2, context: 2 },
      ...{ train: { steps: 1, global_batch: 32, optimizer: { lr: 1e-3 } }, data: { path: "corpus.txt" } },
    }),
  ).plan;
  const lines = paint(printOverview(many, inspectPlan(many), Array(9).fill(warning), 80), false).split("\n");
  expect(lines.length).toBeLessThanOrEqual(40);
  expect(Math.max(...lines.map(textWidth))).toBeLessThanOrEqual(80);
  for (const part of ["model", "mesh", "memory", "traffic", "schedule", "bubble", "compute", "warning C504", "tensor tp", "pipeline pp"])
    expect(lines.join("\n")).toContain(part);
});

describe("text", () => {
  const word = fc.oneof(fc.stringMatching(/^[a-z]{1,14}$/), fc.stringMatching(/^\d{1,6}(\.\d)? (GiB|%|Tflop)$/));

  test("wrapped text has the same words, and a number stays with its unit", () => {
    fc.assert(
      fc.property(fc.array(word, { minLength: 1, maxLength: 30 }), fc.integer({ min: 24, max: 80 }), (words, width) => {
        const lines = wrap(words.join(" "), width);
        expect(lines.map((line) => line.trim()).join(" ")).toBe(words.join(" "));
        for (const line of lines) {
          expect(line.length).toBeLessThanOrEqual(width);
          expect(line.trim()).not.toMatch(/^(GiB|%|Tflop)/);
        }
      }),
    );
  });

  test("a table drops columns in their order before it wraps the last", () => {
    const columns = [{ head: "a" }, { head: "b", drop: 1 }, { head: "c", drop: 2 }, { head: "d" }] as const;
    const rows = [["one", "two".repeat(5), "three".repeat(4), "four five six seven eight nine ten"]];
    const at = (width: number) => paint(fitTable(columns, rows, { width }).join("\n"), false);
    expect(at(90)).toContain("threethree");
    expect(at(60)).not.toContain("threethree");
    expect(at(60)).toContain("twotwo");
    expect(at(30)).not.toContain("twotwo");
    for (const width of [30, 60, 90]) for (const line of at(width).split("\n")) expect(line.length).toBeLessThanOrEqual(width);
  });

  test("a bar has a column per share, and marks what is above its end", () => {
    const parts = [
      { letter: "P", size: 25 },
      { letter: "G", size: 25 },
    ];
    expect(paint(bar(parts, 100, 8), false)).toBe("[PPGG····]");
    expect(paint(bar(parts, 40, 8), false)).toBe("[PPPPPGGG>");
  });

  test("wide characters take two columns", () => {
    expect([textWidth("模型"), textWidth("e\u0301"), textWidth("ab")]).toEqual([4, 1, 2]);
  });
});

test("links: in an exchange all peers elsewhere count, in a ring one link of each node", () => {
  const { mesh } = mixtral;
  const linkOf = linksOf(mesh, 0);
  expect(linkOf({ subAxes: mesh.axes.ep, how: "all_to_all" })).toEqual({ ranks: 4, nodes: 2, across: 2 / 3 });
  expect(linkOf({ subAxes: mesh.axes.dp, how: "all_gather" })).toEqual({ ranks: 4, nodes: 2, across: 0.5 });
  expect(linkOf({ subAxes: mesh.axes.tp, how: "all_gather" })).toEqual({ ranks: 4, nodes: 1, across: 0 });
  expect(linkOf({ subAxes: [], world: true, how: "all_reduce" })).toEqual({ ranks: 16, nodes: 2, across: 2 / 16 });
  expect(transferAcross({ ...staged.mesh, gpus_per_node: 1 }, 0, 1)).toBe(1);
  expect(transferAcross(staged.mesh, 0, 1)).toBe(0);
});

test("the tensors of a stage have its bytes: parameters, gradients and optimizer add up to their arenas up to alignment", () => {
  const tensors = tensorsOf(mixtral.programs[0]!);
  for (const kind of ["parameter", "gradient", "optimizer"] as const) {
    const sum = tensors.filter((t) => t.kind === kind).reduce((n, t) => n + t.total_bytes, 0);
    const arena = mixtral.memory[0]![kind];
    expect(sum).toBeLessThanOrEqual(arena);
    expect(sum).toBeGreaterThan(0.99 * arena);
  }
});

describe("ids", () => {
  test.each([
    ["layers.1.moe.w1", "layers.1.moe.w1"],
    ["layers.*.moe.w1", "layers.0.moe.w1"],
    ["moe.permute dispatch", "layers.0.moe.permute@-,etp,ep,-.dispatch"],
    ["attn.norm@dp,-,-.all_gather", "layers.0.attn.norm@dp,-,-.all_gather"],
    ["grad_norm total all_reduce", "grad_norm.squared.total.all_reduce"],
  ])("%s is %s", (text, id) => expect(findId(mixtral, text).id).toBe(id));

  test("an id that fits several or none is an error with suggestions", () => {
    expect(() => findId(mixtral, "all_gather")).toThrow(/fits \d+ instructions and buffers/);
    expect(() => findId(mixtral, "layers.*.moe.wx")).toThrow('no instruction and no buffer is named "layers.*.moe.wx"');
    const fixOf = (text: string): string | undefined => {
      try {
        return findId(mixtral, text).id;
      } catch (error) {
        return error instanceof Trouble ? error.fix : "";
      }
    };
    // axes are left out and words misspelt; the layer that is named stays
    expect(fixOf("layers.1.moe.permut.dispach")).toBe("did you mean layers.1.moe.permute@-,etp,ep,-.dispatch?");
    expect(fixOf("layers.9.attn.wo.dgrda")).toMatch(/^did you mean layers\.\*\.attn\.wo\.dgrad/);
  });
});

describe("why", () => {
  const job = (sets: readonly string[] = []) =>
    jobOf(
      {
        ...{
          name: "why",
          model: {
            layers: 4,
            hidden: 32,
            ffn: 64,
            heads: 4,
            vocab: 256,
            seq: 64,
            moe: { experts: 4, top_k: 2, ffn: 32 },
            mtp: { layers: 1 },
          },
        },
        parallel: {
          world: 16,
          tensor: 2,
          sequence: true,
          pipeline: 2,
          expert: 2,
          expert_tensor: 2,
          context: 2,
          distributed_optimizer: true,
        },
        ...{ train: { steps: 1, global_batch: 32, optimizer: { lr: 1e-3 } }, data: { path: "corpus.txt" } },
      },
      sets,
    );
  const { plan } = compile(job());
  /** Collectives and transfers by kind, axes and id, without layers. */
  const formOf = (i: Instruction, buffers: BufferTable): string =>
    `${i.kind === "collective" ? `${i.how} ${i.axes}` : i.kind} ${anyLayer(i.id, layerOf(i, buffers))}`;
  const formsOf = (p: typeof plan): Map<string, Instruction> =>
    new Map(
      p.programs.flatMap((program) => {
        const buffers = new BufferTable(program.buffers);
        return instructionsOf(program).flatMap((i) => (i.kind === "compute" ? [] : [[formOf(i, buffers), i] as const]));
      }),
    );

  test("every change that an answer names removes the collective or the transfer", async () => {
    // one of each origin
    const origins = new Map<string, readonly [string, Instruction]>();
    for (const [form, i] of formsOf(plan)) {
      if (i.kind === "compute") continue;
      const key = [i.why.path, i.why.because === "each rank saw other tokens", form.split(" ").slice(0, -1).join(" ")].join("|");
      if (!origins.has(key)) origins.set(key, [form, i]);
    }
    const changed = new Map<string, Map<string, Instruction>>();
    let tried = 0;
    for (const [form, { id }] of origins.values()) {
      const { removed_by, key, bytes } = explainId(plan, findId(plan, id));
      expect(key.value, `${id}: ${key.path}`).not.toBe(undefined);
      expect(bytes).toBeGreaterThan(0);
      const refusals = await refusalsOf(plan.job, removed_by);
      for (const [i, { set }] of removed_by.entries()) {
        if (refusals[i] !== "") continue;
        const sets = Object.entries(set).map(([path, value]) => `${path}=${value}`);
        const forms = changed.get(sets.join()) ?? formsOf(compile(job(sets)).plan);
        changed.set(sets.join(), forms);
        tried++;
        expect(forms.has(form), `${sets.join()} keeps ${form}`).toBe(false);
      }
    }
    expect(tried).toBeGreaterThan(8);
  });

  test("a buffer names its kind, its readers and its share of the peak", () => {
    const why = explainId(plan, findId(plan, "layers.1.w1"));
    expect(why).toMatchObject({ is: "buffer", what: "parameter buffer", key: { path: "train.precision" } });
    expect(why.because.join()).toContain("layers.1.moe.w1");
    expect(why.share).toBeGreaterThan(0);
  });
});
