/**
 * Products on CUDA equal their reference, with every tile that may be chosen: many tiles in a block, experts without rows
 * and with all rows, sizes that no tile divides; Hopper's kernel with its copies, barriers, swizzles and clusters emulated as PTX documents them.
 */
import { describe, expect, test } from "vitest";
import type { OpName } from "../../schemas/opNames.ts";
import { type HopperTiling, hopperTiling } from "../../src/codegen/cuda/gemmHopper.ts";
import { mma, simt } from "../../src/codegen/cuda/gemmTiles.ts";
import { productOf } from "../../src/codegen/matmul.ts";
import { hold } from "../support/contractCheck.ts";
import { cudaEmulator, emulatorMissing } from "../support/cudaEmulator.ts";
import { type Held, held, holdAll, inTier, low, rows, small, tiled, turns, wide } from "../support/heldProducts.ts";
import { random } from "../support/opCases.ts";
import { adding, caseOf, products, type Sizes, specFor } from "../support/productCases.ts";
import { byTier, full, isFull } from "../support/tiers.ts";

const missing = await emulatorMissing();
const emulated = describe.skipIf(missing);
const note = missing ? ` (skipped: ${missing})` : "";

emulated(`Hopper's products${note}`, () => {
  // in the fast tier the dense and the alternating product is n3, below: each test compiles a library
  test("dense: one tile and several, remainders in every dim, addition to existing values", full, () =>
    holdAll([
      held("a0", "gemm", { S: 128, K: 64, N: 64 }, false, { tile: small, stages: 2 }),
      held("a1", "gemm", { S: 300, K: 136, N: 200 }, false, { tile: small, stages: 3, raster: 4 }),
      held("a2", "gemm_dgrad", { S: 300, K: 200, N: 136 }, false, { tile: small, stages: 2 }),
      held("a3", "gemm_wgrad", { S: 150, K: 136, N: 200 }, false, { tile: small, stages: 2 }),
      held("a4", "gemm_wgrad", { S: 150, K: 136, N: 200 }, true, { tile: small, stages: 2, buffers: 2 }),
      held("a5", "gemm", { S: 70, K: 64, N: 8 }, false, { tile: small, stages: 8 }),
    ]),
  );
  test("every tile", full, () =>
    holdAll([
      held("t0", "gemm", { S: 140, K: 72, N: 264 }, false, { tile: { rows: 128, columns: 256 }, stages: 2 }),
      held("t1", "gemm_dgrad", { S: 140, K: 200, N: 72 }, false, { tile: { rows: 128, columns: 192 }, stages: 2 }),
      held("t2", "gemm_wgrad", { S: 72, K: 136, N: 136 }, true, { tile: wide, stages: 2 }),
      held("t3", "gemm", { S: 72, K: 72, N: 264 }, false, { tile: { rows: 64, columns: 256 }, stages: 2 }),
      held("t4", "gemm_dgrad", { S: 72, K: 136, N: 72 }, false, { tile: low, stages: 2 }),
      held("t5", "gemm_wgrad", { S: 72, K: 72, N: 136 }, false, { tile: low, stages: 2 }),
    ]),
  );
  /** The kernel that runs beside collectives. */
  const beside = (name: string, sizes: Sizes, adds: boolean, change: Partial<HopperTiling>): Held => {
    const c = caseOf(name, "grouped_wgrad", sizes, "bf16", adds);
    return { ...c, made: tiled({ ...c.use, sharesDevice: true }, change) };
  };
  test("grouped: experts without rows, with few and with several tiles", () =>
    holdAll(
      inTier(
        [
          held("g0", "grouped_gemm", { K: 72, N: 136, rows }, false, { tile: small, stages: 3 }),
          held("g1", "grouped_dgrad", { K: 136, N: 72, rows }, false, { tile: small, stages: 2, raster: 4 }),
          held("g2", "grouped_wgrad", { K: 72, N: 136, rows }, false, { tile: small, stages: 2 }),
          held("g3", "grouped_wgrad", { K: 72, N: 136, rows }, true, { tile: small, stages: 3 }),
          held("g4", "grouped_gemm", { K: 64, N: 64, rows: [0, 0, 0] }, false, { tile: small, stages: 2 }),
          held("g5", "grouped_wgrad", { K: 64, N: 64, rows: [0, 0, 0] }, false, { tile: small, stages: 2 }),
          held("g6", "grouped_gemm", { K: 64, N: 64, rows: [0, 150, 0] }, false, { tile: small, stages: 2 }),
          // the fourth block takes tiles from the shallow end
          held("g7", "grouped_wgrad", { K: 136, N: 72, rows }, false, { tile: turns, stages: 2, blocks: 5 }),
          held("g8", "grouped_wgrad", { K: 72, N: 136, rows }, true, { tile: turns, stages: 3, blocks: 4 }),
          beside("g9", { K: 136, N: 72, rows }, false, { tile: turns, stages: 2, blocks: 5 }),
          beside("g10", { K: 72, N: 136, rows }, true, { tile: turns, stages: 3, blocks: 4 }),
        ],
        "g3",
        "g9",
        "g7",
      ),
    ));
  test("alternating warpgroups: even and odd numbers of tiles, experts without rows, remainders of the depth", full, () =>
    holdAll([
      held("w0", "gemm", { S: 300, K: 136, N: 200 }, false, { tile: turns, stages: 3 }),
      held("w1", "gemm_dgrad", { S: 300, K: 200, N: 136 }, false, { tile: turns, stages: 2 }),
      held("w2", "gemm_wgrad", { S: 150, K: 136, N: 200 }, true, { tile: turns, stages: 2, buffers: 2 }),
      held("w3", "grouped_wgrad", { K: 136, N: 136, rows }, false, { tile: turns, stages: 3, buffers: 1 }),
      held("w4", "grouped_wgrad", { K: 72, N: 136, rows }, true, { tile: turns, stages: 2 }),
      held("w5", "grouped_gemm", { K: 72, N: 136, rows }, false, { tile: turns, stages: 5 }),
      held("w6", "grouped_wgrad", { K: 64, N: 64, rows: [0, 0, 0] }, false, { tile: turns, stages: 2 }),
    ]),
  );
  test("what a tile lacks is left out: its second 64 rows, sixteens of depth beyond an expert, columns beyond c", () => {
    const square = { rows: 128, columns: 128, alternates: true } as const;
    const long = { rows: 128, columns: 192, alternates: true } as const;
    return holdAll(
      inTier(
        [
          held("l0", "grouped_gemm", { K: 72, N: 136, rows: [64, 65, 1, 0, 192, 130, 127] }, false, { tile: square, stages: 3, blocks: 3 }),
          held("l1", "grouped_dgrad", { K: 320, N: 72, rows: [64, 65, 1] }, false, { tile: long, stages: 2, blocks: 3 }),
          held("l2", "grouped_dgrad", { K: 136, N: 72, rows: [64, 193, 1] }, false, { tile: wide, stages: 2, cluster: 2 }),
          held("l3", "grouped_wgrad", { K: 136, N: 136, rows: [16, 17, 64, 79, 80, 0, 129, 15] }, false, {
            tile: square,
            stages: 2,
            blocks: 5,
          }),
          held("l4", "grouped_wgrad", { K: 192, N: 72, rows: [33, 48, 63, 1] }, true, { tile: wide, stages: 2, cluster: 2 }),
          held("l5", "gemm_wgrad", { S: 72, K: 40, N: 200 }, false, { tile: long, stages: 2 }),
          held("l6", "gemm", { S: 190, K: 72, N: 328 }, false, { tile: { rows: 128, columns: 256 }, stages: 2 }),
        ],
        "l0",
        "l3",
      ),
    );
  });
  test("weight gradients in bf16, which are rounded once where they are added to; in parts of the depth, whose sums a second launch adds", () => {
    const alignedCase = (name: string, op: OpName, sizes: Sizes, adds: boolean, change: Partial<HopperTiling>): Held => {
      const c = caseOf(name, op, sizes, "bf16", adds, 29, "bf16");
      return { ...c, made: tiled(c.use, change) };
    };
    return holdAll(
      inTier(
        [
          alignedCase("n0", "gemm_wgrad", { S: 150, K: 136, N: 200 }, true, { tile: small, stages: 2 }),
          alignedCase("n1", "grouped_wgrad", { K: 72, N: 136, rows }, true, { tile: turns, stages: 2 }),
          alignedCase("n2", "grouped_wgrad", { K: 72, N: 136, rows }, false, { tile: small, stages: 2 }),
          alignedCase("n3", "gemm_wgrad", { S: 300, K: 136, N: 72 }, true, { tile: turns, stages: 2, parts: 3 }),
          held("n4", "gemm_wgrad", { S: 300, K: 136, N: 200 }, false, { tile: small, stages: 2, parts: 3 }),
          held("n5", "gemm_wgrad", { S: 300, K: 136, N: 200 }, true, { tile: turns, stages: 3, parts: 2 }),
        ],
        "n3",
      ),
    );
  });
  test("in f16: of every layout of the operands one, sums that leave as halves and as f32", full, () =>
    holdAll([
      held("f0", "gemm", { S: 300, K: 136, N: 200 }, false, { tile: small, stages: 3, raster: 4 }, "f16"),
      held("f1", "gemm_dgrad", { S: 140, K: 200, N: 72 }, false, { tile: { rows: 128, columns: 192 }, stages: 2 }, "f16"),
      held("f2", "gemm_wgrad", { S: 150, K: 136, N: 200 }, true, { tile: small, stages: 2, buffers: 2 }, "f16"),
      held("f3", "grouped_gemm", { K: 200, N: 264, rows: [300, 0, 17, 384, 1] }, false, { tile: wide, stages: 2, cluster: 2 }, "f16"),
      held("f4", "grouped_dgrad", { K: 136, N: 72, rows }, false, { tile: low, stages: 2 }, "f16"),
      held("f5", "grouped_wgrad", { K: 72, N: 136, rows }, true, { tile: small, stages: 3 }, "f16"),
    ]),
  );
  const clusters = (): Held[] => [
    held("c0", "gemm", { S: 400, K: 200, N: 264 }, false, { tile: wide, stages: 2, cluster: 2, blocks: 4, raster: 4 }),
    held("c1", "gemm_dgrad", { S: 400, K: 264, N: 200 }, false, { tile: wide, stages: 3, cluster: 2 }),
    held("c2", "gemm_wgrad", { S: 200, K: 264, N: 136 }, true, { tile: wide, stages: 2, cluster: 2 }),
    held("c3", "grouped_gemm", { K: 200, N: 264, rows: [300, 0, 17, 384, 1] }, false, { tile: wide, stages: 2, cluster: 2 }),
    held("c4", "grouped_dgrad", { K: 264, N: 200, rows: [300, 0, 17, 384, 1] }, false, { tile: low, stages: 3, cluster: 2, blocks: 4 }),
    held("c5", "grouped_wgrad", { K: 200, N: 136, rows: [130, 0, 70, 1] }, true, { tile: wide, stages: 2, cluster: 2 }),
    // three tiles: one block's neighbour ends before it
    held("c7", "gemm", { S: 300, K: 264, N: 120 }, false, { tile: wide, stages: 2, cluster: 2 }),
    held("c6", "grouped_wgrad", { K: 200, N: 136, rows: [130, 0, 70, 1] }, false, { tile: wide, stages: 2, cluster: 2 }),
    held("c9", "grouped_wgrad", { K: 200, N: 264, rows: [130, 0, 70, 1] }, false, {
      ...{ tile: { rows: 128, columns: 128, alternates: true }, stages: 2, cluster: 2, blocks: 4 },
    }),
    // one step of depth to a tile
    held("c8", "gemm_dgrad", { S: 400, K: 264, N: 8 }, false, { tile: wide, stages: 4, cluster: 2, blocks: 4 }),
  ];
  // hardware may also run the blocks of a cluster at different speeds, and deliver their signals late
  test("clusters of two blocks share b where possible, in any order of execution", full, () =>
    isFull ? holdAll(clusters(), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]) : holdAll(inTier(clusters(), "c5"), [0, 1, 2]),
  );

  const rowsOf = (S: number, name: string) => held(name, "gemm", { S, K: 264, N: 120 }, false, { tile: wide, stages: 2, cluster: 2 });
  const without = (c: Held, text: string, other: string): Held => {
    expect(c.made.source).toContain(text);
    return { ...c, made: { ...c.made, source: c.made.source.replace(text, other) } };
  };
  const hangs = [
    [
      "no arrival in place of a neighbour without tiles",
      without(rowsOf(300, "h0"), "neighbour ? u32(lane) : rank", "u32(lane)"),
      /deadlock/,
    ],
    [
      "blocks of a cluster have unequal depths",
      // experts run by falling depth: 7 steps beside 2
      held("h1", "grouped_wgrad", { K: 72, N: 72, rows: [400, 0, 70, 1] }, false, { tile: wide, stages: 2, cluster: 2 }),
      /deadlock|more arrivals/,
    ],
    [
      "a block exits before its neighbour's last arrival",
      without(rowsOf(256, "h2"), "  __syncwarp();\n  if constexpr (CLUSTER > 1) clusterBarrier();\n}", "}"),
      /a block that has ended/,
    ],
  ] as const;
  for (const { options, rows } of byTier(hangs, (_, i) => i === 0))
    test.each(rows)("a hang is detected: %s", options, async (_, c, message) => {
      for (const order of [0, 1, 2, 3])
        await expect(hold(cudaEmulator([c], [order]), c.made, c), `order ${order}`).rejects.toThrow(message);
    });
});

const fewRows = [70, 0, 17, 64, 1, 40];
const allShapes: readonly (readonly [string, OpName, Sizes])[] = [
  // nothing a multiple of anything; rows of 16 bytes and tails in tiles only; whole tiles
  ...products
    .slice(0, 3)
    .flatMap((op) => [
      [`${op}_odd`, op, { S: 77, K: 35, N: 131 }] as const,
      [`${op}_tails`, op, { S: 200, K: 72, N: 136 }] as const,
      [`${op}_whole`, op, { S: 128, K: 128, N: 128 }] as const,
      [`${op}_thin`, op, { S: 3, K: 2, N: 1 }] as const,
    ]),
  ...products
    .slice(3)
    .flatMap((op) => [
      [`${op}_odd`, op, { K: 35, N: 67, rows: fewRows }] as const,
      [`${op}_tails`, op, { K: 72, N: 136, rows: fewRows }] as const,
      [`${op}_many`, op, { K: 8, N: 8, rows: Array.from({ length: 70 }, (_, e) => (e * 7) % 5) }] as const,
      [`${op}_none`, op, { K: 8, N: 8, rows: [0, 0] }] as const,
    ]),
];

const shapes = isFull ? allShapes : allShapes.filter(([name]) => name.endsWith("_tails"));

emulated(`tensor cores since sm_80${note}`, () => {
  const cases = [
    ["bf16", 128],
    ["bf16", 64],
    ["f16", 64],
  ] as const;
  for (const { options, rows } of byTier(cases, ([half, edge]) => half === "bf16" && edge === 64))
    test.each(rows)("%s, tiles of %d", options, (half, edge) =>
      holdAll(
        shapes.slice(isFull ? 0 : -2).flatMap(([name, op, sizes]) =>
          adding(op).map((adds) => {
            const c = caseOf(`${name}_${half}_${edge}${adds ? "_adds" : ""}`, op, sizes, half, adds);
            return { ...c, made: mma(c.use, productOf(c.use), half, edge) };
          }),
        ),
      ),
    );
});

emulated(`f32 arithmetic${note}`, () => {
  for (const edge of [128, 64, 32] as const)
    test(`tiles of ${edge}`, full, () =>
      holdAll(
        shapes.flatMap(([name, op, sizes]) =>
          adding(op).map((adds) => {
            const c = caseOf(`${name}_${edge}${adds ? "_adds" : ""}`, op, sizes, "f32", adds);
            return { ...c, made: simt(c.use, productOf(c.use), { part: productOf(c.use).depth, edge }) };
          }),
        ),
      ),
    );
});

emulated(`TF32${note}`, () => {
  const rounded = shapes.map(([name, op, sizes]) => [name, op, { ...sizes, tf32: 1 }] as const);
  for (const { options, rows } of byTier([128, 32] as const, (edge) => edge === 128))
    test.each(rows)("tiles of %d: operands are rounded as the reference rounds them", options, (edge) =>
      holdAll(
        rounded.flatMap(([name, op, sizes]) =>
          adding(op).map((adds) => {
            const c = caseOf(`${name}_tf32_${edge}${adds ? "_adds" : ""}`, op, sizes, "f32", adds);
            return { ...c, made: simt(c.use, productOf(c.use), { part: productOf(c.use).depth, edge }) };
          }),
        ),
      ),
    );
  test("a kernel that does not round differs from the reference", async () => {
    const { use, ...c } = caseOf("exact", "gemm", { S: 40, K: 64, N: 40, tf32: 1 }, "f32");
    const { tf32: _, ...d } = use.d;
    const exact = { ...use, d };
    const made = simt(exact, productOf(exact));
    await expect(hold(cudaEmulator([{ use: exact, made }]), made, { ...c, use: exact })).rejects.toThrow(/exact/);
  });
});

emulated(`f32 arithmetic in parts of the depth${note}`, () => {
  test("the sums of the parts are added in order, and to existing values if the output accumulates", () =>
    holdAll(
      [
        { name: "p0", op: "gemm_wgrad", sizes: { S: 150, K: 72, N: 24 }, adds: false },
        { name: "p1", op: "gemm_wgrad", sizes: { S: 150, K: 130, N: 140 }, adds: true },
        { name: "p2", op: "gemm", sizes: { S: 40, K: 130, N: 24 }, adds: false },
        { name: "p3", op: "gemm_dgrad", sizes: { S: 40, K: 24, N: 130 }, adds: false },
      ]
        .filter(({ adds }) => isFull || adds)
        .map(({ name, op, sizes, adds }) => {
          const c = caseOf(name, op as OpName, sizes, "f32", adds);
          return { ...c, made: simt(c.use, productOf(c.use), { part: 64 }) };
        }),
    ));
  test("products with few tiles for their depth are made in parts, others are not", () => {
    const launchesOf = (op: OpName, d: Record<string, number>) => {
      const small = specFor("parts", op, { S: 8, K: 8, N: 8 }, "f32");
      const use = { ...small, d: { ...small.d, ...d } };
      return simt(use, productOf(use)).launches.map(({ entry, grid }) => [entry, grid[0]]);
    };
    expect(launchesOf("gemm_wgrad", { S: 8192, K: 2048, N: 128 })).toEqual([
      ["parts", 256],
      ["parts_sum", 256],
    ]);
    expect(launchesOf("gemm", { S: 8192, K: 2048, N: 128 })).toHaveLength(2);
    // 36 tiles of 128 x 128 seven times: 252 of 264 places
    expect(launchesOf("gemm_wgrad", { S: 16384, K: 768, N: 768 })[0]).toEqual(["parts", 252]);
    expect(launchesOf("gemm", { S: 4096, K: 4096, N: 4096 })).toEqual([["parts", 1024]]);
    expect(launchesOf("gemm_wgrad", { S: 64, K: 64, N: 64 })).toHaveLength(1);
  });
});

test("Hopper's tilings: they fit a multiprocessor; a deep product gets the largest tile, one with a long store alternates, small ones get more tiles", () => {
  const resized = (op: OpName, d: Record<string, number>, bound: number) => {
    const small = specFor("tiling", op, { S: 8, K: 8, N: 8, ...(bound ? { rows: [8] } : {}) }, "bf16");
    return hopperTiling(productOf({ ...small, bound, d: { ...small.d, ...d } }));
  };
  expect(resized("gemm", { S: 8192, K: 14336, N: 4096 }, 0)).toEqual({
    ...{ tile: { rows: 128, columns: 256 }, cluster: 2, raster: 16, blocks: 132, parts: 1, stages: 4, buffers: 2 },
  });
  expect(resized("grouped_wgrad", { K: 4096, N: 14336, E: 8 }, 16384)).toEqual({
    ...{ tile: { rows: 128, columns: 192, alternates: true }, cluster: 1, raster: 12, blocks: 132, parts: 1, stages: 4, buffers: 4 },
  });
  expect(resized("gemm", { S: 16384, K: 4096, N: 8 }, 0)).toMatchObject({ tile: { rows: 128, columns: 64 }, blocks: 128 });
  // 18 tiles of 128 x 256 in seven parts of the depth
  expect(resized("gemm_wgrad", { S: 16384, K: 768, N: 768 }, 0)).toMatchObject({ parts: 7, blocks: 126 });
  const next = random(5);
  const size = (most: number) => 8 * Math.ceil(((next() + 1) / 2) * (most / 8));
  for (let i = 0; i < 200; i++) {
    const op = products[i % 6]!;
    const tiling = resized(op, { S: size(20000), K: size(8192), N: size(16384), E: size(256) }, i % 6 < 3 ? 0 : size(100000));
    expect(tiling.stages).toBeGreaterThanOrEqual(3);
    expect(tiling.blocks % tiling.cluster).toBe(0);
    expect(tiling.tile.columns % (64 * tiling.cluster)).toBe(0);
  }
});
