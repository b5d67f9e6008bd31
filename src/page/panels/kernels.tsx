/** The kernels by falling work, and the source of one. */
import { useSignal } from "@preact/signals";
import { useEffect } from "preact/hooks";
import type { KernelView } from "../../report/view/planView.ts";
import { bytesText, countText, flopsText } from "../../units.ts";
import { readKernelSources } from "../packed.ts";
import { plan, plans, select, selection } from "../state.ts";

/** The columns by which kernels are sorted. */
const orders = {
  work: (a: KernelView, b: KernelView) => b.flops_per_step - a.flops_per_step || b.per_step - a.per_step,
  runs: (a: KernelView, b: KernelView) => b.per_step - a.per_step,
  name: (a: KernelView, b: KernelView) => a.id.localeCompare(b.id),
} as const;

/** The panel of the kernels. */
export function KernelsPanel() {
  const order = useSignal<keyof typeof orders>("work");
  const wanted = useSignal("");
  const { kernels } = plan.value.view;
  const other = plans.value[1 - plan.value.index]?.view.kernels;
  const total = kernels.reduce((sum, { flops_per_step }) => sum + flops_per_step, 0);
  const shown = kernels.filter(({ id, op }) => `${id} ${op}`.includes(wanted.value)).sort(orders[order.value]);
  const chosen = selection.value?.kind === "kernel" ? selection.value.id : undefined;
  const head = (key: keyof typeof orders, text: string, isNumber = false) => (
    <th
      scope="col"
      class={isNumber ? "number" : ""}
      aria-sort={order.value === key ? (key === "name" ? "ascending" : "descending") : "none"}
    >
      <button type="button" class="link" onClick={() => (order.value = key)}>
        {text}
      </button>
    </th>
  );
  return (
    <section class="panel kernels-panel">
      <div class="toolbar">
        <label class="choice">
          filter <input type="search" value={wanted.value} onInput={(event) => (wanted.value = event.currentTarget.value)} />
        </label>
        <span class="quiet">
          {countText(shown.length)} of {countText(kernels.length)} kernels
        </span>
      </div>
      <div class="kernels-room">
        <div class="table-room">
          <table>
            <thead>
              <tr>
                {head("name", "kernel")}
                {head("work", "work", true)}
                {head("runs", "runs a step", true)}
                <th scope="col" class="number">
                  scratch
                </th>
              </tr>
            </thead>
            <tbody>
              {shown.map(({ id, flops_per_step, per_step, scratch }) => (
                <tr key={id} class={id === chosen ? "selected" : ""}>
                  <td>
                    <button type="button" class="link id" onClick={() => select({ kind: "kernel", id })}>
                      {id}
                    </button>
                    {other && !other.some((k) => k.id === id) && <span class="badge"> only in this plan</span>}
                  </td>
                  <td class="number work">
                    {flops_per_step > 0 ? flopsText(flops_per_step) : "–"}
                    <i class="share" style={{ width: `${(100 * flops_per_step) / Math.max(1, total)}%` }} />
                  </td>
                  <td class="number">{countText(per_step)}</td>
                  <td class="number">{scratch > 0 ? bytesText(scratch) : "–"}</td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
        <KernelSource file={kernels.find(({ id }) => id === chosen)?.file} isChosen={chosen !== undefined} />
      </div>
    </section>
  );
}

/** The source of a kernel; the sources are unpacked when the first one is shown. */
function KernelSource({ file, isChosen }: { readonly file: string | undefined; readonly isChosen: boolean }) {
  const text = useSignal<string | undefined>(undefined);
  const { index } = plan.value;
  useEffect(() => {
    text.value = undefined;
    if (file !== undefined) void readKernelSources().then((sources) => (text.value = sources[index]?.[file] ?? ""));
  }, [file, index, text]);
  if (file === undefined)
    return (
      <p class="note source">
        {isChosen
          ? "This kernel has no source: the target runs the reference arithmetic of its op."
          : "Choose a kernel to read its source."}
      </p>
    );
  return (
    <figure class="source">
      <figcaption class="quiet">{file}</figcaption>
      <pre class="code">{text.value === undefined ? "…" : numbered(text.value)}</pre>
    </figure>
  );
}

const numbered = (text: string): string =>
  text
    .trimEnd()
    .split("\n")
    .map((line, i) => `${String(i + 1).padStart(4)}  ${line}`)
    .join("\n");
