/** Each recipe of fixtures/megatron becomes a job without an error, which compiles for all ranks. `import-megatron.test.ts` has what is in the jobs. */
import { readdirSync, readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { parameterCount } from "../../src/analysis/parameterCount.ts";
import { compile } from "../../src/compile.ts";
import { importMegatron, type MegatronSettings } from "../../src/convert/megatron/importMegatron.ts";
import { readQuickly } from "../../src/frontend/readJob.ts";
import { fixture } from "../support/job.ts";
import { full } from "../support/tiers.ts";

/** How a recipe is launched: the variables and words that its README or its caller gives. */
interface Launch {
  readonly file: string;
  readonly world?: number;
  readonly set?: Readonly<Record<string, string>>;
  readonly words?: string;
  readonly ranks: number;
  /** The parameters in billions that the model's card states. */
  readonly billions: number;
}

const zoo = { CP: "1", MBS: "1", SEQ_LEN: "4096", LAYERS_PER_VP: "false" };
const alltoall = "--moe-token-dispatcher-type alltoall";
const deepseekV3 =
  "--recompute-granularity selective --recompute-modules mla_up_proj mlp --mtp-num-layers 1 --moe-token-dispatcher-type flex";
const launches: readonly Launch[] = [
  { file: "mixtral_8x7b_16gpu.sh", ranks: 16, billions: 46.7 },
  { file: "deepseek_v2.sh", ranks: 8, billions: 15.7 },
  { file: "deepseek_v2.sh", set: { SIZE: "236B", NNODES: "8", PP: "4", EP: "16" }, ranks: 64, billions: 235.7 },
  {
    file: "moonlight.sh",
    words: "dsw A3B 1 512 1e-4 1e-5 4096 bf16 1 1 8 true sel /data/x_text_document 100000000000 1000000000",
    ranks: 8,
    billions: 16,
  },
  {
    file: "Qwen3-30B-A3B.yaml",
    world: 32,
    set: { ...zoo, TP: "1", PP: "1", EP: "8", GBS: "256", MOE_TOKEN_DISPATCHER: "alltoall", MOE_GROUPED_GEMM: "true" },
    ranks: 32,
    billions: 30.5,
  },
  {
    file: "Qwen3-235B-A22B.yaml",
    world: 256,
    set: { ...zoo, TP: "2", PP: "8", EP: "32", GBS: "2048", LAYERS_PER_VP: "3" },
    words: alltoall,
    ranks: 256,
    billions: 235.1,
  },
  {
    file: "Mixtral-8x22B.yaml",
    world: 128,
    set: { ...zoo, TP: "2", PP: "8", EP: "8", GBS: "256" },
    words: alltoall,
    ranks: 128,
    billions: 140.6,
  },
  {
    file: "DeepSeek-V3.yaml",
    world: 1024,
    set: { ...zoo, TP: "2", PP: "8", EP: "64", GBS: "8192" },
    words: `${deepseekV3} --pipeline-model-parallel-layout Et|(tt|)*30mL`,
    ranks: 1024,
    billions: 682.6,
  },
  {
    file: "DeepSeek-V3.yaml",
    world: 256,
    set: { ...zoo, TP: "1", PP: "8", EP: "32", GBS: "8192" },
    words: `${deepseekV3} --pipeline-model-parallel-layout Et*2|(tt|)*22t|(tt|)*7mL`,
    ranks: 256,
    billions: 682.6,
  },
];

function jobOf({ file, world, set = {}, words }: Launch) {
  const settings: MegatronSettings = {
    ...{ name: "recipe", variables: new Map(Object.entries(set)) },
    ...(world !== undefined && { world }),
    ...(words !== undefined && { words: words.split(" ") }),
    ...(file === "moonlight.sh" && { vocab: 163840 }),
  };
  const kind = file.endsWith(".sh") ? "script" : "list";
  const { text } = importMegatron({ kind, text: readFileSync(fixture(`megatron/${file}`), "utf8"), file }, settings);
  const { job, findings } = readQuickly(text, "job.yaml", []);
  expect(findings.filter(({ level }) => level === "error")).toEqual([]);
  return job!;
}

test("every recipe is launched", () => {
  expect([...new Set(launches.map(({ file }) => file))].sort()).toEqual(readdirSync(fixture("megatron")).sort());
});

describe.each(launches.map((launch) => [launch.file, launch.ranks, launch] as const))("%s on %i ranks", (file, ranks, launch) => {
  test("is a valid job with the parameters of its model", () => {
    const { parallel, model } = jobOf(launch);
    expect(parallel.world).toBe(ranks);
    // vocabularies are padded, and cards round
    expect(Math.abs(parameterCount(model) / 1e9 / launch.billions - 1)).toBeLessThan(0.01);
  });

  test("compiles", file === "deepseek_v2.sh" && ranks === 8 ? {} : full, () => {
    const { plan } = compile(jobOf(launch));
    expect(plan.mesh.world).toBe(ranks);
    expect(plan.programs.length).toBe(plan.job.parallel.pipeline);
  });
});
