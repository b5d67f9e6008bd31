/** Checks of the memory section: every buffer lies in the arena of its kind, and the parts add up to the peak. */
import { bytesOf } from "../../schemas/dtypes.ts";
import type { Buffer, BufferKind, Memory, Plan, Program } from "../../schemas/plan.ts";
import { memoryBreakdown, peakOfParts } from "../analysis/memoryBreakdown.ts";
import { invariant } from "../ops/op.ts";
import { pairs } from "../passes/layout.ts";
import { ALIGN, scratchOf, sizeOf, verifyMemory } from "../passes/memory.ts";

/** Throws a BrokenInvariant that names stage and buffer if the memory of a plan does not fit its programs. */
export function verifyArenas({ programs, memory, kernels }: Plan): void {
  invariant(memory.length === programs.length, () => `${memory.length} memories for ${programs.length} stages`);
  for (const [stage, [p, m]] of pairs(programs, memory).entries()) {
    const who = `stage ${stage}`;
    invariant(m.stage === stage, () => `memory entry ${stage} is for stage ${m.stage}`);
    invariant(
      m.activation.length === p.chunks.length,
      () => `${who}: ${m.activation.length} activation arenas for ${p.chunks.length} chunks`,
    );
    verifyOffsets(p, m, who);
    const { scratch, peak } = m;
    const needed = scratchOf(p, kernels);
    invariant(scratch >= needed, () => `${who}: ${scratch} bytes of scratch, and its kernels use ${needed}`);
    const sum = peakOfParts(memoryBreakdown(p, m));
    invariant(Number.isSafeInteger(sum) && sum === peak, () => `${who}: the peak is ${peak} bytes, and the arenas have ${sum}`);
    verifyMemory(p, m);
  }
}

/** Checks that buffers are aligned and inside their arenas, and that lasting buffers overlap only if one is declared `within` the other. */
function verifyOffsets(p: Program, m: Memory, who: string): void {
  const arena: { readonly [K in BufferKind]: (b: Buffer) => number } = {
    parameter: () => m.parameter,
    gradient: () => m.gradient,
    optimizer: () => m.optimizer,
    workspace: () => m.workspace,
    activation: ({ chunk = 0 }) => m.activation[chunk] ?? 0,
  };
  invariant(
    Object.keys(m.offsets).length === p.buffers.length,
    () => `${who}: ${Object.keys(m.offsets).length} offsets for ${p.buffers.length} buffers`,
  );
  const lasting: { readonly kind: BufferKind; readonly id: string; readonly from: number; readonly to: number }[] = [];
  for (const b of p.buffers) {
    const from = Object.hasOwn(m.offsets, b.id) ? m.offsets[b.id] : undefined;
    invariant(from !== undefined, () => `${who}: ${b.id} has no offset`);
    const to = from + sizeOf(b);
    const bytes = arena[b.kind](b);
    invariant(
      from % ALIGN === 0 && to <= bytes,
      () => `${who}: ${b.id} at ${from} is misaligned or outside of the ${b.kind} arena of ${bytes} bytes`,
    );
    if (b.part !== undefined) {
      const place = (m.offsets[b.part.of] ?? 0) + b.part.at * bytesOf[b.dtype];
      invariant(from === place, () => `${who}: ${b.id} does not lie where its part of ${b.part?.of} does`);
    } else if (b.within !== undefined)
      invariant(from === m.offsets[b.within], () => `${who}: ${b.id} does not start at the offset of ${b.within}`);
    else if (b.kind === "parameter" || b.kind === "gradient" || b.kind === "optimizer") lasting.push({ kind: b.kind, id: b.id, from, to });
  }
  lasting.sort((a, b) => (a.kind === b.kind ? a.from - b.from : a.kind < b.kind ? -1 : 1));
  for (const [at, b] of lasting.entries()) {
    const next = lasting[at + 1];
    invariant(!next || next.kind !== b.kind || next.from >= b.to, () => `${who}: ${b.id} and ${next?.id} overlap`);
  }
}
