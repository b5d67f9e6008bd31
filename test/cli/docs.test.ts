/**
 * The README and the pages of docs/ run. On each page, a yaml block that names a job is saved as job.yaml and passes `check`. Each line
 * of an sh block runs in a copy of the checkout, where `rankc` is the compiled command line: in a shell, or for a plain command of docs/ in
 * this process; `# exit N` after a line gives its exit code;
 * lines that begin with `npm ci` or `npm install` are left out, because the copy has its packages. Every line of a text block that follows
 * an sh block was printed by that block; `…` stands for anything.
 */
import { spawnSync } from "node:child_process";
import { chmodSync, existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { basename, delimiter, dirname, join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { copyCheckout, root } from "../support/checkout.ts";
import { builtCli, rankc } from "../support/rankc.ts";
import { byTier, longestFiles } from "../support/tiers.ts";

interface Block {
  readonly kind: string;
  readonly text: string;
  readonly line: number;
}

const pages = [
  "README.md",
  "CONTRIBUTING.md",
  ...readdirSync(join(root, "docs"))
    .filter((name) => name.endsWith(".md"))
    .map((name) => `docs/${name}`),
];
const textOf = (page: string): string => readFileSync(join(root, page), "utf8");
const blocksOf = (page: string): Block[] => {
  const text = textOf(page);
  return [...text.matchAll(/^```(\w+)\n([\s\S]*?)^```$/gm)].map((found) => ({
    kind: found[1]!,
    text: found[2]!,
    line: text.slice(0, found.index).split("\n").length,
  }));
};
const runnable = pages.filter((page) => blocksOf(page).some(({ kind }) => kind === "sh"));

const copy = copyCheckout();
afterAll(() => rmSync(copy, { recursive: true, force: true }));
const bin = join(copy, ".bin");
mkdirSync(bin);
writeFileSync(join(bin, "rankc"), `#!/bin/sh\nexec "${process.execPath}" "${builtCli()}" "$@"\n`);
chmodSync(join(bin, "rankc"), 0o755);
const env = { ...process.env, PATH: `${bin}${delimiter}${process.env.PATH}`, NO_COLOR: "1" };

/** A command without pipes, variables or other programs: words, some of them in quotes. */
const plain = /^rankc(?: +(?:[\w./:=,+-]+|"[^"$`\\]*"))+$/;

async function run(page: string, line: string): Promise<string> {
  const expected = Number(/# exit (\d)$/.exec(line)?.[1] ?? 0);
  const command = line.replace(/ +# exit \d$/, "");
  if (page.startsWith("docs/") && plain.test(command)) {
    const words = [...command.matchAll(/"([^"]*)"|[^ "]+/g)].map((found) => found[1] ?? found[0]);
    const before = process.cwd();
    process.chdir(copy);
    const { exit, out, err } = await rankc(...words.slice(1)).finally(() => process.chdir(before));
    expect(exit, `${command}\n${err}`).toBe(expected);
    return out + err;
  }
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

test("every block is of a kind that is checked, and the README has commands", () => {
  expect(runnable).toContain("README.md");
  // configurations of editors are read by the editors alone
  const kinds = pages.filter((page) => page !== "docs/editors.md").flatMap((page) => blocksOf(page).map(({ kind }) => kind));
  expect(kinds.filter((kind) => !["sh", "yaml", "text", "json", "ts", "console"].includes(kind))).toEqual([]);
  // a transcript begins with its command; it takes too long to run here, so its output is not compared
  const transcripts = pages.flatMap((page) => blocksOf(page).filter(({ kind }) => kind === "console"));
  for (const { text, line } of transcripts) expect(text, `line ${line}`).toMatch(/^\$ rankc \w+ /);
});

test("every relative link of a page names an existing file", () => {
  const broken = pages.flatMap((page) =>
    [...textOf(page).matchAll(/\]\((?!https?:|#)([^)#]+)/g)]
      .map((found) => found[1]!)
      .filter((target) => !existsSync(join(root, dirname(page), target)))
      .map((target) => `${page} -> ${target}`),
  );
  expect(broken).toEqual([]);
});

test("every file that a page names exists", () => {
  const named = (page: string) => [
    ...textOf(page).matchAll(/(?<![\w./-])((?:src|runtime|schemas|test|templates|plans)\/[\w./-]+\.(?:ts|tsv|json|hbs|md|txt|yaml)\b)/g),
  ];
  const missing = pages.flatMap((page) =>
    named(page)
      .map((found) => found[1]!)
      .filter((target) => !existsSync(join(root, target)))
      .map((target) => `${page}: ${target}`),
  );
  expect(missing).toEqual([]);
});

test("docs/testing.md names existing test files, and so does the list of those that start first", () => {
  const rows = textOf("docs/testing.md")
    .split("\n")
    .filter((line) => line.startsWith("| ") && !line.startsWith("| law"));
  const named = rows
    .flatMap((row) =>
      row
        .split("|")[2]!
        .replace(/\(.*?\)/g, "")
        .split(","),
    )
    .map((name) => name.trim());
  expect(named.length).toBeGreaterThan(40);
  const exists = (name: string): boolean => existsSync(join(root, "test", name.endsWith("/") ? name : `${name}.test.ts`));
  expect(named.filter((name) => !exists(name))).toEqual([]);
  const files = readdirSync(join(root, "test"), { recursive: true, encoding: "utf8" }).map((path) => basename(path));
  expect(longestFiles.filter((name) => !files.includes(`${name}.test.ts`))).toEqual([]);
});

/** Pages whose jobs take seconds to compile. Other tests import and estimate smaller ones. */
const large = ["docs/coming-from-megatron.md", "docs/estimate.md", "docs/quickstart.md"];
// one after the other: a command reads what an earlier one wrote
for (const { options, rows } of byTier(runnable, (page) => !large.includes(page)))
  test.each(rows)("the commands of %s have the exit codes and the output that it shows", { timeout: 600_000, ...options }, async (page) => {
    let printed: string[] | undefined;
    for (const { kind, text, line } of blocksOf(page)) {
      if (kind === "yaml" && /^name:/m.test(text)) {
        writeFileSync(join(copy, "job.yaml"), text);
        await run(page, "rankc check job.yaml");
      }
      if (kind === "sh") {
        const commands = text.trimEnd().split("\n");
        const kept = commands.filter((command) => !/^npm (ci|install)\b/.test(command));
        printed = [];
        for (const command of kept) printed.push(...(await run(page, command)).split("\n").map((output) => output.trim()));
      } else if (kind === "text" && printed) {
        const missing = text
          .trimEnd()
          .split("\n")
          .filter((shown) => !printed!.some((output) => pattern(shown).test(output)));
        expect(missing, `${page}:${line}`).toEqual([]);
        printed = undefined;
      }
    }
  });
