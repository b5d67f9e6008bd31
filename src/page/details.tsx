/** What is known about the selection, beside every panel: why it exists, its line of the job, bytes, ranks, time slots. */

import type { ComponentChildren } from "preact";
import { bytesText, countText, plural, wholeAxes } from "../units.ts";
import { sourceOf, targetOf } from "./dependencies.ts";
import { Heading, JobLines, MiniMesh, TimeSlots } from "./detailParts.tsx";
import { InstructionDetails } from "./instructionDetails.tsx";
import { PairTurns } from "./pairTable.tsx";
import { groupText, rankText } from "./panels/mesh.tsx";
import { runText } from "./panels/schedule.tsx";
import { axisNames } from "./planModel.ts";
import { PlanSummary } from "./planSummary.tsx";
import { Facts } from "./shared/facts.tsx";
import { focusRank, panel, plan, type Selection, select, selectedRanks, selection, stage } from "./state.ts";
import { timeText } from "./timeText.ts";
import { bytesBetween, flowsBetween } from "./traffic.ts";

type Of<K extends Selection["kind"]> = { readonly of: Extract<Selection, { kind: K }> };

/** The column beside the panel. */
export function Details() {
  const of = selection.value;
  return (
    <aside class="details" aria-label="details">
      {of ? <SelectionDetails of={of} /> : <PlanSummary />}
    </aside>
  );
}

function SelectionDetails({ of }: { readonly of: Selection }) {
  switch (of.kind) {
    case "rank":
      return <RankDetails of={of} />;
    case "axis":
      return <AxisDetails of={of} />;
    case "instruction":
      return <InstructionDetails of={of} />;
    case "run":
      return <RunDetails of={of} />;
    case "tensor":
      return <TensorDetails of={of} />;
    case "kernel":
      return <KernelDetails of={of} />;
    case "pair":
      return <PairDetails of={of} />;
    case "key":
      return (
        <Heading kind="job key" title={of.path}>
          <JobLines path={of.path} />
        </Heading>
      );
    default:
      return of satisfies never;
  }
}

function RankDetails({ of: { rank } }: Of<"rank">) {
  const shown = plan.value;
  const axes = axisNames.filter((axis) => shown.view.mesh.sizes[axis] > 1);
  return (
    <Heading kind="rank" title={`rank ${countText(rank)}`}>
      <p>{rankText(shown, rank)}</p>
      <Facts
        rows={axes.map((axis) => [
          `${axis} ${shown.coordinate(rank, axis)} of ${shown.view.mesh.sizes[axis]}`,
          <button key={axis} type="button" class="link ranks" onClick={() => select({ kind: "axis", axis })}>
            {groupText(shown.group(rank, axis))}
          </button>,
        ])}
      />
      <MiniMesh />
      <p class="buttons">
        <button type="button" onClick={() => (panel.value = "program")}>
          program of stage {shown.stageOf(rank)}
        </button>
        <button type="button" onClick={() => (panel.value = "memory")}>
          memory
        </button>
      </p>
    </Heading>
  );
}

function AxisDetails({ of: { axis } }: Of<"axis">) {
  const shown = plan.value;
  const view = shown.view.inspection.mesh.axes.find((a) => a.axis === axis);
  const role = shown.view.inspection.roles[stage.value];
  const sent = (role?.collectives ?? [])
    .filter(({ axes }) => wholeAxes(axes).includes(axis))
    .sort((a, b) => b.bytes_per_step - a.bytes_per_step)
    .slice(0, 8);
  return (
    <Heading kind="axis" title={axis}>
      <Facts
        rows={[
          ["groups", view && `${countText(view.groups)} of ${plural(view.size, "rank")}`],
          ["links", view && (view.nodes === 1 ? "inside a node" : `across ${view.nodes} nodes`)],
          [`group of rank ${focusRank.value}`, groupText(selectedRanks.value)],
        ]}
      />
      <MiniMesh />
      <h3>Collectives of stage {stage.value}, a step</h3>
      {sent.length === 0 && <p class="quiet">none over this axis</p>}
      <table>
        <tbody>
          {sent.map((c) => (
            <tr key={`${c.phase} ${c.name} ${c.bytes} ${c.because}`}>
              <td class="number">{bytesText(c.bytes_per_step)}</td>
              <td>
                {c.name} <span class="quiet">{c.phase}</span>
              </td>
            </tr>
          ))}
        </tbody>
      </table>
    </Heading>
  );
}

function RunDetails({ of: { stage: own, run } }: Of<"run">) {
  const shown = plan.value;
  const runs = shown.runs[own];
  if (!runs || run >= runs.length) return <PlanSummary />;
  const [source, target] = [sourceOf(shown, { stage: own, run }), targetOf(shown, { stage: own, run })];
  const link = (place: typeof source): ComponentChildren =>
    place && (
      <button type="button" class="link" onClick={() => select({ kind: "run", ...place })}>
        stage {place.stage}, {shown.runs[place.stage]?.tag(place.run)}
      </button>
    );
  const partner = runs.partnerOf(run);
  const waited = (runs.start[run] ?? 0) - (run > 0 ? (runs.end[run - 1] ?? 0) : 0);
  return (
    <Heading kind="block run" title={`${runs.tag(run)} on stage ${own}`}>
      <p>{runText(shown, own, run)}</p>
      <Facts
        rows={[
          ["takes", timeText(runs.duration(run))],
          ["waits before", waited > 0 ? timeText(waited) : "not at all"],
          source && ["receives from", link(source)],
          target && ["sends to", link(target)],
          partner === undefined ? undefined : ["alternates with", link({ stage: own, run: partner })],
        ]}
      />
      {partner !== undefined && <PairTurns of={{ stage: own, runs, first: Math.min(run, partner) }} />}
      <TimeSlots />
      <MiniMesh />
      <p class="buttons">
        <button type="button" onClick={() => (panel.value = "program")}>
          its instructions
        </button>
      </p>
    </Heading>
  );
}

function TensorDetails({ of: { stage: own, id } }: Of<"tensor">) {
  const shown = plan.value;
  const state = shown.view.stages[own]?.state.find((t) => t.id === id);
  return (
    <Heading kind={state?.kind ?? "buffer"} title={id}>
      <Facts
        rows={[
          ["stage", own],
          state && ["shape of each", state.shape],
          state && ["number", countText(state.count)],
          state && ["bytes of all", bytesText(state.bytes)],
        ]}
      />
      <MiniMesh />
    </Heading>
  );
}

function KernelDetails({ of: { id } }: Of<"kernel">) {
  const kernel = plan.value.view.kernels.find((k) => k.id === id);
  const pairs = (of: Readonly<Record<string, number>>): string =>
    Object.entries(of)
      .map(([name, n]) => `${name}=${n}`)
      .join(" ");
  return (
    <Heading kind="kernel" title={id}>
      {kernel ? (
        <Facts
          rows={[
            ["op", kernel.op],
            ["types", kernel.dtypes],
            ["sizes", pairs(kernel.sizes)],
            ["attributes", pairs(kernel.attrs) || "none"],
            ["runs a step", countText(kernel.per_step)],
            ["threads", kernel.threads.join(", ") || "–"],
            ["scratch", bytesText(kernel.scratch)],
          ]}
        />
      ) : (
        <p>This plan has no such kernel.</p>
      )}
    </Heading>
  );
}

function PairDetails({ of: { from, to } }: Of<"pair">) {
  const shown = plan.value;
  const flows = flowsBetween(shown, from, to);
  return (
    <Heading kind="pair of ranks" title={`${countText(from)} → ${countText(to)}`}>
      <p>
        {shown.nodeOf(from) === shown.nodeOf(to) ? "on one node" : `from node ${shown.nodeOf(from)} to node ${shown.nodeOf(to)}`};{" "}
        {bytesText(Math.round(bytesBetween(shown, from, to)))} a step
      </p>
      <Facts rows={flows.map(({ axes, bytes }) => [axes, bytesText(Math.round(bytes))])} />
      <MiniMesh />
    </Heading>
  );
}
