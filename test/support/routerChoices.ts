/** The discrete choices of the routers of a plan: laws that compare numbers compare these first. */
import type { Plan } from "../../schemas/plan.ts";

/**
 * The choices of a router, each before what depends on it. With groups or a bias, balancing counts plain choices of its own; a capacity
 * keeps the largest weights of those that chose an expert.
 */
const choices = ["top_k_mask", "plain_top_k_mask", "apply_capacity"];

/**
 * Returns the ids of all buffers [B,S,E] of 0 and 1 that say which token goes to which expert, layer after layer. Rounding decides among
 * equal weights, so two correct runs may differ in them, and after that in everything.
 */
export function routerChoices(plan: Plan): string[] {
  const ids = new Set(plan.programs.flatMap(({ buffers }) => buffers.map(({ id }) => id)));
  const routers = [...ids].filter((id) => id.endsWith(".moe.top_k_mask")).map((id) => id.slice(0, -"top_k_mask".length));
  routers.sort(new Intl.Collator("en", { numeric: true }).compare);
  return routers.flatMap((router) => choices.map((name) => router + name)).filter((id) => ids.has(id));
}
