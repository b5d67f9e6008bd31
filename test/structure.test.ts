/** The rooms: who may look at whom, who prints, who touches files. The README's map says the same in words. */
import { dirname, join, relative } from "node:path";
import { Project, type SourceFile, SyntaxKind } from "ts-morph";
import { expect, test } from "vitest";
import { root } from "./checkout.ts";

/** The compiler's rooms in order: a file looks into its own room and those before it. A file is in the last room that names it. */
const rooms = [
  { name: "schemas", holds: /^schemas\// },
  { name: "ops", holds: /^src\/ops\// },
  { name: "stages, and what prints them", holds: /^(src|templates)\/[^/]+$/ },
  { name: "rules", holds: /^src\/rules\// },
  { name: "reading and explaining a job by its rules", holds: /^src\/(readJob|explain)\.ts$/ },
  { name: "compile", holds: /^src\/compile\.ts$/ },
  { name: "what needs a compiled job to speak", holds: /^src\/explainText\.ts$/ },
  { name: "cli", holds: /^src\/cli\.ts$/ },
] as const;
const roomOf = (file: string): number => rooms.findLastIndex((room) => room.holds.test(file));

const cli = "src/cli.ts";
/** Development scripts: they write what is committed. */
const generators = ["schemas/generate.ts", "templates/generate.ts"];
const touchFiles = [
  cli,
  "src/kernels.ts",
  "src/files.ts",
  "src/outputs.ts",
  "src/packageFile.ts",
  "runtime/inputFile.ts",
  "runtime/checkpoint.ts",
  "runtime/safetensors.ts",
  "runtime/cuda/libraries.ts",
  ...generators,
];

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

test("the compiler looks back only: schemas, ops, stages, rules, compile, cli", () => {
  expect(offences((from, to) => roomOf(from) >= 0 && roomOf(to) > roomOf(from))).toEqual([]);
});

test("the runtime sees the schemas and the ops; the command line alone opens it", () => {
  const seen = /^(runtime|schemas|src\/ops)\//;
  expect(offences((from, to) => from.startsWith("runtime/") && looks.has(to) && !seen.test(to))).toEqual([]);
  expect(offences((from, to) => to.startsWith("runtime/") && !from.startsWith("runtime/") && from !== cli)).toEqual([]);
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

test("only the command line prints and ends the process", () => {
  const speaks = /^(console\.\w+|process\.(exit|exitCode|stdout|stderr|abort|kill))$/;
  const speakers = [...files].flatMap(([path, file]) =>
    file
      .getDescendantsOfKind(SyntaxKind.PropertyAccessExpression)
      .filter((access) => speaks.test(access.getText()))
      .map((access) => `${path}: ${access.getText()}`),
  );
  expect(speakers.filter((said) => !said.startsWith(`${cli}:`))).toEqual([]);
});

test("only the files that are there for it touch the file system", () => {
  expect(offences((from, to) => /^(node:)?fs(\/|$)/.test(to) && !touchFiles.includes(from))).toEqual([]);
});
