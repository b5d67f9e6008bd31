/**
 * Effects of an instruction: the buffers that it reads, writes and adds to. The index of ragged rows is a buffer of its own.
 * Arithmetic over the plan, shared by compiler and runtime.
 */
import type { OpName } from "./opNames.ts";
import type { Buffer, Collective, Compute, Instruction } from "./plan.ts";

/** Names of the ops that pack and unpack the buffers of a collective (src/ops/rearrange.ts): they only copy values. */
export const transportOps: readonly OpName[] = ["arrange", "take_rows", "invert_rows", "split_rows", "merge_rows"];

/** Buffers by id, as far as effects need them. */
type Buffers = { get(id: string): Pick<Buffer, "rows"> | undefined };

/** Returns the pairs of buffers that a collective exchanges, in the order in which they are exchanged. */
export const pairsOf = ({ from, to, more }: Pick<Collective, "from" | "to" | "more">): readonly { from: string; to: string }[] =>
  more ? [{ from, to }, ...more] : [{ from, to }];

/** Returns the operands that an instruction reads, without the indices of their rows. */
export function readsOf(i: Instruction): readonly string[] {
  switch (i.kind) {
    case "compute":
      return Object.values(i.reads);
    case "collective":
      return i.more ? pairsOf(i).map(({ from }) => from) : [i.from];
    case "send":
      return [i.buffer];
    default:
      return [];
  }
}

/** Returns the buffers that an instruction writes, index buffers included: rows that arrive come with their index. */
export function writesOf(i: Instruction, buffers: Buffers): readonly string[] {
  if (i.kind === "compute") return i.rows === undefined ? Object.values(i.writes) : [...Object.values(i.writes), i.rows];
  if (i.kind === "send") return [];
  if (i.kind === "collective" && i.more) return pairsOf(i).map(({ to }) => to);
  const to = i.kind === "collective" ? i.to : i.buffer;
  const rows = buffers.get(to)?.rows;
  return rows === undefined ? [to] : [to, rows];
}

/**
 * Returns the index of the rows that an op computes on: the one that it writes, that of the operand which the instruction names, or that of
 * all its ragged inputs. A plan file sorts operands by name, so their order means nothing.
 */
export function rowIndexOf(i: Compute, buffers: Buffers): string | undefined {
  if (i.rows !== undefined) return i.rows;
  if (i.rows_of !== undefined) return buffers.get(i.reads[i.rows_of] ?? "")?.rows;
  for (const id of Object.values({ ...i.reads, ...i.writes })) {
    const rows = buffers.get(id)?.rows;
    if (rows !== undefined) return rows;
  }
  return undefined;
}

/** Returns an operand that has the rows that an op computes on: it tells how many there may be. Other ragged operands are lists. */
export function raggedOperandOf<B extends Pick<Buffer, "rows">>(i: Compute, buffers: { get(id: string): B | undefined }): B | undefined {
  const index = rowIndexOf(i, buffers);
  if (index === undefined) return undefined;
  return Object.values({ ...i.reads, ...i.writes })
    .map((id) => buffers.get(id))
    .find((b) => b?.rows === index);
}

/** Returns the i32 buffer to which an op that writes a row index stores how many rows it needed. */
export const neededOf = ({ rows }: Pick<Compute, "rows">): string | undefined => (rows === undefined ? undefined : `${rows}.needed`);

/** Returns the buffers that an instruction adds to or updates in place. */
export const accumulatesInto = (i: Instruction): readonly string[] =>
  i.kind === "compute" ? (i.accumulates ?? []).flatMap((name) => i.writes[name] ?? []) : [];

/** Calls `visit` for each buffer that an instruction reads or writes, with the indices of all their rows; for some more than once. */
export function visitTouched(i: Instruction, buffers: Buffers, visit: (id: string) => void): void {
  const add = (id: string | undefined): void => {
    if (id === undefined) return;
    visit(id);
    const rows = buffers.get(id)?.rows;
    if (rows !== undefined) visit(rows);
  };
  if (i.kind === "compute") {
    // called for every instruction of a program: no intermediate lists
    for (const name in i.reads) add(i.reads[name]);
    for (const name in i.writes) add(i.writes[name]);
    if (i.rows !== undefined) visit(i.rows);
  } else if (i.kind === "collective") {
    add(i.from);
    add(i.to);
    for (const pair of i.more ?? []) {
      add(pair.from);
      add(pair.to);
    }
  } else add(i.buffer);
}

/** Returns the buffers that an instruction reads or writes, with the indices of all their rows. */
export function touchedBy(i: Instruction, buffers: Buffers): Set<string> {
  const ids = new Set<string>();
  visitTouched(i, buffers, (id) => ids.add(id));
  return ids;
}
