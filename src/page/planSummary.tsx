/** The details when nothing is selected: the plan in a few numbers, and with two plans what the change costs. */

import { bytesText, countText, flopsText, largest } from "../units.ts";
import { palette } from "./palette.ts";
import { Facts } from "./shared/facts.tsx";
import { plan, planIndex, plans, select, stage, viewDiff } from "./state.ts";
import { timeText } from "./timeText.ts";
import { Legend } from "./widgets.tsx";

/** The parts of the memory in the order of reports. */
export const memoryParts = ["parameter", "gradient", "optimizer", "activation", "workspace", "scratch"] as const;
/** Their names. */
export const memoryTitles: Readonly<Record<(typeof memoryParts)[number], string>> = {
  ...{ parameter: "parameters", gradient: "gradients", optimizer: "optimizer", activation: "activations" },
  ...{ workspace: "workspace", scratch: "scratch" },
};

/** The plan at a glance. */
export function PlanSummary() {
  const { inspection } = plan.value.view;
  const { derived, device, roles, digest, rankc, target, estimate: time } = inspection;
  const classes = time?.stages.find((own) => own.stage === time.busiest)?.classes ?? [];
  const communication = classes.reduce((sum, { total }) => sum + total, 0);
  const exposed = classes.reduce((sum, own) => sum + own.exposed, 0);
  const flops = largest(roles, (role) => role.flops.per_step);
  return (
    <>
      <h2>{inspection.name}</h2>
      <p class="quiet">
        plan {digest.slice(0, 12)}, rankc {rankc}, {target}
      </p>
      <Consequences />
      <Facts
        rows={[
          ["parameters", countText(derived.parameters)],
          ["tokens a step", countText(derived.tokens_per_step)],
          time ? ["estimated step", `${timeText(time.seconds)} (${time.profile.name})`] : undefined,
          time ? ["of the peak", `${(100 * time.of_peak).toFixed(0)} % model flops`] : undefined,
          communication > 0 ? ["communication", `${timeText(exposed)} exposed of ${timeText(communication)}`] : undefined,
          derived.local_experts > 0 ? ["experts on a rank", countText(derived.local_experts)] : undefined,
          ["flops of the busiest rank", `${flopsText(flops)} a step`],
          ["kernels", countText(inspection.kernels)],
        ]}
      />
      <h3>
        Memory of a rank{" "}
        <span class="quiet">
          of {bytesText(device.memory)} ({device.name})
        </span>
      </h3>
      <MemoryBars />
    </>
  );
}

/** A bar for each stage, full at the memory of the device; a plan that fills a small part of it has a scale of its own. */
function MemoryBars() {
  const { roles, device } = plan.value.view.inspection;
  const most = Math.max(...plans.value.flatMap(({ view }) => view.inspection.roles.map(({ memory }) => memory.peak)));
  const scale = device.memory > 8 * most ? most : Math.max(device.memory, most);
  const used = memoryParts.filter((part) => roles.some(({ memory }) => memory[part] > 0));
  const other = plans.value[1 - planIndex.value];
  return (
    <>
      <ul class="bars">
        {roles.map(({ stage: own, memory }) => {
          const before = planIndex.value === 1 ? other?.view.inspection.roles[own]?.memory.peak : undefined;
          return (
            <li key={own}>
              <button
                type="button"
                class={own === stage.value ? "bar chosen" : "bar"}
                aria-pressed={own === stage.value}
                onClick={() => (stage.value = own)}
              >
                <span class="bar-name">stage {own}</span>
                <span class="bar-room">
                  {used.map((part) => (
                    <i key={part} style={{ width: `${(100 * memory[part]) / scale}%`, background: palette.value.memory[part] }} />
                  ))}
                </span>
                <span class="bar-value">
                  {bytesText(memory.peak)}
                  {before !== undefined && before !== memory.peak && <small>{changeText(before, memory.peak)}</small>}
                </span>
              </button>
            </li>
          );
        })}
      </ul>
      <Legend entries={used.map((part) => [memoryTitles[part], palette.value.memory[part]])} />
    </>
  );
}

/** Returns a relative change: `+12 %`. */
export function changeText(from: number, to: number): string {
  if (Math.round(from) === Math.round(to)) return "";
  if (from === 0 || to === 0) return from === 0 ? "new" : "gone";
  const change = (100 * (to - from)) / from;
  return `${change > 0 ? "+" : ""}${change.toFixed(Math.abs(change) < 10 ? 1 : 0)} %`;
}

/** What the change of the second plan costs, the gravest first. */
function Consequences() {
  const diff = viewDiff.value;
  if (!diff) return null;
  return (
    <>
      <h3>What the change does</h3>
      {!diff.changes && <p>The plans are the same.</p>}
      <ul class="consequences">
        {diff.consequences.slice(0, 6).map(({ is, text }) => (
          <li key={text} class={is}>
            {text}
          </li>
        ))}
      </ul>
      <p class="buttons">
        <button type="button" onClick={() => select(undefined, "findings")}>
          all differences
        </button>
      </p>
    </>
  );
}
