/**
 * Searches meshes for published configurations, and compares the best with what was published, as a table for docs/performance.md. The estimate is
 * that of rankc's kernels on the device, for both; with `-- --stack` that of the software of the row, with what it hides and how it sends rows. `npm run bench:search`, with ids of rows of test/fixtures/estimate/rows.tsv those. Takes about
 * five minutes of one core; times are CPU seconds of the search alone.
 */
import { packageProfile } from "../../src/analysis/estimate/profiles.ts";
import { loadDeviceTargets } from "../../src/codegen/targets.ts";
import { asInJob, type JobChoice, sideKeys } from "../../src/search/choice.ts";
import { alternativesOf, search } from "../../src/search/search.ts";
import { secondsText } from "../../src/units.ts";
import { jobOfRow, readTable, stackOfRow, stackTarget } from "./estimateRows.ts";

const published = ["V115", "V091", "V027", "V116", "V013"];
const isOfStack = process.argv.includes("--stack");
const asked = process.argv.slice(2).filter((word) => word !== "--stack");
const ids = asked.length > 0 ? asked : published;

const degrees = (choice: JobChoice): string => {
  const { tensor, pipeline, virtual_pipeline, context, expert, expert_tensor, micro_batch, recompute } = choice;
  const sides = sideKeys.flatMap((key) => (choice[key] === "job" ? [] : [`, ${key} ${choice[key]}`]));
  return `${tensor} ${pipeline} ${virtual_pipeline} ${context} ${expert} ${expert_tensor} ${micro_batch} ${recompute}${sides.join("")}`;
};

const less = (seconds: number): string => `${secondsText(Math.abs(seconds))} ${seconds >= 0 ? "less" : "more"}`;

const targetOf = await loadDeviceTargets();
const lines: string[] = [];
for (const id of ids) {
  const row = readTable("rows.tsv").find((r) => r.id === id);
  if (!row) throw new Error(`there is no row ${id}`);
  const written = jobOfRow(row);
  const own = packageProfile(written.cluster.device);
  const { profile, assumed } = isOfStack ? stackOfRow(row) : { profile: own, assumed: {} };
  if (!profile) throw new Error(`${written.cluster.device} has no profile`);
  const began = process.cpuUsage();
  const target = isOfStack ? await stackTarget(written) : targetOf(written.cluster.device);
  // other software decides by itself how rows are sent and what runs beside them: `assumed` says so
  const fixed = isOfStack ? asInJob : {};
  const result = search(written, {
    profile,
    target,
    written,
    assumed,
    fixed,
    onProgress: (line) => process.stderr.write(`${id}: ${line}\n`),
  });
  const { user, system } = process.cpuUsage(began);
  const [best] = result.best;
  if (!best || !result.written) throw new Error(`${id}: ${best ? "the published configuration has errors" : "nothing fits"}`);
  const { parallel: p, train } = written;
  const degreesOfRow = `${p.tensor} ${p.pipeline} ${p.virtual_pipeline} ${p.context} ${p.expert} ${p.expert_tensor} ${train.micro_batch} ${train.recompute.mode}`;
  const gib = (bytes: number): string => (bytes / 2 ** 30).toFixed(1);
  const gain = 100 * (result.written.seconds / best.seconds - 1);
  lines.push(
    `| ${id} ${row.model}, ${row.gpus} ${row.device} | ${degreesOfRow} | ${secondsText(result.written.seconds)}, ${gib(result.written.peak)} | ${degrees(best.choice)} | ${secondsText(best.seconds)}, ${gib(best.peak)} | ${gain.toFixed(1)} % | ${result.choices}, ${result.best.length + result.tooLarge.length} | ${(1e-6 * (user + system)).toFixed(0)} |`,
  );
  for (const { changes, seconds, saved, peak, part, reason } of result.fromWritten ?? [])
    process.stderr.write(
      `  from ${changes.map(({ key, from, to }) => `${key} ${from} to ${to}`).join(", ") || "layout"}: ${secondsText(seconds)}, ${less(saved)}, ${gib(peak)} GiB; ${less(part.saved)} of ${part.name}${reason ? `; ${reason}` : ""}\n`,
    );
  for (const { key, value, instead, saved, part } of alternativesOf(result.best))
    process.stderr.write(`  ${key} ${value} before ${instead}: ${secondsText(saved)}, ${secondsText(part.saved)} of ${part.name}\n`);
}
console.log(
  "| row | published: tp pp vpp cp ep etp batch recompute | s, GiB | best found | s, GiB | faster by | choices, compiled | CPU s |",
);
console.log("|---|---|---|---|---|---|---|---|");
for (const line of lines) console.log(line);
