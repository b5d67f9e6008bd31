"""What the bench of CUDA kernels asks of torch: inputs that suit an op, what the op makes of them, and torch's own ways to do it.

Buffers are as an op's signature has them, ragged operands as a matrix of rows. A reference computes in f32, of f32 products and of
AdamW in f64. A peer is a call without arguments that leaves the buffers alone; what it need not repeat is done before.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import cuda_bench_triton as liger

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "i32": torch.int32}


def poison(tensor):
    tensor.reshape(-1).view(torch.uint8).fill_(255)


class Cases:
    def __init__(self, compiles):
        self.compiles = compiles

    def fill(self, case):
        """New buffers: normal noise, and what an op needs otherwise; outputs hold 0xFF."""
        made = {}
        for buffer in case["buffers"]:
            tensor = torch.empty(buffer["shape"] or [1], dtype=TYPES[buffer["dtype"]], device="cuda")
            if buffer["role"] != "out" and tensor.is_floating_point():
                tensor.normal_()
            else:
                poison(tensor)
            made[buffer["name"]] = tensor
        fill = getattr(self, f"fill_{case['kind']}", None)
        if fill:
            fill(case["d"], made, case)
        return made

    def reference(self, case, b):
        with torch.no_grad():
            return getattr(self, f"reference_{case['kind']}")(case["d"], b, case)

    def peers(self, case, b):
        return getattr(self, f"peers_{case['kind']}")(case["d"], b, case)

    def several(self, name, f, *args):
        """Several kernels in a row, and what torch.compile makes of them."""
        peers = {name: lambda: f(*args)}
        if self.compiles:
            compiled = torch.compile(f, dynamic=False)
            peers[f"{name}, compiled"] = lambda: compiled(*args)
        return peers

    def liger(self, call):
        """A peer in Triton, where Triton is there."""
        return {"Triton, as Liger": call} if call else {}

    # -- products

    def reference_gemm(self, d, b, case):
        wide = torch.float64 if case["dtype"] == "f32" else torch.float32
        return {"y": flat(b["x"]).to(wide) @ b["w"].to(wide)}

    def peers_gemm(self, d, b, case):
        x, w = flat(b["x"]), b["w"]
        turned = w.t().contiguous().t()
        out = torch.empty_like(flat(b["y"]))
        return rounding(d, {"matmul": lambda: torch.matmul(x, w, out=out), "matmul, w [N,K]": lambda: torch.matmul(x, turned, out=out)})

    def reference_gemm_dgrad(self, d, b, case):
        wide = torch.float64 if case["dtype"] == "f32" else torch.float32
        return {"dx": flat(b["dy"]).to(wide) @ b["w"].to(wide).t()}

    def peers_gemm_dgrad(self, d, b, case):
        dy, w, out = flat(b["dy"]), b["w"].t(), torch.empty_like(flat(b["dx"]))
        return rounding(d, {"matmul": lambda: torch.matmul(dy, w, out=out)})

    def reference_gemm_wgrad(self, d, b, case):
        wide = torch.float64 if case["dtype"] == "f32" else torch.float32
        return {"dw": flat(b["x"]).to(wide).t() @ flat(b["dy"]).to(wide)}

    def peers_gemm_wgrad(self, d, b, case):
        x, dy = flat(b["x"]).t(), flat(b["dy"])
        out = torch.empty_like(b["dw"], dtype=x.dtype)
        if case["dtype"] == "f32":
            return rounding(d, {"matmul": lambda: torch.matmul(x, dy, out=out)})
        return {
            "matmul, bf16 out": lambda: torch.matmul(x, dy, out=out),
            "mm, f32 out": lambda: torch.mm(x, dy, out_dtype=torch.float32),
        }

    def fill_grouped_gemm(self, d, b, case):
        counts = torch.tensor(case["counts"])
        row = torch.arange(int(counts.sum()))
        expert = torch.repeat_interleave(torch.arange(len(counts)), counts)
        write_rows(d, b, torch.stack([torch.zeros_like(row), row, expert], 1), counts)

    fill_grouped_dgrad = fill_grouped_wgrad = fill_grouped_gemm

    def reference_grouped_gemm(self, d, b, case):
        return {"y": torch.cat([b["x"][s].float() @ b["w"][e].float() for e, s in enumerate(spans(case))])}

    def peers_grouped_gemm(self, d, b, case):
        x, w, ends = b["x"], b["w"], ends_of(case)
        turned = w.transpose(1, 2).contiguous().transpose(1, 2)
        return {"_grouped_mm": lambda: torch._grouped_mm(x, w, offs=ends), "_grouped_mm, w [E,N,K]": lambda: torch._grouped_mm(x, turned, offs=ends)}

    def reference_grouped_dgrad(self, d, b, case):
        return {"dx": torch.cat([b["dy"][s].float() @ b["w"][e].float().t() for e, s in enumerate(spans(case))])}

    def peers_grouped_dgrad(self, d, b, case):
        dy, w, ends = b["dy"], b["w"].transpose(1, 2), ends_of(case)
        return {"_grouped_mm": lambda: torch._grouped_mm(dy, w, offs=ends)}

    def reference_grouped_wgrad(self, d, b, case):
        return {"dw": torch.stack([b["x"][s].float().t() @ b["dy"][s].float() for s in spans(case)])}

    def peers_grouped_wgrad(self, d, b, case):
        x, dy, ends = b["x"].t(), b["dy"], ends_of(case)
        return {"_grouped_mm, bf16 out": lambda: torch._grouped_mm(x, dy, offs=ends)}

    # -- attention: query head g*M + m reads key head g; in zigzag order, that of the first rank, there is no peer

    def reference_attention(self, d, b, case):
        o, lse = torch.empty_like(b["o"], dtype=torch.float32), torch.empty_like(b["lse"])
        for n, (q, k, v, out, log, mask) in enumerate(heads(d, q=b["q"], k=b["k"], v=b["v"], o=o, lse=lse)):
            scores = (q @ k.t() * d["scale"]).masked_fill_(mask, float("-inf"))
            log.copy_(scores.logsumexp(-1))
            out.copy_((scores.softmax(-1) * drop_factors(d, b, n)) @ v)
        return {"o": o, "lse": lse}

    reference_attention_part = reference_attention_dropout = reference_attention

    def peers_attention(self, d, b, case):
        if d["chunk"]:
            return {}
        q, k, v = queries_first(d, b)

        def run(backend):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=d.get("drop", 0), enable_gqa=True)

        return {"SDPA cuDNN": lambda: run(SDPBackend.CUDNN_ATTENTION), "SDPA FA2": lambda: run(SDPBackend.FLASH_ATTENTION)}

    peers_attention_part = peers_attention_dropout = peers_attention

    def fill_attention_dropout(self, d, b, case):
        b["sample"].copy_(torch.arange(1000, 1000 + d["B"]))

    def fill_attention_grad(self, d, b, case):
        if "drop" in d:
            self.fill_attention_dropout(d, b, case)
        with torch.no_grad():
            for name, value in self.reference_attention(d, b, case).items():
                b[name].copy_(value)

    fill_attention_part_grad = fill_attention_dropout_grad = fill_attention_grad

    def reference_attention_grad(self, d, b, case):
        want = {name: torch.zeros_like(b[name], dtype=torch.float32) for name in ("dq", "dk", "dv")}
        parts = heads(d, q=b["q"], k=b["k"], v=b["v"], dy=b["dy"], **want)
        for n, (q, k, v, dy, dq, dk, dv, mask) in enumerate(parts):
            weight, factor = (q @ k.t() * d["scale"]).masked_fill_(mask, float("-inf")).softmax(-1), drop_factors(d, b, n)
            dv += (weight * factor).t() @ dy
            slope = dy @ v.t() * factor
            slope = weight * (slope - (weight * slope).sum(-1, keepdim=True)) * d["scale"]
            dq.copy_(slope @ k)
            dk += slope.t() @ q
        return want

    reference_attention_part_grad = reference_attention_dropout_grad = reference_attention_grad

    def peers_attention_grad(self, d, b, case):
        if d["chunk"]:
            return {}
        q, k, v = queries_first(d, b)
        dy = b["dy"].view(d["B"], d["S"], -1, d["W"]).transpose(1, 2)
        peers = {}
        for name, backend in {"SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA FA2": SDPBackend.FLASH_ATTENTION}.items():
            try:
                with sdpa_kernel(backend):
                    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=d.get("drop", 0), enable_gqa=True)
            except RuntimeError:
                continue
            peers[f"{name} backward"] = lambda o=o: torch.autograd.grad(o, (q, k, v), dy, retain_graph=True)
        return peers

    peers_attention_part_grad = peers_attention_dropout_grad = peers_attention_grad

    def reference_attention_merge(self, d, b, case):
        weights = torch.stack([b["la"], b["lb"]]).softmax(0).repeat_interleave(d["W"], -1)
        return {"o": weights[0] * b["a"] + weights[1] * b["b"].float(), "lse": torch.logaddexp(b["la"], b["lb"])}

    def peers_attention_merge(self, d, b, case):
        def merge(a, la, b, lb):
            lse = torch.logaddexp(la, lb)
            part = lambda x, l: x.unflatten(-1, (d["H"], d["W"])) * (l - lse).exp().unsqueeze(-1)
            return (part(a, la) + part(b, lb)).flatten(-2), lse

        return self.several("logaddexp", merge, b["a"], b["la"], b["b"], b["lb"])

    # -- what moves memory

    def fill_rmsnorm(self, d, b, case):
        b["gain"].uniform_(0.5, 1.5)

    fill_rmsnorm_grad = fill_rmsnorm_sum = fill_rmsnorm_grad_add_pair = fill_rmsnorm

    def reference_rmsnorm_sum(self, d, b, case):
        total = b["x1"].float() + b["x2"].float()
        return {"sum": total, "y": normed(total, b["gain"].float(), d["eps"])}

    def peers_rmsnorm_sum(self, d, b, case):
        def norm(x1, x2, g):
            total = x1 + x2
            return total, F.rms_norm(total, (d["D"],), g, d["eps"])

        return self.several("x1 + x2, F.rms_norm", norm, b["x1"], b["x2"], b["gain"])

    def reference_rmsnorm_grad_add_pair(self, d, b, case):
        found = self.reference_rmsnorm_grad(d, {**b, "dy": b["dy1"].float() + b["dy2"].float()}, case)
        return {**found, "dx": found["dx"] + b["z"].float()}

    def peers_rmsnorm_grad_add_pair(self, d, b, case):
        x, gain = leaf(b["x"]), leaf(b["gain"])
        y = F.rms_norm(x, (d["D"],), gain, d["eps"])

        def backward():
            dx, dgain = torch.autograd.grad(y, (x, gain), b["dy1"] + b["dy2"], retain_graph=True)
            return dx + b["z"], dgain

        return {"F.rms_norm backward, two additions": backward}

    def reference_rmsnorm(self, d, b, case):
        return {"y": normed(b["x"].float(), b["gain"].float(), d["eps"])}

    def peers_rmsnorm(self, d, b, case):
        x, gain = b["x"], b["gain"]
        peers = self.several("F.rms_norm", lambda x, g: F.rms_norm(x, (d["D"],), g, d["eps"]), x, gain)
        return {**peers, **self.liger(liger.rms_norm(x, gain, d["eps"]))}

    def reference_rmsnorm_grad(self, d, b, case):
        x, gain, dy = b["x"].float(), b["gain"].float(), b["dy"].float()
        r = torch.rsqrt(x.square().mean(-1, keepdim=True) + d["eps"])
        pull = (x * gain * dy).mean(-1, keepdim=True) * r * r
        return {"dx": r * (gain * dy - x * pull), "dgain": (x * r * dy).reshape(-1, d["D"]).sum(0)}

    def peers_rmsnorm_grad(self, d, b, case):
        x, gain = leaf(b["x"]), leaf(b["gain"])
        y = F.rms_norm(x, (d["D"],), gain, d["eps"])
        peers = {"F.rms_norm backward": lambda: torch.autograd.grad(y, (x, gain), b["dy"], retain_graph=True)}
        return {**peers, **self.liger(liger.rms_norm_backward(b["x"], b["gain"], b["dy"], d["eps"]))}

    def fill_adamw(self, d, b, case):
        b["v"].uniform_(0.1, 1)
        for name, value in {"scale": 1, "lr": 0.01, "step": 1000}.items():
            b[name].fill_(value)

    def reference_adamw(self, d, b, case):
        g, w, m, v = (b[name].double() for name in ("g", "w", "m", "v"))
        lr, step = b["lr"].double().item(), b["step"].item()
        m.mul_(d["beta1"]).add_(g, alpha=1 - d["beta1"])
        v.mul_(d["beta2"]).addcmul_(g, g, value=1 - d["beta2"])
        below = (v / (1 - d["beta2"] ** step)).sqrt_().add_(d["eps"])
        w.mul_(1 - lr * d["decay"]).addcdiv_(m, below, value=-lr / (1 - d["beta1"] ** step))
        return {"w": w, "m": m, "v": v}

    def peers_adamw(self, d, b, case):
        g, w, m, v = (b[name].clone() for name in ("g", "w", "m", "v"))
        step = b["step"].reshape(())
        how = {"lr": 0.01, "beta1": d["beta1"], "beta2": d["beta2"], "weight_decay": d["decay"], "eps": d["eps"]}
        return {"_fused_adamw_": lambda: torch._fused_adamw_([w], [g], [m], [v], [], [step], amsgrad=False, maximize=False, **how)}

    def reference_cast(self, d, b, case):
        return {"y": b["x"]}

    def peers_cast(self, d, b, case):
        out = torch.empty_like(b["y"])
        return {"copy_": lambda: out.copy_(b["x"])}

    def reference_swiglu(self, d, b, case):
        return {"y": F.silu(b["gate"].float()) * b["up"].float()}

    def peers_swiglu(self, d, b, case):
        peers = self.several("silu(gate)*up", lambda gate, up: F.silu(gate) * up, b["gate"], b["up"])
        return {**peers, **self.liger(liger.swiglu(b["gate"], b["up"]))}

    def reference_swiglu_grad(self, d, b, case):
        gate, up, dy = b["gate"].float(), b["up"].float(), b["dy"].float()
        s = gate.sigmoid()
        return {"dgate": dy * up * s * (1 + gate * (1 - s)), "dup": dy * gate * s}

    def peers_swiglu_grad(self, d, b, case):
        gate, up = leaf(b["gate"]), leaf(b["up"])
        y = F.silu(gate) * up
        peers = {"autograd": lambda: torch.autograd.grad(y, (gate, up), b["dy"], retain_graph=True)}
        return {**peers, **self.liger(liger.swiglu_gradient(b["gate"], b["up"], b["dy"]))}

    def reference_rope(self, d, b, case):
        return {"y": turned(b["x"].float().view(d["B"], d["S"], d["H"], d["C"]), *angles(d))}

    def peers_rope(self, d, b, case):
        cos, sin = (a.bfloat16() for a in angles(d))
        return self.several("rotate_half", turned, b["x"].view(d["B"], d["S"], d["H"], d["C"]), cos, sin)

    def fill_head_norm_rope(self, d, b, case):
        b["weight"].uniform_(0.5, 1.5)

    fill_head_norm_rope_grad = fill_head_norm_rope

    def reference_head_norm_rope(self, d, b, case):
        x = b["x"].float().view(d["B"], d["S"], d["H"], d["C"])
        return {"y": turned(normed(x, b["weight"].float(), d["eps"]), *angles(d))}

    def peers_head_norm_rope(self, d, b, case):
        cos, sin = (a.bfloat16() for a in angles(d))

        def heads(x, weight):
            return turned(F.rms_norm(x, (d["C"],), weight, d["eps"]), cos, sin)

        return self.several("F.rms_norm, rotate_half", heads, b["x"].view(d["B"], d["S"], d["H"], d["C"]), b["weight"])

    def reference_head_norm_rope_grad(self, d, b, case):
        sizes = (d["B"], d["S"], d["H"], d["C"])
        dy = turned(b["dy"].float().view(sizes), *angles(d))
        of = {"x": b["x"].view(sizes), "gain": b["weight"], "dy": dy}
        found = self.reference_rmsnorm_grad({**d, "D": d["C"]}, of, case)
        return {"dx": found["dx"], "dweight": found["dgain"]}

    def peers_head_norm_rope_grad(self, d, b, case):
        sizes = (d["B"], d["S"], d["H"], d["C"])
        cos, sin = (a.bfloat16() for a in angles({**d, "sign": -d["sign"]}))
        x, weight = leaf(b["x"].view(sizes)), leaf(b["weight"])
        y = turned(F.rms_norm(x, (d["C"],), weight, d["eps"]), cos, sin)
        dy = b["dy"].view(sizes)
        return {"F.rms_norm, rotate_half backward": lambda: torch.autograd.grad(y, (x, weight), dy, retain_graph=True)}

    # -- the router

    def reference_softmax(self, d, b, case):
        return {"y": b["x"].float().softmax(-1)}

    def peers_softmax(self, d, b, case):
        return {"softmax": lambda: torch.softmax(b["x"], -1, dtype=torch.float32)}

    def reference_top_k_mask(self, d, b, case):
        return {"c": chosen(b["x"].float(), d["k"])}

    def peers_top_k_mask(self, d, b, case):
        return self.several("topk, scatter", lambda x: torch.zeros_like(x).scatter_(-1, x.topk(d["k"], -1).indices, 1.0), b["x"])

    def scores_in_groups(self, d, x, bias):
        score = x + d["sign"] * bias
        of_group = score.unflatten(-1, (d["groups"], -1))
        worth = of_group.topk(d["group_scores"], -1).values.sum(-1)
        best = chosen(worth, d["group_top_k"]).unsqueeze(-1)
        return of_group.masked_fill(best == 0, float("-inf")).flatten(-2)

    def reference_top_k_mask_biased(self, d, b, case):
        return {"c": chosen(self.scores_in_groups(d, b["x"], b["bias"]), d["k"])}

    def peers_top_k_mask_biased(self, d, b, case):
        def choose(x, bias):
            score = self.scores_in_groups(d, x, bias)
            return torch.zeros_like(score).scatter_(-1, score.topk(d["k"], -1).indices, 1.0)

        return self.several("groups, topk, scatter", choose, b["x"], b["bias"])

    def fill_combine_weights(self, d, b, case):
        b["c"].copy_(chosen(b["p"], 8))
        b["p"].copy_(b["p"].softmax(-1))

    def reference_combine_weights(self, d, b, case):
        kept = b["p"] * b["c"]
        return {"y": kept / kept.sum(-1, keepdim=True)}

    def peers_combine_weights(self, d, b, case):
        def weigh(p, c):
            kept = p * c
            return kept / kept.sum(-1, keepdim=True)

        return self.several("product, sum, quotient", weigh, b["p"], b["c"])

    def reference_router(self, d, b, case):
        p = b["x"].float().softmax(-1)
        c = chosen(b["x"].float(), d["k"])
        return {"p": p, "c": c, "y": p * c / (p * c).sum(-1, keepdim=True)}

    def peers_router(self, d, b, case):
        return self.several("softmax, topk, scatter", lambda x: kept(torch.softmax(x, -1, dtype=torch.float32), d["k"]), b["x"])

    # -- rows of experts

    def fill_permute(self, d, b, case):
        tokens, experts = d["B"] * d["S"], d["E"]
        k = d["bound"] // tokens
        # some experts are liked more than others
        liking = torch.randn(tokens, experts, device="cuda") + torch.randn(experts, device="cuda") / 2
        b["c"].copy_(chosen(liking, k).view_as(b["c"]))

    def fill_unpermute(self, d, b, case):
        self.fill_permute(d, b, case)
        write_rows(d, b, *rows_of(b["c"]))

    def reference_permute(self, d, b, case):
        index, counts = rows_of(b["c"])
        rows = torch.empty_like(b["rows"])
        write_rows(d, {"rows": rows}, index, counts)
        return {"r": flat(b["x"])[index[:, 0] * d["S"] + index[:, 1]], "rows": rows}

    def peers_permute(self, d, b, case):
        x = flat(b["x"])
        index, _ = rows_of(b["c"])
        tokens = index[:, 0] * d["S"] + index[:, 1]
        k = d["bound"] // x.shape[0]
        experts = b["c"].view(-1, d["E"]).topk(k, -1).indices
        out = torch.empty_like(b["r"])
        return {
            "argsort, index_select": lambda: torch.index_select(x, 0, experts.flatten().argsort(stable=True) // k, out=out),
            "index_select alone": lambda: torch.index_select(x, 0, tokens, out=out),
        }

    def reference_unpermute(self, d, b, case):
        index, _ = rows_of(b["c"])
        tokens = index[:, 0] * d["S"] + index[:, 1]
        total = torch.zeros(flat(b["x"]).shape, dtype=torch.float32, device="cuda")
        return {"x": total.index_add_(0, tokens, b["r"].float())}

    def peers_unpermute(self, d, b, case):
        index, _ = rows_of(b["c"])
        tokens, k = index[:, 0] * d["S"] + index[:, 1], d["bound"] // (d["B"] * d["S"])
        of_token = tokens.argsort(stable=True).view(-1, k)
        r = b["r"]
        peers = self.several("gather, sum", lambda r, at: r[at].sum(1), r, of_token)
        peers["embedding_bag"] = lambda: F.embedding_bag(of_token, r, mode="sum")
        return peers

    def fill_take_rows(self, d, b, case):
        # rows that eight ranks have sent, each rank's by expert: the rows of an expert come together
        b["from"].copy_(torch.arange(d["N"]).view(8, 64, -1).transpose(0, 1).flatten())

    def reference_take_rows(self, d, b, case):
        return {"y": b["x"].view(-1, d["width"])[b["from"].long()]}

    def peers_take_rows(self, d, b, case):
        x, at = b["x"].view(-1, d["width"]), b["from"].long()
        out = torch.empty(len(at), d["width"], dtype=x.dtype, device="cuda")
        return {"index_select": lambda: torch.index_select(x, 0, at, out=out)}

    # -- the vocabulary

    def reference_row_max(self, d, b, case):
        return {"m": b["x"].float().amax(-1)}

    def peers_row_max(self, d, b, case):
        return {"amax": lambda: b["x"].amax(-1)}

    def fill_softmax_terms(self, d, b, case):
        b["m"].copy_(b["x"].amax(-1))
        b["target"].random_(0, d["V"])

    fill_softmax_terms_grad = fill_softmax_terms

    def reference_softmax_terms(self, d, b, case):
        x = b["x"].float()
        p = x.gather(-1, b["target"].long().unsqueeze(-1)).squeeze(-1)
        return {"s": (x - b["m"].unsqueeze(-1)).exp().sum(-1), "p": p}

    def peers_softmax_terms(self, d, b, case):
        peers = self.several("exp(x-m).sum", lambda x, m: (x.float() - m.unsqueeze(-1)).exp().sum(-1), b["x"], b["m"])
        return {**peers, "logsumexp": lambda: torch.logsumexp(b["x"], -1)}

    def reference_softmax_terms_grad(self, d, b, case):
        dx = (b["x"].float() - b["m"].unsqueeze(-1)).exp() * b["ds"].unsqueeze(-1)
        return {"dx": dx.scatter_add_(-1, b["target"].long().unsqueeze(-1), b["dp"].unsqueeze(-1))}

    def peers_softmax_terms_grad(self, d, b, case):
        x = b["x"].detach().requires_grad_()
        target = b["target"].long().view(-1)
        loss = F.cross_entropy(flat(x), target, reduction="none")
        return {"F.cross_entropy backward": lambda: torch.autograd.grad(loss, x, b["dp"].view(-1).to(loss.dtype), retain_graph=True)}

    def fill_cross_entropy(self, d, b, case):
        b["target"].random_(0, d["V"])

    def reference_cross_entropy(self, d, b, case):
        x = b["x"].float()
        m = x.amax(-1)
        s = (x - m.unsqueeze(-1)).exp().sum(-1)
        p = x.gather(-1, b["target"].long().unsqueeze(-1)).squeeze(-1)
        return {"m": m, "s": s, "p": p, "l": s.log() + m - p}

    def peers_cross_entropy(self, d, b, case):
        target = b["target"].long().view(-1)
        return self.several("F.cross_entropy", lambda x, t: F.cross_entropy(x, t, reduction="none"), flat(b["x"]), target)

    # forward and backward as models run them: one pass of statistics, one that writes the gradient

    def fill_loss_and_gradient(self, d, b, case):
        self.fill_softmax_statistics(d, b, case)
        x = b["x"].float()
        b["ds"].copy_(1 / (x - x.amax(-1, keepdim=True)).exp().sum(-1))
        b["dp"].fill_(-1)

    def reference_loss_and_gradient(self, d, b, case):
        statistics = self.reference_softmax_statistics(d, b, case)
        return {**statistics, **self.reference_softmax_terms_grad(d, {**b, **statistics}, case)}

    def peers_loss_and_gradient(self, d, b, case):
        x = b["x"].detach().requires_grad_()
        target = b["target"].long().view(-1)

        def both():
            loss = F.cross_entropy(flat(x), target, reduction="none")
            return torch.autograd.grad(loss, x, torch.ones_like(loss))

        return {"F.cross_entropy, backward": both, **self.liger(liger.cross_entropy_both(b["x"], b["target"].view(-1)))}

    def fill_softmax_statistics(self, d, b, case):
        b["target"].random_(0, d["V"])

    def reference_softmax_statistics(self, d, b, case):
        x = b["x"].float()
        m = x.amax(-1)
        p = x.gather(-1, b["target"].long().unsqueeze(-1)).squeeze(-1)
        return {"m": m, "s": (x - m.unsqueeze(-1)).exp().sum(-1), "p": p}

    def peers_softmax_statistics(self, d, b, case):
        return {"logsumexp": lambda: torch.logsumexp(b["x"], -1), **self.peers_cross_entropy(d, b, case)}

    def fill_embed(self, d, b, case):
        b["ids"].random_(0, d["V"])

    def fill_embed_grad(self, d, b, case):
        self.fill_embed(d, b, case)
        if case["name"].endswith("by rank"):
            b["ids"].copy_(torch.rand(b["ids"].shape, device="cuda").mul_(torch.log(torch.tensor(d["V"] + 1.0))).exp_().int() - 1).clamp_(0, d["V"] - 1)

    def reference_embed(self, d, b, case):
        return {"x": b["table"][b["ids"].long()]}

    def peers_embed(self, d, b, case):
        ids = b["ids"].long()
        return {"F.embedding": lambda: F.embedding(ids, b["table"])}

    def reference_embed_grad(self, d, b, case):
        total = torch.zeros(d["V"], d["D"], device="cuda")
        return {"dtable": total.index_add_(0, b["ids"].view(-1).long(), flat(b["dy"]).float())}

    def peers_embed_grad(self, d, b, case):
        ids = b["ids"].long()
        peers = {"embedding backward, bf16": lambda: torch.ops.aten.embedding_dense_backward(b["dy"], ids, d["V"], -1, False)}
        return {**peers, **self.liger(liger.embedding_gradient(b["ids"], flat(b["dy"]), d["V"]))}


# -- what several share


def rounding(d, peers):
    """The same calls with products in TF32, if the case has them."""

    def rounded(call):
        def run():
            torch.backends.cuda.matmul.allow_tf32 = True
            call()
            torch.backends.cuda.matmul.allow_tf32 = False

        return run

    return {f"{name}, TF32": rounded(call) for name, call in peers.items()} if d.get("tf32") else peers


def flat(x):
    return x.view(-1, x.shape[-1])


def leaf(x):
    return x.detach().requires_grad_()


def spans(case):
    at = 0
    for count in case["counts"]:
        yield slice(at, at + count)
        at += count


def ends_of(case):
    return torch.tensor(case["counts"], device="cuda").cumsum(0).int()


def rows_of(c):
    """(b,s,e) of every one in the map, by e, b, s; and how many each expert has."""
    found = (c > 0).permute(2, 0, 1).nonzero()
    return found[:, [1, 2, 0]], torch.bincount(found[:, 0], minlength=c.shape[-1])


def write_rows(d, b, index, counts):
    """The count, (b,s,e) of each row, and where each expert's begin."""
    rows = b["rows"].fill_(-1)
    rows[0] = len(index)
    rows[1 : 1 + 3 * len(index)] = index.reshape(-1).int().cuda()
    rows[d["offsets"]] = 0
    rows[d["offsets"] + 1 :] = counts.cumsum(0).int().cuda()


def queries_first(d, b):
    widths = (("q", d["G"] * d["M"], d["C"]), ("k", d["G"], d["C"]), ("v", d["G"], d["W"]))
    return [leaf(b[name]).view(d["B"], -1, count, width).transpose(1, 2) for name, count, width in widths]


def positions(d, count):
    """Of the first tokens of a sequence, as src/ops/positions.ts has them."""
    index = torch.arange(count, device="cuda")
    if not d["chunk"]:
        return index
    block = index // d["chunk"]
    place = torch.where(block % 2 == 1, 2 * d["ranks"] - 1 - block // 2, block // 2)
    return place * d["chunk"] + index % d["chunk"]


def heads(d, **tensors):
    """Every query head, with its keys' where a tensor has those alone: [S,C] each (of one value per head [S]), and what no query sees."""
    mask = positions(d, d["U"])[None, :] > positions(d, d["S"])[:, None]
    queries, keys = d["G"] * d["M"], d["G"]
    views = []
    for name, t in tensors.items():
        count = keys if name in ("k", "v", "dk", "dv") else queries
        views.append((count, t.view(*t.shape[:2], count, -1)))
    for batch in range(d["B"]):
        for h in range(queries):
            parts = [v[batch, :, h if count == queries else h * keys // queries] for count, v in views]
            # inputs in half precision are widened; f32 ones are results, and stay views
            yield *[(p.float() if p.dtype == torch.bfloat16 else p).squeeze(-1) for p in parts], mask


# the key of the random bits of kernels that drop something
DROP_KEY = (0x243F6A88, 0x85A308D3)


def drop_factors(d, b, n):
    """What the weights of the n-th of all query heads are multiplied by, [S,U] (src/ops/attentionDropout.ts); 1 where none is dropped."""
    if "drop" not in d:
        return 1
    batch, head = divmod(n, d["G"] * d["M"])
    rows, keys = d["S"] // 2, d["U"] // 4
    call = [torch.arange(rows, device="cuda")[:, None].expand(rows, keys), torch.arange(keys, device="cuda").expand(rows, keys)]
    c = [torch.full_like(call[0], int(b["sample"][batch])), call[0], torch.full_like(call[0], head), call[1]]
    words = torch.stack(philox(c, *DROP_KEY), -1)
    # row 8i + r, key call 4j + u, word 2k + h, half e: query 16i + 8h + r, key 16j + 8k + 2u + e
    bits = torch.stack([words & 0x7FFF, words >> 16 & 0x7FFF], -1).view(d["S"] // 16, 8, d["U"] // 16, 4, 2, 2, 2)
    bits = bits.permute(0, 5, 1, 2, 4, 3, 6).reshape(d["S"], d["U"])
    threshold = round(d["drop"] * 2**15)
    return (bits >= threshold).float() / (1 - threshold / 2**15)


def philox(c, key0, key1):
    """Philox 4x32-10 of four tensors of 32-bit words in i64 (src/ops/philox.ts)."""
    for _ in range(10):
        (x_high, x_low), (z_high, z_low) = wide_product(c[0], 0xD2511F53), wide_product(c[2], 0xCD9E8D57)
        c = [z_high ^ c[1] ^ key0, z_low, x_high ^ c[3] ^ key1, x_low]
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def wide_product(x, by):
    """The high and the low word of the product of 32-bit words, of which i64 holds no more than 63 bits."""
    low, high = (x & 0xFFFF) * by, (x >> 16) * by
    middle = (low >> 16) + high
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF


def normed(x, gain, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def angles(d):
    frequency = d["theta"] ** (-torch.arange(0, d["C"], 2, dtype=torch.float64, device="cuda") / d["C"])
    turn = torch.arange(d["S"], dtype=torch.float64, device="cuda").outer(frequency).repeat(1, 2).unsqueeze(1)
    return turn.cos().float(), turn.sin().float() * d["sign"]


def turned(x, cos, sin):
    """Pairs (c, c + C/2) turn, as transformers' rotate_half does it; [B,S,H,C]."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def chosen(x, k):
    """Ones at the k largest, of equal ones the first; zeros elsewhere."""
    at = x.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(x).scatter_(-1, at, 1.0)


def kept(p, k):
    values, at = p.topk(k, -1)
    return torch.zeros_like(p).scatter_(-1, at, values / values.sum(-1, keepdim=True))
