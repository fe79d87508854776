"""Speculative decoding with a trained draft: tokens a second of assisted generation beside the prediction.

    python recipes/gkd_draft.py && gkd export outputs/gkd_draft --output outputs/draft
    python benchmarks/draft.py --after outputs/draft        # glassllm and its half: a minute
    python benchmarks/draft.py --target my/model --before my/small --after outputs/draft --prompts 32

One row at a time, sampled at T = 1 and greedy, a constant number of drafted tokens. Plain and assisted decoding take
turns prompt by prompt, so that a busy machine slows both. What is predicted stands in docs/draft.md.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from gkd.demo import glass_student, glass_teacher, translation_sentences
from gkd.evaluation.harness import Evaluator
from gkd.evaluation.subject import Conditions, LocalSubject
from gkd.loss.registry import make_divergence
from gkd.loss.settings import LossSettings
from gkd.rollouts.base import SamplingSettings


def predicted(target: Any, draft: Any, tokenizer: Any, prompts: list[list[int]], asked: argparse.Namespace) -> Any:
    """What the evaluation says of the draft, by key."""
    sampling = SamplingSettings(max_new_tokens=asked.max_new_tokens, temperature=1.0, pad_id=0)
    harness = Evaluator(
        LocalSubject(target),
        tokenizer,
        prompts,
        [],
        sampling,
        LossSettings(make_divergence("jsd")),
        conditions=Conditions(seed=0, batch_size=16),
        draft_tokens=asked.tokens,
    )
    return harness.measure(LocalSubject(draft), "draft").values


def seconds(target: Any, prompt: list[int], how: GenerationConfig, **options: Any) -> tuple[float, int]:
    """Of one generation, and its number of tokens."""
    ids = torch.tensor([prompt], device=target.device)
    begun = time.perf_counter()
    out = target.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how, **options)
    return time.perf_counter() - begun, out.shape[1] - len(prompt)


def measured(
    target: Any, draft: Any, prompts: list[list[int]], asked: argparse.Namespace, sampled: bool
) -> list[float]:
    """Tokens a second without and with the draft."""
    draft.generation_config.num_assistant_tokens = asked.tokens
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {}
    target.generation_config.eos_token_id = draft.generation_config.eos_token_id = None  # equal lengths
    how = GenerationConfig(max_new_tokens=asked.max_new_tokens, do_sample=sampled, pad_token_id=0, **plain)
    torch.manual_seed(0)
    totals = [[0.0, 0], [0.0, 0]]
    for number, prompt in enumerate([prompts[0], *prompts]):
        for total, options in zip(totals, ({}, {"assistant_model": draft}), strict=True):
            spent, written = seconds(target, prompt, how, **options)
            if number:  # the first is to get warm
                total[0] += spent
                total[1] += written
    return [written / spent for spent, written in totals]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=None, help="glassllm without it")
    parser.add_argument("--before", default=None, help="the draft before training; half of glassllm without it")
    parser.add_argument("--after", default=None, help="the trained draft, a whole model (gkd export)")
    parser.add_argument("--tokens", type=int, default=4, help="drafted tokens a block")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    asked = parser.parse_args()
    name = asked.target or glass_teacher()
    target, tokenizer = AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    texts = [" ".join(sentence.split()[:4]) for sentence in translation_sentences()[-asked.prompts :]]
    prompts = [list(tokenizer(text)["input_ids"]) for text in texts]
    print("| draft | decoding | taken | predicted speed-up | measured | tokens/s alone | tokens/s assisted |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for label, folder in (("before", asked.before or glass_student()), ("after", asked.after)):
        if folder is None:
            continue
        draft = AutoModelForCausalLM.from_pretrained(folder).eval()
        found = predicted(target, draft, tokenizer, prompts, asked)
        for way, sampled in (("", True), ("_greedy", False)):
            alone, assisted = measured(target, draft, prompts, asked, sampled)
            taken, gain = found[f"acceptance{way}"].value, found[f"speedup{way}"].value
            cells = (label, way[1:] or "T = 1", f"{taken:.1%}", f"{gain:.2f}", f"{assisted / alone:.2f}")
            print(f"| {' | '.join(cells)} | {alone:.0f} | {assisted:.0f} |", flush=True)


if __name__ == "__main__":
    main()
