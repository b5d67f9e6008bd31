/** What a run says while it trains: one step as one line. */
export interface StepReport {
  readonly step: number;
  readonly loss: number;
  /** Where the model has multi-token prediction. */
  readonly mtp_loss?: number;
  /** Of balancing and z losses together. */
  readonly aux_loss?: number;
  readonly z_loss?: number;
  readonly grad_norm: number;
  /** Tokens of the busiest expert over the mean. */
  readonly expert_load?: number;
  readonly dropped_rows?: number;
  /** Tokens that are learnt from, where labels say which. */
  readonly labels?: number;
  readonly lr: number;
  readonly tokens: number;
  readonly seconds: number;
  readonly loss_scale?: number;
  readonly skipped?: boolean;
  /** Of a skipped step, what was not finite, where that is no matter of the loss scale. */
  readonly nonfinite?: string;
}

/** `of` is the last step; `pace` the mean seconds of a step so far. */
export function progressLine(report: StepReport, of: number, pace: number): string {
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
    `${Math.round(report.tokens / report.seconds).toLocaleString("en-US")} tokens/s`,
    left > 0 ? `${duration(left)} left` : "done",
  ];
  return fields.join("  ");
}

/** What a router's losses add; undefined where the model has no experts. */
const addedBy = ({ aux_loss, expert_load }: StepReport): number | undefined => (expert_load === undefined ? undefined : aux_loss);

/** `2^32`, where it is a power of two. */
const scaleText = (scale: number): string => (Number.isInteger(Math.log2(scale)) ? `2^${Math.log2(scale)}` : String(scale));

/** The keys of a line of the metrics file, and no others. A number that is not finite is null. */
export function metricsLine(report: StepReport): string {
  const { step, loss, mtp_loss, z_loss, grad_norm, expert_load, dropped_rows, lr, tokens, labels, seconds } = report;
  const { loss_scale, skipped } = report;
  const losses = { loss, mtp_loss, aux_loss: addedBy(report), z_loss, grad_norm };
  return `${JSON.stringify({ step, ...losses, expert_load, dropped_rows, lr, tokens, labels, seconds, loss_scale, skipped })}\n`;
}

export function duration(seconds: number): string {
  if (seconds < 59.95) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.round(hours / 24)} days`;
}
