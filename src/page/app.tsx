/** The frame of the page: the plan's name, tabs, the open panel, and what is known about the selection beside it. */
import type { ComponentType } from "preact";
import { useEffect } from "preact/hooks";
import { countText, plural } from "../units.ts";
import { Details } from "./details.tsx";
import { FindingsPanel } from "./panels/findings.tsx";
import { KernelsPanel } from "./panels/kernels.tsx";
import { MemoryPanel } from "./panels/memory.tsx";
import { MeshPanel } from "./panels/mesh.tsx";
import { ProgramPanel } from "./panels/program.tsx";
import { SchedulePanel } from "./panels/schedule.tsx";
import { TrafficPanel } from "./panels/traffic.tsx";
import { Search } from "./search.tsx";
import { followTheme, isPageKey, switchTheme, ThemeButton } from "./shared/themeChoice.tsx";
import { isSearching, type PanelName, panel, panelNames, plan, planIndex, plans, select, status } from "./state.ts";

/** The panels: title and content. */
const panels: Readonly<Record<PanelName, { readonly title: string; readonly Content: ComponentType }>> = {
  mesh: { title: "Mesh", Content: MeshPanel },
  schedule: { title: "Schedule", Content: SchedulePanel },
  memory: { title: "Memory", Content: MemoryPanel },
  program: { title: "Program", Content: ProgramPanel },
  traffic: { title: "Communication", Content: TrafficPanel },
  kernels: { title: "Kernels", Content: KernelsPanel },
  findings: { title: "Findings", Content: FindingsPanel },
};

/** The page. */
export function App() {
  useEffect(followTheme, []);
  useEffect(() => {
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, []);
  const { Content, title } = panels[panel.value];
  return (
    <div class="frame">
      <Header />
      <Tabs />
      <div class="body">
        <main>
          <div id="panel" class="panel-room" role="tabpanel" aria-label={title}>
            <Content key={panel.value} />
          </div>
        </main>
        <Details />
      </div>
      <p class="status" role="status">
        {status}
      </p>
      <Search />
    </div>
  );
}

/** Keys that work everywhere but in a field of text. */
function onKey(event: KeyboardEvent): void {
  const { key } = event;
  if (!isPageKey(event)) return;
  const numbered = panelNames[Number(key) - 1];
  if (key === "/") isSearching.value = true;
  else if (key === "Escape") select(undefined);
  else if (key === "t") switchTheme();
  else if (numbered) panel.value = numbered;
  else return;
  event.preventDefault();
}

function Header() {
  const { inspection } = plan.value.view;
  const { mesh, schedule, derived } = inspection;
  const chunks = plan.value.chunks;
  const facts = [
    plural(mesh.world, "rank"),
    `${plural(mesh.nodes, "node")} of ${mesh.gpus_per_node} ${inspection.device.name}`,
    `${plural(plan.value.stages, "stage")}${chunks > 1 ? ` of ${chunks} chunks` : ""}`,
    `${countText(derived.microbatches)} microbatch${derived.microbatches === 1 ? "" : "es"}`,
    `bubble ${(100 * schedule.bubble).toFixed(1)} %`,
  ];
  return (
    <header class="header">
      <h1>{inspection.name}</h1>
      {plans.value.length > 1 && <PlanSwitch />}
      <p class="facts">{facts.join("  ·  ")}</p>
      <button type="button" class="search-button" onClick={() => (isSearching.value = true)}>
        Search <kbd>/</kbd>
      </button>
      <ThemeButton />
    </header>
  );
}

/** Which of two plans is shown. */
function PlanSwitch() {
  const [a, b] = plans.value.map(({ view }) => view.inspection.name);
  const isSame = a === b;
  return (
    <fieldset class="segments" aria-label="plan">
      {plans.value.map(({ view, index }) => (
        <label key={index}>
          <input type="radio" name="plan" checked={planIndex.value === index} onChange={() => (planIndex.value = index)} />
          <span>{isSame ? ["before", "after"][index] : view.inspection.name}</span>
        </label>
      ))}
    </fieldset>
  );
}

function Tabs() {
  const move = (event: KeyboardEvent): void => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by === undefined) return;
    const next = panelNames[(panelNames.indexOf(panel.value) + by + panelNames.length) % panelNames.length];
    if (!next) return;
    panel.value = next;
    document.getElementById(`tab-${next}`)?.focus();
  };
  return (
    <div class="tabs" role="tablist" aria-label="panels" onKeyDown={move}>
      {panelNames.map((name, i) => (
        <button
          key={name}
          id={`tab-${name}`}
          type="button"
          role="tab"
          aria-selected={panel.value === name}
          aria-controls="panel"
          tabIndex={panel.value === name ? 0 : -1}
          title={`key ${i + 1}`}
          onClick={() => (panel.value = name)}
        >
          {panels[name].title}
        </button>
      ))}
    </div>
  );
}
