# SPDX-License-Identifier: Apache-2.0
"""ULD and GOLD's hybrid at the ends of common spans, with gradients: written from their formulas in f64, and TRL's own ULDLoss.

The reference here shares nothing with TRL's code: it sums over spans that are found from sets of byte ends, and multiplies
conditional probabilities in logarithms. TRL's class is taken out of its source file (importing the module would need packages that
have nothing to do with it) and run on the same numbers, with merging by the chain rule ("bayesian").
"""
import ast
import importlib.metadata
import pathlib
import types

import oracle

SEED = 31
V_STUDENT, V_TEACHER, PADDED_STUDENT, PADDED_TEACHER = 57, 66, 60, 70
# case -> hybrid, objective, beta, temperature, share of the matched part (-1: TRL's own)
CASES = {
    "uld": (False, "jensen_shannon", 0.5, 1.0, -1.0),
    "uld.warm": (False, "jensen_shannon", 0.5, 2.0, -1.0),
    "gold": (True, "jensen_shannon", 0.5, 1.0, -1.0),
    "gold.warm": (True, "jensen_shannon", 0.3, 1.5, 0.7),
    "gold.forward": (True, "forward_kl", 0.5, 1.0, 0.6),
    "gold.reverse": (True, "reverse_kl", 0.5, 2.0, 0.6),
}
# Byte ends of the predicted tokens of one text of 30 bytes: single tokens, one against several, several against several.
STUDENT_ENDS = [2, 3, 7, 9, 12, 13, 15, 20, 21, 24, 26, 29, 30]
TEACHER_ENDS = [2, 5, 7, 8, 9, 10, 11, 13, 16, 18, 20, 22, 24, 30]


def trl_uld():
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
    source = pathlib.Path(str(importlib.metadata.distribution("trl").locate_file("trl/experimental/gold/gold_trainer.py")))
    tree = ast.parse(source.read_text())
    uld = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ULDLoss")
    trainer = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "GOLDTrainer")
    jsd = next(node for node in trainer.body if isinstance(node, ast.FunctionDef) and node.name == "generalized_jsd_loss")
    jsd.decorator_list = []
    space = {"torch": torch, "nn": nn, "F": F, "GOLDConfig": object}
    exec(compile(ast.Module(body=[uld, jsd], type_ignores=[]), str(source), "exec"), space)
    space["GOLDTrainer"] = types.SimpleNamespace(generalized_jsd_loss=space["generalized_jsd_loss"])
    return space["ULDLoss"]


def by_trl(case, student, teacher, student_ids, teacher_ids, pairs):
    """Sum over the spans. TRL masks neither padding nor the first token; labels do it, and slices of the logits."""
    import torch
    hybrid, objective, beta, t, share = CASES[case]
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(objective, beta)
    config = types.SimpleNamespace(uld_crossentropy_weight=0.0, uld_distillation_weight=1.0, uld_student_temperature=t, uld_teacher_temperature=t, uld_skip_student_eos=False, uld_skip_teacher_eos=False,
                                   use_extended_uld=True, uld_token_merge_strategy="bayesian", uld_use_hybrid_loss=hybrid, beta=beta, uld_hybrid_matched_weight=None if share < 0 else share,
                                   uld_hybrid_unmatched_weight=None if share < 0 else 1 - share)
    names = lambda prefix, size, column: types.SimpleNamespace(get_vocab=lambda: {**{f"{prefix}{i}": i for i in range(size) if i not in pairs[:, column].tolist()}, **{f"common{n}": int(i) for n, i in enumerate(pairs[:, column])}})
    loss = trl_uld()(config, names("s", V_STUDENT, 0), names("t", V_TEACHER, 1))
    begin = lambda ids: torch.cat([torch.tensor([[0]]), ids[None]], 1)
    mask = lambda ids: torch.cat([torch.tensor([[-100]]), ids[None]], 1)
    ends = lambda values: torch.tensor([[[0, 0]] + [[0, end] for end in values]])
    longer = lambda logits: torch.cat([logits, logits[-1:]])[None]
    value = loss(longer(student[:, :V_STUDENT]), longer(teacher[:, :V_TEACHER]), mask(student_ids), mask(teacher_ids), begin(student_ids), begin(teacher_ids), ends(STUDENT_ENDS), ends(TEACHER_ENDS))
    return value * len(set(STUDENT_ENDS) & set(TEACHER_ENDS)) * t * t


def spans():
    """(student tokens, teacher tokens) of each span."""
    common = sorted(set(STUDENT_ENDS) & set(TEACHER_ENDS))
    within = lambda ends, low, high: [i for i, end in enumerate(ends) if low < end <= high]
    return [(within(STUDENT_ENDS, low, high), within(TEACHER_ENDS, low, high)) for low, high in zip([0] + common, common)]


def by_formula(case, student, teacher, student_ids, teacher_ids, pairs):
    import torch
    hybrid, objective, beta, t, share = CASES[case]
    log_q, log_p = torch.log_softmax(student[:, :V_STUDENT] / t, -1), torch.log_softmax(teacher[:, :V_TEACHER] / t, -1)
    if share < 0:
        share = len(pairs) / V_TEACHER
    total = 0
    for ours, theirs in spans():
        last_q = log_q[ours[-1]] + sum(log_q[i, student_ids[i]] for i in ours[:-1])
        last_p = log_p[theirs[-1]] + sum(log_p[i, teacher_ids[i]] for i in theirs[:-1])
        alone_q, alone_p = torch.ones(V_STUDENT, dtype=torch.bool), torch.ones(V_TEACHER, dtype=torch.bool)
        matched = 0
        if hybrid:
            alone_q[pairs[:, 0]] = False
            alone_p[pairs[:, 1]] = False
            lq, lp = last_q[pairs[:, 0]], last_p[pairs[:, 1]]
            q, p = lq.exp(), lp.exp()
            if objective == "forward_kl":
                matched = (p * (lp - lq) - p + q).sum()
            elif objective == "reverse_kl":
                matched = (q * (lq - lp) - q + p).sum()
            else:
                m = beta * p + (1 - beta) * q
                matched = beta * (p * (lp - m.log())).sum() + (1 - beta) * (q * (lq - m.log())).sum()
        q, p = last_q[alone_q].exp(), last_p[alone_p].exp()
        size = max(len(q), len(p))
        padded = lambda x: torch.cat([x, torch.zeros(size - len(x), dtype=x.dtype)]).msort().flip(0)
        by_rank = (padded(q) - padded(p)).abs().sum()
        total = total + (share * matched + (1 - share) * by_rank if hybrid else by_rank)
    return total * t * t


def make(folder):
    import torch
    generator = torch.Generator().manual_seed(SEED)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    student, teacher = (random(len(STUDENT_ENDS), PADDED_STUDENT) * 1.5).float(), (random(len(TEACHER_ENDS), PADDED_TEACHER) * 1.5).float()
    student_ids = torch.randint(0, V_STUDENT, (len(STUDENT_ENDS),), generator=generator)
    teacher_ids = torch.randint(0, V_TEACHER, (len(TEACHER_ENDS),), generator=generator)
    pairs = torch.stack([torch.randperm(V_STUDENT, generator=generator)[:33], torch.randperm(V_TEACHER, generator=generator)[:33]], 1)
    pairs = pairs[pairs[:, 0].argsort()]
    tensors = {"student": student, "teacher": teacher, "student_ids": student_ids, "teacher_ids": teacher_ids, "pairs": pairs, "student_ends": torch.tensor(STUDENT_ENDS), "teacher_ends": torch.tensor(TEACHER_ENDS),
               "spans": torch.tensor([[ours[0], len(ours), theirs[0], len(theirs)] for ours, theirs in spans()])}
    for case, (hybrid, objective, _, t, share) in CASES.items():
        found = {}
        for way, compute in (("formula", by_formula), ("trl", by_trl)):
            leaf = student.double().requires_grad_()
            value = compute(case, leaf, teacher.double(), student_ids, teacher_ids, pairs)
            if way == "trl" and objective != "jensen_shannon":
                # TRL's Kullback-Leibler sums lack the terms for masses that do not sum to 1: added here, they must give the same.
                lq, lp = torch.log_softmax(leaf[:, :V_STUDENT] / t, -1), torch.log_softmax(teacher.double()[:, :V_TEACHER] / t, -1)
                for ours, theirs in spans():
                    q = (lq[ours[-1]] + sum(lq[i, student_ids[i]] for i in ours[:-1])).exp()[pairs[:, 0]].sum()
                    p = (lp[theirs[-1]] + sum(lp[i, teacher_ids[i]] for i in theirs[:-1])).exp()[pairs[:, 1]].sum()
                    value = value + share * t * t * ((q - p) if objective == "forward_kl" else (p - q))
            value.backward()
            found[way] = (value.detach().reshape(()), leaf.grad)
        # TRL takes no probability below 1e-8, and none here is.
        oracle.assert_close(found["formula"][0], found["trl"][0], 1e-9, 0, f"{case}: value by TRL")
        oracle.assert_close(found["formula"][1], found["trl"][1], 0, 1e-9 * float(found["trl"][1].abs().max()), f"{case}: gradient by TRL")
        tensors |= {f"{case}.value": found["trl"][0], f"{case}.gradient": found["trl"][1].float()}
    settings = {case: " ".join(map(str, setting)) for case, setting in CASES.items()}
    oracle.save_golden(folder / "unlike_tokens.safetensors", tensors, SEED, packages=("torch", "trl"), **settings)


if __name__ == "__main__":
    oracle.main(make)
