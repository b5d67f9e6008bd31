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
        safe: { "train.loss_scale": undefined },
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
  rule({
    code: "B241",
    title: "gradients and moments in bf16 need precision bf16",
    why: "Parameters of fp32 have gradients of fp32, and those of fp16 depend on the loss scale: there bf16 would save memory at the cost of the digits that the precision was chosen for.",
    level: "error",
    *check({ train }) {
      if (train.precision === "bf16") return;
      const found = `with precision: ${train.precision}`;
      if (train.gradients === "bf16")
        yield {
          at: "train.gradients",
          related: ["train.precision"],
          found: `gradients: bf16 ${found}`,
          fix: "f32, or precision: bf16",
          tries: [{ "train.gradients": "f32" }, { "train.precision": "bf16" }],
        };
      if (train.optimizer.moments === "bf16")
        yield {
          at: "train.optimizer.moments",
          related: ["train.precision"],
          found: `moments: bf16 ${found}`,
          fix: "f32, or precision: bf16",
          tries: [{ "train.optimizer.moments": "f32" }, { "train.precision": "bf16" }],
        };
    },
    bad: "train: {precision: fp32, gradients: bf16}",
  }),
  rule({
    code: "B250",
    title: "tf32 needs products of fp32",
    why: "TF32 rounds operands of fp32 to 10 bits of mantissa, so that tensor cores multiply them. bf16 and fp16 have 7 and 10 bits and are multiplied there anyway.",
    level: "error",
    *check({ train }) {
      if (train.matmul !== "tf32" || train.precision === "fp32") return;
      yield {
        at: "train.matmul",
        related: ["train.precision"],
        found: `matmul: tf32 with precision: ${train.precision}`,
        fix: "f32, or precision: fp32",
        tries: [{ "train.matmul": "f32" }, { "train.precision": "fp32" }],
      };
    },
    bad: "train: {precision: bf16, matmul: tf32}",
  }),
  rule({
    code: "B243",
    title: "gradient_reduction has no gradients to reduce",
    why: "Gradients are sent between the ranks that hold the same parameter and saw other tokens. A stage of one rank sends none, so that their type has no effect.",
    level: "warning",
    *check({ parallel: p, train }) {
      if (train.gradient_reduction === "f32" || p.world > p.pipeline) return;
      yield {
        at: "train.gradient_reduction",
        related: ["parallel.world"],
        found: `gradient_reduction ${train.gradient_reduction} with one rank in a stage`,
        fix: "leave it out, or add ranks",
        tries: [{ "train.gradient_reduction": "f32" }],
      };
    },
    bad: "train: {gradient_reduction: bf16}",
  }),
  rule({
    code: "B242",
    title: "a second moment in bf16 cannot follow its decay rate",
    why: "bf16 has 8 significant bits: a change by less than 1/512 of a value rounds to nothing. A second moment that shrinks by 1 - beta2 a step then never shrinks, and the updates stay small after one large gradient.",
    level: "warning",
    *check({ train: { optimizer } }) {
      const [beta1, beta2] = optimizer.betas;
      if (optimizer.moments !== "bf16" || optimizer.type === "sgd" || 1 - beta2 >= 1 / 512) return;
      yield {
        at: "train.optimizer.moments",
        related: ["train.optimizer.betas"],
        found: `moments: bf16 with beta2 ${beta2}`,
        fix: "0.95 is usual with bf16 moments (DeepSeek-V3)",
        tries: [{ "train.optimizer.betas": [beta1, 0.95] }, { "train.optimizer.moments": "f32" }],
      };
    },
    bad: "train: {precision: bf16, optimizer: {lr: 1.0e-3, betas: [0.9, 0.999], moments: bf16}}",
  }),
] as const;
