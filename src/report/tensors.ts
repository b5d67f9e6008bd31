/** The buffers of a plan by the bytes that they take on a rank, with equal layers as one row. */
import { bytesOf } from "../../schemas/dtypes.ts";
import type { Buffer, BufferKind, Plan, Program } from "../../schemas/plan.ts";
import { elementsOf } from "../../schemas/sharding.ts";
import { anyLayer } from "../analysis/layerText.ts";
import { memoryNames } from "../analysis/memoryBreakdown.ts";
import { bytesText, countText, percentOf, plural, ranges } from "../units.ts";
import type { Inspection } from "./inspect.ts";
import { bold, type Column, dim, fitLines, fitTable } from "./textLayout.ts";

/** Buffers of a stage that differ only in their layer. */
export interface TensorGroup {
  /** The id, with `layers.*` for all of `layers`. */
  readonly id: string;
  readonly kind: BufferKind;
  readonly dtype: string;
  readonly shape: readonly number[];
  /** Whether the first dim is a bound of rows. */
  readonly ragged: boolean;
  readonly layers: readonly number[];
  readonly count: number;
  /** Activation copies of each: microbatches in flight. */
  readonly copies: number;
  /** Of one copy of one buffer, and of all of them; of the workspace, which layers share, of one. */
  readonly bytes: number;
  readonly total_bytes: number;
}

/** The tensors of the stages that have the same. */
export interface StageTensors {
  readonly stages: readonly number[];
  readonly tensors: readonly TensorGroup[];
}

/** Returns the tensors of a stage by falling bytes. Workspace is shared over time, so its tensors add up to more than its arena. */
export function tensorsOf({ buffers, chunks }: Pick<Program, "buffers" | "chunks">): TensorGroup[] {
  const groups = new Map<string, TensorGroup & { layers: number[]; count: number; total_bytes: number }>();
  for (const b of buffers) {
    const copies = b.kind === "activation" ? (chunks[b.chunk ?? 0]?.copies ?? 1) : 1;
    const bytes = sizeOf(b);
    const key = [anyLayer(b.id, b.layer), b.kind, b.dtype, b.shape.join(), copies].join("|");
    const group = groups.get(key) ?? {
      ...{ id: anyLayer(b.id, b.layer), kind: b.kind, dtype: b.dtype, shape: b.shape, ragged: b.ragged > 0, layers: [], count: 0 },
      ...{ copies, bytes, total_bytes: 0 },
    };
    groups.set(key, group);
    if (b.layer !== undefined) group.layers.push(b.layer);
    group.count++;
    // layers use the same bytes of the workspace one after another
    if (b.kind === "workspace") group.total_bytes = bytes;
    else group.total_bytes += bytes * copies;
  }
  return [...groups.values()].sort((a, b) => b.total_bytes - a.total_bytes);
}

/** A buffer that lies in another takes no bytes of its own. */
const sizeOf = (b: Buffer): number => (b.within === undefined && b.part === undefined ? bytesOf[b.dtype] * elementsOf(b.shape) : 0);

/** Returns the tensors of all stages; stages whose tensors differ only in their layers are one entry. */
export function stageTensors({ programs }: Pick<Plan, "programs">): StageTensors[] {
  const found = new Map<string, { readonly stages: number[]; readonly tensors: TensorGroup[] }>();
  for (const program of programs) {
    const tensors = tensorsOf(program);
    const key = JSON.stringify(tensors.map(({ layers: _, ...rest }) => rest));
    const same = found.get(key);
    if (same) same.stages.push(program.stage);
    else found.set(key, { stages: [program.stage], tensors });
  }
  return [...found.values()];
}

/** A row of the table: a tensor of all chunks. */
interface TensorRow {
  readonly tensor: TensorGroup;
  readonly total_bytes: number;
  /** The number of tensors, and of their copies, by chunks with equal copies. */
  readonly numbers: readonly string[];
}

/** Collects tensors that differ only in the copies of their chunks. */
function mergedCopies(tensors: readonly TensorGroup[]): TensorRow[] {
  const rows = new Map<string, TensorRow>();
  for (const tensor of tensors) {
    const { id, kind, dtype, shape, count, copies, total_bytes } = tensor;
    const key = [id, kind, dtype, shape.join()].join("|");
    const { total_bytes: before, numbers } = rows.get(key) ?? { total_bytes: 0, numbers: [] };
    const number = `${countText(count)}${copies > 1 ? ` x ${copies}` : ""}`;
    rows.set(key, { tensor, total_bytes: before + total_bytes, numbers: [...numbers, number] });
  }
  return [...rows.values()].sort((a, b) => b.total_bytes - a.total_bytes);
}

/** Formats the memory of each stage, and its largest tensors. */
export function printTensors(plan: Plan, { roles, device }: Inspection, most: number, width: number): string[] {
  const columns: Column[] = [
    { head: "bytes", right: true },
    { head: "of peak", right: true },
    { head: "kind" },
    { head: "each", right: true, drop: 2 },
    { head: "number", right: true, drop: 3 },
    { head: "shape", drop: 1 },
    { head: "tensor" },
  ];
  return stageTensors(plan).flatMap(({ stages, tensors: groups }) => {
    const tensors = mergedCopies(groups);
    const memory = roles.find(({ stage }) => stage === stages[0])?.memory;
    const peak = memory?.peak ?? 0;
    const row = ({ tensor: t, total_bytes, numbers }: TensorRow): string[] => [
      bytesText(total_bytes),
      percentOf(total_bytes / peak),
      memoryNames[t.kind],
      bytesText(t.bytes),
      numbers.join(" + "),
      `${t.dtype} [${t.ragged ? "<=" : ""}${t.shape.join(",")}]`,
      t.id,
    ];
    return [
      ...fitLines(
        [
          `${bold(`stage${stages.length > 1 ? "s" : ""} ${ranges(stages)}`)}: ${bytesText(peak)} of ${bytesText(device.memory)} a rank; ${plural(tensors.length, "kind")} of tensors, the largest:`,
        ],
        width,
      ),
      ...fitTable(columns, tensors.slice(0, most).map(row), { width }),
      ...(tensors.length > most ? [dim(`  … ${plural(tensors.length - most, "smaller kind")}; --top N shows more`)] : []),
      "",
    ];
  });
}
