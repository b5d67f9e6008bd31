/** A file that a command writes is complete or absent; a file that cannot be written is one error with a fix, before the work. */
import { execFileSync, spawnSync } from "node:child_process";
import { existsSync, lstatSync, mkdtempSync, readdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "vitest";
import { Trouble } from "../../schemas/trouble.ts";
import { makeFolder } from "../../schemas/writing.ts";
import { expectWritable, expectWritableFolder, openLines, writeFile, writeFolder } from "../../src/cli/outputFiles.ts";
import { builtCli, rankc } from "../support/rankc.ts";

const folder = mkdtempSync(join(tmpdir(), "rankc-outputs-"));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const at = (...names: string[]): string => join(folder, ...names);
writeFileSync(at("file"), "here");

function troubleOf(act: () => void): Trouble {
  try {
    act();
  } catch (error) {
    expect(error).toBeInstanceOf(Trouble);
    return error as Trouble;
  }
  throw new Error("it was written");
}

const linux = process.platform === "linux";

describe("a location that is not writable", () => {
  const before = readdirSync(folder);
  const cases: readonly (readonly [string, () => void, RegExp])[] = [
    ["a folder that is a file", () => expectWritableFolder(at("file")), /file is a file, not a directory/],
    [
      "a folder below a file",
      () => expectWritableFolder(at("file", "plan")),
      /cannot be written: a part of the path is a file \(ENOTDIR\)/,
    ],
    ["a file in no folder", () => expectWritable(at("none", "a.svg")), /cannot be written: the folder does not exist \(ENOENT\)/],
    ["a file that is a folder", () => expectWritable(folder), /cannot be written: it is a folder \(EISDIR\)/],
    ["files below a file", () => writeFolder(at("file", "plan"), { "plan.json": "{}" }), /cannot be written/],
    ["a folder half of which can be made", () => writeFolder(at("new"), { "a/b": "", "a/b/c": "" }), /cannot be written/],
  ];
  // Node's recursive mkdir never ends here
  const proc: typeof cases = [
    ["a folder below /proc", () => expectWritableFolder("/proc/x/y"), /^\/proc\/x\/y: cannot be written: /],
    ["files below /proc", () => writeFolder("/proc/x", { "plan.json": "{}" }), /^\/proc\/x: cannot be written: /],
    ["a file below /proc", () => expectWritable("/proc/x"), /^\/proc\/x: cannot be written: /],
    ["lines on a full disk", () => openLines("/dev/full", "new").add("1\n"), /^\/dev\/full: cannot be written: the disk is full/],
  ];
  test.each([...cases, ...(linux ? proc : [])])("%s", (_, act, text) => {
    const { message, fix, exit } = troubleOf(act);
    expect([message, exit]).toEqual([expect.stringMatching(text), 2]);
    expect(fix).toBeTruthy();
    expect(readdirSync(folder)).toEqual(before);
  });
});

test("folders are made one by one; a second time none is", () => {
  expect(makeFolder(at("a", "b", "c"))).toBe(at("a"));
  expect(makeFolder(at("a", "b", "c"))).toBeUndefined();
  rmSync(at("a"), { recursive: true });
});

test("a check whether a file can be written leaves no file", () => {
  expectWritable(at("later.svg"));
  expectWritable(at("file"));
  expectWritableFolder(at("a", "b"));
  expect(readdirSync(folder)).toEqual(["file"]);
  expect(readFileSync(at("file"), "utf8")).toBe("here");
});

test("lines are appended to an existing file, or to a new one", () => {
  for (const [how, holds] of [
    ["new", "1\n"],
    ["append", "1\n1\n"],
    ["new", "1\n"],
  ] as const) {
    const lines = openLines(at("lines"), how);
    lines.add("1\n");
    lines.close();
    expect(readFileSync(at("lines"), "utf8")).toBe(holds);
  }
});

test("a write keeps a symbolic link and writes its target; devices are written directly", () => {
  symlinkSync(at("file"), at("link"));
  writeFile(at("link"), "there");
  expect([lstatSync(at("link")).isSymbolicLink(), readFileSync(at("file"), "utf8")]).toEqual([true, "there"]);
  symlinkSync("/dev/null", at("nothing"));
  writeFile(at("nothing"), "gone");
  expect(lstatSync(at("nothing")).isSymbolicLink()).toBe(true);
  expect(lstatSync("/dev/null").isCharacterDevice()).toBe(true);
});

describe("the command line", { timeout: 60_000 }, () => {
  test("compile looks at -o before the job", async () => {
    const { exit, err, out } = await rankc("compile", at("no-such-job.yaml"), "-o", at("file"));
    expect([exit, out]).toEqual([2, ""]);
    expect(err).toContain("is a file, not a directory");
  });

  test.skipIf(!existsSync("/dev/full"))("a full disk under stdout is one message", () => {
    const cli = builtCli();
    const { status, stderr } = spawnSync("/bin/sh", ["-c", `"${process.execPath}" "${cli}" explain > /dev/full`], { encoding: "utf8" });
    expect(stderr).toMatch(/^rankc: the standard output: cannot be written: the disk is full \(ENOSPC\)\n {2}fix: .*\n$/);
    expect(status).toBe(2);
    expect(() => execFileSync("/bin/sh", ["-c", `"${process.execPath}" "${cli}" nonsense > /dev/full 2> /dev/full`])).toThrow();
  });
});
