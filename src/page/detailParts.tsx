/** Parts of the details: lines of the job, a small mesh with the selected ranks, the time slots in the step, and what reads a result. */
import type { ComponentChildren } from "preact";
import { Canvas, type Sheet } from "./canvas.tsx";
import { meshLayout } from "./meshLayout.ts";
import { palette } from "./palette.ts";
import type { PlacedView } from "./planModel.ts";
import { drawRows } from "./scheduleDraw.ts";
import { drawMarks } from "./scheduleMarks.ts";
import { panel, plan, select, selectedRanks, selectInstruction, selection, visible } from "./state.ts";
import { timeScale } from "./timeAxis.ts";

/** The lines of the job around a key. */
export function JobLines({ path }: { readonly path: string }) {
  const { text, file, places } = plan.value.view.job;
  const place = places[path];
  const name = file ?? "complete job";
  if (place && ("set" in place || "elsewhere" in place))
    return (
      <pre class="yaml">
        <mark>{"set" in place ? `--set ${place.set}` : place.elsewhere}</mark>
      </pre>
    );
  if (!place || "isDefault" in place)
    return (
      <p class="key">
        <code>{path}</code> <span class="quiet">is not in the job: its default decides</span>
      </p>
    );
  const lines = text.split("\n");
  const first = Math.max(0, place.line - 3);
  return (
    <figure class="yaml-figure">
      <figcaption class="quiet">
        {name}:{place.line} <code>{path}</code>
      </figcaption>
      <pre class="yaml">
        {lines.slice(first, place.line + 2).map((line, i) => {
          const n = first + i + 1;
          const content = `${String(n).padStart(3)}  ${line}\n`;
          return n === place.line ? <mark key={n}>{content}</mark> : content;
        })}
      </pre>
    </figure>
  );
}

/** The ranks of the selection in a small mesh. */
export function MiniMesh() {
  const { world, gpus_per_node } = plan.value.view.mesh;
  if (world === 1) return null;
  const draw = ({ context, width, height }: Sheet): void => {
    const layout = meshLayout({ world, perNode: gpus_per_node, width, height, label: 0, largest: 13 });
    const chosen = new Set(selectedRanks.value);
    const { idle, accent, line } = palette.value;
    for (let node = 0; node < Math.ceil(world / gpus_per_node); node++) {
      const { x, y } = layout.node(node);
      context.strokeStyle = line;
      context.strokeRect(x + 0.5, y + 0.5, layout.box.width - 1, layout.box.height - 1);
    }
    for (let rank = 0; rank < world; rank++) {
      const { x, y } = layout.at(rank);
      context.fillStyle = chosen.has(rank) ? accent : idle;
      context.fillRect(x, y, layout.cell, layout.cell);
    }
  };
  return (
    <Canvas
      draw={draw}
      class="mini-mesh"
      label={`${selectedRanks.value.length} of ${world} ranks are in it`}
      onClick={() => (panel.value = "mesh")}
    />
  );
}

/** When the selection runs: the stage over the whole step. */
export function TimeSlots() {
  const of = selection.value;
  if (!of || !("stage" in of)) return null;
  const draw = (sheet: Sheet): void => {
    const scale = timeScale(0, sheet.width, { from: 0, to: visible.value.end });
    const rows = [{ model: plan.value, stage: of.stage, top: 4, height: sheet.height - 8 }];
    drawRows(sheet, scale, rows, "kind");
    drawMarks(sheet.context, scale, rows);
  };
  return <Canvas draw={draw} class="mini-time" label={`stage ${of.stage} over the step`} onClick={() => (panel.value = "schedule")} />;
}

/** The instructions of the block that write what it reads, and that read what it writes. */
export function BackLinks({ found }: { readonly found: PlacedView }) {
  const model = plan.value;
  const all = model.instructions(found.stage, found.block);
  const idsOf = (i: PlacedView, side: "reads" | "writes"): string[] => i.view[side].map((id) => model.idIn(i, id));
  const [reads, writes] = [new Set(idsOf(found, "reads")), new Set(idsOf(found, "writes"))];
  const writers = all.slice(0, found.n).filter((i) => idsOf(i, "writes").some((id) => reads.has(id)));
  const readers = all.slice(found.n + 1).filter((i) => idsOf(i, "reads").some((id) => writes.has(id)));
  return (
    <>
      <LinkList title="Reads the results of" of={writers.slice(-6)} />
      <LinkList title="Its results are read by" of={readers.slice(0, 6)} />
    </>
  );
}

function LinkList({ title, of }: { readonly title: string; readonly of: readonly PlacedView[] }) {
  if (of.length === 0) return null;
  return (
    <>
      <h3>{title}</h3>
      <ul class="links">
        {of.map((i) => (
          <li key={i.n}>
            <button type="button" class="link id" onClick={() => selectInstruction(i)}>
              {i.id}
            </button>{" "}
            <span class="quiet">{i.view.does}</span>
          </li>
        ))}
      </ul>
    </>
  );
}

interface HeadingProps {
  readonly kind: string;
  readonly title: string;
  readonly children: ComponentChildren;
}

/** The head of the details: what it is, its name, and a button that clears the selection. */
export function Heading({ kind, title, children }: HeadingProps) {
  return (
    <>
      <div class="details-head">
        <span class="kind">{kind}</span>
        <button type="button" class="link" onClick={() => select(undefined)} title="Escape">
          clear
        </button>
      </div>
      <h2 class="id">{title}</h2>
      {children}
    </>
  );
}
