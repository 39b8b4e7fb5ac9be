"""What a stage cost: the tokens that went through the model."""

import torch

from scaleot_core.common.runtime import Runtime
from scaleot_core.training.cost import Meter

CPU = Runtime(torch.device("cpu"), torch.float32)


def test_tokens_through_the_model_are_counted(model):
    meter = Meter(CPU)
    meter.count(model)
    model(input_ids=torch.ones(2, 5, dtype=torch.long))
    model.base_model(input_ids=torch.ones(3, 4, dtype=torch.long))
    model(inputs_embeds=model.get_input_embeddings()(torch.ones(1, 7, dtype=torch.long)))
    assert meter.read()["tokens"] == 2 * 5 + 3 * 4 + 7
