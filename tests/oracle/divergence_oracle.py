# SPDX-License-Identifier: Apache-2.0
"""Divergences of rows of logits and their gradients, by torch's autograd in f64, each written from its paper's formula.

The Jensen-Shannon cases (with beta 0 and 1 the two KLs) are computed by TRL's generalized_jsd_loss, which is taken out of TRL's
source file: importing its module would need packages that have nothing to do with it.
"""
import ast
import importlib.metadata
import pathlib

import oracle

SEED = 29
K, V = 7, 270
NAMES = ["forward_kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation", "adaptive_kl"]
# case -> objective, temperature, beta, skew, head_share
CASES = {name: (name, 1.0, 0.5, 0.1, 0.5) for name in NAMES}
CASES |= {f"{name}.cold": (name, 0.5, 0.3, 0.4, 0.8) for name in NAMES}
CASES |= {f"{name}.warm": (name, 2.0, 0.9, 0.7, 0.2) for name in ("forward_kl", "jensen_shannon", "skew_reverse_kl", "adaptive_kl")}
CASES |= {"jensen_shannon.0": ("jensen_shannon", 2.0, 0.0, 0.1, 0.5), "jensen_shannon.1": ("jensen_shannon", 2.0, 1.0, 0.1, 0.5)}
SLOTS = 6


def trl_jsd():
    """TRL's static method, compiled from its own source."""
    import torch
    import torch.nn.functional as F
    source = pathlib.Path(str(importlib.metadata.distribution("trl").locate_file("trl/experimental/gkd/gkd_trainer.py")))
    found = [node for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.FunctionDef) and node.name == "generalized_jsd_loss"]
    assert len(found) == 1
    found[0].decorator_list = []
    space = {"torch": torch, "F": F}
    exec(compile(ast.Module(body=found, type_ignores=[]), str(source), "exec"), space)
    return space["generalized_jsd_loss"]


def logits():
    import torch
    generator = torch.Generator().manual_seed(SEED)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    student, teacher = random(K, V) * 2, random(K, V) * 2
    student[1] = teacher[1]  # equal
    student[2], teacher[2] = torch.sign(student[2]) * 1e4 + random(V), torch.sign(teacher[2]) * 1e4 + random(V)  # extreme
    teacher[3], student[3] = teacher[3] * 8, student[3] / 8  # a sure teacher, an unsure student
    teacher[4], student[4] = teacher[4] / 8, student[4] * 8
    student[5] = teacher[5] + random(V) * 1e-2  # all but equal
    teacher[6, 7], student[6, 9] = 60, 70  # sure of different tokens
    return student.float(), teacher.float(), torch.rand(K, generator=generator) + 0.5, generator


def value(case, student, teacher, jsd):
    """[K], f64: the paper's formula, times t^2."""
    import torch
    objective, t, beta, skew, head_share = CASES[case]
    log_p, log_q = torch.log_softmax(teacher / t, -1), torch.log_softmax(student / t, -1)
    p, q = log_p.exp(), log_q.exp()
    kl = lambda x, log_x, log_y: torch.where(x > 0, x * (log_x - log_y), 0 * x).sum(-1)
    mixed = lambda w: torch.logaddexp(log_p + torch.log(torch.tensor(w)), log_q + torch.log1p(torch.tensor(-w)))  # w p + (1 - w) q
    if objective == "forward_kl":
        result = kl(p, log_p, log_q)
    elif objective == "reverse_kl":
        result = kl(q, log_q, log_p)
    elif objective == "jensen_shannon":
        result = torch.stack([jsd(student[i:i + 1], teacher[i:i + 1], beta=beta, temperature=t, reduction="sum") for i in range(K)])
    elif objective == "skew_kl":
        result = kl(p, log_p, mixed(skew))
    elif objective == "skew_reverse_kl":
        result = kl(q, log_q, mixed(1 - skew))
    elif objective == "total_variation":
        result = (p - q).abs().sum(-1) / 2
    else:
        ordered, index = p.sort(dim=-1, descending=True, stable=True)
        gap = (ordered - q.gather(-1, index)).abs().detach()
        tail = ordered.cumsum(-1) > head_share
        tail[:, 0] = False
        head, rest = gap.masked_fill(tail, 0).sum(-1), gap.masked_fill(~tail, 0).sum(-1)
        share = torch.where(head + rest > 0, head / (head + rest), torch.full_like(head, 0.5))
        result = share * kl(p, log_p, log_q) + (1 - share) * kl(q, log_q, log_p)
    return result * t * t


def make(folder):
    import torch
    student, teacher, weights, generator = logits()
    jsd = trl_jsd()
    tensors = {"student": student, "teacher": teacher, "weights": weights}
    for case in CASES:
        leaf = student.double().requires_grad_()
        rows = value(case, leaf, teacher.double(), jsd) * weights.double()
        rows.sum().backward()
        assert bool(rows.isfinite().all()) and bool(leaf.grad.isfinite().all()), case
        tensors |= {f"{case}.value": rows.detach(), f"{case}.gradient": leaf.grad.float()}

    # Sparse signals. top_k: the likeliest tokens in a shuffled order, one slot unused; sampled: counts of 12 draws.
    t = 2.0
    p = torch.softmax(teacher.double() / t, -1)
    ids = p.topk(SLOTS, -1).indices[:, torch.randperm(SLOTS, generator=generator)].int()
    ids[:, 2] = -1
    given = torch.where(ids >= 0, p.gather(-1, ids.clamp(min=0).long()), 0.0)
    tail = 1 - given.sum(-1)
    tensors |= {"top_k.ids": ids, "top_k.probabilities": given.float(), "top_k.tail": tail.float()}
    leaf = student.double().requires_grad_()
    log_q = torch.log_softmax(leaf / t, -1)
    taken = torch.stack([torch.isin(torch.arange(V), row[row >= 0].long()) for row in ids])
    log_rest = torch.logsumexp(log_q.masked_fill(taken, -torch.inf), -1)
    g, s = given.float().double(), tail.float().double()  # as f32 holds them
    log_g = g.clamp(min=1e-300).log()
    inside = torch.where((ids >= 0) & (g > 0), g * (log_g - log_q.gather(-1, ids.clamp(min=0).long())), 0 * g).sum(-1)
    rows = (inside + torch.where(s > 0, s * (s.clamp(min=1e-300).log() - log_rest), 0 * log_rest)) * t * t * weights.double()
    rows.sum().backward()
    tensors |= {"top_k.value": rows.detach(), "top_k.gradient": leaf.grad.float()}

    counts = torch.zeros(K, V, dtype=torch.float64)
    draws = torch.multinomial(p, 12, replacement=True, generator=generator)
    counts.scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64))
    share, ids = (counts / 12).topk(12, -1)
    ids = torch.where(share > 0, ids, -1).int()
    tensors |= {"sampled.ids": ids, "sampled.probabilities": share.float()}
    leaf = student.double().requires_grad_()
    rows = -(counts / 12 * torch.log_softmax(leaf / t, -1)).sum(-1) * t * t * weights.double()
    rows.sum().backward()
    tensors |= {"sampled.value": rows.detach(), "sampled.gradient": leaf.grad.float()}
    settings = {case: " ".join(map(str, setting)) for case, setting in CASES.items()}
    oracle.save_golden(folder / "divergence.safetensors", tensors, SEED, packages=("torch", "trl"), **settings)


if __name__ == "__main__":
    oracle.main(make)
