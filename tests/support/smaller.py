"""What the tests of `gkd shrink` ask of a smaller model."""

import torch


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=torch.tensor([ids])).logits


def assert_writes_with_its_cache_as_without(model, prompt):
    """Greedily, four tokens; it ends where the model that it was made of ends."""
    written = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    ids = list(prompt)
    for _ in range(4):
        ids.append(int(logits(model, ids)[0, -1].argmax()))
    assert written[0].tolist() == ids
    assert model.generation_config.eos_token_id == 258
