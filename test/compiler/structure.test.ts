/** The folders: which may import which, who prints, who touches files. docs/concepts.md draws the same. And limits of every file of source. */
import { readdirSync, readFileSync } from "node:fs";
import { dirname, join, relative } from "node:path";
import { Project, SyntaxKind, type TypeNode, ts } from "ts-morph";
import { describe, expect, test } from "vitest";
import { backendNames } from "../../runtime/backends.ts";
import { root } from "../support/checkout.ts";

/** Layers of the compiler, lowest first: a file may import from its own layer and from lower ones. A file belongs to the first layer that matches. */
const layers = [
  { name: "schemas", holds: /^schemas\// },
  { name: "text, package files and repeats", holds: /^src\/(units|repeats|version|packageFile)\.ts$/ },
  { name: "ops", holds: /^src\/ops\// },
  { name: "model", holds: /^src\/model\// },
  { name: "templates", holds: /^templates\/[^/]+$/ },
  {
    name: "kernel specs",
    holds:
      /^src\/codegen\/(targetNames|launchArgs|kernelSpec|formulaText|matmul|selection|arrangement|slices|attentionSizes|orthogonalizeSizes)\.ts$/,
  },
  { name: "kernel generators", holds: /^src\/codegen\/(cuda|wgsl)\// },
  { name: "mesh and pipeline", holds: /^src\/passes\/(mesh|pipelineStages|passNames)\.ts$/ },
  { name: "analysis", holds: /^src\/analysis\// },
  { name: "sealing", holds: /^src\/plan\/(seal|canonical)\.ts$/ },
  { name: "passes", holds: /^src\/passes\// },
  { name: "codegen", holds: /^src\/codegen\// },
  { name: "plan files", holds: /^src\/plan\// },
  { name: "peak memory", holds: /^src\/peakMemory\.ts$/ },
  { name: "reports", holds: /^src\/report\// },
  { name: "source and diagnostics", holds: /^src\/frontend\/(source|diagnostic|jobFiles|auto)\.ts$/ },
  { name: "rules", holds: /^src\/rules\// },
  { name: "frontend", holds: /^src\/frontend\/(shapeFaults|keyEdits|readJob|readJobNow|explain)\.ts$/ },
  { name: "compile", holds: /^src\/compile\.ts$/ },
  { name: "explanations that compile a job", holds: /^src\/frontend\// },
  { name: "search", holds: /^src\/search\// },
  { name: "converters", holds: /^src\/convert\// },
  { name: "page of a plan", holds: /^src\/page\// },
  { name: "library", holds: /^src\/index\.ts$/ },
  { name: "command line", holds: /^src\/cli\// },
] as const;
const layerOf = (file: string): number => layers.findIndex((layer) => layer.holds.test(file));

/** The commands and the library open the runtime. */
const opensRuntime = [
  ...[
    "calibrate",
    "compile",
    "data",
    "doctor",
    "eval",
    "evaluations",
    "export",
    "launchRanks",
    "run",
    "trainSteps",
    "runEnd",
    "runSaves",
    "hfModel",
    "importCheckpoint",
  ].map((command) => `src/cli/${command}.ts`),
  "src/index.ts",
];
const touchFiles = new Map([
  ["schemas/writing.ts", "folders of written files"],
  ["src/cli/loadPlan.ts", "finds the plan of a directory"],
  ["src/cli/git.ts", "the attributes of a repository"],
  ["src/cli/checkPlan.ts", "the files of a plan that may be stale"],
  ["src/cli/cache.ts", "results that a later command needs again"],
  ["src/cli/cacheFolder.ts", "the folder of these results"],
  ["src/cli/codeCache.ts", "the code that V8 compiled"],
  ["src/cli/inputFiles.ts", "jobs, and kernels beside their plan"],
  ["src/cli/outputFiles.ts", "the files that a command writes"],
  ["src/cli/log/runLog.ts", "the log of a run"],
  ["src/cli/log/readLog.ts", "the log of a run that a page shows"],
  ["src/packageFile.ts", "schemas and templates of the package"],
  ["src/plan/validator.ts", "the built validator"],
  ["src/cli/archive.ts", "an archive of a plan and all that runs it"],
  ["src/cli/init.ts", "whether a job and its schema exist"],
  ["src/cli/examples.ts", "the example jobs and schemas of the package"],
  ["src/cli/viewPage.ts", "the built page that shows plans"],
  ["src/cli/pageServer.ts", "the built page, and what a plan in a browser reads"],
  ["src/codegen/cubins.ts", "sources for nvcc, cubins from it"],
  ["runtime/data/inputFile.ts", "the corpus"],
  ["runtime/data/prepare/partialDataset.ts", "a data set while it is written"],
  ["runtime/checkpoint/hfFiles.ts", "initial weights"],
  ["runtime/checkpoint/loadWeights.ts", "weights that devices load"],
  ["runtime/checkpoint/safetensors.ts", "tensors that are written"],
  ["runtime/checkpoint/blockWriter.ts", "blocks of checkpoints"],
  ["runtime/checkpoint/save.ts", "the files of a checkpoint while it is written"],
  ["runtime/checkpoint/commit.ts", "complete checkpoints, and the removal of older ones"],
  ["runtime/checkpoint/megatron/distcp.ts", "checkpoints of Megatron Core"],
  ["runtime/checkpoint/megatron/savedArguments.ts", "their common state"],
  ["runtime/checkpoint/hfFolder.ts", "exported models"],
  ["runtime/checkpoint/tokenizerFiles.ts", "the files of a tokenizer"],
  ["runtime/checkpoint/snapshotFile.ts", "the description of a checkpoint"],
  ["runtime/checkpoint/saveFolder.ts", "the folder of a run's checkpoints"],
  ["runtime/lockFile.ts", "locks of folders and data sets"],
  ["runtime/cuda/libraries.ts", "which name of a library exists"],
  ["runtime/cuda/kernels.ts", "cubins compiled by NVRTC, kept between runs"],
  ["runtime/launch/rankPlace.ts", "a secret that the ranks share"],
  ["runtime/launch/watchdog.ts", "the last message, while the main thread is blocked"],
  // development scripts: they write what is committed
  ["src/ops/generateNames.ts", "names of ops"],
  ["src/plan/buildValidator.ts", "the validator of the built package"],
  ["schemas/generate.ts", "JSON Schemas"],
  ["templates/generate.ts", "bindings"],
]);

const project = new Project({ skipAddingFilesFromTsConfig: true, compilerOptions: { allowImportingTsExtensions: true } });
project.addSourceFilesAtPaths(["schemas", "src", "runtime", "templates"].map((folder) => join(root, folder, "**/*.{ts,tsx}")));
const files = new Map(project.getSourceFiles().map((file) => [relative(root, file.getFilePath()), file]));

/** Per file all its nodes, in the order of the text. */
const nodes = new Map(
  [...files].map(([path, { compilerNode: file }]) => {
    const all: ts.Node[] = [];
    const visit = (node: ts.Node): void => {
      all.push(node);
      ts.forEachChild(node, visit);
    };
    visit(file);
    return [path, { file, all }];
  }),
);
const lineOf = (file: ts.SourceFile, at: number): number => ts.getLineAndCharacterOfPosition(file, at).line + 1;
/** Every node that `pick` takes, as the text that it returns, behind the path of its file. */
const uses = (pick: (node: ts.Node, file: ts.SourceFile) => string | undefined): string[] =>
  [...nodes].flatMap(([path, { file, all }]) => all.flatMap((node) => pick(node, file) ?? []).map((text) => `${path}: ${text}`));

/** Every module that a file names in `import`, `export … from` or `import()`; own modules as a path from the root. */
function importsOf(path: string): string[] {
  const named = (node: ts.Node): ts.Node | undefined => {
    if (ts.isImportDeclaration(node) || ts.isExportDeclaration(node)) return node.moduleSpecifier;
    return ts.isCallExpression(node) && node.expression.kind === ts.SyntaxKind.ImportKeyword ? node.arguments[0] : undefined;
  };
  const names = nodes.get(path)!.all.flatMap((node) => {
    const name = named(node);
    if (name && !ts.isStringLiteral(name)) throw new Error(`${path} imports a computed name`);
    return name ? [name.text] : [];
  });
  return names.map((name) => (name.startsWith(".") ? join(dirname(path), name) : name));
}
const imports = new Map([...files.keys()].map((path) => [path, importsOf(path)]));
const ownImports = (path: string): string[] => imports.get(path)!.filter((target) => imports.has(target));

/** The pairs `from -> to` that a law forbids. */
const offences = (forbidden: (from: string, to: string) => boolean): string[] =>
  [...imports].flatMap(([from, targets]) => targets.filter((to) => forbidden(from, to)).map((to) => `${from} -> ${to}`));

test("every own import names an existing file", () => {
  expect(files.size).toBeGreaterThan(40);
  expect(offences((_, to) => /^(schemas|src|runtime|templates)\//.test(to) && !imports.has(to))).toEqual([]);
});

test("every file of the compiler belongs to a layer, and imports only from its own layer and lower ones", () => {
  expect([...files.keys()].filter((path) => !path.startsWith("runtime/") && layerOf(path) < 0)).toEqual([]);
  expect(offences((from, to) => layerOf(from) >= 0 && layerOf(to) > layerOf(from))).toEqual([]);
});

test("the runtime imports schemas and ops; only commands and the library import the runtime", () => {
  const allowed = /^(runtime|schemas|src\/ops)\//;
  const isShared = (from: string, to: string): boolean => from.startsWith("runtime/browser/") && to.startsWith("src/page/shared/");
  expect(offences((from, to) => from.startsWith("runtime/") && imports.has(to) && !allowed.test(to) && !isShared(from, to))).toEqual([]);
  expect(offences((from, to) => to.startsWith("runtime/") && !from.startsWith("runtime/") && !opensRuntime.includes(from))).toEqual([]);
});

test("the page of a plan reads the data of a plan, and no plan: of the compiler it imports units and names of layers", () => {
  const allowed = /^(schemas\/|src\/page\/|src\/units\.ts$|src\/analysis\/layerText\.ts$|src\/report\/view\/planView\.ts$)/;
  expect(offences((from, to) => from.startsWith("src/page/") && imports.has(to) && !allowed.test(to))).toEqual([]);
  expect(offences((from, to) => to.startsWith("src/page/") && !/^(src\/page|runtime\/browser)\//.test(from))).toEqual([]);
});

test("a model is built without a mesh: it imports schemas and ops", () => {
  const allowed = /^(schemas|src\/ops|src\/model)\//;
  expect(offences((from, to) => from.startsWith("src/model/") && !allowed.test(to))).toEqual([]);
});

test("a graph is immutable: every property of its values and nodes is readonly, and every list", () => {
  const places = { "src/ops/op.ts": ["Value", "Leaf", "Node"], "src/ops/declarations.ts": ["Regrid", "Sharing", "Pin", "Quota"] };
  const declared = Object.entries(places).flatMap(([path, names]) => names.map((name) => files.get(path)!.getInterfaceOrThrow(name)));
  const properties = declared.flatMap((type) => type.getProperties().map((property) => ({ type, property })));
  expect(properties.length).toBeGreaterThan(30);
  const isMutable = (type: TypeNode): boolean =>
    [type, ...type.getDescendants()].some(
      (node) =>
        (node.isKind(SyntaxKind.ArrayType) && !node.getParentIfKind(SyntaxKind.TypeOperator)) || /^(Array|Map|Set)\b/.test(node.getText()),
    );
  const mutable = properties.filter(({ property }) => !property.isReadonly() || isMutable(property.getTypeNodeOrThrow()));
  expect(mutable.map(({ type, property }) => `${type.getName()}.${property.getName()}`)).toEqual([]);
});

test("no import cycle", () => {
  const done = new Set<string>();
  const cycles: string[] = [];
  const walk = (path: string, trail: readonly string[]): void => {
    if (trail.includes(path)) cycles.push([...trail.slice(trail.indexOf(path)), path].join(" -> "));
    if (done.has(path) || trail.includes(path)) return;
    for (const target of ownImports(path)) walk(target, [...trail, path]);
    done.add(path);
  };
  for (const path of imports.keys()) walk(path, []);
  expect(cycles).toEqual([]);
});

/** Returns the modules that are loaded with these files: those of imports that are not types. */
function loadedWith(...paths: readonly string[]): Set<string> {
  const isLoaded = (node: ts.Node): node is ts.ImportDeclaration =>
    ts.isImportDeclaration(node) &&
    node.importClause?.phaseModifier !== ts.SyntaxKind.TypeKeyword &&
    !(
      node.importClause?.namedBindings &&
      ts.isNamedImports(node.importClause.namedBindings) &&
      node.importClause.namedBindings.elements.every((element) => element.isTypeOnly)
    );
  const loaded = new Set<string>();
  const load = (path: string): void => {
    if (loaded.has(path)) return;
    loaded.add(path);
    for (const node of nodes.get(path)?.all.filter(isLoaded) ?? []) {
      const name = ts.isStringLiteral(node.moduleSpecifier) ? node.moduleSpecifier.text : "";
      load(name.startsWith(".") ? join(dirname(path), name) : name);
    }
  };
  for (const path of paths) load(path);
  return loaded;
}

test("a command line is parsed before the schemas and the YAML library are loaded, and before those know that they are interpreted", () => {
  const loaded = loadedWith("src/cli/main.ts");
  expect([...loaded].filter((path) => files.has(path)).length).toBeGreaterThan(30);
  expect([...loaded].filter((path) => !files.has(path) && !path.startsWith("node:")).sort()).toEqual(["commander", "leven"]);
});

test("a plan is read and reported without the schemas of jobs and plans, which take 15 ms to load", () => {
  const commands = [
    "src/plan/read.ts",
    "src/report/inspect.ts",
    "src/report/overview.ts",
    "src/cli/knownEstimate.ts",
    "src/rules/jobRules.ts",
  ];
  expect(loadedWith(...commands)).not.toContain("zod");
});

/** The watchdog thread kills a process whose main thread is blocked in NCCL or CUDA. Signal 0 tests whether the owner of a lock still runs. */
const exceptions = [
  "src/cli/initPrompts.ts: process.stderr", // where questions are asked
  "src/cli/lsp.ts: process.stdout", // the protocol of editors
  "runtime/launch/watchdog.ts: process.kill",
  "runtime/lockFile.ts: process.kill",
];

test("only the command line prints and ends the process; the watchdog of a blocked rank may kill it", () => {
  const effects = /^(console\.\w+|process\.(exit|exitCode|stdout|stderr|abort|kill))$/;
  const found = uses((node, file) => {
    const text = ts.isPropertyAccessExpression(node) ? node.getText(file) : "";
    return effects.test(text) ? text : undefined;
  });
  const isAllowed = (use: string): boolean =>
    exceptions.includes(use) || use.startsWith("src/cli/main.ts: ") || /^src\/cli\/output\.ts: process\.(stdout|stderr)$/.test(use);
  expect(found.filter((use) => !isAllowed(use))).toEqual([]);
});

test("only listed places use the locales of V8, which take 10 ms to load", () => {
  const locales = uses((node, file) =>
    (ts.isPropertyAccessExpression(node) && /^(toLocale\w*|localeCompare)$/.test(node.name.text)) ||
    (ts.isIdentifier(node) && node.text === "Intl")
      ? node.getText(file)
      : undefined,
  );
  const isPage = (use: string): boolean => /^(src\/page|runtime\/browser)\//.test(use);
  expect(locales.filter((use) => !isPage(use))).toEqual([
    "src/units.ts: n.toLocaleString",
    "runtime/cuda/checks.ts: addends.toLocaleString",
    "runtime/cuda/libraries.ts: b.localeCompare",
    "runtime/data/tokenizers/characterMap.ts: Intl",
  ]);
});

test("only listed files touch the file system", () => {
  const touches = (to: string): boolean => /^(node:)?fs(\/|$)/.test(to);
  expect(offences((from, to) => touches(to) && !touchFiles.has(from))).toEqual([]);
  expect([...touchFiles.keys()].filter((path) => !imports.get(path)?.some(touches))).toEqual([]);
});

test("no command compares the name of a backend: the registry states what a backend needs", () => {
  const isName = (side: ts.Node): boolean => ts.isStringLiteral(side) && (backendNames as readonly string[]).includes(side.text);
  const compared = uses((node, file) =>
    ts.isBinaryExpression(node) &&
    [ts.SyntaxKind.EqualsEqualsEqualsToken, ts.SyntaxKind.ExclamationEqualsEqualsToken].includes(node.operatorToken.kind) &&
    [node.left, node.right].some(isName)
      ? node.getText(file)
      : undefined,
  );
  expect(compared.filter((use) => use.startsWith("src/cli/"))).toEqual([]);
});

describe("limits of source files", () => {
  const generated = ["templates/bindings.ts", "schemas/opNames.ts"];
  const sources = [...nodes].filter(([path]) => !generated.includes(path));
  /** Returns `path:line` of each node that is chosen. */
  const places = (isChosen: (node: ts.Node, file: ts.SourceFile) => boolean): string[] =>
    sources.flatMap(([path, { file, all }]) =>
      all.filter((node) => isChosen(node, file)).map((node) => `${path}:${lineOf(file, node.getStart(file))}`),
    );

  test("no file has more than 400 lines, no function more than 80", () => {
    expect(sources.filter(([, { file }]) => lineOf(file, file.end) > 401).map(([path]) => path)).toEqual([]);
    const linesOf = (node: ts.Node, file: ts.SourceFile): number => lineOf(file, node.end) - lineOf(file, node.getStart(file)) + 1;
    expect(places((node, file) => ts.isFunctionLike(node) && linesOf(node, file) > 80)).toEqual([]);
  });

  test("no test and no bench has more than 400 lines", () => {
    const tests = readdirSync(join(root, "test"), { recursive: true, encoding: "utf8" }).filter((path) => path.endsWith(".ts"));
    expect(tests.length).toBeGreaterThan(100);
    expect(tests.filter((path) => readFileSync(join(root, "test", path), "utf8").split("\n").length > 401)).toEqual([]);
  });

  test("every export has a docstring", () => {
    const isUndocumented = (node: ts.Node): boolean =>
      ts.canHaveModifiers(node) &&
      ts.getModifiers(node)?.some(({ kind }) => kind === ts.SyntaxKind.ExportKeyword) === true &&
      !ts.getJSDocCommentsAndTags(node).some((doc) => ts.isJSDoc(doc));
    expect(places(isUndocumented)).toEqual([]);
  });

  test("no `any`; outside src/ops fewer than 100 non-null assertions `!`", () => {
    expect(places(({ kind }) => kind === ts.SyntaxKind.AnyKeyword)).toEqual([]);
    const asserted = places((node) => ts.isNonNullExpression(node)).filter((place) => !place.startsWith("src/ops/"));
    expect(asserted.length).toBeLessThan(100);
  });
});

test("folders are created by makeFolder: in Node 20 a recursive mkdir below /proc never returns", () => {
  const makers = project.getSourceFiles().filter((file) => /\bmkdir(Sync)?\([^;]*recursive/.test(file.getFullText()));
  expect(makers.map((file) => file.getFilePath())).toEqual([]);
});

test("no text has the marks of a merge conflict", () => {
  const folders = ["docs", "plans", "runtime", "schemas", "src", "templates", "test"];
  const isText = (path: string): boolean => /\.(ts|tsx|hbs|md|ya?ml|json|txt|py|sh|css)$/.test(path) && !path.startsWith("test/fixtures/");
  const listed = folders.flatMap((folder) =>
    readdirSync(join(root, folder), { recursive: true, encoding: "utf8" }).map((path) => join(folder, path)),
  );
  const texts = [...listed.filter(isText), "CHANGELOG.md", "README.md", "CONTRIBUTING.md", "package.json"];
  expect(texts.length).toBeGreaterThan(800);
  expect(texts.filter((path) => /^(<{7}|>{7}) /m.test(readFileSync(join(root, path), "utf8")))).toEqual([]);
});
