/** Rules B: 16-bit types and loss scaling. */
import { rule } from "./rule.ts";

/** The smallest positive f16 value: a smaller loss scale makes the loss zero. */
const SMALLEST = 2 ** -24;

/** Rules of precision. */
export const precision = [
  rule({
    code: "B224",
    title: "loss_scale needs precision fp16",
    why: "fp32 and bf16 represent numbers down to 1e-38, so gradients do not underflow, and the loss is not scaled.",
    level: "warning",
    *check({ train }) {
      if (train.loss_scale === null || train.precision === "fp16") return;
      yield {
        at: "train.loss_scale",
        related: ["train.precision"],
        found: `loss_scale with precision: ${train.precision}`,
        fix: "leave it out",
        tries: [{ "train.loss_scale": null }],
      };
    },
    bad: "train: {precision: fp32, loss_scale: 1024}",
  }),
  rule({
    code: "B225",
    title: "loss_scale is out of range",
    why: "The scale starts at initial, grows by a factor above 1, shrinks by a factor between 0 and 1, and never falls below min, which is positive. Division by a scale above 2^100 would underflow.",
    level: "error",
    *check({ train: { loss_scale: scale } }) {
      if (scale === null) return;
      const wrong = (key: keyof Exclude<typeof scale, number>, found: number, fix: string, value: number) => ({
        at: `train.loss_scale.${key}` as const,
        found: `${key} ${found}`,
        fix,
        tries: [{ [`train.loss_scale.${key}`]: value }],
      });
      const inRange = (x: number): boolean => x >= SMALLEST && x <= 2 ** 100;
      if (typeof scale === "number") {
        if (inRange(scale)) return;
        yield { at: "train.loss_scale", found: `loss_scale ${scale}`, fix: "65536 is usual", tries: [{ "train.loss_scale": 65536 }] };
        return;
      }
      const { initial, growth, backoff, min } = scale;
      if (!inRange(min)) yield wrong("min", min, "1 is usual", 1);
      else if (!inRange(initial) || initial < min)
        yield wrong("initial", initial, `from min ${min} to 2^100; 2^32 is usual`, Math.max(2 ** 32, min));
      if (!(growth > 1)) yield wrong("growth", growth, "above 1; 2 is usual", 2);
      if (!(backoff > 0 && backoff < 1)) yield wrong("backoff", backoff, "between 0 and 1; 0.5 is usual", 0.5);
    },
    bad: "train: {precision: fp16, loss_scale: {backoff: 2}}",
  }),
] as const;
