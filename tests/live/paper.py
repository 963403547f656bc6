"""An independent reading of the paper, for the live tests: plain loops over plain files.

Nothing here comes from lib_klora; the equations are those of K-LoRA (CVPR 2025).
"""

import math
import re

import numpy as np
import torch
from make_loras import layers_of, parts_of, save
from safetensors.torch import load_file


def delta(tensors):
    """ΔW of one layer in fp32, from the tensors of its file by their kohya names."""
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    alpha = tensors.get("alpha")
    if "lora_up.weight" in tensors:
        up, down = tensors["lora_up.weight"].flatten(1), tensors["lora_down.weight"]
        rank = down.shape[0]
        if "lora_mid.weight" in tensors:
            middle = torch.einsum("abxy,bi->aixy", tensors["lora_mid.weight"], down.flatten(1))
            matrix = up @ middle.flatten(1)
        else:
            matrix = up @ down.flatten(1)
    elif "hada_w1_a" in tensors:
        rank = tensors["hada_w1_b"].shape[0]
        one = tensors["hada_w1_a"] @ tensors["hada_w1_b"]
        matrix = one * (tensors["hada_w2_a"] @ tensors["hada_w2_b"])
    elif "lokr_w1" in tensors:
        second, rank = tensors.get("lokr_w2"), None
        if second is None:
            second = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
            rank = tensors["lokr_w2_b"].shape[0]
        matrix = torch.kron(tensors["lokr_w1"], second.flatten(1))
    else:
        matrix, rank = tensors["diff"].flatten(1), None
    scale = alpha.item() / rank if alpha is not None and rank else 1.0
    return matrix * scale, rank


SHORT = {
    "_lora.down.weight": ".lora_down.weight",
    "_lora.up.weight": ".lora_up.weight",
    ".lora_A.weight": ".lora_down.weight",
    ".lora_B.weight": ".lora_up.weight",
}


def deltas(path, checkpoint):
    """{layer, or rows of it: (ΔW, rank)} of a file's layers in the UNet."""
    held = load_file(path)
    found = {}
    for part, keys in parts_of(path, layers_of(checkpoint)).items():
        if part.startswith("te"):
            continue
        tensors = {}
        for key in keys:
            for ending, kohya in SHORT.items():
                key_there = key.replace(ending, kohya) if key.endswith(ending) else None
                if key_there:
                    break
            name = key_there or key
            first = next(
                name.index(mark)
                for mark in (".lora_", ".hada_", ".lokr_", ".diff", ".alpha", ".dora_scale")
                if mark in name
            )
            tensors[name[first + 1 :]] = held[key]
        found[part] = delta(tensors)
    return found


def joined(found, whole):
    """The same, with the rows of every layer in `whole` one under another."""
    parts = {}
    for part, value in found.items():
        layer = part.partition("[")[0]
        parts.setdefault(layer if layer in whole else part, []).append(value)
    return {
        part: (
            torch.cat([matrix for matrix, _ in values]),
            max((rank for _, rank in values if rank), default=None),
        )
        for part, values in parts.items()
    }


def rows_of(tensors):
    """The rows that those of a plain LoRA's ΔW are made of, in fp64; None for anything else."""
    down = next(
        (x for name, x in tensors.items() if re.search(r"(down|lora_A)\.weight$", name)), None
    )
    if down is None or any("dora_scale" in name for name in tensors):
        return None
    down = down.flatten(1).double().numpy()
    middle = next((x for name, x in tensors.items() if "lora_mid" in name), None)
    if middle is not None:
        down = np.einsum("pqkl,qi->pikl", middle.double().numpy(), down)
    return down.reshape(len(down), -1)


def project(content, style, checkpoint, path, layers=lambda part: True):
    """Write the content's file as NP-LoRA (arXiv 2511.11051) has it beside the style, μ = 0.5: in
    every layer of the UNet that both have A_c ← A_c − (A_c·Q)·Qᵀ/3, Q by numpy's QR of A_sᵀ.

    Returns which part of the content's energy lies in the style's row space, over these layers.
    """
    found = layers_of(checkpoint)
    held, others = load_file(content), load_file(style)
    parts, parts_s = parts_of(content, found), parts_of(style, found)
    before = deltas(content, checkpoint)
    inside = total = 0.0
    for part, keys in parts.items():
        layer = part.partition("[")[0]
        if layers(part) and not part.startswith("te"):
            names = [x for x in (part, layer) if x in parts_s][:1]
            names = names or [x for x in parts_s if x.startswith(f"{part}[")]
            rows = [rows_of({key: others[key] for key in parts_s[x]}) for x in names]
            changing = [
                key for key in keys if re.search(r"(down\.weight|lora_A\.weight|\.diff)$", key)
            ]
            kept = any(re.search("dora_scale|lora_mid", key) for key in keys)
            if not changing or kept or not rows or any(x is None for x in rows):
                continue
            basis, _ = np.linalg.qr(np.concatenate(rows).T)
            old = held[changing[0]]
            factor = old.flatten(1).double().numpy()
            new = (factor - (factor @ basis) @ basis.T / 3).astype(np.float32)
            held[changing[0]] = torch.from_numpy(new).to(old.dtype).reshape(old.shape)
            delta_c = before[part][0].double().numpy()
            inside += ((delta_c @ basis) ** 2).sum()
            total += (delta_c**2).sum()
    save(path, held)
    return inside / total if total else None


class Choice:
    """Eq. 1-10 for two files on one checkpoint; the layers of `layers` only (a predicate)."""

    def __init__(self, content, style, checkpoint, layers=lambda part: True):
        c, s = deltas(content, checkpoint), deltas(style, checkpoint)
        c = {part: value for part, value in c.items() if layers(part)}
        s = {part: value for part, value in s.items() if layers(part)}
        whole = {part for part in (*c, *s) if "[" not in part}
        c, s = joined(c, whole), joined(s, whole)
        self.only = {part: "content" for part in c if part not in s}
        self.only |= {part: "style" for part in s if part not in c}
        self.top, self.total, self.energy = {}, {}, {}
        sums = [0.0, 0.0]
        for part in c.keys() & s.keys():
            rank_c, rank_s = c[part][1] or s[part][1], s[part][1] or c[part][1]
            k = min(rank_c * rank_s, c[part][0].numel())
            row, total, energy = [], [], []
            for side, (matrix, _) in enumerate((c[part], s[part])):
                values = sorted(matrix.abs().flatten().tolist(), reverse=True)
                row.append(math.fsum(values[:k]))
                total.append(math.fsum(values))
                energy.append(math.fsum(x * x for x in values))
                sums[side] += total[-1]
            self.top[part], self.total[part], self.energy[part] = row, total, energy
        self.gamma = sums[0] / sums[1] if self.top else 1.0

    def ratios(self):
        """S_c / (γ·S_s) of every layer, in order: content wins while S(t) is not above it."""
        return sorted(c / (self.gamma * s) for c, s in self.top.values())

    def at(self, scale):
        """{layer: role} while the scale is S(t) = `scale`."""
        chosen = {
            part: "content" if c >= self.gamma * scale * s else "style"
            for part, (c, s) in self.top.items()
        }
        return {**chosen, **self.only}

    def step(self, i, steps, t0=0.0, alpha=1.5, beta=0.5):
        """{layer: role} after `i` of `steps` steps of a pass that starts at t₀ (Eq. 7)."""
        t = t0 + (1 - t0) * min(i / steps, 1)
        return self.at(alpha * t + beta)

    def with_share(self, percent):
        """{layer: role} while the content LoRA has so many percent of the layers: those in which
        S_c/S_s is largest. Not the paper's."""
        layers = sorted(self.top, key=lambda part: part.replace(".", "_"))
        layers.sort(key=lambda part: -self.top[part][0] / self.top[part][1])
        count = math.floor(round(percent / 100 * len(layers), 9) + 0.5)
        roles = {part: "content" if i < count else "style" for i, part in enumerate(layers)}
        return {**roles, **self.only}

    def other(self, method, i, scale, seed=0):
        """{layer: role} after `i` steps, by a method that the paper compares with; `scale` is S(t).

        Role “both” is content and style added up; with NP-LoRA the content of `project`; with LoRA
        Composite one after the other, within the step.
        """
        layers = sorted(self.top, key=lambda part: part.replace(".", "_"))
        if method in ("Direct merge", "NP-LoRA", "LoRA Composite"):
            roles = ["both" for _ in layers]
        elif method == "LoRA Switch":
            roles = [("content", "style")[i % 2] for _ in layers]
        elif method == "Fixed selection":
            roles = ["content" if scale < 1 else "style" for _ in layers]
        elif method == "Random selection":
            dice = np.random.default_rng(seed)
            for _ in range(i + 1):  # the draws of earlier steps come first
                roles = ["content" if dice.random() < 1 / 3 else "style" for _ in layers]
        elif method == "Top-K without scale":
            return self.at(1)
        elif method == "Without γ":
            tops = [self.top[layer] for layer in layers]
            roles = ["content" if c >= scale * s else "style" for c, s in tops]
        elif method == "EST-LoRA":  # arXiv 2508.02165, with γ of the authors' K-LoRA program
            ratios = [c / s for c, s in self.total.values()]
            mean = sum(ratios) / len(ratios)
            ratios = [ratio for ratio in ratios if ratio < 3 * mean]
            gamma = sum(ratios) / len(ratios)
            found = [self.energy[layer] for layer in layers]
            roles = ["content" if c / gamma >= scale * s else "style" for c, s in found]
        return {**dict(zip(layers, roles, strict=True)), **self.only}
