/** A plan as a graph of its stages: what each runs, what goes between them, and the collectives of each by axes. Texts for Graphviz and Mermaid. */
import type { Instruction, Plan, Program } from "../../../schemas/plan.ts";
import { blockOf } from "../../../schemas/program.ts";
import { rankAt } from "../../../schemas/sharding.ts";
import { linksOf, linkText } from "../../report/links.ts";
import { bytesText, countText, plural } from "../../units.ts";

/** A node: a stable id, and the lines of its label. */
interface GraphNode {
  readonly id: string;
  readonly lines: readonly string[];
}
/** Nodes and edges of a plan. A stage has the nodes of its collectives. */
export interface OverviewGraph {
  readonly name: string;
  readonly stages: readonly { readonly node: GraphNode; readonly collectives: readonly GraphNode[] }[];
  readonly transfers: readonly { readonly from: string; readonly to: string; readonly label: string }[];
}

/** Calls `visit` for each instruction of a step as often as the step runs it: `times` for a whole block. */
function visitStep(program: Program, visit: (i: Instruction, times: number) => void): void {
  const runs = new Map<readonly Instruction[], number>([[program.step, 1]]);
  for (const run of program.order) {
    const block = blockOf(program, run);
    runs.set(block, (runs.get(block) ?? 0) + 1);
  }
  for (const [block, times] of runs) for (const i of block) visit(i, i.only ? 1 : times);
}

/** Returns the graph of these stages; transfers to other stages are left out. */
export function overviewGraph({ job, mesh, programs }: Plan, stages: readonly number[]): OverviewGraph {
  const transfers = new Map<string, { from: number; to: number; count: number; bytes: number }>();
  const parts = stages.map((stage) => {
    const program = programs[stage];
    if (!program) throw new Error(`rankc: the plan has no stage ${stage}`);
    const link = linksOf(mesh, stage);
    const byAxes = new Map<string, { axes: string; name: string; where: string; count: number; bytes: number }>();
    visitStep(program, (i, times) => {
      if (i.kind === "collective") {
        const key = `${i.axes} ${i.name}`;
        const sum = byAxes.get(key) ?? { axes: i.axes, name: i.name, where: linkText(link(i)), count: 0, bytes: 0 };
        byAxes.set(key, { ...sum, count: sum.count + times, bytes: sum.bytes + times * i.bytes });
      } else if (i.kind === "send" && stages.includes(i.peer)) {
        const key = `${stage} ${i.peer}`;
        const sum = transfers.get(key) ?? { from: stage, to: i.peer, count: 0, bytes: 0 };
        transfers.set(key, { ...sum, count: sum.count + times, bytes: sum.bytes + times * i.bytes });
      }
    });
    const layers = program.chunks.map(({ layers: [from, to] }) => (to - from > 1 ? `${from}..${to - 1}` : `${from}`)).join(", ");
    const [first, last] = [rankAt(mesh, stage, 0), rankAt(mesh, stage, mesh.per_stage - 1)];
    const node = {
      id: `stage${stage}`,
      lines: [
        `stage ${stage}`,
        first === last ? `rank ${first}` : `${countText(mesh.per_stage)} ranks, ${first} to ${last}`,
        `layers ${layers}`,
      ],
    };
    const collectives = [...byAxes.values()]
      .sort((a, b) => b.bytes - a.bytes)
      .map(({ axes, name, where, count, bytes }, n) => ({
        id: `stage${stage}_${n}`,
        lines: [`${axes} ${name}`, `${plural(count, "time")} a step, ${bytesText(bytes)}`, ...(where ? [where] : [])],
      }));
    return { node, collectives };
  });
  return {
    name: job.name,
    stages: parts,
    transfers: [...transfers.values()].map(({ from, to, count, bytes }) => ({
      from: `stage${from}`,
      to: `stage${to}`,
      label: `${countText(count)} messages, ${bytesText(bytes)}`,
    })),
  };
}

/** Returns a text as a quoted id of Graphviz; `\n` separates the lines of a label. */
const quoted = (...lines: readonly string[]): string => `"${lines.map((line) => line.replace(/[\\"]/g, "\\$&")).join("\\n")}"`;

/** Returns the graph in the language of Graphviz. */
export function graphvizText({ name, stages, transfers }: OverviewGraph): string {
  const clusters = stages.flatMap(({ node, collectives }) => [
    `  subgraph ${quoted(`cluster_${node.id}`)} {`,
    `    ${quoted(node.id)} [shape=box, label=${quoted(...node.lines)}];`,
    ...collectives.flatMap((c) => [
      `    ${quoted(c.id)} [shape=ellipse, label=${quoted(...c.lines)}];`,
      `    ${quoted(node.id)} -> ${quoted(c.id)} [dir=none, style=dotted];`,
    ]),
    "  }",
  ]);
  const edges = transfers.map(({ from, to, label }) => `  ${quoted(from)} -> ${quoted(to)} [label=${quoted(label)}];`);
  return ["digraph plan {", `  label=${quoted(name)};`, "  rankdir=LR;", ...clusters, ...edges, "}", ""].join("\n");
}

/** Characters and edges above which Mermaid draws nothing, by its defaults. */
const MERMAID = { characters: 50_000, edges: 500 };

/** Returns whether Mermaid draws a text with its default limits. */
export const fitsMermaid = (text: string): boolean =>
  text.length <= MERMAID.characters && text.split("\n").filter((line) => /-->|-\.-/.test(line)).length <= MERMAID.edges;

/** Returns the graph in the language of Mermaid: a flowchart. */
export function mermaidText({ stages, transfers }: OverviewGraph): string {
  const label = (...lines: readonly string[]): string =>
    `"${lines.map((line) => line.replace(/[&<>"#;]/g, (c) => `#${c.charCodeAt(0)};`)).join("<br/>")}"`;
  const groups = stages.flatMap(({ node, collectives }) => [
    `  ${node.id}[${label(...node.lines)}]`,
    ...collectives.flatMap((c) => [`  ${c.id}([${label(...c.lines)}])`, `  ${node.id} -.- ${c.id}`]),
  ]);
  const edges = transfers.map(({ from, to, label: text }) => `  ${from} -->|${label(text)}| ${to}`);
  return ["flowchart LR", ...groups, ...edges, ""].join("\n");
}
