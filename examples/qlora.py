"""QLoRA in one file, to read: its numbers are the trainer's (tests/training/test_qlora_example.py).

python examples/qlora.py BASE DATA.jsonl OUT

BASE is a Hugging Face folder of a Llama or its like, DATA has a "prompt" and a "completion" a line, OUT is an adapter for peft.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

R, ALPHA, SEQUENCE, ROWS, RATE, CLIP, SEED = 16, 32, 512, 4, 2e-4, 1.0, 0
IGNORED = -100  # the label of a token that is not trained on

# ---- NF4: 16 codes at the quantiles of a normal distribution, and a magnitude for every block of 64 weights

BLOCK, NESTED = 64, 256
CODE = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


class NF4(NamedTuple):
    """A matrix in 4.127 bits a weight: two codes a byte, and the magnitudes in 8 bits with a factor for 256 of them."""

    packed: Tensor  # uint8 (n / 2,)
    absmax: Tensor  # uint8 (n / 64,)
    factors: Tensor  # float32 (n / 64 / 256,)
    offset: Tensor  # float32, the mean magnitude
    shape: torch.Size  # (out, in)


def quantize(weight: Tensor) -> NF4:
    """Replace each weight by the nearest code times its block's magnitude, and each magnitude by 8 bits."""
    blocks = weight.float().reshape(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38).unsqueeze(1))).clamp(-1, 1)
    codes = torch.bucketize(scaled, (CODE[:-1] + CODE[1:]) / 2).to(torch.uint8).view(-1, 2)
    offset = absmax.mean()
    padded = nn.functional.pad(absmax - offset, (0, -len(absmax) % NESTED)).view(-1, NESTED)
    factors = padded.abs().amax(dim=1)
    steps = (((padded * (1.0 / factors.clamp(min=1e-38).unsqueeze(1))).clamp(-1, 1) + 1) * (0.5 * 65535) + 0.5).int()
    indices = torch.where(factors.unsqueeze(1) > 0, nearest_of_65536()[steps], 0).view(-1)[: len(absmax)]
    return NF4((codes[:, 0] << 4) | codes[:, 1], indices, factors, offset, weight.shape)


def dequantize(matrix: NF4, dtype: torch.dtype) -> Tensor:
    """Return the matrix `(out, in)`; it lives as long as one product."""
    factors = matrix.factors.repeat_interleave(NESTED)[: len(matrix.absmax)]
    absmax = dynamic_8_bits()[matrix.absmax.int()] * factors + matrix.offset
    codes = torch.stack([matrix.packed >> 4, matrix.packed & 15], dim=1).view(-1, BLOCK)
    return (CODE[codes.int()] * absmax.unsqueeze(1)).to(dtype).view(matrix.shape)


def dynamic_8_bits() -> Tensor:
    """Return the 256 values of magnitudes: seven decades, each with twice as many as the one below (arXiv 2110.02861)."""
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1)
        means = (10 ** (exponent - 6) * ((bounds[:-1] + bounds[1:]) / 2)).tolist()
        values += means + [-mean for mean in means]
    return torch.tensor(sorted(values))


def nearest_of_65536() -> Tensor:
    """Return the index of the nearest of the 256 values for 65,536 steps over [-1, 1]; bitsandbytes looks it up like this."""
    steps = torch.arange(65536, dtype=torch.float64).mul(2 / 65535).sub(1).float()
    values = dynamic_8_bits()
    above = torch.bucketize(steps, values).clamp(1, 255)
    below = (steps - values[above - 1]).abs() <= (values[above] - steps).abs()
    return (above - below.long()).to(torch.uint8)


# ---- LoRA: y = x W^T + alpha / r (x A^T) B^T, W frozen in NF4


class LoRAFunction(torch.autograd.Function):
    """x `(tokens, in)`, A `(r, in)`, B `(out, r)`; nothing of W's size is kept between the forward and the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lora_A: Tensor, lora_B: Tensor, weight: NF4) -> Tensor:
        """Return y, `(tokens, out)`."""
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        y, xA = x @ dequantize(weight, x.dtype).t(), x @ A.t()
        ctx.save_for_backward(x, xA, A, B)
        ctx.weight = weight
        return y.addmm_(xA, B.t(), alpha=ALPHA / R)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of x, A and B."""
        x, xA, A, B = ctx.saved_tensors
        dyB = (dy @ B).mul_(ALPHA / R)
        dx = (dy @ dequantize(ctx.weight, dy.dtype)).addmm_(dyB, A)
        return dx, (dyB.t() @ x).float(), (dy.t() @ xA).float().mul_(ALPHA / R), None


class LoRALinear(nn.Module):
    """A frozen linear layer without a bias, and its factors in float32: A is random and B zero, so that it starts unchanged."""

    def __init__(self, linear: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        self.weight, (out_features, in_features) = quantize(linear.weight.detach()), linear.weight.shape
        bound = 1 / math.sqrt(in_features)
        self.lora_A = nn.Parameter(torch.empty(R, in_features).uniform_(-bound, bound, generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(out_features, R))

    def forward(self, x: Tensor) -> Tensor:
        """`(…, in)` to `(…, out)`."""
        return LoRAFunction.apply(x.reshape(-1, x.shape[-1]), self.lora_A, self.lora_B, self.weight).view(*x.shape[:-1], -1)


class RMSNormFunction(torch.autograd.Function):
    """y = w * x * r with r = 1 / sqrt(mean(x²) + eps), w frozen: the gradient of x is r g - r³ x mean(g x) with g = w * dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return y, computed in float32 as transformers does."""
        root = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, root, weight)
        return weight * (x.float() * root).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of x."""
        x, root, weight = ctx.saved_tensors
        g = dy.float() * weight.float()
        means = (g * x.float()).mean(-1, keepdim=True)
        return (g * root).addcmul(x.float(), means * root.pow(3), value=-1).to(x.dtype), None, None


def adapt(model: nn.Module) -> dict[str, LoRALinear]:
    """Freeze the model, and replace every linear layer but the output layer, and the arithmetic of every norm."""
    model.requires_grad_(False)
    for norm in model.modules():
        if hasattr(norm, "variance_epsilon"):
            norm.forward = lambda x, norm=norm: RMSNormFunction.apply(x, norm.weight, norm.variance_epsilon)
    generator, layers = torch.Generator().manual_seed(SEED), {}
    for path, linear in [*model.base_model.named_modules(prefix=model.base_model_prefix)]:
        if isinstance(linear, nn.Linear):
            parent, _, name = path.rpartition(".")
            layers[path] = LoRALinear(linear, generator)
            setattr(model.get_submodule(parent), name, layers[path])
    return layers


# ---- Data: documents share rows, and positions that begin again keep them apart


def read(path: Path, tokenizer: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return ids and labels of each document: the token to predict at each position, only of completions."""
    documents = []
    for line in map(json.loads, path.read_text().splitlines()):
        prompt = tokenizer(line["prompt"])["input_ids"]
        answer = [*tokenizer(line["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids, labels = np.array([*prompt, *answer]), np.array([IGNORED] * (len(prompt) - 1) + [*answer, IGNORED])
        labels[SEQUENCE - 1 :] = IGNORED  # where a document is cut
        documents.append((ids[:SEQUENCE], labels[:SEQUENCE]))
    return documents


def pack(documents: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids, labels and positions `(rows, SEQUENCE)`: the longest documents first, each in the fullest row with room."""
    rows: list[list[tuple[np.ndarray, np.ndarray]]] = []
    free: dict[int, int] = {}  # of each row, the one that changed last at the end
    for number in sorted(shuffled(len(documents)), key=lambda number: -len(documents[number][0])):
        size = len(documents[number][0])
        row = min((row for row in reversed(free) if free[row] >= size), key=free.__getitem__, default=len(rows))
        rows += [[]] if row == len(rows) else []
        rows[row].append(documents[number])
        free[row] = free.pop(row, SEQUENCE) - size
    ids, positions = np.zeros((len(rows), SEQUENCE), np.int64), np.zeros((len(rows), SEQUENCE), np.int64)
    labels = np.full((len(rows), SEQUENCE), IGNORED, np.int64)
    for row, row_documents in enumerate(rows):
        at = 0
        for document, targets in row_documents:
            end = at + len(document)
            ids[row, at:end], labels[row, at:end], positions[row, at:end] = document, targets, np.arange(end - at)
            at = end
        positions[row, at:] = np.arange(SEQUENCE - at)
    return ids, labels, positions


def shuffled(count: int) -> np.ndarray:
    """Return the numbers below `count` in the order of the seed."""
    return np.random.Generator(np.random.PCG64(SEED)).permutation(count)


# ---- Loss: the logits of 128 tokens at a time, whose gradient is computed while they exist


class CrossEntropy(torch.autograd.Function):
    """hidden `(tokens, d)`, head `(vocab, d)` frozen, labels `(tokens,)`; the losses, float32 `(tokens,)`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        """Return the losses, and keep their gradient toward `hidden`."""
        losses, ctx.gradient = torch.empty(len(hidden)), torch.empty_like(hidden)
        for start in range(0, len(hidden), 128):
            chunk = slice(start, start + 128)
            logits = (hidden[chunk] @ head.t()).float()
            logits -= logits.amax(dim=1, keepdim=True)
            sums = logits.exp().sum(dim=1, keepdim=True)
            losses[chunk] = (sums.log() - logits.gather(1, labels[chunk, None])).view(-1)
            change = logits.exp().div(sums).scatter_add(1, labels[chunk, None], torch.full_like(sums, -1.0))
            ctx.gradient[chunk] = change.to(head.dtype) @ head
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of `hidden`."""
        return ctx.gradient * upstream[:, None].to(ctx.gradient.dtype), None, None


# ---- Steps


def train(model: nn.Module, layers: dict[str, LoRALinear], rows: tuple[np.ndarray, ...]) -> Iterator[float]:
    """Yield the loss of each step of one epoch: AdamW, a clipped gradient, and a rate that falls along a cosine."""
    parameters = [layer.lora_A for layer in layers.values()] + [layer.lora_B for layer in layers.values()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, fused=True)
    order = shuffled(len(rows[0]))
    steps = -(len(order) // -ROWS)
    for step in range(steps):
        chosen = order[step * ROWS : (step + 1) * ROWS]
        ids, labels, positions = (torch.from_numpy(part[chosen]) for part in rows)
        width = -((int((labels != IGNORED).any(dim=0).nonzero().max()) + 1) // -16) * 16  # without padding
        ids, labels, positions = ids[:, :width], labels[:, :width], positions[:, :width]
        states = model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        trained = labels != IGNORED
        losses = CrossEntropy.apply(states[trained], model.get_output_embeddings().weight, labels[trained])
        loss = torch.zeros(labels.shape).masked_scatter(trained, losses).sum() / len(losses)  # in the trainer's order
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def save(layers: dict[str, LoRALinear], base: str, out: Path) -> None:
    """Write the folder that peft loads."""
    out.mkdir(parents=True)
    tensors = {f"{path}.{name}": value for path, layer in layers.items() for name, value in layer.named_parameters()}
    named = {f"base_model.model.{name}.weight": tensor.detach() for name, tensor in tensors.items()}
    save_file(named, out / "adapter_model.safetensors")
    targets = sorted({path.rpartition(".")[2] for path in layers})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": R, "lora_alpha": ALPHA, "target_modules": targets}
    (out / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}, indent=2))


def main(base: str, data: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> list[float]:
    """Train an adapter; returns the losses."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager").train()
    layers, losses = adapt(model), []
    for loss in train(model, layers, pack(read(data, tokenizer))):
        losses.append(loss)
        print(f"step {len(losses)}: loss {loss:.4f}")
    save(layers, base, out)
    return losses


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
