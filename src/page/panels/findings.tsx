/** Findings: warnings of rules, what differs between two plans, and the job with the lines that decide. */
import { bytesText, countText, flopsText, plural, ranges, secondsText } from "../../units.ts";
import { changeText } from "../planSummary.tsx";
import { plan, select, selection, viewDiff } from "../state.ts";
import { TableHead } from "../widgets.tsx";

/** The panel of the findings. */
export function FindingsPanel() {
  return (
    <section class="panel findings-panel">
      <div class="findings">
        <Warnings />
        <Differences />
      </div>
      <Job />
    </section>
  );
}

function Warnings() {
  const { warnings } = plan.value.view;
  return (
    <>
      <h2>Warnings</h2>
      {warnings.length === 0 && <p class="quiet">None: no rule warns of this job, and the plan fits its device.</p>}
      <ul class="warnings">
        {warnings.map(({ code, title, found }) => (
          <li key={`${code} ${found}`}>
            <strong>
              <code>{code}</code> {title}
            </strong>
            <span>{found}</span>
            <small class="quiet">rankc explain {code}</small>
          </li>
        ))}
      </ul>
    </>
  );
}

const units = {
  bytes: (n: number) => bytesText(Math.round(n)),
  flops: flopsText,
  count: countText,
  seconds: secondsText,
} as const;
const placedText = ({ ranks, nodes }: { readonly ranks: number; readonly nodes: number }): string =>
  `${plural(ranks, "rank")} on ${plural(nodes, "node")}`;
const valueText = (value: unknown): string => (value === undefined ? "absent" : JSON.stringify(value));

/** What differs between two plans, level by level. */
function Differences() {
  const diff = viewDiff.value;
  if (!diff) return null;
  const changed = diff.program.filter(({ kind }) => kind !== "compute").slice(0, 40);
  return (
    <>
      <h2>Differences</h2>
      {!diff.changes && <p>The plans are the same.</p>}
      <ul class="consequences">
        {diff.consequences.map(({ is, text }) => (
          <li key={text} class={is}>
            {text}
          </li>
        ))}
      </ul>
      {diff.job.length > 0 && (
        <Table heads={["job key", "before", "after"]} rows={diff.job.map((c) => [c.path, valueText(c.old), valueText(c.new)])} />
      )}
      {diff.placement.length > 0 && (
        <Table
          heads={["axis", "before", "after", "groups"]}
          rows={diff.placement.map(({ axis, old, new: now, moved }) => [axis, placedText(old), placedText(now), moved])}
        />
      )}
      {diff.summary.length > 0 && (
        <Table
          heads={["stages", "what", "before", "after", "change"]}
          rows={diff.summary.map((c) => [ranges(c.stages), c.what, units[c.unit](c.old), units[c.unit](c.new), changeText(c.old, c.new)])}
        />
      )}
      {changed.length > 0 && (
        <Table
          heads={["change", "block", "what", "instruction", "layers"]}
          rows={changed.map(({ change, phase, does, id, layers }) => [change, phase, does, id, ranges(layers)])}
        />
      )}
    </>
  );
}

interface TableProps {
  readonly heads: readonly string[];
  readonly rows: readonly (readonly string[])[];
}

function Table({ heads, rows }: TableProps) {
  return (
    <table>
      <TableHead names={heads} />
      <tbody>
        {rows.map((row) => (
          <tr key={row.join("|")}>
            {row.map((cell, i) => (
              <td key={heads[i]}>{cell}</td>
            ))}
          </tr>
        ))}
      </tbody>
    </table>
  );
}

/** The text of the job. Lines that decide about instructions can be chosen. */
function Job() {
  const { text, file, places } = plan.value.view.job;
  const byLine = new Map(Object.entries(places).flatMap(([path, place]) => ("line" in place ? [[place.line, path] as const] : [])));
  const of = selection.value;
  const chosen = of?.kind === "key" ? places[of.path] : undefined;
  return (
    <figure class="job">
      <figcaption>
        <h2>{file ?? "The complete job"}</h2>
        <span class="quiet">{file ? "the job file" : "no job file beside the plan fits it"}; marked lines decide about instructions</span>
      </figcaption>
      <ol class="job-lines">
        {text
          .trimEnd()
          .split("\n")
          .map((line, i) => {
            const path = byLine.get(i + 1);
            const isChosen = chosen !== undefined && "line" in chosen && chosen.line === i + 1;
            return (
              <li key={i} class={isChosen ? "selected" : ""}>
                {path === undefined ? (
                  <code>{line || " "}</code>
                ) : (
                  <button type="button" class="link" onClick={() => select({ kind: "key", path })}>
                    <code>{line}</code>
                  </button>
                )}
              </li>
            );
          })}
      </ol>
    </figure>
  );
}
