/** The activations of feed-forward layers, apart from the schema of jobs, which is slow to load. */

/** Activations with a gate. */
export const gatedActivations = ["swiglu", "geglu", "quick_geglu"] as const;
/** Activations without a gate. */
export const plainActivations = ["gelu", "gelu_tanh", "squared_relu"] as const;
/** An activation with a gate: f(gate) · up, of two products with the input. */
export type GatedActivation = (typeof gatedActivations)[number];
/** An activation of one product with the input. */
export type PlainActivation = (typeof plainActivations)[number];
/** Returns whether an activation has a gate, and the feed-forward part thus three matrices instead of two. */
export const isGated = (activation: GatedActivation | PlainActivation): activation is GatedActivation =>
  gatedActivations.some((name) => name === activation);
