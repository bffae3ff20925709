"""Gathering the weights of a sharded model, and loading them into it, in two forked processes with gloo."""

import pytest
import tiny
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes

from vlv.training.sharding import assign, blank_copy, fill, gathered, unsharded


def check(rank, folder):
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    original, model = tiny.model(), tiny.model()
    pixel_values = tiny.pixels(2)[0]
    expected = original.encode(pixel_values)
    blank = blank_copy(model)
    assert all(weight.is_meta for weight in blank.parameters())
    fully_shard([model.caption_head.get_input_embeddings(), model.caption_head.get_output_embeddings()])
    for layer in model.caption_head.model.layers:
        fully_shard(layer)
    fully_shard(model)
    weights = list(model.parameters())
    assert all(isinstance(weight, DTensor) for weight in weights)

    # Other methods than forward. generate uses the tied embeddings during a forward pass.
    model(caption_embeds=expected, input_ids=torch.tensor([[1, 2], [3, 4]]))
    with torch.no_grad(), unsharded(model):
        torch.testing.assert_close(model.encode(pixel_values), expected)
        written = model.generate(caption_embeds=expected, max_new_tokens=3, do_sample=False)
        assert torch.equal(written, original.generate(caption_embeds=expected, max_new_tokens=3, do_sample=False))
    assert all(now is before for now, before in zip(model.parameters(), weights, strict=True))

    for (name, weight), whole in zip(model.named_parameters(), original.parameters(), strict=True):
        assert torch.equal(gathered(weight), whole), name
        assign(weight, 2 * whole)
        assert torch.equal(gathered(weight), 2 * whole), name

    fill(blank, model, keep=rank == 0)
    if rank == 0:
        for weight, whole in zip(blank.parameters(), original.parameters(), strict=True):
            assert torch.equal(weight, 2 * whole) and weight.requires_grad == whole.requires_grad
        assert blank.caption_head.lm_head.weight is blank.caption_head.model.embed_tokens.weight
        assert type(blank) is type(original)
    else:
        assert all(weight.is_meta for weight in blank.parameters())
    distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded_model_is_used_gathered_and_loaded(tmp_path):
    start_processes(check, (str(tmp_path),), nprocs=2, start_method="fork")
