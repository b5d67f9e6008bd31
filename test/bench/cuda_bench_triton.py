"""Peers in Triton, as Liger-Kernel writes them: a program per row (norms: per multiprocessor), the whole row in registers.

Each function returns a call without arguments, or None where Triton is missing.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton:

    @triton.jit
    def norm_forward(x, gain, y, r, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, BLOCK)
        mask = at < WIDTH
        value = tl.load(x + row * WIDTH + at, mask=mask, other=0).to(tl.float32)
        scale = tl.math.rsqrt(tl.sum(value * value, 0) / WIDTH + eps)
        tl.store(r + row, scale)
        tl.store(y + row * WIDTH + at, value * scale * tl.load(gain + at, mask=mask, other=0).to(tl.float32), mask=mask)

    @triton.jit
    def norm_backward(x, gain, dy, r, dx, parts, rows, EACH, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
        first = tl.program_id(0).to(tl.int64) * EACH
        at = tl.arange(0, BLOCK)
        mask = at < WIDTH
        weight = tl.load(gain + at, mask=mask, other=0).to(tl.float32)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for row in range(first, min(first + EACH, rows)):
            value = tl.load(x + row * WIDTH + at, mask=mask, other=0).to(tl.float32)
            slope = tl.load(dy + row * WIDTH + at, mask=mask, other=0).to(tl.float32)
            scale = tl.load(r + row)
            pull = tl.sum(value * weight * slope, 0) * scale * scale / WIDTH
            tl.store(dx + row * WIDTH + at, scale * (weight * slope - value * pull), mask=mask)
            total += slope * value * scale
        tl.store(parts + tl.program_id(0) * WIDTH + at, total, mask=mask)

    @triton.jit
    def swiglu_forward(gate, up, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = row * WIDTH + tl.arange(0, BLOCK)
        mask = tl.arange(0, BLOCK) < WIDTH
        g = tl.load(gate + at, mask=mask, other=0).to(tl.float32)
        tl.store(y + at, g * tl.sigmoid(g) * tl.load(up + at, mask=mask, other=0).to(tl.float32), mask=mask)

    @triton.jit
    def swiglu_backward(gate, up, dy, dgate, dup, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = row * WIDTH + tl.arange(0, BLOCK)
        mask = tl.arange(0, BLOCK) < WIDTH
        g = tl.load(gate + at, mask=mask, other=0).to(tl.float32)
        u = tl.load(up + at, mask=mask, other=0).to(tl.float32)
        d = tl.load(dy + at, mask=mask, other=0).to(tl.float32)
        s = tl.sigmoid(g)
        tl.store(dup + at, d * g * s, mask=mask)
        tl.store(dgate + at, d * u * s * (1 + g * (1 - s)), mask=mask)

    @triton.jit
    def cross_entropy(x, dx, target, loss, WIDTH, BLOCK: tl.constexpr):
        # the loss, then the gradient, which Liger-Kernel writes over the logits
        row = tl.program_id(0).to(tl.int64)
        x += row * WIDTH
        dx += row * WIDTH
        label = tl.load(target + row)
        most = float("-inf")
        total = 0.0
        for first in range(0, WIDTH, BLOCK):
            at = first + tl.arange(0, BLOCK)
            value = tl.load(x + at, mask=at < WIDTH, other=float("-inf")).to(tl.float32)
            high = tl.maximum(most, tl.max(value, 0))
            total = total * tl.exp(most - high) + tl.sum(tl.exp(value - high), 0)
            most = high
        tl.store(loss + row, most + tl.log(total) - tl.load(x + label).to(tl.float32))
        for first in range(0, WIDTH, BLOCK):
            at = first + tl.arange(0, BLOCK)
            value = tl.load(x + at, mask=at < WIDTH, other=float("-inf")).to(tl.float32)
            slope = tl.exp(value - most) / total
            tl.store(dx + at, tl.where(at == label, slope - 1, slope), mask=at < WIDTH)

    @triton.jit
    def embedding_backward(ids, dy, table, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = at < WIDTH
        value = tl.load(dy + row * WIDTH + at, mask=mask, other=0).to(tl.float32)
        tl.atomic_add(table + tl.load(ids + row).to(tl.int64) * WIDTH + at, value, mask=mask)


def block_of(width):
    block = triton.next_power_of_2(width)
    return block, min(32, max(4, block // 512))


def rms_norm(x, gain, eps):
    if not triton:
        return None
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    y, r = torch.empty_like(x), torch.empty(rows, device=x.device)
    block, warps = block_of(width)
    return lambda: norm_forward[(rows,)](x, gain, y, r, eps, width, block, num_warps=warps)


def rms_norm_backward(x, gain, dy, eps):
    if not triton:
        return None
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    r = torch.rsqrt(x.float().square().mean(-1) + eps)
    dx = torch.empty_like(x)
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    parts = torch.empty(programs, width, device=x.device)
    block, warps = block_of(width)

    def backward():
        norm_backward[(programs,)](x, gain, dy, r, dx, parts, rows, triton.cdiv(rows, programs), width, block, num_warps=warps)
        return parts.sum(0)

    return backward


def swiglu(gate, up):
    if not triton:
        return None
    rows, width = gate.numel() // gate.shape[-1], gate.shape[-1]
    y = torch.empty_like(gate)
    block, warps = block_of(width)
    return lambda: swiglu_forward[(rows,)](gate, up, y, width, block, num_warps=warps)


def swiglu_gradient(gate, up, dy):
    if not triton:
        return None
    rows, width = gate.numel() // gate.shape[-1], gate.shape[-1]
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    block, warps = block_of(width)
    return lambda: swiglu_backward[(rows,)](gate, up, dy, dgate, dup, width, block, num_warps=warps)


def cross_entropy_both(x, target):
    if not triton:
        return None
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    dx, loss = torch.empty_like(x), torch.empty(rows, device=x.device)
    return lambda: cross_entropy[(rows,)](x, dx, target, loss, width, min(32768, triton.next_power_of_2(width)), num_warps=32)


def embedding_gradient(ids, dy, words):
    if not triton:
        return None
    rows, width = ids.numel(), dy.shape[-1]
    table = torch.empty(words, width, device=dy.device)
    block = min(1024, triton.next_power_of_2(width))

    def backward():
        table.zero_()
        embedding_backward[(rows, triton.cdiv(width, block))](ids, dy, table, width, block)

    return backward
