/** Exports of plans for other tools: each file is read by the tool it is for, or by the grammar that the tool publishes. */
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { instance } from "@viz-js/viz";
import protobuf from "protobufjs";
import { afterAll, describe, expect, test } from "vitest";
import type { Plan } from "../../schemas/plan.ts";
import { stageOfRank } from "../../schemas/sharding.ts";
import { expectRoom } from "../../src/cli/exportPlan.ts";
import { freeBytes } from "../../src/cli/outputFiles.ts";
import { compile } from "../../src/compile.ts";
import { pipelineCsv } from "../../src/convert/plan/pipelineCsv.ts";
import { chosenRanks } from "../../src/convert/plan/ranks.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { traceText } from "../../src/report/trace.ts";
import { root } from "../support/checkout.ts";
import { random } from "../support/opCases.ts";
import { importTrace } from "../support/perfettoImport.ts";
import { rankc } from "../support/rankc.ts";
import { once } from "../support/tiers.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-export-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const interleaved = join(root, "plans/tiny-interleaved/job.yaml");
const experts = join(root, "plans/tiny-mixtral/job.yaml");
const planOf = (path: string, ...sets: string[]): Plan => compile(readJob(readFileSync(path, "utf8"), path, sets).job!).plan;
const interleavedPlan = once(() => planOf(interleaved));
const expertsPlan = once(() => planOf(experts));
const exported = async (format: string, job: string, name: string, ...more: string[]): Promise<string> => {
  const out = join(folder, name);
  expect(await rankc("export", format, job, "-o", out, ...more)).toMatchObject({ exit: 0, err: "" });
  return out;
};

describe("the pipeline schedule of PyTorch", () => {
  /** What `_Action.from_str` of torch.distributed.pipelining accepts of a compute-only schedule. */
  const action = /^(\d+)(F|I|B|W)(\d+)$/;

  test.each([
    ["1F1B of two chunks", () => interleavedPlan()],
    ["zero bubble", () => planOf(interleaved, "parallel.virtual_pipeline=1", "parallel.schedule=zero_bubble")],
  ])("%s: every action is complete once and in order, after those of other stages in earlier slots", (_, plan) => {
    const rows = pipelineCsv(plan())
      .trimEnd()
      .split("\r\n")
      .map((row) => row.split(","));
    const slots = new Map<string, number>();
    for (const row of rows)
      for (const [slot, cell] of row.entries()) {
        if (cell === "") continue;
        expect(cell).toMatch(action);
        expect(slots.has(cell)).toBe(false);
        slots.set(cell, slot);
      }
    const stages = new Set([...slots.keys()].map((cell) => Number(action.exec(cell)![1])));
    const microbatches = new Set([...slots.keys()].map((cell) => Number(action.exec(cell)![3])));
    const split = [...slots.keys()].some((cell) => cell.includes("W"));
    const back = split ? "I" : "B";
    for (const stage of stages)
      for (const m of microbatches) {
        const at = (s: number, letter: string): number => slots.get(`${s}${letter}${m}`)!;
        expect(at(stage, back)).toBeGreaterThan(at(stage, "F"));
        if (split) expect(at(stage, "W")).toBeGreaterThan(at(stage, "I"));
        if (!stages.has(stage + 1)) continue;
        expect(at(stage + 1, "F")).toBeGreaterThan(at(stage, "F"));
        expect(at(stage, back)).toBeGreaterThan(at(stage + 1, back));
      }
    expect(slots.size).toBe(stages.size * microbatches.size * (split ? 3 : 2));
    expect(new Set(rows.map(({ length }) => length)).size).toBe(1);
  });

  test("the files that test/oracles/pipeline_csv.py runs through PyTorch are those of this version", async () => {
    const deep = ["parallel.world=8", "parallel.tensor=1", "parallel.sequence=false", "parallel.pipeline=4", "parallel.data=2"];
    for (const [name, plan] of [
      ["interleaved", interleavedPlan()],
      ["four-stages-of-two-chunks", planOf(interleaved, ...deep, "model.layers=8")],
      ["zero-bubble", planOf(interleaved, "parallel.virtual_pipeline=1", "parallel.schedule=zero_bubble")],
    ] as const)
      await expect(pipelineCsv(plan)).toMatchFileSnapshot(`../fixtures/pipeline/${name}.csv`);
  });
});

test("Perfetto imports the trace: a process for each chosen rank, a slice for each block run, and none is dropped", async () => {
  const plan = interleavedPlan();
  const { threads, faults } = importTrace(readFileSync(await exported("trace", interleaved, "plan.trace.json", "--ranks", "all"), "utf8"));
  expect(faults).toEqual([]);
  expect(threads.map(({ process, thread, isMain }) => [process, thread, isMain])).toEqual(
    Array.from({ length: plan.mesh.world }, (_, rank) => [`rank ${rank}, stage ${stageOfRank(plan.mesh, rank)}`, "compute", true]),
  );
  for (const [rank, { slices }] of threads.entries()) {
    expect(slices).toHaveLength(plan.programs[stageOfRank(plan.mesh, rank)]!.order.length);
    expect(slices.every(({ depth }) => depth === 0)).toBe(true);
    for (const [n, { end }] of slices.entries()) expect(end).toBeLessThanOrEqual(slices[n + 1]?.begin ?? Infinity);
  }
});

test("any times are imported as they are, to the nanosecond: slices that follow each other, or are within each other, stay so", () => {
  const next = random(5);
  for (const scale of [1e-3, 1, 1e5]) {
    const drawn = Array.from({ length: 500 }, () => (next() + 1) * scale * 1000).sort((a, b) => a - b);
    // two slices of no duration at one time are put on each other
    const edges = drawn.filter((edge, n) => n === 0 || Math.round(edge * 1000) > Math.round(drawn[n - 1]! * 1000));
    const pairs = edges.flatMap((end, n) => (n > 0 ? [[edges[n - 1]!, end] as const] : []));
    const slice = (stream: string, begin_us: number, end_us: number) => ({ stream, name: "x", category: "c", begin_us, end_us });
    const slices = [slice("outer", edges[0]!, edges.at(-1)!), ...pairs.flatMap(([a, b]) => [slice("compute", a, b), slice("outer", a, b)])];
    const traced = [0, 1].map((rank) => ({ rank, name: `rank ${rank}`, slices: () => slices }));
    const { threads, faults } = importTrace([...traceText(traced, ["compute", "outer"])].join(""));
    expect(faults).toEqual([]);
    expect(threads.map(({ process, thread }) => `${process} ${thread}`)).toEqual(
      ["rank 0", "rank 1"].flatMap((name) => [`${name} compute`, `${name} outer`]),
    );
    for (const { thread, isMain, slices: found } of threads) {
      expect(isMain).toBe(thread === "compute");
      const inner = found.filter(({ depth }) => depth === (thread === "outer" ? 1 : 0));
      expect(inner.map(({ begin, end }) => [begin, end])).toEqual(pairs.map((pair) => pair.map((us) => Math.round(us * 1000))));
    }
  }
});

describe("execution traces of Chakra", () => {
  /** The messages of mlcommons/chakra, schema/protobuf/et_def.proto, that a trace uses: names, types and numbers of their fields. */
  const schema = protobuf.Root.fromJSON({
    nested: {
      Attribute: {
        oneofs: { value: { oneof: ["int32Val", "int64Val", "uint64Val", "boolVal", "stringVal"] } },
        fields: {
          name: { type: "string", id: 1 },
          int32Val: { type: "int32", id: 7 },
          int64Val: { type: "int64", id: 9 },
          uint64Val: { type: "uint64", id: 13 },
          boolVal: { type: "bool", id: 27 },
          stringVal: { type: "string", id: 29 },
        },
      },
      Inputs: { fields: { values: { type: "string", id: 1 } } },
      Metadata: { fields: { version: { type: "string", id: 1 }, attr: { rule: "repeated", type: "Attribute", id: 2 } } },
      Node: {
        fields: {
          id: { type: "uint64", id: 1 },
          name: { type: "string", id: 2 },
          type: { type: "uint32", id: 3 },
          ctrlDeps: { rule: "repeated", type: "uint64", id: 4 },
          dataDeps: { rule: "repeated", type: "uint64", id: 5 },
          inputs: { type: "Inputs", id: 8 },
          attr: { rule: "repeated", type: "Attribute", id: 10 },
        },
      },
    },
  });
  interface Node {
    readonly id: number;
    readonly name: string;
    readonly type?: number;
    readonly ctrlDeps?: readonly number[];
    readonly dataDeps?: readonly number[];
    readonly inputs?: { readonly values: string };
    readonly attr?: readonly ({ readonly name: string } & Readonly<Record<string, unknown>>)[];
  }
  const read = (file: string): { metadata: Record<string, unknown>; nodes: Node[] } => {
    const reader = protobuf.Reader.create(readFileSync(file));
    const next = (type: string): Record<string, unknown> => {
      const found = schema.lookupType(type);
      return found.toObject(found.decodeDelimited(reader), { longs: Number });
    };
    const metadata = next("Metadata");
    const nodes: Node[] = [];
    while (reader.pos < reader.len) nodes.push(next("Node") as unknown as Node);
    return { metadata, nodes };
  };
  const attributeValue = (node: Node, name: string): unknown =>
    Object.entries(node.attr?.find((a) => a.name === name) ?? {}).find(([key]) => key.endsWith("Val"))?.[1];

  test("every node waits for earlier nodes only, names known communicators, and the groups hold the rank", async () => {
    const plan = expertsPlan();
    const out = await exported("chakra", experts, "chakra", "--ranks", "0,5");
    expect(readdirSync(out).sort()).toEqual(["comm_groups.json", "plan.0.et", "plan.5.et"]);
    const groups = JSON.parse(readFileSync(join(out, "comm_groups.json"), "utf8")) as Record<string, number[]>;
    for (const rank of [0, 5]) {
      const { metadata, nodes } = read(join(out, `plan.${rank}.et`));
      expect(metadata.version).toContain("et_def.proto");
      const [groupsOfRank, ...work] = nodes;
      for (const { pg_name, ranks } of JSON.parse(groupsOfRank!.inputs!.values) as { pg_name: string; ranks: number[] }[]) {
        expect(groups[pg_name]).toEqual(ranks);
        expect(ranks).toContain(rank);
      }
      const program = plan.programs[stageOfRank(plan.mesh, rank)]!;
      const perRun = program.order.reduce((sum, { kind, chunk }) => sum + program.chunks[chunk]![kind].length, program.step.length);
      expect(work).toHaveLength(perRun);
      for (const [n, node] of work.entries()) {
        expect(node.id).toBe(n + 2);
        for (const before of [...(node.ctrlDeps ?? []), ...(node.dataDeps ?? [])]) expect(before).toBeLessThan(node.id);
        if (node.type !== 7) continue;
        expect(groups[String(attributeValue(node, "pg_name"))]).toContain(rank);
        expect([0, 2, 6, 7]).toContain(attributeValue(node, "comm_type"));
      }
      expect(work.some(({ type }) => type === 7)).toBe(true);
    }
  });

  test("sends and receives of two stages have each other as peers, and equal bytes in equal order", async () => {
    const plan = interleavedPlan();
    const ranks = [0, 1].map((stage) => chosenRanks(plan.mesh, { stage })[0]!);
    const out = await exported("chakra", interleaved, "stages", "--ranks", ranks.join());
    const [first, second] = ranks.map((rank) => read(join(out, `plan.${rank}.et`)).nodes);
    const transfers = (nodes: Node[], type: number, from: number, to: number): unknown[] =>
      nodes
        .filter((n) => n.type === type && attributeValue(n, "comm_src") === from && attributeValue(n, "comm_dst") === to)
        .map((n) => [attributeValue(n, "tag"), attributeValue(n, "comm_size")]);
    for (const [a, b, from, to] of [
      [first!, second!, ranks[0]!, ranks[1]!],
      [second!, first!, ranks[1]!, ranks[0]!],
    ] as const) {
      const [sent, received] = [transfers(a, 5, from, to), transfers(b, 6, from, to)];
      expect(sent.length).toBeGreaterThan(0);
      expect([...received].sort()).toEqual([...sent].sort());
    }
  });
});

describe("graphs", () => {
  test("Graphviz lays the graph out: a node for each stage, an edge for each pair of stages that exchange", async () => {
    const text = readFileSync(await exported("graphviz", interleaved, "plan.dot"), "utf8");
    const viz = await instance();
    const { objects = [], edges = [] } = viz.renderJSON(text) as { objects?: { name: string }[]; edges?: { label?: string }[] };
    expect(objects.map(({ name }) => name)).toEqual(expect.arrayContaining(["stage0", "stage1"]));
    expect(edges.filter(({ label }) => label?.includes("messages"))).toHaveLength(2);
  });

  test("the flowchart of Mermaid has nodes, links and quoted labels only", async () => {
    const text = readFileSync(await exported("mermaid", experts, "plan.mmd"), "utf8");
    const [head, ...lines] = text.trimEnd().split("\n");
    expect(head).toBe("flowchart LR");
    const label = '"[^"]+"';
    const line = new RegExp(String.raw`^  (\w+(\[${label}\]|\(\[${label}\]\))|\w+ -\.- \w+|\w+ -->\|${label}\| \w+)$`);
    for (const one of lines) expect(one).toMatch(line);
  });
});

test("ranks that the plan lacks, lists that cannot be read and two choices are refused, and nothing is written", async () => {
  const out = join(folder, "refused.json");
  for (const [more, what] of [
    [["--ranks", "99"], "the plan has 4 ranks"],
    [["--ranks", "3-1"], "not a list of ranks"],
    [["--stage", "7"], "the plan has 2 stages"],
    [["--stage", "0", "--ranks", "0"], "both choose ranks"],
  ] as const) {
    const said = await rankc("export", "trace", interleaved, "-o", out, ...more);
    expect(said.exit).toBe(2);
    expect(said.err).toContain(what);
  }
  expect(readdirSync(folder).some((name) => name.startsWith("refused"))).toBe(false);
});

test("traces that do not fit the disk are refused after the first one", () => {
  const free = freeBytes(".");
  expect(() => expectRoom(".", free / 4, 1024)).toThrow(/^the trace of a rank has .*: 1,024 ranks take about .*, and \. has room for /);
  expect(() => expectRoom(".", 1, 2)).not.toThrow();
});
