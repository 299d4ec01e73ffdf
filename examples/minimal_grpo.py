"""GRPO for a Hugging Face model on one page: a tiny Qwen2, random at first, learns to sort digits.

    python examples/minimal_grpo.py                                   # half a minute on a CPU
    python examples/minimal_grpo.py --model Qwen/Qwen2.5-0.5B-Instruct --learning_rate 1e-6 --device cuda

What differs from DeepSeekMath (arXiv:2402.03300): there is no supervised start, the loss is the mean over all tokens of
the batch (DAPO), and the KL penalty is off unless --beta says otherwise.
"""

from __future__ import annotations

import argparse
import copy
import random
import re
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from grpo_kernels import GRPOLossConfig, group_advantages, linear_grpo_loss, linear_token_logprobs


def tiny_model() -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """A randomly initialised model of two layers, and a tokenizer with a token for every word of the task."""
    words = ["<pad>", "<eos>", "sort", ":", *"0123456789"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Qwen2Config(vocab_size=len(words), num_key_value_heads=4, tie_word_embeddings=True, **sizes, **ends)
    return Qwen2ForCausalLM(config), tokenizer


def reward(prompt: str, completion: str) -> float:
    """The share of the places that have the right digit; 1 for the sorted digits and nothing else."""
    expected, written = sorted(re.findall(r"\d", prompt)), re.findall(r"\d", completion)
    return sum(a == b for a, b in zip(expected, written, strict=False)) / max(len(expected), len(written))


def head_inputs(model: torch.nn.Module, ids: Tensor, attention_mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Hidden states [B, length + 1, H] before and at the last ``length`` tokens, and the weight of the head."""
    hidden = model.base_model(input_ids=ids, attention_mask=attention_mask).last_hidden_state
    return hidden[:, -length - 1 :], model.get_output_embeddings().weight


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Trains, and prints the mean reward of ten steps at a time; returns that of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model by folder or Hub name; by default a tiny one is made")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=200, help="generations")
    parser.add_argument("--epochs", type=int, default=2, help="optimizer steps on each generation")
    parser.add_argument("--prompts", type=int, default=32, help="prompts of a generation")
    parser.add_argument("--num_generations", type=int, default=8, help="completions of a prompt: the group")
    parser.add_argument("--digits", type=int, default=3)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--beta", type=float, default=0.0, help="weight of the KL penalty")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    if args.model is None:
        torch.set_num_threads(1)  # more threads only slow a model of this size down
        model, tokenizer = tiny_model()
    else:
        model, tokenizer = (kind.from_pretrained(args.model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    tokenizer.padding_side = "left"
    model.to(args.device).eval()  # without dropout, so that log-probabilities are those of the sampled tokens
    reference = copy.deepcopy(model).requires_grad_(False) if args.beta else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    config = GRPOLossConfig(loss_type="dapo", epsilon_low=0.2, epsilon_high=0.28, beta=args.beta)

    curve = []
    for step in range(args.steps):
        # Sample a group of completions for each prompt.
        prompts = [f"sort {' '.join(rng.choices('0123456789', k=args.digits))} :" for _ in range(args.prompts)]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False).to(args.device)
        group = {"num_return_sequences": args.num_generations, "max_new_tokens": args.digits + 1}
        ids = model.generate(**inputs, **group, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        completion_ids = ids[:, inputs.input_ids.shape[1] :]  # [B, T]
        is_end = completion_ids == tokenizer.eos_token_id
        completion_mask = (is_end.cumsum(1) - is_end.long()) == 0  # up to the end token, with it
        prompt_mask = inputs.attention_mask.repeat_interleave(args.num_generations, 0)
        attention_mask = torch.cat([prompt_mask, completion_mask], 1)

        # Reward them, and compare each with its group.
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        rewards = torch.tensor([reward(prompts[i // args.num_generations], text) for i, text in enumerate(texts)])
        advantages = group_advantages(rewards.to(args.device), args.num_generations)  # [B]

        # Train on them. The first pass is on-policy; its log-probabilities are the later ones' old policy.
        sequences, policies = (ids, attention_mask, completion_ids.shape[1]), {}
        if reference is not None:
            scores = linear_token_logprobs(*head_inputs(reference, *sequences), completion_ids)
            policies["ref_logprobs"] = scores.logprobs
        for _ in range(args.epochs):
            tokens = (completion_ids, advantages, completion_mask)
            output = linear_grpo_loss(*head_inputs(model, *sequences), *tokens, **policies, config=config)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            policies.setdefault("old_logprobs", output.logprobs.detach())
        curve.append(rewards.mean().item())
        if step % 10 == 9:
            mean = sum(curve[-10:]) / 10
            print(f"step {step + 1:4d}  reward {mean:.3f}  {'#' * round(40 * mean)}", flush=True)
    return curve


if __name__ == "__main__":
    main()
