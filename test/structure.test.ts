/** The rooms: who may look at whom, who prints, who touches files. The README's map says the same in words. */
import { dirname, join, relative } from "node:path";
import { Project, type SourceFile, SyntaxKind } from "ts-morph";
import { expect, test } from "vitest";
import { root } from "./checkout.ts";

/** The compiler's rooms in order: a file looks into its own room and those before it. A file is in the last room that names it. */
const rooms = [
  { name: "schemas", holds: /^schemas\// },
  { name: "ops", holds: /^src\/ops\// },
  {
    name: "what kernels are made of: targets, uses, templates",
    holds: /^(templates\/[^/]+|src\/(target|packageFile|kernels\/(kernel|parts))\.ts)$/,
  },
  { name: "the tables of kernels", holds: /^src\/kernels\/(wgsl|cuda)\// },
  { name: "stages, and what prints them", holds: /^src\/(?!(target|packageFile)\.ts$)[^/]+$/ },
  { name: "rules", holds: /^src\/rules\// },
  { name: "reading and explaining a job by its rules", holds: /^src\/(readJob|explain)\.ts$/ },
  { name: "compile", holds: /^src\/compile\.ts$/ },
  { name: "what needs a compiled job to speak", holds: /^src\/explainText\.ts$/ },
  { name: "the command line", holds: /^src\/(cli|cliRun|say)\.ts$/ },
] as const;
const roomOf = (file: string): number => rooms.findLastIndex((room) => room.holds.test(file));

/** cli.ts says how the process ends, cliRun.ts answers with it; say.ts alone prints. */
const commandLine = ["src/cli.ts", "src/cliRun.ts"];
const touchFiles = new Map([
  ["schemas/writing.ts", "folders for what is written"],
  ["src/cli.ts", "is a name a job, a plan or its directory? and plans"],
  ["src/files.ts", "jobs, and kernels beside their plan"],
  ["src/outputs.ts", "what a command leaves behind"],
  ["src/packageFile.ts", "schemas and templates that ship with rankc"],
  ["src/pack.ts", "an archive of a plan and all that runs it"],
  ["src/serve.ts", "the built page, and what a plan in a browser reads"],
  ["src/cubins.ts", "sources for nvcc, cubins from it"],
  ["runtime/inputFile.ts", "the corpus"],
  ["runtime/checkpointFiles.ts", "weights to begin with"],
  ["runtime/safetensors.ts", "gradients that are written"],
  ["runtime/snapshot.ts", "what a run goes on from"],
  ["runtime/snapshotText.ts", "its text"],
  ["runtime/saveFolder.ts", "the folder of a run's snapshots, and its lock"],
  ["runtime/cuda/libraries.ts", "which of a library's names is there"],
  ["runtime/cuda/kernels.ts", "what NVRTC compiled before, kept between runs"],
  ["runtime/launch/place.ts", "a secret that the ranks share"],
  ["runtime/launch/watchdog.ts", "its last words, past a main thread that is blocked"],
  // development scripts: they write what is committed
  ["schemas/generate.ts", "JSON Schemas"],
  ["templates/generate.ts", "bindings"],
]);

const project = new Project({ skipAddingFilesFromTsConfig: true, compilerOptions: { allowImportingTsExtensions: true } });
project.addSourceFilesAtPaths(["schemas", "src", "runtime", "templates"].map((room) => join(root, room, "**/*.ts")));
const files = new Map(project.getSourceFiles().map((file) => [relative(root, file.getFilePath()), file]));

/** Every module a file names, by `import`, `export … from` or `import()`; our own as a path from the root. */
function lookedAt(path: string, file: SourceFile): string[] {
  const declared = [...file.getImportDeclarations(), ...file.getExportDeclarations()].flatMap((d) => d.getModuleSpecifierValue() ?? []);
  const loaded = file
    .getDescendantsOfKind(SyntaxKind.CallExpression)
    .filter((call) => call.getExpression().getKind() === SyntaxKind.ImportKeyword)
    .map((call) => call.getArguments()[0]!.asKindOrThrow(SyntaxKind.StringLiteral).getLiteralValue());
  return [...declared, ...loaded].map((name) => (name.startsWith(".") ? join(dirname(path), name) : name));
}
const looks = new Map([...files].map(([path, file]) => [path, lookedAt(path, file)]));
const ours = (path: string): string[] => looks.get(path)!.filter((target) => looks.has(target));

/** The pairs `from -> to` that a law forbids. */
const offences = (forbidden: (from: string, to: string) => boolean): string[] =>
  [...looks].flatMap(([from, targets]) => targets.filter((to) => forbidden(from, to)).map((to) => `${from} -> ${to}`));

test("every import of our own names a file that is there", () => {
  expect(files.size).toBeGreaterThan(40);
  expect(offences((_, to) => /^(schemas|src|runtime|templates)\//.test(to) && !looks.has(to))).toEqual([]);
});

test("the compiler looks back only: schemas, ops, kernels, stages, rules, compile, the command line", () => {
  expect(offences((from, to) => roomOf(from) >= 0 && roomOf(to) > roomOf(from))).toEqual([]);
});

test("the runtime sees the schemas and the ops; the command line alone opens it", () => {
  const seen = /^(runtime|schemas|src\/ops)\//;
  expect(offences((from, to) => from.startsWith("runtime/") && looks.has(to) && !seen.test(to))).toEqual([]);
  expect(offences((from, to) => to.startsWith("runtime/") && !from.startsWith("runtime/") && !commandLine.includes(from))).toEqual([]);
});

test("nothing looks at itself in a circle", () => {
  const done = new Set<string>();
  const circles: string[] = [];
  const walk = (path: string, trail: readonly string[]): void => {
    if (trail.includes(path)) circles.push([...trail.slice(trail.indexOf(path)), path].join(" -> "));
    if (done.has(path) || trail.includes(path)) return;
    for (const target of ours(path)) walk(target, [...trail, path]);
    done.add(path);
  };
  for (const path of looks.keys()) walk(path, []);
  expect(circles).toEqual([]);
});

/**
 * A rank's main thread may be blocked for ever in NCCL or CUDA: its watchdog, a thread beside it, kills the process. Signal 0 asks
 * whether the process that holds a lock still runs.
 */
const exceptions = ["runtime/launch/watchdog.ts: process.kill", "runtime/saveFolder.ts: process.kill"];

test("only the command line prints and ends the process, and the watchdog of a rank that is blocked", () => {
  const speaks = /^(console\.\w+|process\.(exit|exitCode|stdout|stderr|abort|kill))$/;
  const speakers = [...files].flatMap(([path, file]) =>
    file
      .getDescendantsOfKind(SyntaxKind.PropertyAccessExpression)
      .filter((access) => speaks.test(access.getText()))
      .map((access) => `${path}: ${access.getText()}`),
  );
  const may = (said: string): boolean =>
    exceptions.includes(said) || said.startsWith("src/cli.ts: ") || /^src\/say\.ts: process\.(stdout|stderr)$/.test(said);
  expect(speakers.filter((said) => !may(said))).toEqual([]);
});

test("only the files that are there for it touch the file system", () => {
  const touches = (to: string): boolean => /^(node:)?fs(\/|$)/.test(to);
  expect(offences((from, to) => touches(to) && !touchFiles.has(from))).toEqual([]);
  expect([...touchFiles.keys()].filter((path) => !looks.get(path)?.some(touches))).toEqual([]);
});
