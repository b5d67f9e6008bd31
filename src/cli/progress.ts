/** Progress lines and metrics lines of a run. */
import { type StartupSeconds, startupParts } from "../../schemas/startup.ts";
import type { EvaluationResult, StepResult } from "../../schemas/stepResult.ts";
import { countText, plural } from "../units.ts";
import type { SaveSeconds } from "./runSaves.ts";

/** Formats a step as a progress line. `of`: the last step; `pace`: mean seconds per step. */
export function progressLine(report: StepResult, of: number, pace: number): string {
  const left = (of - report.step) * pace;
  const added = addedBy(report);
  const fields = [
    `step ${String(report.step).padStart(String(of).length)}/${of}`,
    `loss ${report.loss.toFixed(4)}`,
    ...(report.mtp_loss === undefined ? [] : [`mtp loss ${report.mtp_loss.toFixed(4)}`]),
    ...(added === undefined ? [] : [`aux loss ${added.toFixed(4)}`]),
    ...(report.z_loss === undefined ? [] : [`z loss ${report.z_loss.toFixed(4)}`]),
    `grad norm ${report.grad_norm.toFixed(3)}`,
    `lr ${report.lr.toExponential(2)}`,
    ...(report.loss_scale === undefined
      ? []
      : [`loss scale ${scaleText(report.loss_scale)}${report.skipped && !report.nonfinite ? ", too large: skipped" : ""}`]),
    ...(report.expert_load === undefined ? [] : [`expert load ${report.expert_load.toFixed(2)}`]),
    ...(report.dropped_rows === undefined ? [] : [`dropped rows ${report.dropped_rows}`]),
    ...(report.labels === 0 ? ["no labels"] : []),
    ...(report.nonfinite ? [`skipped: ${report.nonfinite}`] : []),
    `${countText(Math.round(report.tokens / report.seconds))} tokens/s`,
    left > 0 ? `${duration(left)} left` : "done",
  ];
  return fields.join("  ");
}

/** Returns the auxiliary loss; undefined if the model has no experts. */
const addedBy = ({ aux_loss, expert_load }: StepResult): number | undefined => (expert_load === undefined ? undefined : aux_loss);

/** Formats a loss scale; a power of two as `2^32`. */
const scaleText = (scale: number): string => (Number.isInteger(Math.log2(scale)) ? `2^${Math.log2(scale)}` : String(scale));

/** Formats the parts of a start as a line. */
export function startupLine(seconds: StartupSeconds): string {
  const total = Object.values(seconds).reduce((a, b) => a + b, 0);
  const parts = startupParts.map((part) => `${part.replace("_", " ")} ${seconds[part].toFixed(1)}`);
  return `the first step was done after ${total.toFixed(1)} s: ${parts.join(", ")}`;
}

/** Formats a step as a JSON line of the metrics file. A non-finite number is null. `startup_seconds`: of the first step of a process. */
export function metricsLine(
  report: StepResult,
  { save_stall_seconds, save_stall_parts, save_seconds, save_pinned_bytes }: SaveSeconds = {},
  startup_seconds?: StartupSeconds,
): string {
  const { step, loss, mtp_loss, z_loss, grad_norm, expert_load, dropped_rows, lr, tokens, labels, seconds, data_wait_seconds } = report;
  const { loss_scale, skipped, mtp_losses, parameter_norm, router_entropy } = report;
  const losses = { loss, mtp_loss, mtp_losses, aux_loss: addedBy(report), z_loss, grad_norm, parameter_norm };
  const times = { seconds, data_wait_seconds, save_stall_seconds, save_stall_parts, save_seconds, save_pinned_bytes };
  return `${JSON.stringify({ step, ...losses, expert_load, dropped_rows, router_entropy, lr, tokens, labels, ...times, loss_scale, skipped, startup_seconds })}\n`;
}

/** Formats seconds as `4.2 s`, `12 min`, `3 h 5 min` or `4 days`. */
export function duration(seconds: number): string {
  if (seconds < 59.95) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.round(hours / 24)} days`;
}

/** Formats an evaluation as a line: the loss of all its data, and that of each source if there are several. */
export function evaluationText({ step, part, loss, perplexity, tokens, sources, seconds }: EvaluationResult): string {
  const of = ({ source, ...own }: EvaluationResult["sources"][number]): string => `${source} ${own.loss.toFixed(4)}`;
  const each = sources.length > 1 ? `  (${sources.map(of).join(", ")})` : "";
  return `step ${step}  ${part} loss ${loss.toFixed(4)}  perplexity ${perplexity.toPrecision(5)}  ${plural(tokens, "token")} in ${duration(seconds)}${each}`;
}

/** Formats an evaluation as a JSON line of the metrics file. A number that is not finite is null. */
export function evaluationLine({ step, part, loss, perplexity, tokens, sources, seconds }: EvaluationResult): string {
  const named = { [`${part}_loss`]: loss, [`${part}_perplexity`]: perplexity, [`${part}_tokens`]: tokens };
  return `${JSON.stringify({ step, ...named, sources, seconds })}\n`;
}
