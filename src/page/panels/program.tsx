/**
 * The program of a stage as a graph: instructions are rows, values are lines from row to row, and collectives are edges to the ranks of
 * their group, which have a line of their own for each axis. Equal layers are folded.
 */
import { useSignal, useSignalEffect } from "@preact/signals";
import { useMemo } from "preact/hooks";
import { bytesText, plural } from "../../units.ts";
import { palette } from "../palette.ts";
import type { PlacedView, ProgramSection } from "../planModel.ts";
import { countsByAxis, type Fold, foldSections, type Lane, lanesOf } from "../programFolds.ts";
import { block, plan, selectedInstruction, stage } from "../state.ts";
import { StageChoice } from "./memory.tsx";
import { SectionGraph } from "./sectionGraph.tsx";

/** The panel of the program. */
export function ProgramPanel() {
  const shown = plan.value;
  const own = Math.min(stage.value, shown.stages - 1);
  const blocks = shown.view.stages[own]?.blocks ?? [];
  const chosen = blocks.find((b) => b.kind === block.value.kind && b.chunk === block.value.chunk) ?? blocks[0];
  const sections = useMemo(() => (chosen ? shown.sections(own, chosen) : []), [shown, own, chosen]);
  const folds = useMemo(() => foldSections(sections), [sections]);
  if (!chosen) return <p class="note">This stage has no blocks.</p>;
  const open = firstOpen(folds);
  const lanes = lanesOf(shown, own, sections);
  const all = sections.reduce((sum, { instructions }) => sum + instructions.length, 0);
  return (
    <section class="panel program-panel">
      <div class="toolbar">
        <StageChoice />
        <label class="choice">
          block{" "}
          <select
            value={blocks.indexOf(chosen)}
            onChange={(event) => {
              const to = blocks[Number(event.currentTarget.value)];
              if (to) block.value = { kind: to.kind, chunk: to.chunk };
            }}
          >
            {blocks.map(({ kind, chunk }, i) => (
              <option key={`${kind} ${chunk}`} value={i}>
                {kind.replace("_", " ")}
                {shown.chunks > 1 && kind !== "step" ? ` of chunk ${chunk}` : ""}
              </option>
            ))}
          </select>
        </label>
        <span class="quiet">{plural(all, "instruction")}; the lines at the right are the other ranks of each group</span>
      </div>
      <div class="program">
        <LaneHeads lanes={lanes} />
        {folds.map((fold) => (
          <FoldedSection
            key={`${own} ${chosen.kind} ${chosen.chunk} ${fold.sections[0]?.first}`}
            fold={fold}
            lanes={lanes}
            isFirst={fold === open}
          />
        ))}
      </div>
    </section>
  );
}

/** Returns the fold that is open at first: the one with the most instructions. */
function firstOpen(folds: readonly Fold[]): Fold | undefined {
  const size = ({ sections }: Fold): number => sections[0]?.instructions.length ?? 0;
  return folds.reduce<Fold | undefined>((most, fold) => (most && size(most) >= size(fold) ? most : fold), undefined);
}

function LaneHeads({ lanes }: { readonly lanes: readonly Lane[] }) {
  return (
    <div class="lane-heads">
      <span />
      <span class="quiet">this rank</span>
      <div class="lanes">
        {lanes.map(({ axes, ranks, axis }) => (
          <span key={axes} style={{ borderColor: palette.value.axes[axis] }} title={`${axes}: ${plural(ranks, "rank")}`}>
            {axes}
            {!axes.startsWith("stage") && <small>{`+${ranks - 1}`}</small>}
          </span>
        ))}
      </div>
    </div>
  );
}

interface FoldProps {
  readonly fold: Fold;
  readonly lanes: readonly Lane[];
  readonly isFirst: boolean;
}

/** Equal layers, or what is between layers: a head, and the graph of one of them. */
function FoldedSection({ fold, lanes, isFirst }: FoldProps) {
  const { sections } = fold;
  const isOpen = useSignal(isFirst);
  const at = useSignal(0);
  useSignalEffect(() => {
    const found = selectedInstruction.value;
    const own = found ? sections.findIndex((s) => holds(s, found)) : -1;
    if (own < 0) return;
    at.value = own;
    isOpen.value = true;
  });
  const section = sections[Math.min(at.value, sections.length - 1)];
  if (!section) return null;
  const counts = countsByAxis(section);
  const layers = sections.flatMap(({ layer }) => layer ?? []);
  return (
    <section class="fold">
      <div class="fold-head">
        <button type="button" class="fold-button" aria-expanded={isOpen.value} onClick={() => (isOpen.value = !isOpen.value)}>
          <span class="turn">{isOpen.value ? "▾" : "▸"}</span>
          <strong>{titleOf(section, layers)}</strong>
          <span class="quiet">
            {sections.length > 1 ? `${sections.length} × ` : ""}
            {plural(section.instructions.length, "instruction")}
          </span>
          {counts.map(({ axes, axis, count, bytes }) => (
            <span key={axes} class="badge" style={{ borderColor: palette.value.axes[axis] }}>
              {axes} {count} · {bytesText(bytes)}
            </span>
          ))}
        </button>
        {isOpen.value && layers.length > 1 && (
          <label class="choice">
            layer{" "}
            <select value={at.value} onChange={(event) => (at.value = Number(event.currentTarget.value))}>
              {layers.map((layer, i) => (
                <option key={layer} value={i}>
                  {layer}
                </option>
              ))}
            </select>
          </label>
        )}
      </div>
      {isOpen.value && <SectionGraph section={section} lanes={lanes} />}
    </section>
  );
}

const holds = ({ instructions }: ProgramSection, { block: of, stage: own, n }: PlacedView): boolean => {
  const [first] = instructions;
  return (
    first !== undefined &&
    first.stage === own &&
    first.block.kind === of.kind &&
    first.block.chunk === of.chunk &&
    n >= first.n &&
    n < first.n + instructions.length
  );
};

function titleOf({ instructions }: ProgramSection, layers: readonly number[]): string {
  if (layers.length > 1) return `layers ${layers[0]}–${layers.at(-1)}`;
  if (layers.length === 1) return `layer ${layers[0]}`;
  const [first = "", second] = [...new Set(instructions.map(({ id }) => id.split(/[.@]/)[0] ?? ""))].filter(Boolean);
  return second === undefined
    ? first
    : `${first}, ${second}${new Set(instructions.map(({ id }) => id.split(/[.@]/)[0])).size > 2 ? " …" : ""}`;
}
