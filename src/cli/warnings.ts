/** The warnings about a plan that reports show. */
import type { Plan } from "../../schemas/plan.ts";
import type { Warning } from "../report/overview.ts";

/** The warnings of the rules that need no compiled program, and a peak above the memory of the device. */
export async function warningsOf(plan: Plan): Promise<Warning[]> {
  const [{ jobRules }, { devices }, { bytesText }] = await Promise.all([
    import("../rules/jobRules.ts"),
    import("../../schemas/devices.ts"),
    import("../units.ts"),
  ]);
  const found = jobRules
    .filter(({ level }) => level === "warning")
    .flatMap((rule) => [...rule.check(plan.job)].map((result) => ({ code: rule.code, title: rule.title, found: result.found })));
  const { device } = plan.job.cluster;
  const most = plan.memory.reduce((a, b) => (b.peak > a.peak ? b : a));
  const limit = devices[device].memory;
  const over = {
    code: "C510",
    title: "the plan does not fit the device",
    found: `a rank of stage ${most.stage} needs ${bytesText(most.peak)}; ${device} has ${bytesText(limit)}`,
  };
  return [...(most.peak > limit && devices[device].links !== null ? [over] : []), ...found];
}
