/**
 * The README runs. A yaml block that names a job is saved as job.yaml and passes `check`. Each line of an sh block is run in
 * a copy of the checkout, where `rankc` is the compiled command line; `# exit N` after a line says how it ends; lines that
 * begin with `npm ci` or `npm install` are left out, for the copy has its packages. Every line of a text block stands in what the
 * sh block before it printed; `…` stands for anything.
 */
import { spawnSync } from "node:child_process";
import { chmodSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { delimiter, join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { copyCheckout, root } from "./checkout.ts";
import { builtCli } from "./rankc.ts";

const copy = copyCheckout();
afterAll(() => rmSync(copy, { recursive: true, force: true }));
const bin = join(copy, ".bin");
mkdirSync(bin);
writeFileSync(join(bin, "rankc"), `#!/bin/sh\nexec "${process.execPath}" "${builtCli()}" "$@"\n`);
chmodSync(join(bin, "rankc"), 0o755);
const env = { ...process.env, PATH: `${bin}${delimiter}${process.env.PATH}`, NO_COLOR: "1" };

interface Block {
  readonly kind: string;
  readonly text: string;
  readonly line: number;
}

const readme = readFileSync(join(root, "README.md"), "utf8");
const blocks: Block[] = [...readme.matchAll(/^```(\w+)\n([\s\S]*?)^```$/gm)].map((found) => ({
  kind: found[1]!,
  text: found[2]!,
  line: readme.slice(0, found.index).split("\n").length,
}));

function run(command: string): string {
  const expected = Number(/# exit (\d)$/.exec(command)?.[1] ?? 0);
  const { status, stdout, stderr } = spawnSync("bash", ["-c", command], { cwd: copy, env, encoding: "utf8" });
  expect(status, `${command}\n${stderr}`).toBe(expected);
  return stdout + stderr;
}

const pattern = (line: string): RegExp =>
  new RegExp(
    `^${line
      .split("…")
      .map((part) =>
        part
          .trim()
          .replace(/[.*+?^${}()|[\]\\]/g, "\\$&")
          .replace(/ +/g, " +"),
      )
      .join(".*")}$`,
  );

test("every block is of a kind that is checked", () => {
  expect(blocks.filter(({ kind }) => kind === "sh").length).toBeGreaterThan(5);
  expect(blocks.map(({ kind }) => kind).filter((kind) => !["sh", "yaml", "text", "json"].includes(kind))).toEqual([]);
});

// one after the other: a command reads what the one before it wrote
test("the commands of the README end as it says, and print what it shows", () => {
  let printed: string[] | undefined;
  for (const { kind, text, line } of blocks) {
    if (kind === "yaml" && /^name:/m.test(text)) {
      writeFileSync(join(copy, "job.yaml"), text);
      run("rankc check job.yaml");
    }
    if (kind === "sh") {
      const commands = text.trimEnd().split("\n");
      const kept = commands.filter((command) => !/^npm (ci|install)\b/.test(command));
      printed = kept.flatMap((command) => run(command).split("\n")).map((said) => said.trim());
    } else if (kind === "text" && printed) {
      const missing = text
        .trimEnd()
        .split("\n")
        .filter((shown) => !printed!.some((said) => pattern(shown).test(said)));
      expect(missing, `README.md:${line}`).toEqual([]);
      printed = undefined;
    }
  }
});
