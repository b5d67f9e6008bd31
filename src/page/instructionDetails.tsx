/** The details of an instruction: why it exists, the line of the job, what it costs, who takes part, when it runs. */

import { bytesText, countText, flopsText, plural } from "../units.ts";
import { changeOf } from "./changes.ts";
import { BackLinks, Heading, JobLines, MiniMesh, TimeSlots } from "./detailParts.tsx";
import { groupText } from "./panels/mesh.tsx";
import type { PlacedView } from "./planModel.ts";
import { Facts } from "./shared/facts.tsx";
import { focusRank, panel, plan, type Selection, select, selectedInstruction, selectedRanks } from "./state.ts";

/** The details of the selected instruction. */
export function InstructionDetails({ of }: { readonly of: Extract<Selection, { kind: "instruction" }> }) {
  const found = selectedInstruction.value;
  if (!found)
    return (
      <Heading kind="instruction" title={of.id}>
        <p>This plan has no such instruction on stage {of.stage}.</p>
      </Heading>
    );
  const { view } = found;
  const is = view.kind === "compute" ? "instruction" : view.kind === "collective" ? "collective" : "transfer";
  const change = changeOf(found);
  return (
    <Heading kind={is} title={found.id}>
      <p>
        <strong>{view.does}</strong>
        {view.axes ? ` over ${view.axes}` : ""} <span class="quiet">{placeText(found)}</span>
      </p>
      {change && <p class={`change ${change.change}`}>{change.text}</p>}
      <h3>Why</h3>
      {(view.why?.because ?? [view.because]).map((sentence) => (
        <p key={sentence}>{plan.value.idIn(found, sentence)}</p>
      ))}
      <JobLines path={view.path} />
      <Numbers found={found} />
      {view.kind !== "compute" && (
        <>
          <h3>Ranks</h3>
          <p class="ranks">
            {groupText(selectedRanks.value)} <span class="quiet">with rank {countText(focusRank.value)}</span>
          </p>
          <MiniMesh />
        </>
      )}
      <h3>Time</h3>
      <TimeSlots />
      <Cures found={found} />
      <BackLinks found={found} />
    </Heading>
  );
}

function placeText({ stage, block, layer }: PlacedView): string {
  const chunk = plan.value.chunks > 1 && block.kind !== "step" ? ` of chunk ${block.chunk}` : "";
  return `${block.kind.replace("_", " ")}${chunk}, stage ${stage}${layer === null ? "" : `, layer ${layer}`}`;
}

function Numbers({ found }: { readonly found: PlacedView }) {
  const { view, block, stage } = found;
  const times = block.kind === "step" || view.only === "last" ? 1 : (plan.value.view.inspection.roles[stage]?.microbatches ?? 1);
  const { why } = view;
  const sends = view.kind === "compute" ? "reads and writes" : "sends";
  const link = why?.link;
  return (
    <Facts
      rows={[
        ["shapes", view.shapes],
        view.kind === "collective" ? ["stream", view.stream ?? "in order with compute"] : undefined,
        view.waits && ["waits for", view.waits.map((id) => plan.value.idIn(found, id)).join(", ")],
        why?.sharding === undefined ? undefined : ["layout", why.sharding],
        link && [
          "links",
          `${plural(link.ranks, "rank")} ${link.nodes === 1 ? "inside a node" : `across ${link.nodes} nodes`}${link.across > 0 ? `; ${(100 * link.across).toFixed(0)} % of the bytes cross nodes` : ""}`,
        ],
        [`a rank ${sends}`, `${bytesText(Math.round(view.bytes))}, ${countText(times)} × a step`],
        view.flops > 0 ? ["flops", `${flopsText(view.flops)} each time`] : undefined,
        why ? ["share", `${(100 * why.share).toFixed(1)} % of the bytes that the rank sends`] : undefined,
        view.kernel
          ? [
              "kernel",
              <button
                key="kernel"
                type="button"
                class="link id"
                onClick={() => view.kernel && select({ kind: "kernel", id: view.kernel }, "kernels")}
              >
                {view.kernel}
              </button>,
            ]
          : undefined,
      ]}
    />
  );
}

/** The changes of the job that remove it. */
function Cures({ found: { view } }: { readonly found: PlacedView }) {
  if (!view.why) return null;
  const { removed_by } = view.why;
  return (
    <>
      <h3>Without it</h3>
      {removed_by.length === 0 && <p class="quiet">No single key: it belongs to every job of this kind.</p>}
      {removed_by.map(({ set, effect }) => (
        <p key={effect}>
          <code>
            {Object.entries(set)
              .map(([path, to]) => `${path}=${JSON.stringify(to)}`)
              .join(" ")}
          </code>
          : {effect}
        </p>
      ))}
      <p class="buttons">
        <button type="button" onClick={() => (panel.value = "program")}>
          in the program
        </button>
        <button type="button" onClick={() => (panel.value = "schedule")}>
          in the schedule
        </button>
      </p>
    </>
  );
}
