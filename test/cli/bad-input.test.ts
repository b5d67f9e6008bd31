/** What a person can get wrong: each gives one clear message and the right exit code, no stack trace, and nothing written. */
import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { openSafetensors, writeSafetensors } from "../../runtime/checkpoint/safetensors.ts";
import { FORMAT_VERSION } from "../../schemas/formatVersion.ts";
import { compile } from "../../src/compile.ts";
import { readJob } from "../../src/frontend/readJobNow.ts";
import { printPlan } from "../../src/plan/seal.ts";
import { fixture } from "../support/job.ts";
import { rankc } from "../support/rankc.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-bad-"));
const at = (name: string) => join(folder, name);
const put = (name: string, text: string | Uint8Array) => writeFileSync(at(name), text);
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const good = `name: good
model: {layers: 2, hidden: 64, ffn: 96, heads: 4, kv_heads: 2, head_dim: 16, vocab: 256, seq: 64, moe: {experts: 8, top_k: 2, ffn: 96, router: {balance: none}}}
train: {steps: 1, global_batch: 2, precision: fp32, optimizer: {lr: 1.0e-3}}
data: {path: corpus.txt}
`;

beforeAll(() => {
  put("good.yaml", good);
  put("corpus.txt", readFileSync(fixture("corpus.txt")));
  put("syntax.yaml", good.replace("steps: 1,", "steps: [1,"));
  put("duplicate.yaml", `${good}name: again\n`);
  put("unknown.yaml", good.replace("layers", "layerz"));
  put("type.yaml", good.replace("layers: 2", "layers: two"));
  const levels = "bcdefghij".split("").map((name, i) => `${name}: &${name} [${Array(9).fill(`*${"abcdefghi"[i]}`)}]`);
  put("bomb.yaml", `a: &a [x,x,x,x,x,x,x,x,x]\n${levels.join("\n")}\n`);
  put("large.yaml", "# nothing\n".repeat(5 * 2 ** 20));
  const { plan } = compile(readJob(good, "good.yaml").job!);
  const text = printPlan(plan);
  const flip = text.indexOf('"sizes":[') + '"sizes":['.length;
  for (const [name, changed] of [
    ["flipped", text.slice(0, flip) + (text[flip] === "1" ? "2" : "1") + text.slice(flip + 1)],
    ["newer", text.replace(`"format_version":"${FORMAT_VERSION}"`, '"format_version":"99.0"')],
  ] as const) {
    mkdirSync(at(name));
    put(`${name}/plan.json`, changed);
  }
  const weights = readFileSync(fixture("hf/mixtral-tiny/model.safetensors"));
  put("truncated.safetensors", weights.subarray(0, weights.length / 2));
  const open = openSafetensors(fixture("hf/mixtral-tiny/model.safetensors"));
  const entries = open.names.map((name) => ({ name, dtype: "F32" as const, shape: open.info(name).shape, data: open.read(name) }));
  open.close();
  writeSafetensors(
    at("missing.safetensors"),
    entries.filter((e) => e.name !== "lm_head.weight"),
  );
  writeSafetensors(
    at("misshapen.safetensors"),
    entries.map((e) => (e.name === "lm_head.weight" ? { ...e, shape: [64, 256] } : e)),
  );
});

describe.concurrent("bad input", () => {
  test.each([
    ["a YAML syntax error", ["compile", "syntax.yaml", "-o", "out"], 1, /error\[S001\][\s\S]*syntax\.yaml:\d+:\d+/],
    ["a duplicate key", ["compile", "duplicate.yaml", "-o", "out"], 1, /error\[S002\]: a key is written twice[\s\S]*duplicate\.yaml:5:1/],
    ["an unknown key", ["compile", "unknown.yaml", "-o", "out"], 1, /unknown key[\s\S]*"layerz"[\s\S]*did you mean model\.layers/],
    ["a wrong type", ["compile", "type.yaml", "-o", "out"], 1, /model\.layers is the text "two"[\s\S]*write a whole number/],
    ["an alias bomb", ["compile", "bomb.yaml", "-o", "out"], 1, /error\[S003\]: an alias cannot be expanded/],
    ["a 50 MB file", ["compile", "large.yaml", "-o", "out"], 2, /large\.yaml has 50\.0 MiB; a job may have 1 MiB/],
    ["a missing file", ["compile", "nowhere.yaml", "-o", "out"], 2, /nowhere\.yaml does not exist/],
    ["a directory", ["check", "."], 2, /is a directory, not a job/],
    ["a plan with a flipped byte", ["inspect", "flipped"], 2, /section "programs" was changed after the plan was compiled/],
    ["a plan of a newer major version", ["run", "newer"], 2, /format_version 99\.0 is newer than this rankc reads \(\d+\.\d+\)/],
    [
      "a truncated safetensors",
      ["run", "good.yaml", "--init-from", "truncated.safetensors", "--metrics", "out"],
      2,
      /truncated\.safetensors: tensor .* it was cut/,
    ],
    [
      "a checkpoint with a missing tensor",
      ["run", "good.yaml", "--init-from", "missing.safetensors", "--metrics", "out"],
      2,
      /lm_head\.weight/,
    ],
    [
      "a checkpoint with a misshapen tensor",
      ["run", "good.yaml", "--init-from", "misshapen.safetensors", "--metrics", "out"],
      2,
      /lm_head\.weight has shape \[64, 256\]; expected \[256, 64\]/,
    ],
    [
      "gradients that could not be written",
      ["run", "good.yaml", "--dump-grads", "/nowhere/grads.safetensors"],
      2,
      /\/nowhere\/grads\.safetensors: cannot be written: the folder does not exist \(ENOENT\)/,
    ],
    [
      "a plan that does not fit this machine",
      ["run", "good.yaml", "--set", "model.hidden=65536", "--set", "model.moe.ffn=1048576"],
      3,
      /does not fit this machine/,
    ],
  ] as const)("%s", async (_, args, exit, message) => {
    const paths = args.map((a) =>
      a === "out" || a.includes(".yaml") || (a.includes(".safetensors") && !a.startsWith("/")) || ["flipped", "newer", "."].includes(a)
        ? at(a)
        : a,
    );
    const printed = await rankc(...paths);
    expect(printed.err).toMatch(message);
    expect(printed.err).not.toMatch(/^\s+at |internal error/m);
    expect(printed.out).toBe("");
    expect(printed.exit).toBe(exit);
    expect(readdirSync(folder)).not.toContain("out");
  });
});
