/**
 * verify: laws of programs, checked on every compile. What is read was made; every send meets its receive, in the same
 * order on both sides, and no stage waits for ever. Ranks of a stage run one program, so the members of every group
 * issue the same collectives in the same order by construction.
 */
import type { Instruction, Program } from "../schemas/plan.ts";
import { sizesAgree } from "./cost.ts";
import type { Mesh } from "./mesh.ts";
import { invariant } from "./ops/op.ts";

export function verifyPrograms(programs: readonly Program[], mesh: Mesh): void {
  for (const p of programs) {
    verifyDefinitions(p);
    verifyMoves(p, mesh);
  }
  verifyTransfers(programs);
}

function verifyDefinitions(p: Program): void {
  const made = new Set<string>([
    ...p.buffers.filter((b) => b.kind === "parameter" || b.kind === "optimizer").map((b) => b.id),
    ...Object.values(p.inputs),
  ]);
  const ids = new Set<string>();
  const known = new Map(p.buffers.map((b) => [b.id, b]));
  // gradients are zeroed at the start of a step: adding to one makes it
  const written = (i: Instruction): string[] => {
    if (i.kind === "compute") return [...Object.values(i.writes), ...(i.rows ? [i.rows] : [])];
    if (i.kind === "move") return [i.to, known.get(i.to)?.rows ?? i.to];
    return i.kind === "recv" ? [i.buffer, known.get(i.buffer)?.rows ?? i.buffer] : [];
  };
  const read = (i: Instruction): string[] =>
    i.kind === "compute" ? Object.values(i.reads) : i.kind === "move" ? [i.from] : i.kind === "send" ? [i.buffer] : [];
  for (const i of [...p.forward, ...p.backward, ...p.step]) {
    invariant(!ids.has(i.id), `stage ${p.stage}: two instructions named ${i.id}`);
    ids.add(i.id);
    for (const id of [...read(i), ...written(i)]) invariant(known.has(id), `stage ${p.stage}: ${i.id} names ${id}, which is no buffer`);
    for (const id of read(i)) {
      invariant(made.has(id), `stage ${p.stage}: ${i.id} reads ${id} before it is made`);
      const rows = known.get(id)!.rows;
      invariant(!rows || made.has(rows), `stage ${p.stage}: ${i.id} reads rows ${rows} before they are made`);
    }
    for (const id of written(i)) made.add(id);
  }
}

/** Collectives move fixed numbers of elements: no rank waits for its host to learn a count. */
function verifyMoves(p: Program, mesh: Mesh): void {
  const buffers = new Map(p.buffers.map((b) => [b.id, b]));
  const buffer = (id: string) => buffers.get(id)!;
  for (const i of [...p.forward, ...p.backward, ...p.step]) {
    if (i.kind !== "move") continue;
    invariant(sizesAgree(i, mesh, buffer), `${i.id}: ${i.how} of [${buffer(i.from).shape}] cannot give [${buffer(i.to).shape}]`);
    invariant(buffer(i.from).dtype === buffer(i.to).dtype, `${i.id}: ${buffer(i.from).dtype} becomes ${buffer(i.to).dtype} on the way`);
  }
}

/** Runs only the sends and receives of all stages: a receive waits for its send; a send does not wait. */
function verifyTransfers(programs: readonly Program[]): void {
  const lists = programs.map((p) => {
    const of = (block: readonly Instruction[], tag: string) =>
      block.flatMap((i) => (i.kind === "send" || i.kind === "recv" ? [{ kind: i.kind, peer: i.peer, what: `${i.tag} of ${tag}` }] : []));
    return [...p.order.flatMap((o) => of(o.startsWith("F") ? p.forward : p.backward, o)), ...of(p.step, "step")];
  });
  const at = lists.map(() => 0);
  const channel = new Map<string, string[]>();
  for (let moved = true; moved; ) {
    moved = false;
    for (const [s, list] of lists.entries())
      for (; at[s]! < list.length; at[s]!++) {
        const t = list[at[s]!]!;
        if (t.kind === "send") {
          const key = `${s}>${t.peer}`;
          channel.set(key, [...(channel.get(key) ?? []), t.what]);
        } else {
          const queue = channel.get(`${t.peer}>${s}`) ?? [];
          if (!queue.length) break;
          const got = queue.shift();
          invariant(got === t.what, `stage ${s} waits for ${t.what} from stage ${t.peer}, which sends ${got}`);
        }
        moved = true;
      }
  }
  for (const [s, list] of lists.entries()) invariant(at[s] === list.length, `stage ${s} waits for ever for ${list[at[s]!]?.what}`);
  for (const [key, left] of channel) invariant(left.length === 0, `sent but never received: ${left[0]} (${key})`);
}
